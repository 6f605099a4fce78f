"""A run's course is a function of its settings: cut or whole, watched or not, however its work is divided."""

import signal
from collections import Counter
from functools import cache
from itertools import chain, pairwise

import pytest
import torch

from nextblock.data import ConcatSource, TrainLoader, eval_batches
from nextblock.models import NextBlockModel
from nextblock.targets import TokenTargets, draw_prefix_lengths
from nextblock.train import TrainResult
from nextblock.train.trainer import Trainer
from ranks import SignalRank, run_ranks, train_together
from tiny_runs import (
    ALL_RANDOM,
    CPU,
    EMBEDDING,
    MASKED,
    TOKENS,
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
    same,
    settings,
    write_teacher,
)
from toy import ToySource, take

PREFIX = {**ALL_RANDOM, "model.prefix": True}
ONE_PATCH = {"model.projection_dim": None, "model.block_mlp_dim": None, "model.block_size": 1}
CASES = {
    "fp32": ALL_RANDOM,
    "bf16": {**ALL_RANDOM, "train.precision": "bf16"},
    "prefix": PREFIX,
    "mlp": {**PREFIX, **ONE_PATCH, "model.predictor": "mlp"},
    "tokens": {**PREFIX, **TOKENS},
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
    killer = SignalRank(step, rank=0, number=signal.SIGKILL)
    assert run_ranks(1, train_together, out, changes, None, (*monitors, killer)) == [-signal.SIGKILL]


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
    for value in (False, True):  # in a process whose types are not checked
        changes = {"model.drop_path": drop_path, "train.duration": "4st", how: value}
        results = run_ranks(1, train_together, tmp_path / str(value), changes, timeout=600)
        assert isinstance(results[0], TrainResult), results
        losses.append([line["loss"] for line in metrics(tmp_path / str(value))])
    assert losses[1] == pytest.approx(losses[0], rel=0, abs=tolerance)


MANY_BLOCKS = {"model.prefix": True, "model.block_size": 1}
"""Sixteen, so that prefix lengths differ."""


def draw(samples):
    return draw_prefix_lengths(0, [0] * len(samples), samples, 16)


def loader(source, micro_batch_size, **options):
    sizes = {"image_size": 16, "batch_size": 8, "micro_batch_size": micro_batch_size}
    return TrainLoader(source, settings().data, seed=0, **sizes, **options)


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(
    ("prefix", "distances", "drop_path"), [(False, 2, 0.0), (True, 1, 0.0), (True, 3, 0.0), (False, 1, 0.5)]
)
@pytest.mark.parametrize("micro_batch_size", [None, 4, 3, 1])
@pytest.mark.parametrize("bad", [(), (0, 2, 3, 6)])
def test_loss_and_gradient_are_those_of_the_whole_batch(micro_batch_size, bad, prefix, distances, drop_path):
    changes = {"model.num_predicted_blocks": distances, "model.prefix": prefix, "model.depth": 4}
    trainer = Trainer(settings({**MANY_BLOCKS, **changes, "model.drop_path": drop_path}), CPU, None)
    for parameter in trainer.model.parameters():
        parameter.data.mul_(8 if drop_path else 1)  # else a fresh model's branches are next to nothing
    whole, in_parts = (
        take(loader(ToySource(8, bad=bad), size, **trainer.loader_options), 1)[0]
        for size in (None, micro_batch_size)
    )
    (batch,) = whole.micro_batches
    images, lengths = trainer.to_model(batch.images), draw(batch.samples.tolist()) if prefix else None
    loss = trainer.model(images, None, lengths, batch.drop_path if drop_path else None).loss
    loss.backward()
    expected, found = gradient(trainer.model), []
    with trainer.evaluating() as model:
        kept = model(images, None, lengths).loss.item()
    assert (kept != pytest.approx(loss.item(), rel=1e-3)) == (drop_path > 0)
    trainer.optimizer.zero_grad()

    def check(sums):
        found.append(sums.scale * gradient(trainer.model))  # before clipping

    outcome = trainer.train_step(in_parts, lr=1e-3, check=check)

    assert outcome.images == 8 - len(bad)
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-6)
    assert outcome.grad_norm == pytest.approx(expected.norm().item(), rel=1e-5)
    torch.testing.assert_close(found[0], expected, rtol=1e-4, atol=1e-7)


def test_a_batch_without_a_readable_image_changes_nothing():
    trainer = Trainer(settings(MANY_BLOCKS), CPU, None)
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    (step,) = take(loader(ToySource(8, bad=range(8)), 3), 1)
    assert trainer.train_step(step, lr=1e-3).images == 0
    assert same(trainer.model.state_dict(), before)


def test_the_validation_loss_is_over_all_kept_blocks_with_the_prefixes_of_visit_0():
    changes = {**MANY_BLOCKS, "model.num_predicted_blocks": 2, "model.norm_pixels": False}
    trainer, source = Trainer(settings(changes), CPU, None), ToySource(13, seed=1, bad=[4])
    measured = [trainer.validate(eval_batches(source, trainer.config.data, 16, size)) for size in (13, 5, 1)]
    losses = [one[0]["val_loss"] for one in measured if one is not None]
    samples = [sample for sample in range(13) if sample != 4]
    pixels = trainer.to_model(torch.stack([source.images[sample] for sample in samples]))
    with trainer.evaluating() as model, torch.no_grad():
        expected = model(pixels, None, draw(samples)).loss.item()
        without = model(pixels).loss.item()
    assert losses == pytest.approx([expected] * 3, rel=1e-5)
    assert abs(without - expected) > 1e-4


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """`drawn(duration, changes)`: block orders, prefix lengths and rotary scales of all training passes."""
    seen, forward = [], NextBlockModel.forward

    def remember(self, images, order=None, prefix=None, *others):
        if self.training:
            seen.append([None if one is None else one.tolist() for one in (order, prefix, others[-1])])
        return forward(self, images, order, prefix, *others)

    monkeypatch.setattr(NextBlockModel, "forward", remember)

    def call(duration, changes):
        seen.clear()
        run_toy(tmp_path / str(len(list(tmp_path.iterdir()))), {**changes, "train.duration": duration})
        return zip(*seen, strict=True)

    return call


def test_a_steps_block_order_is_drawn_from_the_models_set_by_seed_and_step(drawn):
    changes = {"model.order": "random", "train.batch_size": 2}
    (first, *_), (other, *_) = drawn("40st", changes), drawn("40st", {**changes, "seed": 1})
    again, *_ = drawn("5st", {**changes, "train.micro_batch_size": 1})
    assert [*again] == [order for order in first[:5] for _ in range(2)], "a step's micro-batches share it"
    assert other != first
    the_set = NextBlockModel(settings({"model.order": "random"}).model).orders.tolist()
    assert set(map(tuple, first)) == set(map(tuple, other)) == set(map(tuple, the_set))
    raster, *_ = drawn("7st", {})
    assert [*raster] == [[0, 1, 2, 3]] * 7


def test_a_steps_scale_of_rotary_coordinates_and_an_images_order_are_drawn_by_the_seed(drawn):
    orders, _, scales = drawn("10st", EMBEDDING)
    again, _, each = drawn("10st", {**EMBEDDING, "train.micro_batch_size": 4})
    assert [*each] == [scale for scale in scales for _ in range(2)]
    assert [*chain(*again)] == [*chain(*orders)]
    assert 0.5 <= min(scales) < 0.9 < 1.1 < max(scales) <= 2
    assert len(set(scales)) == 10
    assert len(set(map(tuple, chain(*orders)))) > 15, "of 24, for 80 draws: every image and visit has its own"
    other_orders, _, other_scales = drawn("10st", {**EMBEDDING, "seed": 1})
    assert set(other_scales).isdisjoint(scales)
    assert other_orders != orders


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_every_image_of_a_run_has_the_prefix_of_its_visit_and_sample_whatever_the_workers(drawn, workers):
    _, seen, _ = drawn("7st", {**MANY_BLOCKS, "data.workers": workers, "train.micro_batch_size": 3})
    steps = take(loader(ToySource(40), micro_batch_size=3), 7)
    keys = [(batch.visits.tolist(), batch.samples.tolist()) for step in steps for batch in step.micro_batches]
    assert [*seen] == [draw_prefix_lengths(0, *of_batch, 16).tolist() for of_batch in keys]
    assert len({(*seen[at], *seen[at + 1]) for at in range(0, 21, 3)}) == 7, "no step repeats another's"
    samples = chain(*(samples for _, samples in keys))
    of_image = set(zip(samples, chain(*seen), strict=True))
    assert max(Counter(sample for sample, _ in of_image).values()) == 2, "another length at another visit"
