"""Several sources as one: their images numbered one after the other, and how an epoch draws on them."""

from __future__ import annotations

import hashlib
import logging
import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data.order import MixtureOrder, SampleOrder, VisitOrder, shares
from nextblock.data.sources import Labels, Source, open_source

__all__ = ["ConcatSource", "open_sources", "parts_of", "sample_order"]

log = logging.getLogger(__name__)


class ConcatSource(Source):
    """The images of several sources; image i of a part has the number i plus the sizes of those before it."""

    def __init__(self, parts: Sequence[Source]) -> None:
        assert len(parts) >= 2
        self.parts = tuple(parts)
        self.spec = " + ".join(part.spec for part in parts)
        self.in_memory = all(part.in_memory for part in parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def has_labels(self) -> bool:
        """Whether every part has labels, of the same classes."""
        return all(part.has_labels for part in self.parts) and len(self._classes()) == 1

    def _classes(self) -> set[tuple[str, ...]]:
        return {part.class_names for part in self.parts}

    def _locate(self, index: int) -> tuple[Source, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)

    def content(self, index: int) -> bytes | None:
        """The encoded file as it lies, None where images are no files; `BadImageError` where unreadable."""
        self._check(index)
        part, within = self._locate(index)
        return part.content(within)

    def _read(self, index: int) -> Tensor:
        part, within = self._locate(index)
        return part.read(within)

    def _name(self, index: int) -> str:
        part, within = self._locate(index)
        return f"{part.spec}: {part.name(within)}"

    def _find_labels(self) -> Labels:
        for part in self.parts:
            if not part.has_labels:
                raise ValueError(f"{self.spec!r} has no labels, as {part.spec!r} has none")
        if len(self._classes()) > 1:
            raise ValueError(f"{self.spec!r} has no labels: its sources have different classes")
        return np.concatenate([part.labels for part in self.parts]), self.parts[0].class_names

    def _make_fingerprint(self) -> str:
        text = "\n".join(part.fingerprint for part in self.parts)
        return f"mixture-{len(self)}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"


def open_sources(specs: Sequence[str], data: DataConfig) -> Source:
    """Open what the specs name: one source as it is, several as a mixture; none of them twice."""
    places = [str(Path(spec).resolve()) if Path(spec).exists() else spec for spec in specs]
    twice = next((spec for i, spec in enumerate(specs) if places[i] in places[:i]), None)
    if twice is not None:
        raise ValueError(
            f"data.train names {twice!r} twice; name each source once, with a larger share in data.weights"
        )
    parts = [open_source(spec, data) for spec in specs]
    return parts[0] if len(parts) == 1 else ConcatSource(parts)


def parts_of(source: Source) -> tuple[Source, ...]:
    """The sources of a mixture, or the one source itself."""
    return source.parts if isinstance(source, ConcatSource) else (source,)


def sample_order(source: Source, data: DataConfig, *, seed: int, batch_size: int) -> SampleOrder:
    """The order that a run trains in: of a mixture, or of one source, gone through visit by visit.

    A mixture's epoch is `data.epoch_samples`, or as many as there are images, down to whole batches; of these
    every source gets its exact share. One source with `data.epoch_samples` is a mixture of one. Raises
    `ValueError` where an epoch is no batch, or a source's share no sample.
    """
    if data.epoch_samples is not None and data.epoch_samples < batch_size:
        raise ValueError(
            f"data.epoch_samples is {data.epoch_samples}, less than one batch of {batch_size}; make it at "
            f"least {batch_size}, or train.batch_size smaller"
        )
    total = len(source) if data.epoch_samples is None else data.epoch_samples
    if total < batch_size:
        log.warning(
            "%s has %d images, fewer than the batch of %d: the batch becomes all of them",
            source.spec,
            total,
            batch_size,
        )
        batch_size = total
    parts = parts_of(source)
    if len(parts) == 1 and data.epoch_samples is None:
        return VisitOrder(len(source), seed=seed, batch_size=batch_size)
    counts = _counts(parts, data, total - total % batch_size, batch_size)
    return MixtureOrder([len(part) for part in parts], counts, seed=seed, batch_size=batch_size)


def _counts(parts: Sequence[Source], data: DataConfig, epoch: int, batch_size: int) -> tuple[int, ...]:
    """How many of an epoch's samples each source gives."""
    weights = data.weights if data.weights is not None and len(parts) > 1 else [len(part) for part in parts]
    assert len(weights) == len(parts), "DataConfig checks that"
    counts = shares(weights, epoch)
    for part, weight, count in zip(parts, weights, counts, strict=True):
        if count == 0:
            enough = math.ceil(math.ceil(sum(weights) / weight) / batch_size) * batch_size
            raise ValueError(
                f"{part.spec!r} has weight {weight:g} of {sum(weights):g}, which is not one of the {epoch} "
                f"samples of an epoch; raise its share in data.weights, or data.epoch_samples to {enough}"
            )
    return counts
