"""Which sample comes when: numbers by name, permutations without a table, exact shares of a mixture."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from nextblock.config import DataConfig
from nextblock.data import ConcatSource, MixtureOrder, VisitOrder, open_sources
from nextblock.data import random as keyed
from nextblock.data.order import sample_order, shares
from nextblock.data.random import Permutation, keyed_permutation, keyed_rng, keyed_seed
from tiny_runs import write_images
from toy import ToySource

DATA = DataConfig(val_resize_px=16)
SEED = 5


def test_keyed_numbers_are_the_same_for_ever_and_everywhere():
    assert keyed_seed(0, "order", 0) == 2585821359639973777
    assert keyed_seed(2**40, "augment", 3, 1_000_000_007) == 4695500815337499223
    drawn = keyed_rng(0, "augment", 1, 2).random(3).tolist()
    assert drawn == [0.26523067267353884, 0.9802260876939085, 0.3684862270489899]
    assert keyed_permutation(7, 10, "order", 3).tolist() == [6, 1, 2, 9, 5, 8, 4, 3, 0, 7]


def test_different_keys_share_no_seed():
    tails = ((), (1,), (2,))
    keys = [(seed, purpose, *numbers) for seed in range(5) for purpose in "ab" for numbers in tails]
    keys += [(0, "a", 1, 2), (0, "a", 12), (0, "a", 1, 2, 0), (11, "a", 2), (0, "a1", 2), (0, "a0,1")]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert 2**60 < max(keyed_seed(*key) for key in keys) < 2**63
    assert len({float(keyed_rng(*key).random()) for key in keys}) == len(keys)


def whole(length, seed=3, visit=0):
    return Permutation(seed, length, "order", visit)[np.arange(length)]


def test_a_permutation_without_a_table_is_a_function_of_seed_visit_and_place(monkeypatch):
    monkeypatch.setattr(keyed, "MAX_TABLE", 0)
    for length in (1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000, 4096, 4097, 70_000):
        assert np.array_equal(np.sort(whole(length)), np.arange(length))
    places = np.array([999, 0, 500])
    assert np.array_equal(Permutation(3, 1000, "order", 0)[places], whole(1000)[places])
    assert not np.array_equal(whole(1000), whole(1000, seed=4))
    assert not np.array_equal(whole(1000), whole(1000, visit=1))


def test_a_permutation_without_a_table_mixes_as_chance_would(monkeypatch):
    """Neighbours do not stay neighbours, and numbers land in every tenth alike."""
    monkeypatch.setattr(keyed, "MAX_TABLE", 0)
    length = 40_000
    shuffled = whole(length)
    assert abs(np.corrcoef(np.arange(length), shuffled)[0, 1]) < 0.02
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.02
    counts = np.histogram2d(np.arange(length), shuffled, bins=10)[0]
    chi_square = ((counts - length / 100) ** 2 / (length / 100)).sum()
    assert 40 < chi_square < 140  # 81 degrees of freedom


def test_steps_far_away_cost_no_more():
    visit, _, samples = VisitOrder(2_000_000_000, seed=0, batch_size=4096).keys(1_000_000)
    assert visit == 2
    assert len(set(samples.tolist())) == 4096
    assert 0 <= samples.min() <= samples.max() < 2_000_000_000
    order = MixtureOrder((30, 7), (25, 7), seed=SEED, batch_size=8)
    epoch, visits, samples = order.keys(4 * 10**9)
    assert epoch == 10**9
    assert set(visits[samples < 30].tolist()) <= {25 * 10**9 // 30, 25 * 10**9 // 30 + 1}
    assert order.seen(4 * 10**9) == (25 * 10**9, 7 * 10**9)


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
def test_a_mixtures_order_is_that_of_the_slow_definition(sizes, counts, batch_size):
    order = MixtureOrder(sizes, counts, seed=SEED, batch_size=batch_size)
    assert order.steps_per_epoch == sum(counts) // batch_size
    expected = slow_mixture(sizes, counts, epochs=6)
    for step in reversed(range(6 * order.steps_per_epoch)):  # nothing depends on what was asked before
        epoch, visits, samples = order.keys(step)
        here = expected[step * batch_size : (step + 1) * batch_size]
        assert (epoch, len(here)) == (step // order.steps_per_epoch, batch_size)
        assert list(zip(visits.tolist(), samples.tolist(), strict=True)) == here
        drawn = [sample for _, sample in expected[: step * batch_size]]
        assert order.seen(step)[0] == sum(sample < sizes[0] for sample in drawn)


@pytest.mark.parametrize("weights", [None, (3.0,)])
def test_an_epoch_of_one_source_is_a_visit_in_its_own_order(weights):
    order = sample_order(ToySource(20), replace(DATA, weights=weights), seed=SEED, batch_size=6)
    assert (type(order), order.steps_per_epoch, order.seen(4)) == (VisitOrder, 3, (24,))
    for step in range(7):
        epoch, visits, samples = order.keys(step)
        expected = keyed_permutation(SEED, 20, "order", step // 3)[6 * (step % 3) :][:6]
        assert (epoch, samples.tolist()) == (step // 3, expected.tolist())
        assert visits.tolist() == [epoch] * 6


def mixture(*sizes: int) -> ConcatSource:
    return ConcatSource([ToySource(size, seed=i) for i, size in enumerate(sizes)])


@pytest.mark.parametrize(
    ("source", "changes", "steps", "counts"),
    [
        (mixture(30, 7), {}, 4, (26, 6)),  # 37 images, of which 32 are whole batches, by their numbers
        (mixture(30, 7), {"weights": (0.8, 0.2)}, 4, (26, 6)),
        (mixture(30, 7), {"weights": (1, 1)}, 4, (16, 16)),
        (mixture(30, 7), {"weights": (0.75, 0.25), "epoch_samples": 100}, 12, (72, 24)),
        *((ToySource(20), {"epoch_samples": 8 * steps + 4}, steps, (8 * steps,)) for steps in (1, 2, 7)),
    ],
)
def test_an_epoch_is_as_asked_down_to_whole_batches(source, changes, steps, counts):
    order = sample_order(source, replace(DATA, **changes), seed=SEED, batch_size=8)
    assert (type(order), order.steps_per_epoch, order.seen(steps)) == (MixtureOrder, steps, counts)


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
        ({"weights": (1e300, 1e-300)}, "samples of an epoch; raise its share in data.weights"),
        ({"epoch_samples": 7}, "data.epoch_samples is 7, less than one batch of 8"),
    ],
)
def test_a_share_of_no_sample_and_an_epoch_of_no_batch_are_refused(changes, message):
    with pytest.raises(ValueError) as caught:
        sample_order(mixture(30, 7), replace(DATA, **changes), seed=SEED, batch_size=8)
    assert message in str(caught.value)


def test_an_epoch_beyond_the_memory_is_refused():
    data = replace(DATA, epoch_samples=10**15)
    with pytest.raises(ValueError, match="no memory for an epoch of 1,000,000,000,000,000 samples; make"):
        sample_order(mixture(30, 7), data, seed=SEED, batch_size=8)


def test_images_names_and_labels_of_a_mixture_are_those_of_its_parts():
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
        open_sources([str(tmp_path), f"{tmp_path}/"], DATA)
