"""The samples of a training step, as a function of the seed and the step's number alone.

One source is traversed in a new order at every visit (`VisitOrder`). A mixture takes a fixed number of
samples from each of its sources every epoch (`MixtureOrder`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, Integer

from nextblock.config import DataConfig
from nextblock.data.random import Permutation, keyed_permutation
from nextblock.data.sources.base import Source
from nextblock.errors import UsageError

log = logging.getLogger(__name__)


class StepKeys(NamedTuple):
    """The samples of a step. With the seed, (visit, sample) decides how an image is cropped."""

    epoch: int
    visits: Int64[np.ndarray, " b"]
    """How often each sample's source had been traversed before."""
    samples: Int64[np.ndarray, " b"]


class VisitOrder:
    """One source of `n` images: an epoch is one visit, without the last incomplete batch."""

    def __init__(self, n: int, *, seed: int, batch_size: int) -> None:
        if not 1 <= batch_size <= n:
            raise UsageError(f"a batch of {batch_size} out of {n} images; use 1 to {n}")
        self.batch_size = batch_size
        self.steps_per_epoch = n // batch_size
        # Workers prefetch, so requests alternate between the end of one visit and the start of the next.
        self._visit = lru_cache(maxsize=2)(lambda visit: Permutation(seed, n, "order", visit))

    def keys(self, step: int) -> StepKeys:
        """The step's slice of the visit's order."""
        # The incomplete last batch of a visit is dropped, so visits begin at whole steps. Every visit has its
        # own order, so it drops other images.
        visit, place = divmod(step, self.steps_per_epoch)
        positions = np.arange(place * self.batch_size, (place + 1) * self.batch_size, dtype=np.int64)
        return StepKeys(visit, np.full(self.batch_size, visit, dtype=np.int64), self._visit(visit)[positions])

    def seen(self, step: int) -> tuple[int, ...]:
        """Samples of each source used before this step."""
        return (step * self.batch_size,)


class MixtureOrder:
    """Sources of the given `sizes`; every epoch contains `counts` samples of each.

    A source is an endless stream: its permutation at visit 0, then that of visit 1, and so on. An epoch takes
    the next `counts[i]` samples of stream i, so no image repeats before its visit is over. Nothing is
    dropped: an epoch is a whole number of batches.
    """

    def __init__(self, sizes: Sequence[int], counts: Sequence[int], *, seed: int, batch_size: int) -> None:
        assert len(sizes) == len(counts) and min(sizes) >= 1 and sum(counts) % batch_size == 0
        self.batch_size = batch_size
        self.steps_per_epoch = sum(counts) // batch_size
        self._sizes, self._counts, self._seed = tuple(sizes), tuple(counts), seed
        self._offsets = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._pattern = lru_cache(maxsize=2)(self._make_pattern)
        self._visit = lru_cache(maxsize=2 * len(sizes))(
            lambda source, visit: Permutation(seed, self._sizes[source], "mixture-order", source, visit)
        )

    def keys(self, step: int) -> StepKeys:
        """The step's samples: each source's stream fills its places in the epoch's pattern."""
        epoch, place = divmod(step, self.steps_per_epoch)
        pattern, before = self._pattern(epoch)
        sources = pattern[place * self.batch_size : (place + 1) * self.batch_size]
        visits, samples = (np.empty(self.batch_size, dtype=np.int64) for _ in range(2))
        for i, size in enumerate(self._sizes):
            places = np.flatnonzero(sources == i)
            # Start of this step in stream i: earlier epochs, then earlier steps of this epoch.
            first = epoch * self._counts[i] + int(before[place, i])
            stream = np.arange(first, first + len(places), dtype=np.int64)
            # Position p of the endless stream is position p % size of visit p // size. There is no running
            # count, so any step of any epoch costs the same.
            visits[places], within = np.divmod(stream, size)
            # A step may cross the end of a visit, or several of a small source; each has its own permutation.
            for visit in np.unique(visits[places]).tolist():
                chosen = visits[places] == visit
                samples[places[chosen]] = self._offsets[i] + self._visit(i, visit)[within[chosen]]
        return StepKeys(epoch, visits, samples)

    def seen(self, step: int) -> tuple[int, ...]:
        """Samples of each source used before this step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        part = self._pattern(epoch)[1][place].tolist() if place else [0] * len(self._counts)
        return tuple(epoch * count + more for count, more in zip(self._counts, part, strict=True))

    def _make_pattern(
        self, epoch: int
    ) -> tuple[Integer[np.ndarray, " epoch"], Int64[np.ndarray, "steps sources"]]:
        """The source of each place in the epoch, and per step the samples of each source in earlier steps."""
        # In a shuffled range, the counts[0] smallest numbers stand for source 0, the next counts[1] for
        # source 1, and so on. Every source gets exactly its count, and every batch mixes the sources.
        try:
            shuffled = keyed_permutation(self._seed, sum(self._counts), "mixture", epoch)
        except MemoryError as error:
            how = "make data.epoch_samples smaller"
            raise UsageError(f"no memory for an epoch of {sum(self._counts):,} samples; {how}") from error
        pattern = np.searchsorted(np.cumsum(self._counts), shuffled, side="right")
        pattern = pattern.astype(np.min_scalar_type(len(self._counts)))
        by_step = pattern.reshape(self.steps_per_epoch, self.batch_size)
        counts = np.stack([(by_step == i).sum(1) for i in range(len(self._counts))], axis=1)
        # An exclusive sum: only the steps before each step.
        return pattern, np.cumsum(counts, axis=0) - counts


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Divide `total` in proportion to the weights, by largest remainders; the first wins a tie."""
    # Weights are exact decimals: 0.8 and 0.2 of 10 are 8 and 2, not 7.999… and 2.
    exact = [Fraction(str(weight)) for weight in weights]
    quotas = [weight * total / sum(exact) for weight in exact]
    counts = [int(quota) for quota in quotas]
    # Rounding down leaves a remainder below len(weights), which goes to those that lost most.
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def sample_order(
    source: Source, data: DataConfig, *, seed: int, batch_size: int
) -> VisitOrder | MixtureOrder:
    """The order of a run's samples: of one source, visit by visit, or of a mixture.

    A mixture's epoch is `data.epoch_samples`, or the number of images, rounded down to whole batches. One
    source with `data.epoch_samples` is a mixture of one. Raises `ValueError` if an epoch is less than a
    batch, or a source's share less than a sample.
    """
    if data.epoch_samples is not None and data.epoch_samples < batch_size:
        raise UsageError(
            f"data.epoch_samples is {data.epoch_samples}, less than one batch of {batch_size}; make it at "
            f"least {batch_size}, or train.batch_size smaller"
        )
    total = len(source) if data.epoch_samples is None else data.epoch_samples
    if total < batch_size:
        log.warning(
            "%s has %d images, fewer than the batch of %d: a batch is all of them",
            source.spec,
            total,
            batch_size,
        )
        batch_size = total
    parts = source.parts
    if len(parts) == 1 and data.epoch_samples is None:
        return VisitOrder(len(source), seed=seed, batch_size=batch_size)
    # Whole batches only, so that every epoch has the same number of each source and drops nothing.
    epoch = total - total % batch_size
    weights = data.weights if data.weights is not None and len(parts) > 1 else [len(part) for part in parts]
    counts = shares(weights, epoch)
    for part, weight, count in zip(parts, weights, counts, strict=True):
        if count == 0:
            # Enough for one sample of this weight, rounded up to whole batches.
            share = Fraction(str(weight)) / sum(Fraction(str(each)) for each in weights)
            enough = -(-math.ceil(1 / share) // batch_size) * batch_size
            longer = f", or data.epoch_samples to {enough}" if enough < 1e9 else ""
            raise UsageError(
                f"{part.spec!r} has weight {weight:g} of {sum(weights):g}, which is not one of the {epoch} "
                f"samples of an epoch; raise its share in data.weights{longer}"
            )
    order = MixtureOrder([len(part) for part in parts], counts, seed=seed, batch_size=batch_size)
    order.keys(0)  # drawn now, not within the run: an epoch may be too long for the memory
    return order
