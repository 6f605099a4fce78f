"""What a run does and leaves behind: it learns, keeps records, draws, measures, starts from other weights."""

from __future__ import annotations

import itertools
import json
import logging
import re
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
    checkpoints,
    logged_steps,
    metrics,
    run_toy,
    same,
    settings,
    weights,
)
from toy import ToySource


def normalised(source, indices):
    pixels = torch.stack([source.read(index) for index in indices])
    return normalize(pixels, TINY.data.mean, TINY.data.std)


def test_it_overfits_eight_images_far_below_zero_and_copying_the_block_before(tmp_path):
    changes = {
        **{"data.flip": 0.0, "data.crop_scale": (1.0, 1.0), "data.crop_ratio": (1.0, 1.0)},
        **{"model.embed_dim": 64, "model.predictor_dim": 64, "model.block_mlp_dim": 128},
        **{"optim.lr": 3e-3, "optim.weight_decay": 0.0, "train.duration": "60ep", "monitor.log_every": "1ep"},
    }
    source = ToySource(8)
    run_toy(tmp_path, changes, sources={"train": source})
    baselines = json.loads((tmp_path / "baselines.json").read_text())
    first, *_, last = metrics(tmp_path)
    assert first["loss"] > 0.9 * baselines["zero"]
    assert last["loss"] < 0.5 * min(baselines.values())
    distances = []
    for image in normalised(source, range(8)):
        blocks = [image[:, row : row + 8, column : column + 8] for row in (0, 8) for column in (0, 8)]
        blocks = [(block - block.mean()) / block.std() for block in blocks]
        distances += [(b - a).square().mean().item() for a, b in pairwise(blocks)]
    assert baselines["copy_previous"] == pytest.approx(sum(distances) / len(distances), rel=1e-4)


SOURCES = {"train": ToySource(40), "val": ToySource(13, seed=1, bad=[4])}
RATES = {"optim.lr": 0.01, "optim.start_lr": 0.001, "optim.warmup": "3st"}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """All that is told of a run that was stopped after step 4 and resumed."""
    run, stopped, resumed = tmp_path_factory.mktemp("told"), Quiet(), Quiet()
    changes = {**RATES, "monitor.val_every": "3st", "monitor.tensorboard": True, "train.micro_batch_size": 3}
    run_toy(run, changes, sources=SOURCES, reporter=stopped, stop=4)
    baselines = (run / "baselines.json").stat().st_mtime_ns
    result = run_toy(run, changes, sources=SOURCES, reporter=resumed)
    return SimpleNamespace(run=run, stopped=stopped, resumed=resumed, result=result, baselines=baselines)


def test_a_line_of_metrics_tells_step_epoch_rate_loss_gradient_speed_and_holes(told):
    lines, val_lines = metrics(told.run), metrics(told.run, "val")
    assert logged_steps(told.run) == [1, 2, 3, 4, 5, 6, 7]
    assert logged_steps(told.run, "val") == [3, 6, 7]
    names = ["kind", "step", "epoch", "lr", "loss", "grad_norm", "skipped"]
    names += ["images_per_s", "data_wait", "bad", "memory_gb", "tflops"]
    assert all(list(line) == names for line in lines)
    assert all(list(line) == ["kind", "step", "val_loss", "val_bad"] for line in val_lines)
    assert [line["epoch"] for line in lines] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4])
    assert all(line["images_per_s"] > 0 and 0 <= line["data_wait"] <= 1 for line in lines)
    assert {line["bad"] for line in lines} == {0}
    rates = [line["lr"] for line in lines]
    assert rates[:4] == pytest.approx([0.001, 0.0055, 0.01, 0.01])
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_a_windows_loss_is_the_mean_of_its_steps(told, tmp_path):
    run_toy(tmp_path, {**RATES, "monitor.log_every": "3st", "train.micro_batch_size": 3})
    each = [line["loss"] for line in metrics(told.run)]
    windows = [line["loss"] for line in metrics(tmp_path)]
    assert logged_steps(tmp_path) == [3, 6, 7]
    assert windows == pytest.approx([sum(each[:3]) / 3, sum(each[3:6]) / 3, each[6]])


def test_validation_loss_is_that_of_the_model_over_all_validation_images(told):
    model = nextblock.load(told.run)
    assert isinstance(model, nextblock.NextBlockModel)
    with torch.no_grad():
        expected = model(normalised(SOURCES["val"], [i for i in range(13) if i != 4])).loss.item()
    assert metrics(told.run, "val")[-1]["val_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics(told.run, "val")[-1]["val_bad"] == 1


def test_environment_json_names_versions_device_command_and_first_step_of_every_start(told):
    starts = json.loads((told.run / "environment.json").read_text())
    assert [(start["step"], start["complete"]) for start in starts] == [(0, False), (4, True)]
    for start in starts:
        assert {"started", "host", "python", "platform", "git_commit", "command"} < set(start)
        assert start["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert start["packages"]["nextblock"] == nextblock.__version__
        assert start["device"].startswith("cpu")


def test_tensorboard_gets_the_same_numbers(told):
    events = EventAccumulator(str(told.run / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in points] == logged_steps(told.run)
    assert [value for _, value in points] == pytest.approx([line["loss"] for line in metrics(told.run)])


def test_the_screen_tells_size_of_a_checkpoint_place_of_resume_last_validation_and_baselines(told):
    size_mb = sum(path.stat().st_size for path in told.run.rglob("step_00000004/*")) / 1e6
    told_mb = re.search(r"a checkpoint of ([\d.]+) MB every 1000st", "\n".join(told.stopped.notes))
    assert told_mb is not None
    assert float(told_mb[1]) == pytest.approx(size_mb, abs=0.1)
    assert told.stopped.moves == [(step, share) for step in range(4) for share in (3 / 8, 6 / 8)]
    assert "resuming at step 4" in told.resumed.notes
    losses = [line["val_loss"] for line in metrics(told.run, "val")]
    assert [tick.latest for tick in told.stopped.ticks] == [{}] * 3 + [{"val_loss": losses[0]}]
    assert told.resumed.ticks[0].latest == {"val_loss": losses[0]}
    assert told.result.losses == {"loss": metrics(told.run)[-1]["loss"], "val_loss": losses[-1]}
    path = told.run / "baselines.json"
    assert path.stat().st_mtime_ns == told.baselines, "measured once a run"
    assert told.resumed.ticks[0].baselines == json.loads(path.read_text())


@pytest.mark.parametrize("zero", [0.0, 1000.0])
def test_a_run_that_stays_above_predicting_zero_warns_once_and_is_not_called_learned(
    tmp_path, monkeypatch, caplog, zero
):
    monkeypatch.setattr("nextblock.train.trainer.Trainer.reference_losses", lambda *_: {"zero": zero})
    result = run_toy(tmp_path, {"optim.warmup": "4st"})
    warned = [record.message for record in caplog.records if "nothing is learned so far" in record.message]
    assert [message[:7] for message in warned] == (["step 5:"] if zero == 0 else [])
    assert (result.warning is None) == (zero > 0)


@pytest.mark.parametrize(
    ("images", "duration", "epochs", "warning"),
    [
        (23, "2ep", [0.5, 1.0, 1.5, 2.0], ""),
        (5, "10sa", [1.0, 2.0], "5 images, fewer than the batch of 8: a batch is all of them"),
    ],
)
def test_the_last_partial_batch_is_dropped_but_not_the_only_one(
    tmp_path, caplog, images, duration, epochs, warning
):
    result = run_toy(tmp_path, {"train.duration": duration}, sources={"train": ToySource(images)})
    assert result.step == result.total_steps == len(epochs)
    assert [line["epoch"] for line in metrics(tmp_path)] == epochs
    assert ("fewer than the batch" in caplog.text) == bool(warning)
    assert warning in caplog.text


def test_durations_are_counted_in_steps_of_the_real_batch(tmp_path, caplog):
    changes = {"train.duration": "2ep", "optim.warmup": "25%", "optim.start_lr": 0.0}
    changes |= {"checkpoint.every": "1ep", "monitor.val_every": "0.4ep"}
    remember = Remember()
    remember.every = "8sa"
    run_toy(tmp_path, changes, sources=SOURCES, monitors=[remember])
    assert logged_steps(tmp_path, "val") == [2, 4, 6, 8, 10]
    assert list(remember.weights) == list(range(11))
    assert checkpoints(tmp_path) == ["step_00000005", "step_00000010"]
    assert metrics(tmp_path)[1]["lr"] == TINY.optim.lr, "warm-up is two of ten steps"
    assert "1 validation images cannot be read, such as toy-1[4]: truncated" in caplog.text


def test_a_checkpoint_every_so_many_minutes_goes_by_the_clock(tmp_path, monkeypatch):
    minutes = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: 60 * next(minutes), perf_counter=time.perf_counter)
    monkeypatch.setattr("nextblock.train.loop.time", clock)
    # The clock is read once a step, and once more at each save.
    run_toy(tmp_path, {"checkpoint.every": "3min", "checkpoint.keep": 9})
    assert checkpoints(tmp_path) == [f"step_{step:08d}" for step in (3, 6, 7)]


@pytest.mark.usefixtures("coarse_pictures")
def test_pictures_and_knn_come_before_the_first_step_at_their_cadence_and_at_the_end(tmp_path):
    changes = {"data.train": "digits:split=train", "data.val": "digits:split=test", "train.duration": "3st"}
    changes |= {"monitor.pictures": 1, "monitor.pictures_every": "2st", "monitor.val_every": "100st"}
    changes |= {"monitor.knn_every": "2st", "monitor.knn_samples": 50}
    nextblock.pretrain(settings(changes), out=tmp_path, reporter=Quiet())
    drawn = sorted(path.name for path in (tmp_path / "pictures").glob("[!.]*"))
    assert drawn == [f"step_{step:08d}.png" for step in (0, 2, 3)]
    for name, most in (("pictures/loss", 10), ("knn/top1", 1)):
        values = {line["step"]: line[name] for line in metrics(tmp_path, "monitor") if name in line}
        assert list(values) == [0, 2, 3]
        assert all(0 <= value <= most for value in values.values())


def test_a_run_starts_from_another_runs_weights_and_lists_them_but_not_again_when_it_resumes(
    tmp_path, caplog
):
    first, start = tmp_path / "first", Remember()
    run_toy(first)
    changes = {"model.init": str(first), "seed": 1}
    with caplog.at_level(logging.INFO):
        run_toy(tmp_path / "second", changes, monitors=[start], stop=3)
    assert same(start.weights[0], weights(first, 7))
    assert f"weights of {first}: {len(start.weights[0])} tensors loaded" in caplog.text
    assert "fresh" not in caplog.text
    first.rename(tmp_path / "elsewhere")
    caplog.clear()
    resumed = Remember()
    with caplog.at_level(logging.INFO):
        run_toy(tmp_path / "second", changes, monitors=[resumed])
    assert list(resumed.weights) == [4, 5, 6, 7]
    assert "weights of" not in caplog.text
