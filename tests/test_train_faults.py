"""What a run does when something goes wrong: numbers that are not finite, full disks, unreadable images."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.utils.data import get_worker_info

from nextblock.atomic import WriteError
from nextblock.checkpoint import CheckpointError
from nextblock.data import DataError, TooManyBadImages, VisitOrder
from nextblock.models import NextBlockModel
from nextblock.train import NonFiniteError, RunDirError
from tiny_runs import (
    CrashAt,
    CrashError,
    Quiet,
    Remember,
    SignalAt,
    assert_same_end,
    checkpoints,
    metrics,
    run_toy,
    same,
    settings,
    weights,
)
from toy import ToySource


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of seven steps in which nothing went wrong."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_toy(run)
    return run


# ----------------------------------------------------------------------------------------- numbers not finite


@pytest.fixture
def spoil(monkeypatch):
    """`spoil({2, 3}, factor=nan)`: multiply the losses of these steps (from 0), or add to them."""

    def apply(steps, *, factor=1.0, summand=0.0):
        forward, calls = NextBlockModel.forward, [0]

        def spoilt(self, images, *arguments):
            out = forward(self, images, *arguments)
            if not self.training:
                return out
            calls[0] += 1
            if calls[0] - 1 not in steps:
                return out
            return out._replace(block_loss=out.block_loss * factor + summand)

        monkeypatch.setattr(NextBlockModel, "forward", spoilt)

    return apply


@pytest.mark.parametrize("how", [{"factor": math.inf}, {"summand": math.nan}])
def test_one_step_that_is_not_finite_changes_no_weight_and_the_run_goes_on(tmp_path, spoil, caplog, how):
    spoil({2}, **how)
    seen = Remember()
    result = run_toy(tmp_path / "run", monitors=[seen])
    assert result.step == 7
    assert same(seen.weights[3], seen.weights[2])
    assert all(not same(seen.weights[step], seen.weights[step - 1]) for step in (1, 2, 4, 5, 6, 7))
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "run", 7).values())
    assert [line["skipped"] for line in metrics(tmp_path / "run")] == [0, 0, 1, 0, 0, 0, 0]
    assert "step 2: loss" in caplog.text


def test_steps_that_are_not_finite_stop_the_run_and_overwrite_nothing(tmp_path, spoil):
    spoil(range(3, 100), factor=math.nan)
    seen = Remember()
    changes = {"train.nonfinite_limit": 3, "checkpoint.every": "1st", "checkpoint.keep": 2}
    with pytest.raises(NonFiniteError) as raised:
        run_toy(tmp_path / "run", changes, monitors=[seen])
    message = str(raised.value)
    assert "3 steps in a row, the last of them step 5" in message
    assert "toy-0[" in message, "names samples"
    assert "step_00000003, is intact" in message
    assert "Try a lower optim.lr" in message
    assert checkpoints(tmp_path / "run") == ["step_00000002", "step_00000003"]
    assert same(weights(tmp_path / "run", 3), seen.weights[3])
    assert same(seen.weights[5], seen.weights[3])


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    class Overflow:
        every = "1st"

        def __call__(self, model, event):
            if event.step == 4:
                next(model.parameters()).fill_(math.inf)
            return {}

    message = r"weights are not finite after step 4. The last checkpoint, .*step_00000003, is intact"
    with pytest.raises(NonFiniteError, match=message):
        run_toy(tmp_path / "run", {"checkpoint.every": "1st"}, monitors=[Overflow()])
    assert checkpoints(tmp_path / "run") == ["step_00000002", "step_00000003"]


def test_steps_that_are_not_finite_count_only_in_a_row(tmp_path, spoil):
    spoil({0, 1, 3, 4, 6}, factor=math.nan)
    assert run_toy(tmp_path / "run", {"train.nonfinite_limit": 3}).step == 7


def test_a_run_that_ends_on_a_step_that_is_not_finite_is_complete(tmp_path, spoil):
    spoil({6}, factor=math.nan)
    run_toy(tmp_path / "run", {"checkpoint.every": "1st"})
    assert checkpoints(tmp_path / "run")[-1] == "step_00000007"
    reporter = Quiet()
    run_toy(tmp_path / "run", {"checkpoint.every": "1st"}, reporter=reporter)
    assert reporter.began_at == (7, 7)


def test_a_run_that_failed_goes_on_from_its_last_checkpoint(whole, tmp_path, spoil, monkeypatch):
    with monkeypatch.context() as patch:
        spoil(range(3, 100), factor=math.nan)
        with pytest.raises(NonFiniteError):
            run_toy(tmp_path / "run", {"train.nonfinite_limit": 2, "checkpoint.every": "2st"})
        patch.undo()
    monkeypatch.undo()
    run_toy(tmp_path / "run", {"train.nonfinite_limit": 2, "checkpoint.every": "2st"})
    assert same(weights(tmp_path / "run", 7), weights(whole, 7))


# ----------------------------------------------------------------------------------------------- checkpoints


class FillDisk:
    """From a step on no file can grow beyond so many bytes, which is how a full disk looks to a program."""

    every = "1st"

    def __init__(self, step: int, limit: int) -> None:
        self.step, self.limit = step, limit

    def __call__(self, model, event):
        if event.step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        return {}


@contextmanager
def disk_freed_afterwards() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# The model file is the smaller of the two, so with 100 kB it is the state that finds no room.
@pytest.mark.parametrize(("limit", "cause"), [(4_000, "File too large"), (100_000, r"is full.*\d+ MB free")])
def test_a_full_disk_leaves_the_checkpoint_before_intact_and_the_run_can_go_on(whole, tmp_path, limit, cause):
    saving = {"checkpoint.every": "2st"}
    with disk_freed_afterwards(), pytest.raises(WriteError, match=f"{cause}.*intact; make room"):
        run_toy(tmp_path / "run", saving, monitors=[FillDisk(4, limit)])
    assert checkpoints(tmp_path / "run") == ["step_00000002"]
    run_toy(tmp_path / "run", saving)
    assert_same_end(tmp_path / "run", whole, 7)


def cut_off(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", [cut_off, flip_a_bit, os.unlink])
def test_a_damaged_checkpoint_is_reported_and_the_one_before_used(whole, tmp_path, caplog, name, damage):
    saving = {"checkpoint.every": "3st"}
    run_toy(tmp_path / "run", saving, monitors=[SignalAt(4, signal.SIGINT)])
    latest = tmp_path / "run" / "checkpoints" / "step_00000004"
    damage(latest / name)
    reporter = Quiet()
    run_toy(tmp_path / "run", saving, reporter=reporter)
    assert f"{name} " in caplog.text or f"{name}'" in caplog.text
    assert "resuming from the checkpoint before it; renamed to damaged_step_00000004" in caplog.text
    assert reporter.began_at == (3, 7)
    assert_same_end(tmp_path / "run", whole, 7)


def test_a_run_all_of_whose_checkpoints_are_damaged_does_not_begin_anew(tmp_path):
    run_toy(tmp_path / "run", {"train.duration": "2st"})
    flip_a_bit(tmp_path / "run" / "checkpoints" / "step_00000002" / "state.pt")
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged: .*state.pt"):
        run_toy(tmp_path / "run", {"train.duration": "2st"})


def test_the_loss_curve_is_on_the_disk_before_its_checkpoint_has_a_name(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: events.append(str(Path(f"/proc/self/fd/{fd}").readlink())) or fsync(fd)
    )
    monkeypatch.setattr(Path, "replace", lambda self, to: events.append(str(to)) or replace(self, to))
    run_toy(tmp_path / "run", {"checkpoint.every": "3st"})
    steps = [at for at, event in enumerate(events) if "/step_" in event and ".writing" not in event]
    curve = [at for at, event in enumerate(events) if event.endswith("metrics.jsonl")]
    named = [at for at in steps if Path(events[at]).name.startswith("step_")]
    assert len(named) == 3
    assert all(any(before < at for before in curve if before > last) for last, at in pairwise([-1, *named]))


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        run_toy(tmp_path / "run", {"train.duration": "1st"})
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file() and "lock" not in path.name]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o640}


def test_only_the_latest_checkpoints_and_those_for_good_are_kept(tmp_path):
    run_toy(
        tmp_path / "run", {"checkpoint.every": "1st", "checkpoint.keep": 2, "checkpoint.keep_every": "3st"}
    )
    assert checkpoints(tmp_path / "run") == [f"step_{step:08d}" for step in (3, 6, 7)]


# ------------------------------------------------------------------------------------------ unreadable images


def test_unreadable_images_are_listed_once_and_counted(tmp_path):
    changes = {"train.duration": "3ep", "data.max_bad_fraction": 0.1}
    result = run_toy(tmp_path / "run", changes, sources={"train": ToySource(40, bad=[3, 17])})
    assert (result.step, result.num_bad) == (15, 2)
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(line["sample"] for line in lines) == [3, 17]
    assert {line["reason"] for line in lines} == {"truncated"}
    assert metrics(tmp_path / "run")[-1]["bad"] == 2


class Fatal(ToySource):
    """Reading one of its images kills the worker process."""

    def __init__(self, fatal: int) -> None:
        super().__init__(40)
        self.fatal = fatal

    def _read(self, index):
        if index == self.fatal and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.images[index]


def test_a_killed_worker_ends_the_run_and_the_steps_done_are_saved(whole, tmp_path):
    seed = settings().seed
    fatal = int(VisitOrder(40, seed=seed, batch_size=8).keys(3).samples[5])
    with pytest.raises(
        DataError, match=rf"killed by SIGKILL while it read toy-0\[{fatal}\].*fewer --data.workers"
    ):
        run_toy(tmp_path / "run", {"data.workers": 1}, sources={"train": Fatal(fatal)})
    assert checkpoints(tmp_path / "run")
    run_toy(tmp_path / "run", sources={"train": Fatal(fatal)})
    assert_same_end(tmp_path / "run", whole, 7)


def test_the_limit_to_unreadable_images_may_be_raised_and_the_run_gone_on_with(tmp_path):
    source = {"train": ToySource(40, bad=[1, 2, 3])}
    with pytest.raises(TooManyBadImages):
        run_toy(tmp_path / "run", sources=source)
    result = run_toy(tmp_path / "run", {"data.max_bad_fraction": 0.5}, sources=source)
    assert (result.step, result.num_bad) == (7, 3)


# ---------------------------------------------------------------------------------------------- a run refused


def test_after_a_failure_signals_are_handled_as_before(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(CrashError):
        run_toy(tmp_path / "run", monitors=[CrashAt(2)])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_call_leaves_the_process_as_it_found_it(tmp_path, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(7)
    expected, told = torch.rand(3), []
    torch.manual_seed(7)

    class Look:
        every = "1st"

        def __call__(self, model, event):
            told.append(torch.are_deterministic_algorithms_enabled())
            return {}

    with monkeypatch.context() as patch:
        patch.setattr(torch, "manual_seed", None)  # it would reseed GPUs
        run_toy(tmp_path / "run", {"train.deterministic": True}, monitors=[Look()])
    assert all(told)
    assert torch.equal(torch.rand(3), expected)
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.backends.cudnn.benchmark
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_an_emulated_precision_is_pointed_out(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    run_toy(tmp_path / "named", {"train.duration": "1st", "train.precision": "bf16"})
    assert "train.precision bf16 is emulated on this cpu" in caplog.text
    caplog.clear()
    reporter = Quiet()
    run_toy(tmp_path / "auto", {"train.duration": "1st", "train.precision": "auto"}, reporter=reporter)
    assert "emulated" not in caplog.text
    assert " · fp32 · " in reporter.notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.precision": "fp16"}, "train.precision fp16 needs a GPU; on a CPU use bf16 or fp32"),
        ({"model.block_size": 4}, "the whole image is one block, so there is no next block"),
        ({"model.predictor": None}, "model.predictor is null"),
        ({"train.device": "mps"}, "device 'mps' is not available .* available: .*cpu"),
        ({"model.init": "nowhere"}, "nowhere does not exist"),
    ],
)
def test_an_impossible_run_is_refused_and_leaves_no_directory(tmp_path, changes, message):
    with pytest.raises((ValueError, CheckpointError), match=message):
        run_toy(tmp_path / "run", changes)
    assert not (tmp_path / "run").exists()


def test_a_refused_overwrite_leaves_the_old_run_as_it_was(tmp_path):
    run_toy(tmp_path / "run")
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run_toy(tmp_path / "run", {"train.precision": "fp16"}, overwrite=True)
    assert checkpoints(tmp_path / "run") == ["step_00000007"]
    with pytest.raises(RunDirError, match="bf16"):
        run_toy(tmp_path / "run", {"train.precision": "bf16", "optim.lr": 0.5, "train.device": "cpu"})
