"""A mixture holds exact shares of its sources, each gone through visit by visit, wherever a run was cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from nextblock.config import DataConfig
from nextblock.data import (
    ConcatSource,
    MixtureOrder,
    VisitOrder,
    keyed_permutation,
    open_sources,
)
from nextblock.data.order import sample_order, shares
from tiny_runs import write_images
from toy import ToySource

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(val_resize_px=16)
SEED = 5


def mixture(*sizes: int, bad: Sequence[int] = ()) -> ConcatSource:
    """Toy sources of these sizes; `bad` ones of the first cannot be read."""
    return ConcatSource([ToySource(size, seed=i, bad=() if i else bad) for i, size in enumerate(sizes)])


def keys(order: MixtureOrder | VisitOrder, steps: int) -> list[tuple[int, int]]:
    """(visit, sample) of the first steps, in order."""
    drawn = [order.keys(step) for step in range(steps)]
    return [pair for one in drawn for pair in zip(one.visits.tolist(), one.samples.tolist(), strict=True)]


# ----------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ((4, 1), 12, (10, 2)),  # 9.6 and 2.4
        ((1, 1, 1), 8, (3, 3, 2)),  # equal remainders: the first win
        ((0.1, 0.2, 0.7), 10, (1, 2, 7)),
        ((0.999, 0.001), 32, (32, 0)),
    ],
)
def test_shares_are_rounded_down_and_the_largest_remainders_get_one_more(weights, total, expected):
    assert shares(weights, total) == expected


# ------------------------------------------------------------------------------------------------ order


def slow_mixture(sizes: Sequence[int], counts: Sequence[int], epochs: int) -> list[tuple[int, int]]:
    """(visit, sample) of whole epochs by definition: shuffled cards with a source's number, endless decks."""
    positions = [0] * len(sizes)
    drawn = []
    for epoch in range(epochs):
        cards = [i for i, count in enumerate(counts) for _ in range(count)]
        for card in keyed_permutation(SEED, len(cards), "mixture", epoch).tolist():
            i = cards[card]
            visit, within = divmod(positions[i], sizes[i])
            deck = keyed_permutation(SEED, sizes[i], "mixture-order", i, visit)
            drawn.append((visit, sum(sizes[:i]) + int(deck[within])))
            positions[i] += 1
    return drawn


@pytest.mark.parametrize(
    ("sizes", "counts", "batch_size"),
    [
        ((30, 7), (25, 7), 8),  # about once an epoch
        ((40, 3), (12, 12), 8),  # the small one four times an epoch, within a batch again
        ((5, 5, 5), (1, 2, 3), 3),
        ((100, 1), (4, 1), 5),  # one image, one batch an epoch
        ((9,), (4,), 2),  # one source, less than once an epoch
    ],
)
def test_the_order_is_that_of_the_slow_definition(sizes, counts, batch_size):
    order = MixtureOrder(sizes, counts, seed=SEED, batch_size=batch_size)
    assert order.steps_per_epoch == sum(counts) // batch_size
    expected = slow_mixture(sizes, counts, epochs=6)
    assert keys(order, 6 * order.steps_per_epoch) == expected
    for step in reversed(range(6 * order.steps_per_epoch)):  # nothing depends on what was asked before
        here = expected[step * batch_size : (step + 1) * batch_size]
        assert order.keys(step).samples.tolist() == [sample for _, sample in here]
        drawn = [sample for _, sample in expected[: step * batch_size]]
        assert order.seen(step)[0] == sum(sample < sizes[0] for sample in drawn)


def test_a_step_far_away_costs_no_more():
    order = MixtureOrder((30, 7), (25, 7), seed=SEED, batch_size=8)
    epoch, visits, samples = order.keys(4 * 10**9)
    assert epoch == 10**9
    assert set(visits[samples < 30].tolist()) <= {25 * 10**9 // 30, 25 * 10**9 // 30 + 1}
    assert order.seen(4 * 10**9) == (25 * 10**9, 7 * 10**9)


# ---------------------------------------------------------------------------------- which order a run has


def test_one_source_is_gone_through_as_ever():
    source = ToySource(20)
    for data in (DATA, replace(DATA, weights=(3.0,))):
        order = sample_order(source, data, seed=SEED, batch_size=6)
        assert isinstance(order, VisitOrder)
        assert order.steps_per_epoch == 3
        for step in range(7):
            epoch, visits, samples = order.keys(step)
            expected = keyed_permutation(SEED, 20, "order", step // 3)[6 * (step % 3) :][:6]
            assert (epoch, samples.tolist()) == (step // 3, expected.tolist())
            assert visits.tolist() == [epoch] * 6


def test_one_source_may_have_epochs_of_any_length():
    for samples, steps in ((12, 2), (17, 2), (60, 10)):
        order = sample_order(ToySource(20), replace(DATA, epoch_samples=samples), seed=SEED, batch_size=6)
        assert isinstance(order, MixtureOrder)
        assert order.steps_per_epoch == steps
        drawn = keys(order, 10)
        for visit in range(3):
            seen = [sample for at, sample in drawn if at == visit]
            assert sorted(seen) == list(range(20))


@pytest.mark.parametrize(
    ("changes", "steps", "counts"),
    [
        ({}, 4, (26, 6)),  # 37 images, of which 32 are whole batches, by their numbers
        ({"weights": (0.8, 0.2)}, 4, (26, 6)),
        ({"weights": (1, 1)}, 4, (16, 16)),
        ({"weights": (0.75, 0.25), "epoch_samples": 100}, 12, (72, 24)),
    ],
)
def test_an_epoch_is_as_asked_down_to_whole_batches(changes, steps, counts):
    order = sample_order(mixture(30, 7), replace(DATA, **changes), seed=SEED, batch_size=8)
    assert order.steps_per_epoch == steps
    assert order.seen(steps) == counts


def test_fewer_images_than_a_batch_are_the_batch_with_a_warning(caplog):
    with caplog.at_level(logging.WARNING, logger="nextblock"):
        order = sample_order(mixture(5, 2), DATA, seed=SEED, batch_size=8)
    assert (order.batch_size, order.steps_per_epoch, order.seen(1)) == (7, 1, (5, 2))
    assert "toy-0 + toy-1 has 7 images, fewer than the batch of 8" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": (0.999, 0.001)}, "'toy-1' has weight 0.001 of 1, which is not one of the 32 samples"),
        ({"epoch_samples": 7}, "data.epoch_samples is 7, less than one batch of 8"),
    ],
)
def test_a_share_of_no_sample_and_an_epoch_of_no_batch_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        sample_order(mixture(30, 7), replace(DATA, **changes), seed=SEED, batch_size=8)
    assert message in str(caught.value)


# -------------------------------------------------------------------------------------------- the source


def test_images_names_and_labels_are_those_of_the_parts():
    first, second = ToySource(5, seed=0), ToySource(3, seed=1, shuffled=True)
    both = ConcatSource([first, second])
    assert (len(both), both.in_memory) == (8, True)
    assert [both.name(index) for index in (4, 5)] == ["toy-0: toy-0[4]", "toy-1: toy-1[0]"]
    for index in range(8):
        part, within = (first, index) if index < 5 else (second, index - 5)
        assert torch.equal(both.read(index), part.read(within))
    assert both.labels.tolist() == [*first.labels.tolist(), *second.labels.tolist()]
    assert both.class_names == first.class_names
    with pytest.raises(ValueError, match="its sources have different classes"):
        _ = ConcatSource([first, ToySource(5, class_names=("x", "b", "c", "d"))]).labels
    assert ConcatSource([second, first]).fingerprint != both.fingerprint
    for index in (-1, 8):
        with pytest.raises(IndexError):
            both.read(index)


def test_a_directory_under_two_names_is_one_source(tmp_path):
    write_images(tmp_path, 2)
    with pytest.raises(ValueError, match=r"twice; name each source once"):
        open_sources([str(tmp_path), f"{tmp_path}/"], DataConfig())
