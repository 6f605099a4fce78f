"""What a run does and leaves behind: it learns, keeps records, draws, measures, starts from other weights."""

import itertools
import json
import logging
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import nextblock
from nextblock.checkpoint import CHECKSUMS_FILE, read_metadata, write_safetensors
from nextblock.data import ConcatSource
from nextblock.report import read_run, report_markdown
from nextblock.targets import KMeansTokenizer
from nextblock.train.trainer import sample_patches
from tiny_runs import (
    TINY,
    TINY_FLAGS,
    TOKENS,
    Quiet,
    Remember,
    blocks_of,
    call_cli,
    checkpoints,
    logged_steps,
    metrics,
    refused,
    run_toy,
    same,
    settings,
    weights,
    write_images,
)
from toy import ToySource

WHOLE_IMAGES = {"data.flip": 0.0, "data.crop_scale": (1.0, 1.0), "data.crop_ratio": (1.0, 1.0)}
CENTROIDS = "tokenizer.centroids"


def baselines_of(run):
    return json.loads((run / "baselines.json").read_text())


def test_it_overfits_eight_images_far_below_zero_and_copying_the_block_before(tmp_path):
    changes = {
        **{"model.embed_dim": 64, "model.predictor_dim": 64, "model.block_mlp_dim": 128},
        **{"optim.lr": 3e-3, "optim.weight_decay": 0.0, "train.duration": "60ep", "monitor.log_every": "1ep"},
    }
    source = ToySource(8)
    run_toy(tmp_path, {**WHOLE_IMAGES, **changes}, sources={"train": source})
    baselines, (first, *_, last) = baselines_of(tmp_path), metrics(tmp_path)
    assert first["loss"] > 0.9 * baselines["zero"]
    assert last["loss"] < 0.5 * min(baselines.values())
    copying = blocks_of(source, 8).diff(dim=1).square().mean().item()
    assert baselines["copy_previous"] == pytest.approx(copying, rel=1e-4)


def test_a_run_on_tokens_goes_below_guessing_evenly_and_by_frequency(tmp_path):
    source = ToySource(8)
    changes = {**TOKENS, **WHOLE_IMAGES, "optim.lr": 1e-2, "train.duration": "40st"}
    run_toy(tmp_path, changes, sources={"train": source, "val": source})
    baselines, (first, *_, last) = baselines_of(tmp_path), metrics(tmp_path)
    tokens = torch.cdist(blocks_of(source, 4), weights(tmp_path, 40)[CENTROIDS]).argmin(-1)
    shares = tokens.flatten().bincount() / tokens.numel()
    entropy = -torch.special.xlogy(shares, shares).sum().item()
    assert baselines == pytest.approx({"uniform": math.log(6), "frequency": entropy}, rel=1e-5)
    assert first["loss"] == pytest.approx(baselines["uniform"], rel=0.1)
    assert last["loss"] < baselines["frequency"]
    assert metrics(tmp_path, "val")[-1]["val_loss"] < baselines["uniform"]
    report = report_markdown(read_run(tmp_path))
    assert "predicting all tokens alike 1.7918, predicting tokens by their frequency" in report


SOURCES = {"train": ToySource(40), "val": ToySource(13, seed=1, bad=[4])}
RATES = {"optim.lr": 0.01, "optim.start_lr": 0.001, "optim.warmup": "3st", "train.micro_batch_size": 3}


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """All that is told of a run that was stopped after step 4 and resumed."""
    run, stopped, resumed = tmp_path_factory.mktemp("told"), Quiet(), Quiet()
    changes = {**RATES, "monitor.val_every": "3st", "monitor.tensorboard": True}
    run_toy(run, changes, sources=SOURCES, reporter=stopped, stop=4)
    measured = (run / "baselines.json").stat().st_mtime_ns
    result = run_toy(run, changes, sources=SOURCES, reporter=resumed)
    return SimpleNamespace(run=run, stopped=stopped, resumed=resumed, result=result, measured=measured)


def test_a_line_of_metrics_tells_step_epoch_rate_loss_gradient_speed_and_holes(told):
    lines, val_lines = metrics(told.run), metrics(told.run, "val")
    assert logged_steps(told.run) == [1, 2, 3, 4, 5, 6, 7]
    assert logged_steps(told.run, "val") == [3, 6, 7]
    names = ["kind", "step", "epoch", "lr", "loss", "grad_norm", "skipped"]
    names += ["images_per_s", "data_wait", "bad", "memory_gb", "tflops"]
    assert all(list(line) == names for line in lines)
    assert all(list(line) == ["kind", "step", "val_loss", "val_bad"] for line in val_lines)
    assert {line["val_bad"] for line in val_lines} == {1}
    assert [line["epoch"] for line in lines] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4])
    assert all(line["images_per_s"] > 0 <= line["data_wait"] <= 1 and line["bad"] == 0 for line in lines)
    rates = [line["lr"] for line in lines]
    assert rates[:4] == pytest.approx([0.001, 0.0055, 0.01, 0.01])
    assert rates[3] > rates[4] > rates[5] > rates[6] > 0
    events = EventAccumulator(str(told.run / "tensorboard")).Reload().Scalars("train/loss")
    losses = {line["step"]: line["loss"] for line in lines}
    assert {event.step: event.value for event in events} == pytest.approx(losses)


def test_a_windows_loss_is_the_mean_of_its_steps(told, tmp_path):
    run_toy(tmp_path, {**RATES, "monitor.log_every": "3st"})
    each = [line["loss"] for line in metrics(told.run)]
    windows = {line["step"]: line["loss"] for line in metrics(tmp_path)}
    assert windows == pytest.approx({3: sum(each[:3]) / 3, 6: sum(each[3:6]) / 3, 7: each[6]})


def test_environment_json_names_versions_device_command_and_first_step_of_every_start(told):
    starts = json.loads((told.run / "environment.json").read_text())
    assert [(start["step"], start["complete"]) for start in starts] == [(0, False), (4, True)]
    for start in starts:
        assert {"started", "host", "python", "platform", "git_commit", "command"} < set(start)
        assert start["packages"]["torch"] == torch.__version__.partition("+")[0]
        assert start["packages"]["nextblock"] == nextblock.__version__
        assert start["device"].startswith("cpu")


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
    assert (told.run / "baselines.json").stat().st_mtime_ns == told.measured, "once a run"
    assert told.resumed.ticks[0].baselines == baselines_of(told.run)


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
    ("images", "duration", "epochs"), [(23, "2ep", [0.5, 1.0, 1.5, 2.0]), (5, "10sa", [1.0, 2.0])]
)
def test_the_last_partial_batch_is_dropped_but_not_the_only_one(tmp_path, caplog, images, duration, epochs):
    result = run_toy(tmp_path, {"train.duration": duration}, sources={"train": ToySource(images)})
    assert result.step == result.total_steps == len(epochs)
    assert [line["epoch"] for line in metrics(tmp_path)] == epochs
    warning = "5 images, fewer than the batch of 8: a batch is all of them"
    assert (warning in caplog.text) == ("fewer than" in caplog.text) == (images == 5)


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


def test_a_run_starts_from_another_runs_weights_but_not_again_when_it_resumes(tmp_path, caplog):
    first, start, resumed = tmp_path / "first", Remember(), Remember()
    run_toy(first)
    changes = {"model.init": str(first), "seed": 1}
    with caplog.at_level(logging.INFO):
        run_toy(tmp_path / "second", changes, monitors=[start], stop=3)
    assert same(start.weights[0], weights(first, 7))
    assert f"weights of {first}: {len(start.weights[0])} tensors loaded" in caplog.text
    first.rename(tmp_path / "elsewhere")
    run_toy(tmp_path / "second", changes, monitors=[resumed])
    assert list(resumed.weights) == [4, 5, 6, 7]


def test_the_checkpoint_of_step_0_is_not_kept_for_good_and_a_run_from_the_weights_keeps_the_tokens(tmp_path):
    saving = {"checkpoint.every": "2st", "checkpoint.keep": 1, "checkpoint.keep_every": "4st"}
    run_toy(tmp_path / "first", {**TOKENS, **saving})
    assert checkpoints(tmp_path / "first") == ["step_00000004", "step_00000007"]
    changes = {**TOKENS, "model.init": str(tmp_path / "first"), "train.duration": "1st"}
    run_toy(tmp_path / "second", changes, sources={"train": ToySource(40, seed=3)})
    first, second = weights(tmp_path / "first", 7), weights(tmp_path / "second", 1)
    assert torch.equal(first[CENTROIDS], second[CENTROIDS])


def as_written_before(model: dict) -> dict:
    """The settings of a model as the release before `model.target` wrote them."""
    newer = "rope_rescale class_token qk_norm layer_scale mask_ratio target_positions target teacher"
    newer += " teacher_dim teacher_digest predict_visible"
    tokenizer = {"pixels": None, "tokens": "kmeans"}[model["target"]]
    older = {name: value for name, value in model.items() if name not in newer.split()}
    return {**older, "tokenizer": tokenizer, "token_px": None}


@pytest.mark.parametrize("changes", [{}, TOKENS], ids=["pixels", "tokens"])
def test_runs_of_the_release_before_load_and_resume(tmp_path, changes):
    run, whole = tmp_path / "run", tmp_path / "whole"
    run_toy(whole, changes)
    run_toy(run, changes, stop=3)
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"] = as_written_before(config["model"])
    del config["monitor"]["collapse"]
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    file = run / "checkpoints/step_00000003/model.safetensors"
    metadata, tensors = read_metadata(file), load_file(file)
    metadata["config"] = json.dumps(as_written_before(json.loads(metadata["config"])))
    write_safetensors(file, tensors, metadata)
    (file.parent / CHECKSUMS_FILE).unlink()
    assert nextblock.load(file).config == settings(changes).model
    run_toy(run, changes)
    assert same(weights(run, 7), weights(whole, 7))


def sample(source, changes=None, **limits):
    return sample_patches(KMeansTokenizer(6, 3, 4), source, settings({**TOKENS, **(changes or {})}), **limits)


def nearest(found, source):
    return torch.cdist(found.double(), blocks_of(source, 4).flatten(0, 1).double()).min(1)


def test_all_patches_of_a_small_source_are_in_the_sample_but_for_unreadable_images():
    distances, indices = nearest(sample(ToySource(9)), ToySource(9))
    assert distances.max() < 1e-4
    assert sorted(indices.tolist()) == list(range(9 * 16))
    assert len(sample(ToySource(9, bad=(2, 5)))) == 7 * 16
    with pytest.raises(ValueError, match="none of 3 images of 'toy-0' can be read"):
        sample(ToySource(3, bad=range(3)))


def test_the_sample_is_bounded_spread_and_a_function_of_the_seed_and_not_of_workers():
    source, limits = ToySource(200), {"max_images": 100, "max_patches": 400}
    first = sample(source, **limits)
    assert source.reads == 100
    found = nearest(first, source).indices
    assert len(found.unique()) == len(found) == 400
    assert len((found // 16).unique()) > 90, "images"
    assert torch.bincount(found % 16, minlength=16).min() > 10, "places in an image"
    torch.manual_seed(1)
    assert torch.equal(first, sample(source, {"data.workers": 1}, **limits))
    assert not torch.equal(first, sample(source, {"seed": 1}, **limits))


def test_every_line_of_metrics_tells_how_much_of_each_source_was_seen(tmp_path):
    mixture = {"train": ConcatSource([ToySource(30), ToySource(5, seed=1)])}
    # Of the 32 samples of an epoch 24 and 8; an epoch is four steps.
    changes = {"data.train": ("toy-0", "toy-1"), "data.weights": (0.75, 0.25), "train.duration": "3ep"}
    run_toy(tmp_path, changes, sources=mixture)
    lines = metrics(tmp_path)
    seen = [(line["seen/toy-0"], line["seen/toy-1"]) for line in lines]
    assert seen[3::4] == [(24, 8), (48, 16), (72, 24)]
    assert [sum(both) for both in seen] == list(range(8, 97, 8))
    assert [line["epoch"] for line in lines[3::4]] == [1, 2, 3]


def test_a_mixture_is_named_by_repeated_flags_or_a_list_and_resumed_by_the_same_command(capsys, tmp_path):
    run, first, second = (str(tmp_path / name) for name in ("run", "A", "B"))
    write_images(tmp_path / "A", 20)
    write_images(tmp_path / "B", 4)
    words = ["pretrain", *TINY_FLAGS, "--data.train", first, "--out", run]
    words += ["--data.weights", "0.75", "--data.train", second, "--data.weights=0.25"]
    for _ in range(2):
        assert call_cli(capsys, *words)[0] == 0
    message = refused(call_cli(capsys, *words, "--data.train", tmp_path / "C"))
    assert "data.train names 3 sources and data.weights 2" in message
    data = {"train": [first, second], "weights": [0.75, 0.25]}
    nextblock.pretrain(TINY, out=tmp_path / "list", data=data, train={"duration": "3st"}, reporter=Quiet())
    for name in ("run", "list"):
        last = metrics(tmp_path / name)[-1]
        assert (last[f"seen/{first}"], last[f"seen/{second}"]) == (18, 6)
