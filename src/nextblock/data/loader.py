"""Batches in an order that is a function of the seed alone.

A training step's samples are f(seed, step), see `order`, and an image's crop is f(seed, visit, sample), so
neither hangs on the number of worker processes, on the size of the micro-batches, or on where a run was cut:
starting at step one million costs what starting at step zero does. An unreadable image leaves a hole in its
batch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextblock.config import DataConfig, Size, pair
from nextblock.data.augment import Decoded, train_crop, val_crop
from nextblock.data.decode import BadImageError, decode_image, jpeg_decoder
from nextblock.data.fast import fast_decode
from nextblock.data.keyed import keyed_rng
from nextblock.data.mixture import sample_order
from nextblock.data.sources import Source
from nextblock.data.workers import from_workers, start_worker

__all__ = ["BadSample", "Batch", "Crop", "Key", "Step", "TrainLoader", "eval_batches", "resolve_workers"]

log = logging.getLogger(__name__)

CHUNK = 64
"""At most this many images travel from a worker at once, so that a large batch neither waits for one worker
nor fills the shared memory; the main process joins chunks to micro-batches."""

GROUP, GROUP_BYTES = 8, 2**21
"""So many images are decoded before they are cropped, or fewer once their pixels take so many bytes: going to
and fro between the two empties the processor's caches. Where more is held at once, the C library gives memory
back to the system and takes it again, which costs more than that."""

Key = tuple[int, int]
"""(visit, sample)."""


@runtime_checkable
class Crop(Protocol):
    """What makes of a source's image one of a batch's."""

    @property
    def data(self) -> DataConfig:
        """How the images are read."""
        ...

    @property
    def image_size(self) -> Size:
        """Size of every crop."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or float32 where the crops are normalised already."""
        ...

    def decode(self, source: Source, key: Key) -> Decoded:
        """The image, to be cropped; `BadImageError` where it cannot be read."""
        ...


class BadSample(NamedTuple):
    """An image that could not be read: its number in the source, its name, and why."""

    sample: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Images, their numbers in the source, and those that are missing because they cannot be read."""

    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    """Bytes, to be normalised on the device; floats where that is done."""
    samples: Int64[Tensor, " b"]
    bad: tuple[BadSample, ...]
    visits: Int64[Tensor, " b"]
    """How often each image's source had been gone through before; 0 in evaluation."""


class Step(NamedTuple):
    """The images of one optimizer step."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.index, of no use here
    """Number of the step, from 0."""
    visit: int
    """The epoch, from 0; where there is one source, how often it had been gone through before."""
    micro_batches: list[Batch]


def resolve_workers(workers: int | None, source: Source) -> int:
    """Worker processes: as asked, else none for a source in memory, else a core each but one, up to 8."""
    if workers is not None:
        return workers
    if source.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


# ------------------------------------------------------------------------------------------------- training


class TrainLoader:
    """Endless iterator over training steps, beginning at `start_step`; each `iter()` begins there again.

    `batch_size` is the global one. Of each step's samples, which hang on no number of processes, rank r of w
    gets the r-th of w contiguous parts, as equal as can be, cut into micro-batches. All ranks have as many
    micro-batches, as they meet after each; where a rank has no sample left, its micro-batches are empty.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        *,
        image_size: Size,
        seed: int,
        batch_size: int,
        micro_batch_size: int | None = None,
        start_step: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        rank: int = 0,
        world_size: int = 1,
        crop: Crop | None = None,
    ) -> None:
        micro = batch_size if micro_batch_size is None else micro_batch_size
        _check_at_least(1, batch_size=batch_size, micro_batch_size=micro, world_size=world_size)
        _check_at_least(0, start_step=start_step, workers=workers, rank=rank)
        if rank >= world_size:
            raise ValueError(f"rank is {rank} of {world_size}; ranks run from 0 to {world_size - 1}")
        self.order = sample_order(source, data, seed=seed, batch_size=batch_size)
        self.batch_size, self.steps_per_epoch = self.order.batch_size, self.order.steps_per_epoch
        self._source = source
        self._start_step = start_step
        self._workers = workers
        self._pin_memory = pin_memory
        self._crop = crop or TrainCrop(data=data, image_size=image_size, seed=seed)
        # A step's samples, as slices: of each micro-batch the chunks that the workers make.
        self._micro_batches = [
            _slices(part.start, part.stop, CHUNK) if workers else [part]
            for part in _rank_slices(self.batch_size, micro, rank, world_size)
        ]

    def __iter__(self) -> Iterator[Step]:
        chunks = from_workers(_data_loader(self._source, self._crop, self._keys(), self._workers))
        for index in count(self._start_step):
            micro_batches = [
                _join([next(chunks) for _ in slices], pin_memory=self._pin_memory)
                for slices in self._micro_batches
            ]
            yield Step(index=index, visit=index // self.steps_per_epoch, micro_batches=micro_batches)

    def _keys(self) -> Iterator[list[Key]]:
        for step in count(self._start_step):
            _, visits, samples = self.order.keys(step)
            for slices in self._micro_batches:
                for part in slices:
                    yield list(zip(visits[part].tolist(), samples[part].tolist(), strict=True))


@dataclass(frozen=True, kw_only=True)
class TrainCrop:
    """The training augmentation of one image, a function of (seed, visit, sample)."""

    data: DataConfig
    image_size: Size
    seed: int
    dtype: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        jpeg_decoder(self.data.decoder)  # refuses a decoder that is not installed, before any worker starts

    def __call__(self, image: Tensor, key: Key) -> Tensor:
        return train_crop(image, self.image_size, self.data, self._rng(key))

    def decode(self, source: Source, key: Key) -> Decoded:
        """A source's image, to be cropped; `BadImageError` where it cannot be read."""
        content = source.content(key[1]) if self.data.decoder == "fast" else None
        if content is None:
            return Decoded(source.read(key[1]), partial(self, key=key))
        decoded = fast_decode(content, self.image_size, self.data, self._rng(key))
        if decoded is not None:
            return decoded
        data = self.data
        image = decode_image(content, max_pixels=data.max_pixels, channels=data.channels)
        return Decoded(image, partial(self, key=key))

    def _rng(self, key: Key) -> np.random.Generator:
        return keyed_rng(self.seed, "augment", *key)


# ----------------------------------------------------------------------------------------------- evaluation


def eval_batches(
    source: Source,
    data: DataConfig,
    image_size: Size,
    batch_size: int,
    indices: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
) -> Iterator[Batch]:
    """Centre crops in the order of the source, or of `indices`; the last batch may be smaller."""
    _check_at_least(1, batch_size=batch_size)
    _check_at_least(0, workers=workers)
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    if len(chosen) and (chosen.min() < 0 or chosen.max() >= len(source)):
        raise ValueError(
            f"indices run from {chosen.min()} to {chosen.max()}, the source's from 0 to {len(source) - 1}"
        )
    chunk = min(batch_size, CHUNK) if workers else batch_size
    batches = [
        _slices(start, min(start + batch_size, len(chosen)), chunk)
        for start in range(0, len(chosen), batch_size)
    ]
    keys = ([(0, sample) for sample in chosen[part].tolist()] for slices in batches for part in slices)
    return _eval_batches(source, EvalCrop(data=data, image_size=image_size), keys, batches, workers)


def _eval_batches(
    source: Source, crop: EvalCrop, keys: Iterable[list[Key]], batches: list[list[slice]], workers: int
) -> Iterator[Batch]:
    chunks = from_workers(_data_loader(source, crop, keys, workers))
    for slices in batches:
        yield _join([next(chunks) for _ in slices], pin_memory=False)


@dataclass(frozen=True, kw_only=True)
class EvalCrop:
    """The crop of one image for validation."""

    data: DataConfig
    image_size: Size
    dtype: torch.dtype = torch.uint8

    def __call__(self, image: Tensor, key: Key) -> Tensor:  # noqa: ARG002 - the same at every visit
        return val_crop(image, self.image_size, self.data)

    def decode(self, source: Source, key: Key) -> Decoded:
        """A source's image, to be cropped; `BadImageError` where it cannot be read."""
        return Decoded(source.read(key[1]), partial(self, key=key))


# ---------------------------------------------------------------------------------------------------- parts


class _Images(Dataset):
    """What a worker runs: keys in, a batch out."""

    def __init__(self, source: Source, crop: Crop) -> None:
        self._source = source
        self._crop = crop
        self._shape = (crop.data.channels, *pair(crop.image_size))

    def __getitems__(self, keys: list[Key]) -> Batch:
        images = torch.empty((len(keys), *self._shape), dtype=self._crop.dtype)
        group: list[Decoded] = []
        read, bad = [], []
        for key in keys:
            sample = key[1]
            try:
                group.append(self._crop.decode(self._source, key))
            except BadImageError as error:
                bad.append(BadSample(sample, self._source.name(sample), str(error)))
                continue
            read.append(key)
            if len(group) == GROUP or sum(decoded.pixels.nbytes for decoded in group) >= GROUP_BYTES:
                _crop_into(images[len(read) - len(group) :], group)
        _crop_into(images[len(read) - len(group) :], group)
        visits, samples = torch.tensor(read, dtype=torch.int64).view(-1, 2).unbind(1)
        return Batch(images[: len(read)], samples, tuple(bad), visits)


def _crop_into(images: Tensor, group: list[Decoded]) -> None:
    """Make the crops of a group the first of these images, and empty it."""
    for place, decoded in enumerate(group):
        crop = decoded.crop()
        assert crop.shape == images.shape[1:], f"a crop of {tuple(crop.shape)}, not {tuple(images.shape[1:])}"
        images[place] = crop
    group.clear()


def _data_loader(source: Source, crop: Crop, keys: Iterable[list[Key]], workers: int) -> DataLoader[Batch]:
    return DataLoader(
        _Images(source, crop),
        batch_sampler=keys,  # type: ignore[arg-type] # any iterable of lists of keys will do
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        # Without a generator of its own it draws from the global one.
        generator=torch.Generator(),
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _join(chunks: list[Batch], *, pin_memory: bool) -> Batch:
    samples = torch.cat([chunk.samples for chunk in chunks])
    visits = torch.cat([chunk.visits for chunk in chunks])
    bad = tuple(bad for chunk in chunks for bad in chunk.bad)
    if len(chunks) == 1 and not pin_memory:
        return Batch(chunks[0].images, samples, bad, visits)
    shape = (len(samples), *chunks[0].images.shape[1:])
    images = torch.empty(shape, dtype=chunks[0].images.dtype, pin_memory=pin_memory)
    return Batch(torch.cat([chunk.images for chunk in chunks], out=images), samples, bad, visits)


def _rank_slices(batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> list[slice]:
    """The micro-batches of a rank within the global batch, as many as on every other rank."""
    start, stop = (batch_size * number // world_size for number in (rank, rank + 1))
    largest_share = -(-batch_size // world_size)
    begins = range(start, start + largest_share, micro_batch_size)
    return [slice(min(begin, stop), min(begin + micro_batch_size, stop)) for begin in begins]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    """Parts of at most `size`; of nothing, one empty part."""
    return [slice(begin, min(begin + size, stop)) for begin in range(start, max(stop, start + 1), size)]


def _check_at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name} is {number}; it must be at least {least}")
