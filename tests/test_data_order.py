"""A mixture holds exact shares of its sources, each gone through visit by visit, wherever a run was cut."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data import (
    ConcatSource,
    MixtureOrder,
    Source,
    Step,
    TrainLoader,
    VisitOrder,
    eval_batches,
    keyed_permutation,
    keyed_rng,
    open_sources,
)
from nextblock.data.augment import train_crop
from nextblock.data.order import sample_order, shares
from tiny_runs import write_images
from toy import ToySource, take

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(val_resize_px=16)
SEED = 5


def mixture(*sizes: int, bad: Sequence[int] = ()) -> ConcatSource:
    """Toy sources of these sizes; `bad` ones of the first cannot be read."""
    return ConcatSource([ToySource(size, seed=i, bad=() if i else bad) for i, size in enumerate(sizes)])


def loader(source: Source, data: DataConfig = DATA, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"image_size": 8, "seed": SEED, "batch_size": 8}
    return TrainLoader(source, data, **settings | options)


def keys(order: MixtureOrder | VisitOrder, steps: int) -> list[tuple[int, int]]:
    """(visit, sample) of the first steps, in order."""
    drawn = [order.keys(step) for step in range(steps)]
    return [pair for one in drawn for pair in zip(one.visits.tolist(), one.samples.tolist(), strict=True)]


def flat(steps: list[Step]) -> list[Tensor]:
    """Images, samples and visits of some steps."""
    batches = [batch for step in steps for batch in step.micro_batches]
    return [
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "samples", "visits")
    ]


# ----------------------------------------------------------------------------------------------- shares


@pytest.mark.parametrize(
    ("weights", "total", "expected"),
    [
        ((0.8, 0.2), 10, (8, 2)),
        ((0.8, 0.2), 1000, (800, 200)),
        ((4, 1), 12, (10, 2)),  # 9.6 and 2.4
        ((1, 1, 1), 8, (3, 3, 2)),  # equal remainders: the first win
        ((0.1, 0.2, 0.7), 10, (1, 2, 7)),
        ((30, 7), 32, (26, 6)),  # 25.9 and 6.1
        ((0.999, 0.001), 32, (32, 0)),
        ((5.0,), 7, (7,)),
    ],
)
def test_shares_are_rounded_down_and_the_largest_remainders_get_one_more(weights, total, expected):
    assert shares(weights, total) == expected


def test_shares_add_up_and_are_off_by_less_than_one():
    rng = np.random.default_rng(0)
    for _ in range(200):
        weights = rng.uniform(0.01, 1, rng.integers(1, 6)).tolist()
        total = int(rng.integers(1, 10**9))
        counts = shares(weights, total)
        assert sum(counts) == total
        assert all(
            abs(count - weight / sum(weights) * total) < 1.001
            for count, weight in zip(counts, weights, strict=True)
        )


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
    for step in reversed(range(6 * order.steps_per_epoch)):  # nothing hangs on what was asked before
        here = expected[step * batch_size : (step + 1) * batch_size]
        assert order.keys(step).samples.tolist() == [sample for _, sample in here]


def test_every_epoch_holds_the_same_exact_number_of_each_source():
    order = MixtureOrder((30, 7), (26, 6), seed=SEED, batch_size=8)
    for epoch in range(5):
        steps = range(epoch * 4, epoch * 4 + 4)
        from_first = sum(int((order.keys(step).samples < 30).sum()) for step in steps)
        assert from_first == 26
        assert {order.keys(step).epoch for step in steps} == {epoch}


def test_no_image_comes_again_before_its_visit_is_over():
    order = MixtureOrder((30, 7), (24, 24), seed=SEED, batch_size=8)
    drawn = keys(order, 60)
    for first, size in ((0, 30), (30, 7)):
        stream = [(visit, sample) for visit, sample in drawn if first <= sample < first + size]
        for start in range(0, len(stream) - size, size):
            visits, samples = zip(*stream[start : start + size], strict=True)
            assert set(visits) == {start // size}
            assert sorted(samples) == list(range(first, first + size))
    assert max(visit for visit, _ in drawn) == 240 // 7


def test_epochs_and_seeds_interleave_differently():
    def pattern(epoch: int, seed: int = SEED) -> list[bool]:
        order = MixtureOrder((50, 50), (32, 32), seed=seed, batch_size=64)
        return (order.keys(epoch).samples < 50).tolist()

    assert len({tuple(pattern(epoch)) for epoch in range(5)} | {tuple(pattern(0, seed=6))}) == 6


def test_sources_of_one_size_have_orders_of_their_own():
    drawn = keys(MixtureOrder((20, 20), (20, 20), seed=SEED, batch_size=40), 1)
    first, second = ([sample % 20 for _, sample in drawn if sample // 20 == i] for i in (0, 1))
    assert sorted(first) == sorted(second)
    assert first != second


def test_what_was_seen_is_what_was_drawn():
    order = MixtureOrder((30, 7), (25, 7), seed=SEED, batch_size=8)
    counts = Counter({0: 0, 1: 0})
    for step in range(13):
        assert order.seen(step) == (counts[0], counts[1])
        counts.update((order.keys(step).samples >= 30).astype(int).tolist())
    assert VisitOrder(30, seed=SEED, batch_size=8).seen(5) == (40,)


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
        (
            {"weights": (0.999, 0.001)},
            "'toy-1' has weight 0.001 of 1, which is not one of the 32 samples of an epoch; raise its share "
            "in data.weights, or data.epoch_samples to 1000",
        ),
        (
            {"epoch_samples": 7},
            "data.epoch_samples is 7, less than one batch of 8; make it at least 8, or train.batch_size "
            "smaller",
        ),
    ],
)
def test_a_share_of_no_sample_and_an_epoch_of_no_batch_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        sample_order(mixture(30, 7), replace(DATA, **changes), seed=SEED, batch_size=8)
    assert message in str(caught.value)


def test_the_epoch_that_a_refusal_asks_for_is_enough():
    for weights, batch_size in (((0.999, 0.001), 8), ((1.0, 3e-4), 7), ((5.0, 0.03, 0.2), 64)):
        data = replace(DATA, weights=weights)
        source = mixture(*[9] * len(weights))
        with pytest.raises(ValueError) as caught:
            sample_order(source, replace(data, epoch_samples=batch_size), seed=0, batch_size=batch_size)
        asked = int(str(caught.value).rpartition(" ")[2])
        order = sample_order(source, replace(data, epoch_samples=asked), seed=0, batch_size=batch_size)
        assert min(order.seen(order.steps_per_epoch)) >= 1


# ----------------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def uninterrupted() -> list[Tensor]:
    """Three epochs of a mixture with holes, undivided."""
    data = replace(DATA, weights=(0.75, 0.25))
    return flat(take(loader(mixture(30, 3, bad=(4, 20)), data), 12))


def test_every_image_is_cropped_by_its_own_visit_and_sample(uninterrupted):
    source = mixture(30, 3, bad=(4, 20))
    images, samples, visits = uninterrupted
    expected = [key for key in slow_mixture((30, 3), (24, 8), 3) if key[1] not in (4, 20)]
    assert list(zip(visits.tolist(), samples.tolist(), strict=True)) == expected
    for image, sample, visit in zip(images, samples.tolist(), visits.tolist(), strict=True):
        rng = keyed_rng(SEED, "augment", visit, sample)
        assert torch.equal(image, train_crop(source.read(sample), 8, DATA, rng))
    of_one_image = images[samples == 31]
    assert len(of_one_image) == 8
    assert len({tuple(image.flatten().tolist()) for image in of_one_image}) == 8


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("stops", [(1, 5), (3, 4, 11)])
def test_a_mixture_cut_anywhere_and_loaded_by_any_number_of_workers_is_the_same(
    uninterrupted, workers, stops
):
    data = replace(DATA, weights=(0.75, 0.25))
    steps = []
    for start, end in zip((0, *stops), (*stops, 12), strict=True):
        source = mixture(30, 3, bad=(4, 20))
        part = loader(source, data, start_step=start, workers=workers, micro_batch_size=1 + 2 * workers)
        steps += take(part, end - start)
        if not workers:
            reads = sum(part.reads for part in source.parts if isinstance(part, ToySource))
            assert reads == 8 * (end - start), "nothing skipped over"
    assert [(step.index, step.keys.epoch) for step in steps] == [(index, index // 4) for index in range(12)]
    for ours, expected in zip(flat(steps), uninterrupted, strict=True):
        assert torch.equal(ours, expected)


def test_a_hole_is_named_with_its_source():
    steps = take(loader(mixture(30, 3, bad=(4,))), 4)
    (bad,) = {bad for step in steps for batch in step.micro_batches for bad in batch.bad}
    assert bad == (4, "toy-0: toy-0[4]", "truncated")


# -------------------------------------------------------------------------------------------- the source


def test_images_names_and_labels_are_those_of_the_parts():
    first, second = ToySource(5, seed=0), ToySource(3, seed=1, shuffled=True)
    both = ConcatSource([first, second])
    assert len(both) == 8
    assert both.in_memory
    assert [both.name(index) for index in (0, 4, 5, 7)] == [
        "toy-0: toy-0[0]",
        "toy-0: toy-0[4]",
        "toy-1: toy-1[0]",
        "toy-1: toy-1[2]",
    ]
    for index in range(8):
        part, within = (first, index) if index < 5 else (second, index - 5)
        assert torch.equal(both.read(index), part.read(within))
    assert both.labels.tolist() == [*first.labels.tolist(), *second.labels.tolist()]
    assert both.class_names == first.class_names
    (batch,) = eval_batches(both, DATA, 16, 8)
    assert batch.visits.tolist() == [0] * 8
    for index in (-1, 8):
        with pytest.raises(IndexError):
            both.read(index)


def test_a_mixture_has_labels_only_of_the_same_classes(tmp_path):
    other = ConcatSource([ToySource(5), ToySource(5, seed=1, class_names=("x", "b", "c", "d"))])
    assert not other.has_labels
    with pytest.raises(ValueError, match="its sources have different classes"):
        _ = other.labels
    write_images(tmp_path / "flat", 3)
    unlabelled = ConcatSource([ToySource(5), *open_sources([str(tmp_path / "flat")], DATA).parts])
    assert not unlabelled.has_labels
    assert not unlabelled.in_memory
    with pytest.raises(ValueError, match=r"has no labels, because '.*flat' has none"):
        _ = unlabelled.labels


def test_the_fingerprint_tells_parts_and_their_order():
    a, b, larger = ToySource(5), ToySource(5, seed=1), ToySource(6, seed=1)
    prints = [ConcatSource(parts).fingerprint for parts in ((a, b), (b, a), (a, larger), (a, b, larger))]
    assert len(set(prints)) == 4
    assert ConcatSource((ToySource(5), ToySource(5, seed=1))).fingerprint == prints[0]


def test_one_spec_opens_the_source_itself_and_several_a_mixture(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 3)
    specs = [str(tmp_path / "a"), str(tmp_path / "b"), "digits:split=test"]
    one, several = open_sources(specs[:1], DATA), open_sources(specs, DATA)
    assert one.parts == (one,)
    assert one.spec == specs[0]
    assert [part.spec for part in several.parts] == specs
    assert several.spec == " + ".join(specs)
    with pytest.raises(ValueError, match="there is no such directory"):
        open_sources([specs[0], str(tmp_path / "c")], DATA)


def test_a_directory_under_two_names_is_one_source(tmp_path):
    write_images(tmp_path, 2)
    with pytest.raises(ValueError, match=r"twice; name each source once"):
        open_sources([str(tmp_path), f"{tmp_path}/"], DataConfig())
