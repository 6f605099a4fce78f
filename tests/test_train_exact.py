"""A run's course is a function of its settings: cut or whole, watched or not, however its work is divided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from itertools import pairwise
from multiprocessing import get_context

import pytest
import torch

from nextblock.data import ConcatSource
from nextblock.targets import TokenTargets
from tiny_runs import (
    ALL_RANDOM,
    EMBEDDING,
    MASKED,
    TINY_FLAGS,
    Meddle,
    Quiet,
    Remember,
    SignalAt,
    assert_same_end,
    checkpoints,
    contents,
    crash_toy,
    logged_steps,
    metrics,
    run_toy,
    settings,
    write_teacher,
)
from toy import ToySource

PREFIX = {**ALL_RANDOM, "model.prefix": True}
ONE_PATCH = {"model.projection_dim": None, "model.block_mlp_dim": None, "model.block_size": 1}
CASES = {
    "fp32": ALL_RANDOM,
    "bf16": {**ALL_RANDOM, "train.precision": "bf16"},
    "prefix": PREFIX,
    "mlp": {**PREFIX, **ONE_PATCH, "model.predictor": "mlp"},
    "tokens": {**PREFIX, "model.target": "tokens", "model.vocab_size": 6},
    "embedding": {**ALL_RANDOM, **EMBEDDING, "model.predictor": "identity"},
    "features": {**ALL_RANDOM, "model.predict_visible": True},
    "masked": {**ALL_RANDOM, **MASKED},
    "mixture": {**ALL_RANDOM, "data.train": ("toy-0", "toy-1"), "data.weights": (0.75, 0.25)},
}


@pytest.fixture(scope="module", autouse=True)
def teacher(tmp_path_factory):
    CASES["features"] |= write_teacher(tmp_path_factory.mktemp("teacher") / "model.safetensors")


def sources(case):
    mixture = ConcatSource([ToySource(30), ToySource(5, seed=1)])
    return {"train": mixture if case == "mixture" else ToySource(40)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """`whole("bf16")` -> a run of seven steps that nothing stopped, without workers, monitors, validation."""
    assert settings().data.flip > 0 and settings().data.crop_scale[0] < 1, "else nothing is drawn"

    @cache
    def make(case):
        run = tmp_path_factory.mktemp(case)
        run_toy(run, CASES[case], sources=sources(case))
        return run

    return make


@pytest.mark.parametrize(
    ("case", "workers", "steps"),
    [
        ("fp32", 0, (0, 1, 3, 6)),
        ("bf16", 0, (0, 4)),
        *((case, 0, (4,)) for case in ("tokens", "embedding", "features", "masked")),
        *((case, workers, (4,)) for case, workers in (("fp32", 1), ("mlp", 2), ("mixture", 2))),
    ],
)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_a_run_stopped_by_signals_resumes_bit_for_bit_with_any_workers(whole, tmp_path, case, workers, steps):
    changes, given = {**CASES[case], "data.workers": workers}, sources(case)
    for last, step in pairwise([0, *steps]):
        number = (signal.SIGINT, signal.SIGTERM)[step % 2]
        before, reporter, stop = signal.getsignal(number), Quiet(), SignalAt(step, number)
        result = run_toy(tmp_path, changes, monitors=[stop], reporter=reporter, sources=given)
        assert (result.step, result.total_steps, result.stopped_by) == (step, 7, number.name)
        assert signal.getsignal(number) is before
        assert reporter.began_at == (last, 7)
        assert checkpoints(tmp_path)[-1:] == ([f"step_{step:08d}"] if step else [])
    finished = run_toy(tmp_path, changes, sources=given)
    assert (finished.step, finished.stopped_by) == (7, None)
    assert_same_end(tmp_path, whole(case))


def kill_toy(out, step, changes, *, monitors):
    kwargs = {"monitors": [*monitors, SignalAt(step, signal.SIGKILL)]}
    # Forked, as importing everything anew takes ten times as long as the run.
    process = get_context("fork").Process(target=run_toy, args=(out, changes), kwargs=kwargs)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("case", "end", "step", "every", "saved"),
    [
        ("bf16", crash_toy, 5, "2st", [2, 4]),
        ("fp32", crash_toy, 5, "1000st", []),
        ("tokens", crash_toy, 5, "1000st", [0]),
        ("fp32", kill_toy, 3, "2st", [2]),
    ],
)
def test_a_crash_costs_the_steps_since_the_last_checkpoint_and_leaves_no_line_twice(
    whole, tmp_path, monkeypatch, case, end, step, every, saved
):
    expected, changes = whole(case), {**CASES[case], "checkpoint.every": every}
    end(tmp_path, step, changes, monitors=[Meddle()])
    assert checkpoints(tmp_path) == [f"step_{step:08d}" for step in saved]
    assert logged_steps(tmp_path) == [3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')  # cut off

    def refit(*_: object) -> None:
        raise AssertionError("tokens fitted again")

    monkeypatch.setattr(TokenTargets, "fit", refit)
    reporter = Quiet()
    run_toy(tmp_path, changes, monitors=[Meddle()], reporter=reporter)
    assert reporter.began_at == (max(saved, default=0), 7)
    assert_same_end(tmp_path, expected)
    watched = [line["step"] for line in metrics(tmp_path, "monitor") if "meddle/sum" in line]
    assert watched == [0, 2, 4, 6, 7]


def test_a_finished_run_started_again_does_nothing(whole):
    before, reporter = contents(whole("fp32")), Quiet()
    result = run_toy(whole("fp32"), ALL_RANDOM, reporter=reporter)
    assert (result.step, result.total_steps, result.stopped_by) == (7, 7, None)
    assert reporter.ticks == []
    assert contents(whole("fp32")) == before


def test_neither_monitors_that_reseed_every_generator_nor_validation_change_a_bit(whole, tmp_path):
    torch.manual_seed(12345)
    changes, given = {**ALL_RANDOM, "monitor.val_every": "2st"}, sources("fp32")
    given["val"] = ToySource(20, seed=1)
    run_toy(tmp_path, changes, sources=given, monitors=[Meddle(), Remember()])
    assert_same_end(tmp_path, whole("fp32"))
    assert logged_steps(tmp_path, "val") == [2, 4, 6, 7]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "drop_path", "tolerance"), [("train.deterministic", 0.2, 0), ("train.compile", 0, 1e-5)]
)
def test_a_deterministic_run_on_a_cpu_is_the_plain_one_and_a_compiled_one_nearly(
    tmp_path, how, drop_path, tolerance
):
    losses = []
    for value in ("false", "true"):
        words = [*TINY_FLAGS, "--data.train", "digits:split=test", "--model.drop_path", str(drop_path)]
        words += ["--train.duration", "4st", f"--{how}={value}", "--out", str(tmp_path / value)]
        environment = {**os.environ, "JAXTYPING_DISABLE": "1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "nextblock", "pretrain", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        losses.append([line["loss"] for line in metrics(tmp_path / value)])
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=tolerance)
