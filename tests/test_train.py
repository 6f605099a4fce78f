"""What a run does and leaves behind: it learns, keeps records, draws, measures, starts from other weights."""

from __future__ import annotations

import itertools
import json
import logging
import re
import shutil
import signal
import time
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nextblock
from nextblock.data import normalize
from tiny_runs import (
    TINY,
    Quiet,
    Remember,
    SignalAt,
    checkpoints,
    metrics,
    run_toy,
    same,
    settings,
    weights,
)
from toy import ToySource

NO_CROPS = {"data.flip": 0.0, "data.crop_scale": (1.0, 1.0), "data.crop_ratio": (1.0, 1.0)}

# ------------------------------------------------------------------------------------------------- it learns


def test_it_overfits_eight_images(tmp_path):
    changes = {
        **NO_CROPS,
        "model.embed_dim": 64,
        "model.predictor_dim": 64,
        "model.block_mlp_dim": 128,
        "optim.lr": 3e-3,
        "optim.weight_decay": 0.0,
        "train.duration": "60ep",
        "monitor.log_every": "1ep",
    }
    run_toy(tmp_path / "run", changes, sources={"train": ToySource(8)})
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    first, *_, last = metrics(tmp_path / "run")
    assert first["loss"] > 0.9 * baselines["zero"]
    assert last["loss"] < 0.5 * min(baselines.values())


# ---------------------------------------------------------------------------------------------- its records


def test_the_copying_baseline_is_the_distance_of_each_block_to_the_one_before(tmp_path):
    source = ToySource(8)
    run_toy(tmp_path / "run", {**NO_CROPS, "train.duration": "1st"}, sources={"train": source})
    distances = []
    for index in range(8):
        image = normalize(source.read(index)[None], TINY.data.mean, TINY.data.std)[0]
        blocks = [image[:, row : row + 8, column : column + 8] for row in (0, 8) for column in (0, 8)]
        normalised = [(block - block.mean()) / block.std() for block in blocks]
        distances += [(b - a).square().mean().item() for a, b in pairwise(normalised)]
    baselines = json.loads((tmp_path / "run" / "baselines.json").read_text())
    assert baselines["copy_previous"] == pytest.approx(sum(distances) / len(distances), rel=1e-4)


def test_baselines_are_measured_once_a_run(tmp_path):
    path = tmp_path / "run" / "baselines.json"
    run_toy(tmp_path / "run", monitors=[SignalAt(3, signal.SIGINT)])
    before = path.read_bytes(), path.stat().st_mtime_ns
    reporter = Quiet()
    run_toy(tmp_path / "run", reporter=reporter)
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert reporter.ticks[0].baselines == json.loads(before[0])


def test_a_line_of_metrics_tells_step_epoch_rate_loss_gradient_speed_and_holes(tmp_path):
    sources = {"train": ToySource(40), "val": ToySource(12, seed=1)}
    run_toy(tmp_path / "run", {"monitor.log_every": "2st", "monitor.val_every": "5st"}, sources=sources)
    train_lines, val_lines = metrics(tmp_path / "run"), metrics(tmp_path / "run", "val")
    assert [line["step"] for line in train_lines] == [2, 4, 6, 7]
    assert [line["step"] for line in val_lines] == [5, 7]
    names = ["kind", "step", "epoch", "lr", "loss", "grad_norm", "skipped"]
    names += ["images_per_s", "data_wait", "bad"]
    assert all(list(line) == names for line in train_lines)
    assert all(list(line) == ["kind", "step", "val_loss", "val_bad"] for line in val_lines)
    assert [line["epoch"] for line in train_lines] == pytest.approx([0.4, 0.8, 1.2, 1.4])
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait"] <= 1 for line in train_lines)
    assert [line["bad"] for line in train_lines] == [0, 0, 0, 0]


def test_a_windows_loss_is_the_mean_of_its_steps(tmp_path):
    run_toy(tmp_path / "each")
    run_toy(tmp_path / "windows", {"monitor.log_every": "3st"})
    each = [line["loss"] for line in metrics(tmp_path / "each")]
    windows = [line["loss"] for line in metrics(tmp_path / "windows")]
    assert windows == pytest.approx([sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]])


def test_the_learning_rate_is_the_schedules(tmp_path):
    run_toy(tmp_path / "run", {"optim.lr": 0.01, "optim.start_lr": 0.001, "optim.warmup": "3st"})
    rates = [line["lr"] for line in metrics(tmp_path / "run")]
    assert rates[:4] == pytest.approx([0.001, 0.0055, 0.01, 0.01])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_environment_json_names_versions_device_and_command(tmp_path):
    run_toy(tmp_path / "run", {"train.duration": "1st"})
    (environment,) = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"started", "host", "python", "platform", "git_commit", "command"} < set(environment)
    assert environment["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert environment["packages"]["nextblock"] == nextblock.__version__
    assert environment["device"].startswith("cpu")


def test_tensorboard_gets_the_same_numbers(tmp_path):
    run_toy(tmp_path / "run", {"monitor.tensorboard": True}, monitors=[SignalAt(3, signal.SIGINT)])
    run_toy(tmp_path / "run", {"monitor.tensorboard": True})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    lines = metrics(tmp_path / "run")
    assert [step for step, _ in points] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [value for _, value in points] == pytest.approx([line["loss"] for line in lines])


def test_validation_loss_is_that_of_the_model_over_all_validation_images(tmp_path, caplog):
    sources = {"train": ToySource(40), "val": ToySource(13, seed=1, bad=[4])}
    run_toy(tmp_path / "run", sources=sources)
    model = nextblock.load(tmp_path / "run")
    assert isinstance(model, nextblock.NextBlockModel)
    pixels = torch.stack([sources["val"].read(index) for index in range(13) if index != 4])
    with torch.no_grad():
        expected = model(normalize(pixels, TINY.data.mean, TINY.data.std)).loss.item()
    line = metrics(tmp_path / "run", "val")[-1]
    assert line["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert line["val_bad"] == 1
    assert "1 validation images cannot be read, such as toy-1[4]: truncated" in caplog.text


# ------------------------------------------------------------------------------------------------- durations


def test_the_last_partial_batch_is_dropped(tmp_path):
    result = run_toy(tmp_path / "run", {"train.duration": "2ep"}, sources={"train": ToySource(23)})
    assert result.step == result.total_steps == 4
    assert [line["epoch"] for line in metrics(tmp_path / "run")] == [0.5, 1.0, 1.5, 2.0]


def test_a_source_smaller_than_a_batch_is_the_batch_with_a_warning(tmp_path, caplog):
    reporter = Quiet()
    changes = {"train.duration": "10sa"}
    result = run_toy(tmp_path / "run", changes, sources={"train": ToySource(5)}, reporter=reporter)
    assert result.total_steps == 2
    assert metrics(tmp_path / "run")[-1]["epoch"] == 2.0
    assert "5 images, fewer than the batch of 8: a batch is all of them" in caplog.text


def test_durations_are_counted_in_steps_of_the_real_batch(tmp_path):
    changes = {
        "train.duration": "2ep",
        "optim.warmup": "25%",
        "optim.start_lr": 0.0,
        "checkpoint.every": "1ep",
    }
    sources = {"train": ToySource(40), "val": ToySource(8, seed=1)}
    remember = Remember()
    remember.every = "8sa"
    run_toy(tmp_path / "run", {**changes, "monitor.val_every": "0.4ep"}, sources=sources, monitors=[remember])
    assert [line["step"] for line in metrics(tmp_path / "run", "val")] == [2, 4, 6, 8, 10]
    assert list(remember.weights) == list(range(11))
    assert checkpoints(tmp_path / "run") == ["step_00000005", "step_00000010"]
    assert metrics(tmp_path / "run")[1]["lr"] == TINY.optim.lr, "warm-up is two of ten steps"


def test_a_checkpoint_every_so_many_minutes_goes_by_the_clock(tmp_path, monkeypatch):
    minutes = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 60 * next(minutes), perf_counter=time.perf_counter)
    monkeypatch.setattr("nextblock.train.loop.time", clock)
    # The clock is read once a step, and once more at each save.
    run_toy(tmp_path / "run", {"checkpoint.every": "3min", "checkpoint.keep": 9})
    assert checkpoints(tmp_path / "run") == [f"step_{step:08d}" for step in (3, 6, 7)]


# ------------------------------------------------------------------------------------------------- the screen


def test_before_the_first_step_the_screen_tells_the_size_of_a_checkpoint_and_where_it_resumes(tmp_path):
    reporter = Quiet()
    run_toy(tmp_path / "run", reporter=reporter, monitors=[SignalAt(3, signal.SIGINT)])
    size_mb = sum(path.stat().st_size for path in (tmp_path / "run").rglob("step_*/*")) / 1e6
    told_mb = re.search(r"a checkpoint of ([\d.]+) MB every 1000st", "\n".join(reporter.notes))
    assert told_mb is not None
    assert float(told_mb[1]) == pytest.approx(size_mb, abs=0.1)
    run_toy(tmp_path / "run", reporter=reporter)
    assert "resuming at step 3" in reporter.notes


def test_progress_moves_within_a_step(tmp_path):
    moves = []

    class Moving(Quiet):
        def within(self, step: int, share: float) -> None:
            moves.append((step, share))

    changes = {"train.micro_batch_size": 3, "train.duration": "2st"}
    run_toy(tmp_path / "run", changes, reporter=Moving())
    assert moves == [(0, 3 / 8), (0, 6 / 8), (1, 3 / 8), (1, 6 / 8)]


def test_the_screen_keeps_the_last_validation_loss_also_after_a_resume(tmp_path):
    sources = {"train": ToySource(40), "val": ToySource(12, seed=1)}
    stopped, resumed = Quiet(), Quiet()
    stop = [SignalAt(4, signal.SIGINT)]
    changes = {"monitor.val_every": "3st"}
    run_toy(tmp_path / "run", changes, sources=sources, reporter=stopped, monitors=stop)
    result = run_toy(tmp_path / "run", changes, sources=sources, reporter=resumed)
    losses = [line["val_loss"] for line in metrics(tmp_path / "run", "val")]
    assert [tick.latest for tick in stopped.ticks] == [{}] * 3 + [{"val_loss": losses[0]}]
    assert resumed.ticks[0].latest == {"val_loss": losses[0]}
    assert result.losses == {"loss": metrics(tmp_path / "run")[-1]["loss"], "val_loss": losses[-1]}


@pytest.mark.parametrize("zero", [0.0, 1000.0])
def test_a_run_that_stays_above_predicting_zero_warns_once_and_is_not_called_learned(
    tmp_path, monkeypatch, caplog, zero
):
    monkeypatch.setattr("nextblock.train.trainer.Trainer.reference_losses", lambda *_: {"zero": zero})
    result = run_toy(tmp_path / "run", {"optim.warmup": "4st"})
    warned = [record.message for record in caplog.records if "nothing is learned so far" in record.message]
    assert [message[:7] for message in warned] == (["step 5:"] if zero == 0 else [])
    assert (result.warning is None) == (zero > 0)


# -------------------------------------------------------------------------------------------------- monitors


DIGITS = {
    "data.train": "digits:split=train",
    "data.val": "digits:split=test",
    "train.duration": "3st",
    "monitor.pictures": 1,
    "monitor.pictures_every": "2st",
    "monitor.knn_every": "2st",
    "monitor.knn_samples": 50,
    "monitor.val_every": "100st",
}


def test_pictures_and_knn_come_before_the_first_step_at_their_cadence_and_at_the_end(tmp_path):
    nextblock.pretrain(settings(DIGITS), out=tmp_path / "run", reporter=Quiet())
    drawn = sorted(path.name for path in (tmp_path / "run" / "pictures").glob("[!.]*"))
    assert drawn == [f"step_{step:08d}.png" for step in (0, 2, 3)]
    lines = metrics(tmp_path / "run", "monitor")
    for name, most in (("pictures/loss", 10), ("knn/top1", 1)):
        values = {line["step"]: line[name] for line in lines if name in line}
        assert list(values) == [0, 2, 3]
        assert all(0 <= value <= most for value in values.values())


def test_without_validation_images_there_is_no_knn(tmp_path):
    changes = {**DIGITS, "data.val": None, "train.duration": "1st", "monitor.pictures_every": None}
    nextblock.pretrain(settings(changes), out=tmp_path / "run", reporter=Quiet())
    assert metrics(tmp_path / "run", "monitor") == []


# ------------------------------------------------------------------------------------------------ model.init


def test_a_run_starts_from_another_runs_weights_and_lists_them(tmp_path, caplog):
    run_toy(tmp_path / "first")
    start = Remember()
    with caplog.at_level(logging.INFO):
        run_toy(tmp_path / "second", {"model.init": str(tmp_path / "first"), "seed": 1}, monitors=[start])
    assert same(start.weights[0], weights(tmp_path / "first", 7))
    assert f"weights of {tmp_path / 'first'}: {len(start.weights[0])} tensors loaded" in caplog.text
    assert "fresh" not in caplog.text


def test_positions_are_resampled_to_another_image_size_and_named_in_the_log(tmp_path, caplog):
    run_toy(tmp_path / "first")
    start = Remember()
    changes = {"model.init": str(tmp_path / "first"), "model.image_size": 24, "data.val_resize_px": 24}
    with caplog.at_level(logging.INFO):
        run_toy(tmp_path / "second", changes, monitors=[start])
    assert "resampled: encoder.pos_embed, predictor.pos_embed" in caplog.text
    first, grown = weights(tmp_path / "first", 7), start.weights[0]
    assert first["encoder.pos_embed"].shape == (1, 16, 16)
    assert grown["encoder.pos_embed"].shape == (1, 36, 16)
    others = [name for name in first if "pos_embed" not in name]
    assert all(torch.equal(first[name], grown[name]) for name in others)


def test_a_resumed_run_does_not_start_from_other_weights_again(tmp_path, caplog):
    run_toy(tmp_path / "first")
    changes = {"model.init": str(tmp_path / "first")}
    run_toy(tmp_path / "whole", changes)
    run_toy(tmp_path / "second", changes, monitors=[SignalAt(3, signal.SIGINT)])
    shutil.rmtree(tmp_path / "first")
    caplog.clear()
    run_toy(tmp_path / "second", changes)
    assert "weights of" not in caplog.text
    assert same(weights(tmp_path / "second", 7), weights(tmp_path / "whole", 7))
