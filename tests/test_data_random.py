"""Numbers by name, the same for ever; permutations without a table, as large as a list may get."""

from __future__ import annotations

import numpy as np
import pytest

from nextblock.data import VisitOrder
from nextblock.data import random as keyed
from nextblock.data.random import Permutation, keyed_permutation, keyed_rng, keyed_seed

PINNED_SEEDS = (2585821359639973777, 4695500815337499223)
PINNED_RANDOM = [0.26523067267353884, 0.9802260876939085, 0.3684862270489899]
PINNED_ORDER = [6, 1, 2, 9, 5, 8, 4, 3, 0, 7]


def whole(length, seed=3, visit=0):
    return Permutation(seed, length, "order", visit)[np.arange(length)]


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(keyed, "MAX_TABLE", 0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 1000, 4096, 4097, 70_000])
@pytest.mark.usefixtures("no_tables")
def test_every_number_comes_once(length):
    assert np.array_equal(np.sort(whole(length)), np.arange(length))


@pytest.mark.usefixtures("no_tables")
def test_it_is_a_function_of_seed_and_visit_and_of_each_place_alone():
    assert np.array_equal(whole(1000), whole(1000))
    assert not np.array_equal(whole(1000), whole(1000, seed=4))
    assert not np.array_equal(whole(1000), whole(1000, visit=1))
    places = np.array([999, 0, 500])
    assert np.array_equal(Permutation(3, 1000, "order", 0)[places], whole(1000)[places])


@pytest.mark.usefixtures("no_tables")
def test_it_mixes_as_chance_would():
    """Neighbours do not stay neighbours, and numbers land in every tenth alike."""
    length = 40_000
    shuffled = whole(length)
    assert abs(np.corrcoef(np.arange(length), shuffled)[0, 1]) < 0.02
    assert abs(np.corrcoef(shuffled[:-1], shuffled[1:])[0, 1]) < 0.02
    counts = np.histogram2d(np.arange(length), shuffled, bins=10)[0]
    chi_square = ((counts - length / 100) ** 2 / (length / 100)).sum()
    assert 40 < chi_square < 140  # 81 degrees of freedom


def test_a_step_of_two_billion_images_is_drawn_without_a_table():
    visit, _, samples = VisitOrder(2_000_000_000, seed=0, batch_size=4096).keys(1_000_000)
    assert visit == 2
    assert len(set(samples.tolist())) == 4096
    assert samples.min() >= 0
    assert samples.max() < 2_000_000_000


# ------------------------------------------------------------------------------------------ numbers by name


def test_keyed_numbers_are_the_same_for_ever_and_everywhere() -> None:
    assert keyed_seed(0, "order", 0) == PINNED_SEEDS[0]
    assert keyed_seed(2**40, "augment", 3, 1_000_000_007) == PINNED_SEEDS[1]
    assert keyed_rng(0, "augment", 1, 2).random(3).tolist() == PINNED_RANDOM
    assert keyed_permutation(7, 10, "order", 3).tolist() == PINNED_ORDER


def test_different_keys_share_no_seed() -> None:
    keys = [
        (seed, purpose, *numbers) for seed in range(5) for purpose in "ab" for numbers in ((), (1,), (2,))
    ]
    keys += [(0, "a", 1, 2), (0, "a", 12), (0, "a", 1, 2, 0), (11, "a", 2), (0, "a1", 2), (0, "a0,1")]
    assert len({keyed_seed(*key) for key in keys}) == len(keys)
    assert 2**60 < max(keyed_seed(*key) for key in keys) < 2**63
    assert len({float(keyed_rng(*key).random()) for key in keys}) == len(keys)
