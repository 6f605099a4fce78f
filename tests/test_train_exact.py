"""A run's course is a function of its settings: cut or whole, watched or not, however its work is divided."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nextblock.data import Step, TrainLoader
from nextblock.models import NextBlockModel
from nextblock.train.trainer import Trainer
from tiny_runs import (
    ALL_RANDOM,
    CPU,
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
from toy import ToySource, take

# -------------------------------------------------------------------------- stopped, and gone on with


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def whole(request, tmp_path_factory):
    """A run of seven steps that nothing stopped, and its settings."""
    run = tmp_path_factory.mktemp(request.param) / "whole"
    changes = {**ALL_RANDOM, "train.precision": request.param}
    run_toy(run, changes)
    return run, changes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [1, 3, 5])
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


KILLED = """
import sys, signal, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
from tiny_runs import *
changes = {**ALL_RANDOM, "checkpoint.every": "3st", "monitor.log_every": "1st"}
run_toy(Path(sys.argv[2]), changes, monitors=[SignalAt(5, signal.SIGKILL)])
"""


def test_a_killed_process_is_continued_bit_for_bit_from_its_last_checkpoint(tmp_path):
    arguments = [str(Path(__file__).parent), str(tmp_path / "run"), str(torch.get_num_threads())]
    died = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    assert [line["step"] for line in loss_lines(tmp_path / "run")] == [1, 2, 3, 4, 5]

    changes = {**ALL_RANDOM, "checkpoint.every": "3st", "monitor.log_every": "1st"}
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


def test_workers_do_not_change_a_bit(tmp_path):
    for workers in (0, 1, 2):
        run_toy(tmp_path / str(workers), {**ALL_RANDOM, "data.workers": workers})
    assert_same_end(tmp_path / "1", tmp_path / "0", 7)
    assert_same_end(tmp_path / "2", tmp_path / "0", 7)


def test_monitors_do_not_change_a_bit_even_if_they_reseed_every_generator(tmp_path):
    run_toy(tmp_path / "alone", ALL_RANDOM)
    run_toy(tmp_path / "watched", ALL_RANDOM, monitors=[Meddle(), Remember()])
    assert_same_end(tmp_path / "watched", tmp_path / "alone", 7)


def test_the_state_of_global_generators_does_not_matter(tmp_path):
    run_toy(tmp_path / "a", ALL_RANDOM)
    torch.manual_seed(12345)
    run_toy(tmp_path / "b", ALL_RANDOM)
    assert_same_end(tmp_path / "a", tmp_path / "b", 7)


def test_validation_does_not_change_a_bit(tmp_path):
    run_toy(tmp_path / "alone", ALL_RANDOM)
    val = {"train": ToySource(40), "val": ToySource(20, seed=1)}
    run_toy(tmp_path / "validated", {**ALL_RANDOM, "monitor.val_every": "2st"}, sources=val)
    assert same(weights(tmp_path / "alone", 7), weights(tmp_path / "validated", 7))
    assert [line["step"] for line in metrics(tmp_path / "validated", "val")] == [2, 4, 6, 7]


def test_another_seed_is_another_run(tmp_path):
    run_toy(tmp_path / "a", {"train.duration": "1st"})
    run_toy(tmp_path / "b", {"train.duration": "1st", "seed": 1})
    assert metrics(tmp_path / "a")[0]["loss"] != metrics(tmp_path / "b")[0]["loss"]


def test_recomputing_activations_does_not_change_the_losses(tmp_path):
    run_toy(tmp_path / "kept", ALL_RANDOM)
    run_toy(tmp_path / "recomputed", {**ALL_RANDOM, "train.activation_checkpointing": True})
    kept, recomputed = loss_lines(tmp_path / "kept"), loss_lines(tmp_path / "recomputed")
    assert [line["loss"] for line in recomputed] == pytest.approx([line["loss"] for line in kept], rel=1e-6)


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


# ---------------------------------------------------------------------------------------------- micro-batches


class Recording(Trainer):
    """Keeps the gradient of a step, before clipping."""

    def _update(self, *, loss_is_finite, scale):
        gradients = [p.grad.flatten() for p in self.model.parameters() if p.grad is not None]
        self.gradient = scale * torch.cat(gradients)
        return super()._update(loss_is_finite=loss_is_finite, scale=scale)


def first_step(source: ToySource, micro_batch_size: int | None) -> tuple[Recording, Step]:
    config = settings({"train.micro_batch_size": micro_batch_size, "model.num_predicted_blocks": 2})
    loader = TrainLoader(
        source, config.data, image_size=16, seed=0, batch_size=8, micro_batch_size=micro_batch_size
    )
    return Recording(config, CPU, None), take(loader, 1)[0]


@pytest.mark.parametrize("micro_batch_size", [None, 4, 3, 1])
@pytest.mark.parametrize("bad", [(), (0, 2, 3, 6)])
def test_loss_and_gradient_are_those_of_the_whole_batch(micro_batch_size, bad):
    trainer, step = first_step(ToySource(8, bad=bad), micro_batch_size)
    images = torch.cat([batch.images for batch in step.micro_batches])
    assert len(images) == 8 - len(bad)
    loss = trainer.model(trainer.to_model(images)).loss
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    trainer.optimizer.zero_grad()

    outcome = trainer.train_step(step, lr=1e-3)

    assert outcome.images == len(images)
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-6)
    assert outcome.grad_norm == pytest.approx(expected.norm().item(), rel=1e-5)
    torch.testing.assert_close(trainer.gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_batch_without_a_readable_image_changes_nothing():
    trainer, step = first_step(ToySource(8, bad=range(8)), 3)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    outcome = trainer.train_step(step, lr=1e-3)
    assert outcome.images == 0
    assert same(trainer.model.state_dict(), before)


def test_micro_batch_sizes_do_not_change_the_loss_curve(tmp_path):
    curves = {}
    for size in (None, 3, 1):
        run_toy(tmp_path / str(size), {"train.micro_batch_size": size})
        curves[size] = [line["loss"] for line in metrics(tmp_path / str(size))]
    assert curves[3] == pytest.approx(curves[None], rel=1e-4)
    assert curves[1] == pytest.approx(curves[None], rel=1e-4)


# --------------------------------------------------------------------------------- what is not to be the same


def test_the_settings_of_these_tests_draw_all_there_is_to_draw():
    config = settings(ALL_RANDOM)
    assert config.model.drop_path > 0
    assert config.model.order == "random"
    assert config.data.flip > 0
    assert config.data.crop_scale[0] < 1
    assert config.train.batch_size % ALL_RANDOM["train.micro_batch_size"] != 0
