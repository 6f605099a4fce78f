"""Permutations without a table: as large as a list may get, and still permutations."""

from __future__ import annotations

import numpy as np
import pytest

from nextblock.data import keyed, order
from nextblock.data.keyed import keyed_permutation, permuted
from nextblock.data.order import MixtureOrder, step_samples


def whole(length, seed=3, visit=0):
    return permuted(seed, length, np.arange(length), "order", visit)


@pytest.fixture
def no_tables(monkeypatch):
    monkeypatch.setattr(keyed, "MAX_TABLE", 0)
    monkeypatch.setattr(order, "MAX_TABLE", 0)


def test_a_short_one_is_the_tables():
    assert np.array_equal(whole(1000), keyed_permutation(3, 1000, "order", 0))


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
    assert np.array_equal(permuted(3, 1000, places, "order", 0), whole(1000)[places])


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
    visit, samples = step_samples(0, 2_000_000_000, 4096, 1_000_000)
    assert visit == 2
    assert len(set(samples.tolist())) == 4096
    assert samples.min() >= 0
    assert samples.max() < 2_000_000_000


def test_a_mixture_with_two_billion_images_is_drawn_without_a_table():
    mixture = MixtureOrder((2_000_000_000, 1000), (800, 200), seed=0, batch_size=100)
    samples = np.concatenate([mixture.keys(step).samples for step in range(10)])
    assert (samples >= 2_000_000_000).sum() == 200
    assert len(set(samples.tolist())) == 1000


@pytest.mark.usefixtures("no_tables")
def test_a_mixture_without_tables_goes_through_every_source():
    mixture = MixtureOrder((30, 20), (30, 20), seed=0, batch_size=10)
    samples = np.concatenate([mixture.keys(step).samples for step in range(5)])
    assert sorted(samples.tolist()) == list(range(50))
