"""What a step draws (orders, prefix lengths, rotary scales), and the divisors of its loss that follow."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from nextblock.data import Step, TrainLoader, eval_batches
from nextblock.models import NextBlockModel
from nextblock.targets import draw_prefix_lengths
from nextblock.train.trainer import Trainer
from tiny_runs import CPU, EMBEDDING, run_toy, same, settings
from toy import ToySource, take

PREFIX = {"model.prefix": True, "model.block_size": 1}
"""Sixteen blocks, so that lengths differ."""


def draw(samples: list[int]) -> Tensor:
    return draw_prefix_lengths(0, [0] * len(samples), samples, 16)


def loader(source: ToySource, micro_batch_size: int | None, **options: Any) -> TrainLoader:
    sizes: dict[str, Any] = {"image_size": 16, "batch_size": 8, "micro_batch_size": micro_batch_size}
    return TrainLoader(source, settings().data, seed=0, **sizes, **options)


class Recording(Trainer):
    """Keeps the gradient of a step, before clipping."""

    def _update(self, sums):
        self.gradient = sums.scale * gradient(self.model)
        return super()._update(sums)


def gradient(model: NextBlockModel) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def fresh(changes: dict, micro_batch_size: int | None, source: ToySource) -> tuple[Recording, Step]:
    config = settings({**PREFIX, **changes, "train.micro_batch_size": micro_batch_size})
    return Recording(config, CPU, None), take(loader(source, micro_batch_size), 1)[0]


@pytest.mark.parametrize(("prefix", "distances"), [(False, 2), (True, 1), (True, 3)])
@pytest.mark.parametrize("micro_batch_size", [None, 4, 3, 1])
@pytest.mark.parametrize("bad", [(), (0, 2, 3, 6)])
def test_loss_and_gradient_are_those_of_the_whole_batch(micro_batch_size, bad, prefix, distances):
    changes = {"model.num_predicted_blocks": distances, "model.prefix": prefix}
    trainer, step = fresh(changes, micro_batch_size, ToySource(8, bad=bad))
    images = torch.cat([batch.images for batch in step.micro_batches])
    samples = torch.cat([batch.samples for batch in step.micro_batches])
    lengths = draw(samples.tolist()) if prefix else None
    loss = trainer.model(trainer.to_model(images), None, lengths).loss
    loss.backward()
    expected = gradient(trainer.model)
    trainer.optimizer.zero_grad()

    outcome = trainer.train_step(step, lr=1e-3)

    assert outcome.images == 8 - len(bad)
    assert outcome.loss == pytest.approx(loss.item(), rel=1e-6)
    assert outcome.grad_norm == pytest.approx(expected.norm().item(), rel=1e-5)
    torch.testing.assert_close(trainer.gradient, expected, rtol=1e-4, atol=1e-7)


def test_under_drop_path_a_step_depends_on_neither_micro_batches_nor_ranks():
    changes = {"model.drop_path": 0.5, "model.depth": 4, "model.prefix": False}
    config, source = settings({**PREFIX, **changes}), ToySource(8)
    losses, gradients = [], []
    for micro_batch_size, world_size in ((None, 1), (3, 1), (1, 1), (None, 2)):
        trainer = Trainer(config, CPU, None)
        for parameter in trainer.model.parameters():
            parameter.data.mul_(8)  # else a fresh model's branches are next to nothing
        loss = torch.zeros(())
        for rank in range(world_size):
            ranks = {"rank": rank, "world_size": world_size, "drop_path_draws": 8}
            for batch in take(loader(source, micro_batch_size, **ranks), 1)[0].micro_batches:
                loss += trainer._backward(batch, (torch.arange(16), None), [8 * 15], is_last=True)
        losses.append(loss.item())
        gradients.append(gradient(trainer.model))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)
    for other in gradients:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-7)
    trainer.model.eval()
    (whole,) = take(loader(source, None), 1)[0].micro_batches
    assert trainer.model(trainer.to_model(whole.images)).loss.item() != pytest.approx(losses[0], rel=1e-3)


def test_a_batch_without_a_readable_image_changes_nothing():
    trainer, step = fresh({}, 3, ToySource(8, bad=range(8)))
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    assert trainer.train_step(step, lr=1e-3).images == 0
    assert same(trainer.model.state_dict(), before)


def test_the_validation_loss_is_over_all_kept_blocks_with_the_prefixes_of_visit_0():
    changes = {**PREFIX, "model.num_predicted_blocks": 2, "model.norm_pixels": False}
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
    _, seen, _ = drawn("7st", {**PREFIX, "data.workers": workers, "train.micro_batch_size": 3})
    steps = take(loader(ToySource(40), micro_batch_size=3), 7)
    keys = [(batch.visits.tolist(), batch.samples.tolist()) for step in steps for batch in step.micro_batches]
    assert [*seen] == [draw_prefix_lengths(0, *of_batch, 16).tolist() for of_batch in keys]
    assert len({(*seen[at], *seen[at + 1]) for at in range(0, 21, 3)}) == 7, "no step repeats another's"
    samples = chain(*(samples for _, samples in keys))
    of_image = set(zip(samples, chain(*seen), strict=True))
    assert max(Counter(sample for sample, _ in of_image).values()) == 2, "another length at another visit"
