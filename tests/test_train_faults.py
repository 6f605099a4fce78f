"""What a run does when something goes wrong: numbers that are not finite, full disks, unreadable images."""

import itertools
import json
import math
import os
import resource
import shutil
import signal
import stat
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from nextblock.atomic import WriteError
from nextblock.checkpoint import CheckpointError
from nextblock.data import ConcatSource, DataError, TooManyBadImages
from nextblock.models import NextBlockModel
from nextblock.train import CollapseError, NonFiniteError
from tiny_runs import (
    TOKENS,
    After,
    Quiet,
    Remember,
    assert_same_end,
    checkpoints,
    contents,
    crash_toy,
    metrics,
    run_toy,
    same,
    weights,
)
from toy import ToySource


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of seven steps in which nothing went wrong."""
    run = tmp_path_factory.mktemp("whole")
    run_toy(run)
    return run


def spoil(monkeypatch, steps, factor):
    """Multiply the losses of these steps (from 0)."""
    forward, calls = NextBlockModel.forward, itertools.count()

    def spoilt(self, images, *arguments):
        out = forward(self, images, *arguments)
        is_spoilt = self.training and next(calls) in steps
        return out._replace(block_loss=out.block_loss * factor) if is_spoilt else out

    monkeypatch.setattr(NextBlockModel, "forward", spoilt)


def test_steps_that_are_not_finite_change_no_weight_and_count_only_in_a_row(tmp_path, monkeypatch, caplog):
    spoil(monkeypatch, {0, 1, 3, 4, 6}, math.inf)
    seen, reporter = Remember(), Quiet()
    changes = {"train.nonfinite_limit": 3, "checkpoint.every": "1st"}
    assert run_toy(tmp_path, changes, monitors=[seen]).step == 7
    skipped = [line["skipped"] for line in metrics(tmp_path)]
    assert skipped == [1, 1, 0, 1, 1, 0, 1]
    assert [same(seen.weights[step + 1], seen.weights[step]) for step in range(7)] == list(map(bool, skipped))
    assert "step 3: loss" in caplog.text
    assert checkpoints(tmp_path)[-1] == "step_00000007", "a run that ends on one is complete"
    run_toy(tmp_path, changes, reporter=reporter)
    assert reporter.began_at == (7, 7)


def test_steps_that_are_not_finite_stop_the_run_and_it_resumes_from_its_last_checkpoint(
    whole, tmp_path, monkeypatch
):
    spoil(monkeypatch, range(3, 100), math.nan)
    seen = Remember()
    changes = {"train.nonfinite_limit": 3, "checkpoint.every": "1st", "checkpoint.keep": 2}
    message = r"3 steps in a row, .* step 5, .* toy-0\[.*step_00000003, is intact. Try a lower optim.lr"
    with pytest.raises(NonFiniteError, match=message):
        run_toy(tmp_path, changes, monitors=[seen])
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000003"]
    assert same(weights(tmp_path, 3), seen.weights[3])
    assert same(seen.weights[5], seen.weights[3])
    monkeypatch.undo()
    run_toy(tmp_path, changes)
    assert same(weights(tmp_path, 7), weights(whole, 7))


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    overflow = After(4, lambda model, _: next(model.parameters()).fill_(math.inf))
    message = r"weights are not finite after step 4. The last checkpoint, .*step_00000003, is intact"
    with pytest.raises(NonFiniteError, match=message):
        run_toy(tmp_path, {"checkpoint.every": "1st"}, monitors=[overflow])
    assert checkpoints(tmp_path) == ["step_00000002", "step_00000003"]


@pytest.fixture
def fill_disk():
    """`fill_disk(limit)`: no file can grow beyond so many bytes: how a full disk looks to a program."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The model file is smaller than the optimizer's, so with 100 kB it is the latter that finds no room.
@pytest.mark.parametrize("limit", [4_000, 100_000])
def test_a_full_disk_leaves_the_checkpoint_before_intact_and_the_run_can_go_on(
    whole, tmp_path, fill_disk, limit
):
    saving = {"checkpoint.every": "2st"}
    with pytest.raises(WriteError, match=r"File too large.*intact; make room"):
        run_toy(tmp_path, saving, monitors=[After(4, lambda *_: fill_disk(limit))])
    fill_disk(resource.RLIM_INFINITY)
    assert checkpoints(tmp_path) == ["step_00000002"]
    run_toy(tmp_path, saving)
    assert_same_end(tmp_path, whole)


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with checkpoints of steps 3 and 4."""
    run = tmp_path_factory.mktemp("saved")
    run_toy(run, {"checkpoint.every": "3st"}, stop=4)
    return run


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", cut_off),
        ("optimizer.safetensors", flip_a_bit),
        ("optimizer.safetensors", os.unlink),
        ("state.json", cut_off),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used_unless_all_are_damaged(
    whole, saved, tmp_path, caplog, name, damage
):
    run = shutil.copytree(saved, tmp_path / "run")
    damage(run / "checkpoints" / "step_00000004" / name)
    both, reporter = shutil.copytree(run, tmp_path / "both"), Quiet()
    run_toy(run, reporter=reporter)
    assert f"{name} " in caplog.text or f"{name}'" in caplog.text
    assert "resuming from the checkpoint before it; renamed to damaged_step_00000004" in caplog.text
    assert reporter.began_at == (3, 7)
    assert "damaged_step_00000004" in checkpoints(run)
    assert_same_end(run, whole)
    damage(both / "checkpoints" / "step_00000003" / name)
    with pytest.raises(CheckpointError, match=rf"all checkpoints in .* are damaged: .*{name}"):
        run_toy(both)


def test_a_checkpoint_and_the_loss_curve_are_on_the_disk_before_it_has_a_name(tmp_path, monkeypatch):
    events, fsync, move = [], os.fsync, Path.replace

    def note_fsync(descriptor):
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def note_move(self, to):
        events.append(to.name)
        return move(self, to)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_move)
    run_toy(tmp_path, {"checkpoint.every": "3st"})
    files = {"metrics.jsonl", "model.safetensors", "optimizer.safetensors", "state.json", "checksums.json"}
    named = [at for at, event in enumerate(events) if event.startswith("step_")]
    assert len(named) == 3
    for last, at in pairwise([-1, *named]):
        assert {*files, f".writing-{events[at]}"} <= set(events[last + 1 : at])
        assert events[at + 1] == "checkpoints", "the new name itself is flushed"


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        run_toy(tmp_path, {"train.duration": "1st"})
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "lock" not in path.name]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_unreadable_images_are_listed_once_with_their_source_and_their_limit_may_be_raised(tmp_path):
    source = ConcatSource([ToySource(35, bad=[1, 2]), ToySource(5, seed=1, bad=[3])])
    changes = {"data.train": ("toy-0", "toy-1"), "train.duration": "3ep", "data.max_bad_fraction": 0.05}
    with pytest.raises(TooManyBadImages, match="3 of 40 files cannot be read"):
        run_toy(tmp_path, changes, sources={"train": source})
    assert checkpoints(tmp_path), "the steps done are saved"
    result = run_toy(tmp_path, {**changes, "data.max_bad_fraction": 0.1}, sources={"train": source})
    assert (result.step, result.num_bad) == (15, 3)
    lines = [json.loads(line) for line in (tmp_path / "quarantine.jsonl").read_text().splitlines()]
    listed = sorted((line["sample"], line["name"], line["reason"]) for line in lines)
    names = {1: "toy-0: toy-0[1]", 2: "toy-0: toy-0[2]", 38: "toy-1: toy-1[3]"}
    assert listed == [(sample, name, "truncated") for sample, name in names.items()]
    assert metrics(tmp_path)[-1]["bad"] == 3


class Fatal(ToySource):
    """Reading an image kills the worker process."""

    def _read(self, index):
        assert get_worker_info() is not None
        os.kill(os.getpid(), signal.SIGKILL)
        return super()._read(index)


def test_a_killed_worker_ends_the_run(tmp_path):
    with pytest.raises(DataError, match=r"killed by SIGKILL while it read toy-0\[.*fewer --data.workers"):
        run_toy(tmp_path, {"data.workers": 1}, sources={"train": Fatal(40)})


def test_a_failed_call_leaves_the_process_as_it_found_it(tmp_path, monkeypatch):
    def process_settings():
        return (
            *(torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
            *("CUBLAS_WORKSPACE_CONFIG" in os.environ, torch.random.get_rng_state().tolist()),
            *(signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)),
        )

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before, within = process_settings(), []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", None)  # it would reseed GPUs
        look = After(1, lambda *_: within.append(process_settings()))
        crash_toy(tmp_path, 2, {"train.deterministic": True}, monitors=[look])
    assert within[0][:3] == (True, False, True)
    assert process_settings() == before


@pytest.mark.parametrize(("precision", "kept"), [("bf16", "bf16"), ("auto", "fp32")])
def test_an_emulated_precision_is_pointed_out(tmp_path, monkeypatch, caplog, precision, kept):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    reporter = Quiet()
    run_toy(tmp_path, {"train.duration": "1st", "train.precision": precision}, reporter=reporter)
    assert ("train.precision bf16 is emulated on this cpu" in caplog.text) == (kept == "bf16")
    assert f" · {kept} · " in reporter.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.precision": "fp16"}, "train.precision fp16 needs a GPU; on a CPU use bf16 or fp32"),
        ({"model.block_size": 4}, "the whole image is one block, so there is no next block"),
        ({"model.predictor": None}, "model.predictor is none"),
        ({"train.device": "mps"}, "device 'mps' is not available .* available: .*cpu"),
        ({"model.init": "nowhere"}, "nowhere does not exist"),
        ({"model.in_chans": 1, "data.channels": 3}, "data.channels is 3, model.in_chans is 1; give one"),
        ({**TOKENS, "model.vocab_size": 700}, "640 patches contain only 640 distinct ones, too few for 700"),
        ({"data.epoch_samples": 3}, "less than one batch"),
    ],
)
def test_an_impossible_run_is_refused_and_leaves_no_directory_and_the_old_run(
    saved, tmp_path, changes, message
):
    old = shutil.copytree(saved, tmp_path / "old")
    before = contents(old)
    for run, overwrite in ((tmp_path / "new", False), (old, True)):
        with pytest.raises((ValueError, CheckpointError), match=message):
            run_toy(run, changes, overwrite=overwrite)
    assert not (tmp_path / "new").exists()
    assert contents(old) == before


@torch.no_grad()
def make_constant(model, _):
    model.encoder.patch_embed.proj.weight.zero_()
    model.encoder.patch_embed.proj.bias.fill_(1)


PREFIX = {"model.prefix": True, "model.predictor": "mlp"}


@pytest.mark.parametrize(("changes", "limit"), [({}, 0.01), ({}, None), (PREFIX, 0.01)])
def test_a_run_whose_targets_become_alike_stops_unless_it_may_go_on(tmp_path, changes, limit):
    changes = {**changes, "model.target": "embedding", "optim.lr": 1e-5, "monitor.collapse": limit}
    message = r"step 4: .* collapsed.* Try a lower optim.lr, .*pixels"
    with pytest.raises(CollapseError, match=message) if limit else nullcontext():
        run_toy(tmp_path, changes, monitors=[After(3, make_constant)])
    values = [(line["target_variance"], line["target_rankme"]) for line in metrics(tmp_path)]
    assert len(values) == (4 if limit else 7)
    assert all(variance > 0.1 and rank > 1.5 for variance, rank in values[:3])
    assert all(variance < 0.01 and rank < 1.5 for variance, rank in values[3:])


def test_targets_that_are_not_finite_are_left_to_the_check_of_the_loss(tmp_path):
    broken = After(2, lambda model, _: model.encoder.patch_embed.proj.weight.data.fill_(math.nan))
    with pytest.raises(NonFiniteError):
        run_toy(tmp_path, {"model.target": "embedding"}, monitors=[broken])
    assert [line["target_variance"] is None for line in metrics(tmp_path)][:3] == [False, False, True]
