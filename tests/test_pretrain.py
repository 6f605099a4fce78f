"""What `nextblock.pretrain` makes of sources and settings before and around the loop."""

from __future__ import annotations

import logging
import signal

import pytest

import nextblock
from tiny_runs import TINY, Quiet, metrics, run_toy, settings, write_images


def write_classes(folder, names):
    for name in names:
        write_images(folder / name, 8)


def pretrain(tmp_path, reporter=None, **overrides):
    data = {"train": str(tmp_path / "train"), "val": str(tmp_path / "val")}
    return nextblock.pretrain(
        TINY, out=tmp_path / "run", reporter=reporter or Quiet(), data=data, **overrides
    )


def test_folders_that_are_no_common_classes_train_without_knn(tmp_path):
    write_classes(tmp_path / "train", ["2021", "2022"])
    write_classes(tmp_path / "val", ["2023", "2024"])
    result = pretrain(tmp_path, **{"monitor.knn_every": "1ep"})
    assert result.step == result.total_steps
    assert not any("knn/top1" in line for line in metrics(tmp_path / "run", "monitor"))


def test_folders_of_the_same_classes_are_measured_by_knn(tmp_path):
    write_classes(tmp_path / "train", ["cat", "dog"])
    write_classes(tmp_path / "val", ["cat", "dog"])
    pretrain(tmp_path, **{"monitor.knn_every": "1ep"})
    assert any("knn/top1" in line for line in metrics(tmp_path / "run", "monitor"))


def test_a_micro_batch_larger_than_the_batch_is_the_whole_batch(tmp_path):
    whole = run_toy(tmp_path / "whole")
    larger = run_toy(tmp_path / "larger", {"train.micro_batch_size": 64})
    assert (whole.step, metrics(tmp_path / "whole")[-1]["loss"]) == (
        larger.step,
        metrics(tmp_path / "larger")[-1]["loss"],
    )


def test_channels_that_no_source_has_are_refused_before_a_directory_is_made(tmp_path):
    grey = {"model.in_chans": 1, "data.mean": (0.5,), "data.std": (0.5,)}
    with pytest.raises(ValueError, match=r"in_chans is 1, but every source yields RGB; use 3"):
        run_toy(tmp_path / "run", grey)
    assert not (tmp_path / "run").exists()


def test_a_warm_up_as_long_as_the_run_is_pointed_out(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run_toy(tmp_path / "run", {"optim.warmup": "7st"})
    assert (
        "optim.warmup 7st is 7 steps, train.duration 7st only 7: the rate never reaches its peak"
        in caplog.text
    )


def test_a_run_stopped_before_its_first_step_claims_no_checkpoint(tmp_path):
    write_classes(tmp_path / "train", ["cat"])
    write_classes(tmp_path / "val", ["cat"])

    class Stopping(Quiet):
        def begin(self, step: int, total_steps: int) -> None:
            signal.raise_signal(signal.SIGINT)

    reporter = Stopping()
    result = pretrain(tmp_path, reporter)
    assert (result.step, result.stopped_by) == (0, "SIGINT")
    assert reporter.notes[-1] == "stopped by SIGINT before the first step: nothing to save yet"


def test_the_default_preset_gets_the_hint_about_another_batch_as_well():
    from nextblock.cli.pretrain import _hints
    from nextblock.presets import get_preset

    config = settings({"train.batch_size": 16, "optim.lr": get_preset("xtra-b16").config.optim.lr})
    assert config.preset is None
    assert any("batch 16 instead of 256" in hint for hint in _hints(config))


def test_a_validation_set_without_a_readable_image_has_no_loss(tmp_path):
    write_images(tmp_path / "train", 8)
    (tmp_path / "val").mkdir()
    for i in range(3):
        (tmp_path / "val" / f"{i}.png").write_bytes(b"")
    pretrain(tmp_path, **{"monitor.pictures_every": None})
    assert {line["val_loss"] for line in metrics(tmp_path / "run", "val")} == {None}
