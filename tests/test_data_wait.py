"""The share of a step that training reports as waiting for images."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nextblock.train.logging import StepOutcome
from nextblock.train.trainer import Trainer
from tiny_runs import metrics, run_toy
from toy import ToySource

# A machine with one core is warned of a worker.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

PAUSE_S, SLEEP_S, MODEL_S = 0.04, 0.5, 10.0
"""An image takes 0.04 s, so a batch 0.32 s; the model sleeps longer, and the clock takes that for 10 s."""


class SlowSource(ToySource):
    """A source in files, as it were, that takes its time."""

    in_memory = False

    def _read(self, index: int) -> torch.Tensor:
        time.sleep(PAUSE_S)
        return super()._read(index)


def data_wait(out: Path, workers: int) -> float:
    """The usual share of a step spent waiting for images, once the workers have started."""
    changes = {"data.workers": workers, "train.duration": "5st"}
    run_toy(out, changes, sources={"train": SlowSource(40)})
    return median(line["data_wait"] for line in metrics(out)[2:])


@pytest.fixture
def slow_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of ten seconds a step, for the loop's clock."""
    steps, train_step = [], Trainer.train_step

    def slow_step(*args: Any, **options: Any) -> StepOutcome:
        time.sleep(SLEEP_S)
        steps.append(args)
        return train_step(*args, **options)

    def now_s() -> float:
        return time.perf_counter() + len(steps) * (MODEL_S - SLEEP_S)

    clock = SimpleNamespace(perf_counter=now_s, monotonic=time.monotonic)
    monkeypatch.setattr("nextblock.train.loop.time", clock)
    monkeypatch.setattr(Trainer, "train_step", slow_step)


def test_a_model_slower_than_its_loader_waits_for_less_than_two_percent(tmp_path, slow_model):
    assert data_wait(tmp_path / "run", workers=1) < 0.02


def test_without_a_worker_that_reads_ahead_the_same_model_waits_for_more(tmp_path, slow_model):
    assert data_wait(tmp_path / "run", workers=0) > 0.02


def test_a_loader_slower_than_its_model_is_seen_to_keep_it_waiting(tmp_path):
    assert data_wait(tmp_path / "run", workers=1) > 0.5
