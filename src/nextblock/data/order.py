"""Which samples a training step holds: a function of the seed and of the step's number alone.

One source is gone through in an order of its own at every visit (`VisitOrder`). A mixture takes from several
sources a fixed number of samples each an epoch (`MixtureOrder`): every source is an endless stream of its
permutations, one a visit, that goes on where the epoch before left it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from nextblock.data.keyed import MAX_TABLE, keyed_permutation, permuted

__all__ = ["MixtureOrder", "SampleOrder", "StepKeys", "VisitOrder", "shares", "step_samples"]


def step_samples(seed: int, n: int, batch_size: int, step: int) -> tuple[int, np.ndarray]:
    """The visit a step belongs to, and the step's samples out of `n`, in order.

    Every visit has an order of its own and drops the last of it, the remainder of n over the batch size.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"a batch of {batch_size} out of {n} images; use 1 to {n}")
    visit, place = divmod(step, n // batch_size)
    positions = np.arange(place * batch_size, (place + 1) * batch_size, dtype=np.int64)
    return visit, permuted(seed, n, positions, "order", visit)


class StepKeys(NamedTuple):
    """What a step holds: with the seed, each (visit, sample) decides how that image is cropped."""

    epoch: int
    visits: Int64[np.ndarray, " b"]
    """How often the sample's source had been gone through before."""
    samples: Int64[np.ndarray, " b"]


class SampleOrder(ABC):
    """The samples of every step, all steps of `batch_size`."""

    batch_size: int
    steps_per_epoch: int

    @abstractmethod
    def keys(self, step: int) -> StepKeys:
        """The step's epoch, and its samples in order with their visits."""

    @abstractmethod
    def seen(self, step: int) -> tuple[int, ...]:
        """How many samples of each source the steps before this one hold."""


class VisitOrder(SampleOrder):
    """One source of `n` images: an epoch is a visit, less the last of it that fills no batch."""

    def __init__(self, n: int, *, seed: int, batch_size: int) -> None:
        self.batch_size = batch_size
        self.steps_per_epoch = n // batch_size
        self._n, self._seed = n, seed

    def keys(self, step: int) -> StepKeys:
        """The slice of the visit's order that the step holds."""
        visit, samples = step_samples(self._seed, self._n, self.batch_size, step)
        return StepKeys(visit, np.full(len(samples), visit, dtype=np.int64), samples)

    def seen(self, step: int) -> tuple[int, ...]:
        """As many as the steps hold."""
        return (step * self.batch_size,)


class MixtureOrder(SampleOrder):
    """Sources of the given `sizes`, of which every epoch holds `counts` samples each.

    Sample numbers go through the sources one after the other. In epoch e the j-th sample of source i stands
    at e*counts[i] + j of that source's stream, so no image comes again before its visit is over, and nothing
    is dropped: an epoch is a whole number of batches.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], *, seed: int, batch_size: int) -> None:
        assert len(sizes) == len(counts) and min(sizes) >= 1 and sum(counts) % batch_size == 0
        self.batch_size = batch_size
        self.steps_per_epoch = sum(counts) // batch_size
        self._sizes, self._counts, self._seed = tuple(sizes), tuple(counts), seed
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        # Workers fetch ahead, so an epoch's end and the next one's beginning are asked for in turn.
        self._pattern = lru_cache(maxsize=2)(self._make_pattern)
        self._table = lru_cache(maxsize=2 * len(self._sizes))(self._make_table)

    def keys(self, step: int) -> StepKeys:
        """Follow every source's stream through the places that the epoch's pattern gives it."""
        epoch, place = divmod(step, self.steps_per_epoch)
        pattern, before = self._pattern(epoch)
        sources = pattern[place * self.batch_size : (place + 1) * self.batch_size]
        visits, samples = (np.empty(self.batch_size, dtype=np.int64) for _ in range(2))
        for i, size in enumerate(self._sizes):
            places = np.flatnonzero(sources == i)
            first = epoch * self._counts[i] + int(before[place, i])
            visits[places], within = np.divmod(np.arange(first, first + len(places), dtype=np.int64), size)
            for visit in range(first // size, -(-(first + len(places)) // size)):
                chosen = visits[places] == visit
                samples[places[chosen]] = self._offsets[i] + self._of_visit(i, visit, within[chosen])
        return StepKeys(epoch, visits, samples)

    def seen(self, step: int) -> tuple[int, ...]:
        """Whole epochs by their counts, the part of one by its pattern."""
        epoch, place = divmod(step, self.steps_per_epoch)
        part = self._pattern(epoch)[1][place].tolist() if place else [0] * len(self._counts)
        return tuple(epoch * count + more for count, more in zip(self._counts, part, strict=True))

    def _of_visit(
        self, source: int, visit: int, positions: Int64[np.ndarray, " b"]
    ) -> Int64[np.ndarray, " b"]:
        size = self._sizes[source]
        if size <= MAX_TABLE:
            return self._table(source, visit)[positions]
        return permuted(self._seed, size, positions, "mixture-order", source, visit)

    def _make_table(self, source: int, visit: int) -> Int64[np.ndarray, " n"]:
        return keyed_permutation(self._seed, self._sizes[source], "mixture-order", source, visit)

    def _make_pattern(
        self, epoch: int
    ) -> tuple[Integer[np.ndarray, " epoch"], Int64[np.ndarray, "steps sources"]]:
        """Which source each place of the epoch draws from, and how many of each the steps before hold."""
        shuffled = keyed_permutation(self._seed, sum(self._counts), "mixture", epoch)
        pattern = np.searchsorted(np.cumsum(self._counts), shuffled, side="right")
        pattern = pattern.astype(np.min_scalar_type(len(self._counts)))
        by_step = pattern.reshape(self.steps_per_epoch, self.batch_size)
        counts = np.stack([(by_step == i).sum(1) for i in range(len(self._counts))], axis=1)
        return pattern, np.cumsum(counts, axis=0) - counts


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Divide `total` in proportion to the weights: rounded down, and the largest remainders one more each.

    Weights are taken as the decimals they print as, so that 0.8 and 0.2 of 10 are 8 and 2; of equal
    remainders the first wins.
    """
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [weight * total / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)
