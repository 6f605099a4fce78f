"""Freed memory is kept while a run lasts, if the C library can be asked to."""

import sys

import pytest
import torch

from nextblock.train import runtime
from nextblock.train.runtime import process_settings


def faults() -> int:
    """How many pages a tensor of 64 MB makes the kernel map, once the heap has the size it needs."""
    import resource

    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)
        count = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_freed_tensor_is_not_mapped_afresh_while_a_run_lasts():
    before = faults()
    with process_settings(torch.device("cpu")):
        during = faults()
    assert during < 100 < min(before, faults())


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "darwin")
    monkeypatch.setattr(runtime.ctypes, "CDLL", None)
    with process_settings(torch.device("cpu")):
        pass
