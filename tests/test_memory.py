"""Freed memory is kept while a run lasts, if the C library can be asked to."""

import subprocess
import sys

import pytest
import torch

from nextblock.train import runtime
from nextblock.train.runtime import process_settings

USE_AGAIN = """
import resource, torch
from nextblock.train.runtime import process_settings
def faults():
    for _ in range(4):  # until the heap has the size it needs
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MB
        count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return count
print(faults())
with process_settings(torch.device("cpu")):
    print(faults())
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_freed_tensor_is_not_mapped_afresh_while_a_run_lasts():
    done = subprocess.run([sys.executable, "-c", USE_AGAIN], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert during < 100 < min(before, after)


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    monkeypatch.setattr(runtime.ctypes, "CDLL", None)
    with process_settings(torch.device("cpu")):
        pass
