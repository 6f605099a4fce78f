"""A run's course is a function of its settings: cut or whole, watched or not, however its work is divided."""

from __future__ import annotations

import signal
from multiprocessing import get_context

import pytest
import torch

from nextblock.models import NextBlockModel
from tiny_runs import (
    ALL_RANDOM,
    CrashAt,
    CrashError,
    Meddle,
    Quiet,
    Remember,
    SignalAt,
    assert_same_end,
    checkpoints,
    loss_lines,
    metrics,
    run_toy,
    same,
    settings,
    weights,
)
from toy import ToySource

# -------------------------------------------------------------------------- stopped, and gone on with


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def whole(request, tmp_path_factory):
    """A run of seven steps that nothing stopped, and its settings."""
    run = tmp_path_factory.mktemp(request.param) / "whole"
    changes = {**ALL_RANDOM, "train.precision": request.param}
    run_toy(run, changes)
    return run, changes


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGINT), (3, signal.SIGTERM), (5, signal.SIGINT)])
def test_a_run_stopped_by_a_signal_goes_on_bit_for_bit(whole, tmp_path, step, number):
    uninterrupted, changes = whole
    before = signal.getsignal(number)
    stopped = run_toy(tmp_path / "run", changes, monitors=[SignalAt(step, number)])
    assert (stopped.step, stopped.total_steps, stopped.stopped_by) == (step, 7, number.name)
    assert signal.getsignal(number) is before
    assert checkpoints(tmp_path / "run") == [f"step_{step:08d}"]

    reporter = Quiet()
    finished = run_toy(tmp_path / "run", changes, reporter=reporter)
    assert reporter.began_at == (step, 7)
    assert (finished.step, finished.stopped_by) == (7, None)
    assert_same_end(tmp_path / "run", uninterrupted, 7)


def test_a_run_stopped_before_its_first_step_begins_anew(whole, tmp_path):
    uninterrupted, changes = whole
    assert run_toy(tmp_path / "run", changes, monitors=[SignalAt(0, signal.SIGINT)]).step == 0
    run_toy(tmp_path / "run", changes)
    assert_same_end(tmp_path / "run", uninterrupted, 7)


def test_a_run_stopped_at_every_step_goes_on_bit_for_bit(whole, tmp_path):
    uninterrupted, changes = whole
    for step in range(1, 7):
        assert run_toy(tmp_path / "run", changes, monitors=[SignalAt(step, signal.SIGTERM)]).step == step
    run_toy(tmp_path / "run", changes)
    assert_same_end(tmp_path / "run", uninterrupted, 7)


def test_a_crash_costs_the_steps_since_the_last_checkpoint_and_nothing_else(whole, tmp_path):
    uninterrupted, changes = whole
    saving = {**changes, "checkpoint.every": "2st"}
    with pytest.raises(CrashError):
        run_toy(tmp_path / "run", saving, monitors=[CrashAt(5)])
    assert checkpoints(tmp_path / "run") == ["step_00000002", "step_00000004"]
    run_toy(tmp_path / "run", saving)
    assert_same_end(tmp_path / "run", uninterrupted, 7)


def test_a_crash_before_the_first_checkpoint_leaves_no_line_twice(whole, tmp_path):
    uninterrupted, changes = whole
    with pytest.raises(CrashError):
        run_toy(tmp_path / "run", changes, monitors=[Meddle(), CrashAt(5)])
    run_toy(tmp_path / "run", changes, monitors=[Meddle()])
    assert_same_end(tmp_path / "run", uninterrupted, 7)
    assert [line["step"] for line in metrics(tmp_path / "run", "monitor")] == [0, 2, 4, 6, 7]


def test_a_killed_process_is_continued_bit_for_bit_from_its_last_checkpoint(tmp_path):
    changes = {**ALL_RANDOM, "checkpoint.every": "3st", "monitor.log_every": "1st"}
    killed = {"monitors": [SignalAt(5, signal.SIGKILL)]}
    # Forked, as importing everything anew takes ten times as long as the run.
    process = get_context("fork").Process(target=run_toy, args=(tmp_path / "run", changes), kwargs=killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    assert [line["step"] for line in loss_lines(tmp_path / "run")] == [1, 2, 3, 4, 5]

    reporter = Quiet()
    run_toy(tmp_path / "run", changes, reporter=reporter)
    run_toy(tmp_path / "whole", changes)
    assert reporter.began_at == (3, 7)
    assert [line["step"] for line in loss_lines(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]
    assert_same_end(tmp_path / "run", tmp_path / "whole", 7)


def test_a_line_of_metrics_that_was_cut_off_is_dropped_on_resume(tmp_path):
    run_toy(tmp_path / "run", monitors=[SignalAt(4, signal.SIGINT)])
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    run_toy(tmp_path / "run")
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_a_finished_run_started_again_does_nothing(tmp_path):
    run_toy(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    reporter = Quiet()
    result = run_toy(tmp_path / "run", reporter=reporter, monitors=[CrashAt(7)])
    assert (result.step, result.total_steps, result.stopped_by) == (7, 7, None)
    assert reporter.ticks == []
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


# --------------------------------------------------------------------------------- who else is on the machine


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run without workers, monitors and validation."""
    run = tmp_path_factory.mktemp("alone") / "run"
    run_toy(run, ALL_RANDOM)
    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_a_bit(alone, tmp_path, workers):
    run_toy(tmp_path / "run", {**ALL_RANDOM, "data.workers": workers})
    assert_same_end(tmp_path / "run", alone, 7)


def test_neither_monitors_that_reseed_every_generator_nor_its_state_change_a_bit(alone, tmp_path):
    torch.manual_seed(12345)
    run_toy(tmp_path / "watched", ALL_RANDOM, monitors=[Meddle(), Remember()])
    assert_same_end(tmp_path / "watched", alone, 7)


def test_validation_does_not_change_a_bit(alone, tmp_path):
    val = {"train": ToySource(40), "val": ToySource(20, seed=1)}
    run_toy(tmp_path / "validated", {**ALL_RANDOM, "monitor.val_every": "2st"}, sources=val)
    assert same(weights(alone, 7), weights(tmp_path / "validated", 7))
    assert [line["step"] for line in metrics(tmp_path / "validated", "val")] == [2, 4, 6, 7]


def test_another_seed_is_another_run(tmp_path):
    run_toy(tmp_path / "a", {"train.duration": "1st"})
    run_toy(tmp_path / "b", {"train.duration": "1st", "seed": 1})
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "b")[0]["loss"]


# ----------------------------------------------------------------------------------------------- block orders


@pytest.fixture
def seen_orders(monkeypatch):
    """The block order of every training forward pass."""
    seen = []
    forward = NextBlockModel.forward

    def remember(self, images, block_order=None, prefix_lengths=None, drop_path=None):
        if self.training and block_order is not None:
            seen.append(tuple(block_order.tolist()))
        return forward(self, images, block_order, prefix_lengths, drop_path)

    monkeypatch.setattr(NextBlockModel, "forward", remember)
    return seen


def test_a_steps_block_order_is_drawn_from_the_models_set_by_seed_and_step(tmp_path, seen_orders):
    changes = {"model.order": "random", "train.batch_size": 2, "train.duration": "40st"}
    run_toy(tmp_path / "a", changes)
    first = seen_orders.copy()
    seen_orders.clear()
    run_toy(tmp_path / "b", {**changes, "train.micro_batch_size": 1})
    twice = [order for order in first for _ in range(2)]
    assert seen_orders == twice, "all micro-batches of a step share its order"
    seen_orders.clear()
    run_toy(tmp_path / "c", {**changes, "seed": 1})
    assert seen_orders != first
    the_set = {tuple(order) for order in NextBlockModel(settings(changes).model).orders.tolist()}
    assert set(first) == set(seen_orders) == the_set


def test_under_raster_order_every_step_goes_in_raster_order(tmp_path, seen_orders):
    run_toy(tmp_path / "run")
    assert set(seen_orders) == {(0, 1, 2, 3)}


# --------------------------------------------------------------------------------- what is not to be the same


def test_the_settings_of_these_tests_draw_all_there_is_to_draw():
    config = settings(ALL_RANDOM)
    assert config.model.drop_path > 0
    assert config.model.order == "random"
    assert config.data.flip > 0
    assert config.data.crop_scale[0] < 1
    assert config.train.batch_size % ALL_RANDOM["train.micro_batch_size"] != 0
