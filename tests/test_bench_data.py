"""The bench of images compares equals; and a loader faster than its model does not keep it waiting."""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from nextblock.bench.data import PHOTOS, SIZES, DataBench, plain_pipeline, write_photos
from nextblock.cli import main
from nextblock.config import DataConfig
from nextblock.data import TrainLoader, normalize, open_source
from nextblock.train.logging import StepOutcome
from nextblock.train.trainer import Trainer
from tiny_runs import metrics, run_toy
from toy import ToySource

SMALL = {"500x375": (40, 30), "2000x1500": (80, 60)}

# A machine with one core is warned of a worker.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def small_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextblock.bench.data.SIZES", SMALL)
    monkeypatch.setattr("nextblock.bench.data.WAITING_BATCHES", (64, 128))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch, small_photos: None) -> list[str]:
    """Jobs are done here, since starting a process takes longer than they do; the variants, in turn."""
    done = []

    def call(target: str, job: dict[str, Any]) -> Any:
        module, _, name = target.partition(":")
        done.append(job.get("variant", name))
        return getattr(importlib.import_module(module), name)(json.loads(json.dumps(job)))

    monkeypatch.setattr("nextblock.bench.measure.run_in_process", call)
    return done


# ------------------------------------------------------------------------------------------------ the bench


def test_the_photos_have_the_stated_sizes_and_differ(tmp_path):
    write_photos(tmp_path)
    for size, (width, height) in SIZES.items():
        files = sorted((tmp_path / size).iterdir())
        assert len({file.read_bytes() for file in files}) == PHOTOS
        with Image.open(files[0]) as photo:
            assert (photo.format, photo.size) == ("JPEG", (width, height))
        assert len(open_source(str(tmp_path / f"{size}.tar"), DataConfig(cache_dir=str(tmp_path)))) == PHOTOS


def test_plain_and_ours_make_the_same_of_a_picture(tmp_path, small_photos):
    write_photos(tmp_path)
    folder = tmp_path / "2000x1500"
    whole = DataConfig(crop_scale=(1.0, 1.0), crop_ratio=(4 / 3, 4 / 3), flip=0.0)
    plain = plain_pipeline(folder, 24, whole)()
    source = open_source(str(folder), whole)
    (batch,) = next(iter(TrainLoader(source, whole, image_size=24, seed=0, batch_size=PHOTOS))).micro_batches
    ours = normalize(batch.images, whole.mean, whole.std)[batch.samples.argsort()]
    assert ours.shape == plain.shape == (PHOTOS, 3, 24, 24)
    assert ours.dtype == plain.dtype == torch.float32
    # Pillow and torch round the resized bytes differently, by one or two of 255.
    assert (ours - plain).abs().max() < 3 / 255 / min(whole.std)


def test_rows_hold_the_budgets_first_and_then_every_decoder(capsys, in_this_process):
    assert main(["bench", "data", "--quick", "--json", "--image_size", "16", "--clock", "cpu"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert in_this_process == ["plain", "auto", "pillow", "fast", "measure_reading", "measure_waiting"]
    assert told["bench"] == "data"
    assert told["ratio"] == told["rows"][0]["ratio"] > 0
    assert [row["at_least"] for row in told["rows"][:2]] == [2.0, 2.4]
    assert {row["at_least"] for row in told["rows"][2:]} == {None}
    assert len(told["rows"]) == 2 + 2 * 2 * len(told["decoders"]) + 2 + 2
    assert [row["at_most"] for row in told["rows"][-2:]] == [5, 5]
    for row in told["rows"][:-2]:
        assert row["ratio"] == pytest.approx(row["ours"] / row["plain"])
    assert told["decoders"]["pillow"] == "pillow"
    assert told["threads"] == 1
    assert {len(laps) for name in told["decoders"] for laps in told["laps_s"][name].values()} == {3}
    exact = [
        row["ratio"]
        for row in told["rows"]
        if row["what"].startswith(("500x375, auto (", "500x375, pillow ("))
    ]
    assert told["ratio"] in exact


def test_decoders_that_are_not_installed_are_left_out(monkeypatch, in_this_process):
    monkeypatch.setattr("nextblock.bench.data.find_spec", lambda name: None if name != "PIL" else True)
    result = DataBench(quick=True, image_size=16).run()
    assert in_this_process == ["plain", "pillow", "fast", "measure_reading", "measure_waiting"]
    assert result.details["decoders"] == {"pillow": "pillow", "fast": "pillow-draft"}


def test_settings_that_cannot_be_measured_are_refused():
    with pytest.raises(ValueError, match="steps is 0; use at least 1"):
        DataBench(steps=0)


# ---------------------------------------------------------------------------------------------- data wait

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
