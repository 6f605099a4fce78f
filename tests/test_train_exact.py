"""A run's course is a function of its settings: cut or whole, watched or not, however its work is divided."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import cache
from itertools import chain, pairwise
from multiprocessing import get_context

import pytest
import torch

from nextblock.data import ConcatSource
from nextblock.models import NextBlockModel
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
    assert settings().data.flip > 0, "else the settings do not draw all there is to draw"
    assert settings().data.crop_scale[0] < 1

    @cache
    def make(case):
        run = tmp_path_factory.mktemp(case)
        run_toy(run, CASES[case], sources=sources(case))
        return run

    return make


@pytest.mark.parametrize(
    ("case", "steps"),
    [
        ("fp32", (0, 1, 3, 6)),
        ("bf16", (0, 4)),
        *((one, (4,)) for one in ("tokens", "embedding", "features", "masked")),
    ],
)
def test_a_run_stopped_by_signals_goes_on_bit_for_bit(whole, tmp_path, case, steps):
    for last, step in pairwise([0, *steps]):
        number = (signal.SIGINT, signal.SIGTERM)[step % 2]
        before, reporter, stop = signal.getsignal(number), Quiet(), SignalAt(step, number)
        result = run_toy(tmp_path, CASES[case], monitors=[stop], reporter=reporter)
        assert (result.step, result.total_steps, result.stopped_by) == (step, 7, number.name)
        assert signal.getsignal(number) is before
        assert reporter.began_at == (last, 7)
        assert checkpoints(tmp_path)[-1:] == ([f"step_{step:08d}"] if step else [])
    finished = run_toy(tmp_path, CASES[case])
    assert (finished.step, finished.stopped_by) == (7, None)
    assert_same_end(tmp_path, whole(case))


def kill_toy(out, step, changes, **options):
    options["monitors"] = [*options["monitors"], SignalAt(step, signal.SIGKILL)]
    # Forked, as importing everything anew takes ten times as long as the run.
    process = get_context("fork").Process(target=run_toy, args=(out, changes), kwargs=options)
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
    result = run_toy(whole("fp32"), ALL_RANDOM, reporter=reporter, stop=7)
    assert (result.step, result.total_steps, result.stopped_by) == (7, 7, None)
    assert reporter.ticks == []
    assert contents(whole("fp32")) == before


@pytest.mark.parametrize(("case", "workers"), [("fp32", 1), ("mlp", 2), ("mixture", 2)])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_do_not_change_a_bit_also_of_a_stopped_run(whole, tmp_path, case, workers):
    changes = {**CASES[case], "data.workers": workers}
    assert run_toy(tmp_path, changes, sources=sources(case), stop=4).step == 4
    run_toy(tmp_path, changes, sources=sources(case))
    assert_same_end(tmp_path, whole(case))


def test_neither_monitors_that_reseed_every_generator_nor_validation_change_a_bit(whole, tmp_path):
    torch.manual_seed(12345)
    val, changes = (
        {**sources("fp32"), "val": ToySource(20, seed=1)},
        {**ALL_RANDOM, "monitor.val_every": "2st"},
    )
    run_toy(tmp_path, changes, sources=val, monitors=[Meddle(), Remember()])
    assert_same_end(tmp_path, whole("fp32"))
    assert logged_steps(tmp_path, "val") == [2, 4, 6, 7]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(duration, **changes)`: the block orders and rotary scales of all training forward passes."""
    seen, forward = [], NextBlockModel.forward

    def remember(self, images, block_order=None, *rest):
        if self.training and block_order is not None:
            seen.append((block_order.tolist(), rest[-1] and rest[-1].item()))
        return forward(self, images, block_order, *rest)

    monkeypatch.setattr(NextBlockModel, "forward", remember)

    def call(duration, **changes):
        seen.clear()
        run_toy(tmp_path / str(len(list(tmp_path.iterdir()))), {**changes, "train.duration": duration})
        return [order for order, _ in seen], [scale for _, scale in seen]

    return call


def test_a_steps_block_order_is_drawn_from_the_models_set_by_seed_and_step(drawn):
    changes = {"model.order": "random", "train.batch_size": 2}
    (first, _), (other, _) = drawn("40st", **changes), drawn("40st", **changes, seed=1)
    twice = [order for order in first[:5] for _ in range(2)]
    again, _ = drawn("5st", **changes, **{"train.micro_batch_size": 1})
    assert again == twice, "a step's micro-batches share it"
    assert other != first
    the_set = NextBlockModel(settings({"model.order": "random"}).model).orders.tolist()
    assert set(map(tuple, first)) == set(map(tuple, other)) == set(map(tuple, the_set))
    raster, _ = drawn("7st")
    assert raster == [[0, 1, 2, 3]] * 7


def test_a_steps_scale_of_rotary_coordinates_and_an_images_order_are_drawn_by_the_seed(drawn):
    orders, scales = drawn("10st", **EMBEDDING)
    again, each = drawn("10st", **EMBEDDING, **{"train.micro_batch_size": 4})
    assert each == [scale for scale in scales for _ in range(2)]
    assert [*chain(*again)] == [*chain(*orders)]
    assert all(0.5 <= scale <= 2 for scale in scales)
    assert min(scales) < 0.9 < 1.1 < max(scales)
    assert len(set(scales)) == 10
    assert len(set(map(tuple, chain(*orders)))) > 15, "of 24, for 80 draws: every image and visit has its own"
    other_orders, other_scales = drawn("10st", **EMBEDDING, seed=1)
    assert set(other_scales).isdisjoint(scales)
    assert other_orders != orders


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
