"""Freed memory is kept where the C library can be told to, and only there."""

import subprocess
import sys

import pytest

from nextblock.train import memory
from nextblock.train.memory import keep_freed_memory

USE_AGAIN = """
import resource, sys, torch
from nextblock.train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def touch():
    torch.ones(2**24)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):  # until the heap has the size it needs
    before = touch()
sys.stdout.write(str(touch() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc")
def test_a_freed_tensor_is_not_mapped_afresh():
    faults = {
        how: int(
            subprocess.run(
                [sys.executable, "-c", USE_AGAIN, how], capture_output=True, text=True, check=True
            ).stdout
        )
        for how in ("keep", "leave")
    }
    assert faults["keep"] < 100 < faults["leave"]


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert keep_freed_memory() is False
