"""Batches in an order that depends on the seed alone, decoded while the previous step computes.

A step's samples are f(seed, step), see `order`; an image's crop is f(seed, visit, sample), see `augment`.
So neither depends on the number of workers, the micro-batch size, or where a run was interrupted. Starting at
step one million costs as much as starting at step zero. An unreadable image leaves a hole in its batch.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from nextblock.config import DataConfig, Size, pair
from nextblock.data.augment import Crop, EvalCrop, Key, TrainCrop
from nextblock.data.decode import BadImageError
from nextblock.data.order import StepKeys, sample_order
from nextblock.data.random import keyed_permutation, keyed_rng
from nextblock.data.sources.base import DataError, Source
from nextblock.data.workers import Note, resolve_workers, run_in_workers
from nextblock.errors import UsageError

log = logging.getLogger(__name__)

# Images that a worker sends at once; the main process joins chunks to micro-batches.
CHUNK = 64


class BadSample(NamedTuple):
    """An image that could not be read: its number in the source, its name, and why."""

    sample: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Images, their numbers in the source, and the images that could not be read."""

    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    """Bytes, to be normalised on the device; or floats, already normalised."""
    samples: Int64[Tensor, " b"]
    bad: tuple[BadSample, ...]
    visits: Int64[Tensor, " b"]
    """How often each image's source had been traversed before; 0 in evaluation."""
    drop_path: Float[Tensor, "b draws"]
    """Uniform in [0, 1), f(seed, visit, sample); drop path compares them with its rate."""


_NONE = torch.empty(0, dtype=torch.int64)
NO_IMAGES = Batch(images=torch.empty(0), samples=_NONE, bad=(), visits=_NONE, drop_path=torch.empty(0, 0))
"""The input of a rank that has no images left or has failed: other ranks wait for it in every pass."""


class Step(NamedTuple):
    """One optimizer step."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.index, unused here
    """Number of the step, from 0."""
    keys: StepKeys
    """The samples of the global batch, over all ranks; some may turn out to be unreadable."""
    micro_batches: Iterator[Batch]
    """This rank's images, as they arrive. They can be consumed once, and only before the next step."""
    num_micro_batches: int
    """How many there are; the same on all ranks."""


class TrainLoader:
    """Endless iterator over training steps from `start_step`; each `iter()` starts there again.

    `batch_size` is the global one. Rank r of w takes the r-th of w contiguous, nearly equal parts of every
    step's samples, in micro-batches. All ranks have the same number of micro-batches, since they synchronise
    after each; a rank without samples left gets empty ones. `drop_path_draws`: numbers drawn per image.
    `unit` consecutive samples are never split; a micro-batch is a multiple of it.
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
        drop_path_draws: int = 0,
        unit: int = 1,
    ) -> None:
        if not 0 <= rank < world_size:
            raise UsageError(f"rank is {rank} of {world_size}; ranks run from 0 to {world_size - 1}")
        self.order = sample_order(source, data, seed=seed, batch_size=batch_size)
        self.batch_size, self.steps_per_epoch = self.order.batch_size, self.order.steps_per_epoch
        crop = crop or TrainCrop(data=data, image_size=image_size, seed=seed)
        self._start_step, self._pin_memory = start_step, pin_memory
        micro = micro_batch_size or batch_size
        chunk = CHUNK if workers else micro
        self._micro_batches = _share(self.batch_size, micro, chunk, rank, world_size, unit)
        read = partial(_read, source, crop, seed, drop_path_draws)
        self._chunks = partial(_chunks, read, source, workers, len(self._micro_batches[0]))

    def __iter__(self) -> Iterator[Step]:
        # Workers run ahead of this loop, but return chunks in the order of _keys. So the next chunks always
        # belong to the next micro-batch.
        chunks = self._chunks(self._keys())
        for index in count(self._start_step):
            # A generator: a micro-batch is yielded as soon as its chunks arrive, while workers decode the
            # following ones.
            batches = (_join(chunks, parts, self._pin_memory) for parts in self._micro_batches)
            yield Step(index, self.order.keys(index), batches, len(self._micro_batches))
            for _ in batches:  # drain what the step left, or the next step would get it
                pass

    def _keys(self) -> Iterator[list[Key]]:
        for step in count(self._start_step):
            _, visits, samples = self.order.keys(step)
            for parts in self._micro_batches:
                for part in parts:
                    yield list(zip(visits[part].tolist(), samples[part].tolist(), strict=True))


def eval_batches(
    source: Source,
    data: DataConfig,
    image_size: Size,
    batch_size: int,
    indices: Sequence[int] | np.ndarray | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Batch]:
    """Centre crops in the order of the source, or of `indices`; the last batch may be smaller.

    Rank r of w gets the r-th of w contiguous parts. All ranks get the same number of batches; the last may
    be empty.
    """
    # There are no visits: the first number of a key is 0 and unused.
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    chunk = min(batch_size, CHUNK) if workers else batch_size
    batches = _share(len(chosen), batch_size, chunk, rank, world_size)
    keys = ([(0, sample) for sample in chosen[part].tolist()] for parts in batches for part in parts)
    read = partial(_read, source, EvalCrop(data=data, image_size=image_size), 0, 0)
    chunks = _chunks(read, source, workers, -(-batch_size // chunk), keys)
    return (_join(chunks, parts, pin_memory=False) for parts in batches)


# --------------------------------------------------------------------------------------- reading and joining


class _Chunk(NamedTuple):
    """Some images of a micro-batch: a tensor, in shared memory if a worker read them, or an array."""

    images: Tensor | np.ndarray
    keys: list[Key]
    bad: list[BadSample]
    drop_path: np.ndarray


def _chunks(
    read: Callable[[list[Key], Note], _Chunk],
    source: Source,
    workers: int,
    per_micro_batch: int,
    keys: Iterable[list[Key]],
) -> Iterator[_Chunk]:
    """Chunks in the order of their keys; `per_micro_batch` of them make a micro-batch."""
    # Workers prefetch a whole micro-batch while the step computes on the previous one. Whatever its size, the
    # step then waits only if decoding is slower than computing.
    ahead = max(2, 1 + -(-per_micro_batch // max(1, workers)))
    return run_in_workers(read, keys, source, workers, ahead=ahead)


def _read(source: Source, crop: Crop, seed: int, drop_path_draws: int, keys: list[Key], note: Note) -> _Chunk:
    """Read, crop and draw drop path for these images; this is what workers run."""
    read = list[Key]()
    images = torch.empty((len(keys), crop.data.channels, *pair(crop.image_size)), dtype=crop.dtype)
    drop_path = np.empty((len(keys), drop_path_draws), dtype=np.float32)
    bad: list[BadSample] = []
    # An unreadable image takes no row: later images move up, and the tensors are cut at the end. Crops
    # and drop path are functions of the image's key, so a hole does not change the other images.
    for key in keys:
        note(key[1])  # before reading: if that kills the process, the note remains
        try:
            image = crop.read(source, key)
        except BadImageError as error:
            bad.append(BadSample(key[1], source.name(key[1]), str(error)))
            continue
        assert image.shape == images.shape[1:], f"a crop of {tuple(image.shape)}"
        images[len(read)] = image
        drop_path[len(read)] = keyed_rng(seed, "drop-path", *key).random(drop_path_draws)
        read.append(key)
    images = images[: len(read)]
    if get_worker_info() is not None:
        # By default torch moves images to shared memory on sending, in a thread whose failure nobody
        # notices: the main process would wait forever. If it is full, send bytes through a pipe.
        try:
            images.share_memory_()
        except RuntimeError:
            return _Chunk(images.numpy(), read, bad, drop_path[: len(read)])
    return _Chunk(images, read, bad, drop_path[: len(read)])


def _join(chunks: Iterator[_Chunk], parts: list[slice], pin_memory: bool) -> Batch:
    """Join the next chunks, one per part, to a batch; each is copied into place as it arrives."""
    images, end = torch.empty(0), 0
    keys: list[Key] = []
    bad: list[BadSample] = []
    drop_path: list[np.ndarray] = []
    for place in range(len(parts)):
        chunk = next(chunks)
        if isinstance(chunk.images, np.ndarray):
            _warn_of_pipes()
        # A single chunk is the batch itself. Several are copied, into pinned memory if requested: copies from
        # there to the device overlap with its computing.
        arrived = torch.as_tensor(chunk.images)
        if len(parts) == 1 and not pin_memory:
            images = arrived
        else:
            if place == 0:
                size = parts[-1].stop - parts[0].start
                images = torch.empty((size, *arrived.shape[1:]), dtype=arrived.dtype, pin_memory=pin_memory)
            images[end : end + len(arrived)] = arrived
        end += len(arrived)
        keys += chunk.keys
        bad += chunk.bad
        drop_path.append(chunk.drop_path)
    visits, samples = torch.tensor(keys, dtype=torch.int64).view(-1, 2).unbind(1)
    return Batch(images[:end], samples, tuple(bad), visits, torch.from_numpy(np.concatenate(drop_path)))


@cache
def _warn_of_pipes() -> None:
    log.warning(
        "shared memory (/dev/shm) is full, so workers send images through pipes, which is slower; give the "
        "container more (docker run --shm-size=2g), or use fewer --data.workers"
    )


def _share(
    total: int, batch_size: int, chunk: int, rank: int, world_size: int, unit: int = 1
) -> list[list[slice]]:
    """A rank's contiguous share of `total` samples: for each batch, the slices of its chunks."""
    # Rounding the borders down makes shares without gaps that differ by at most one unit.
    units = -(-total // unit)
    start, stop = (min(total, unit * (units * number // world_size)) for number in (rank, rank + 1))
    # The largest share determines the number of batches: on other ranks the last may be short or empty. An
    # empty one is one empty slice.
    batches = []
    for place in range(start, start + unit * -(-units // world_size), batch_size):
        begin, end = min(place, stop), min(place + batch_size, stop)
        batches.append([slice(i, min(i + chunk, end)) for i in range(begin, max(end, begin + 1), chunk)])
    return batches


# --------------------------------------------------------------------------------- mean and deviation


class PixelStatistics(NamedTuple):
    """Mean and deviation of each channel to six digits, for pixels in [0, 1], and the number of images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int


def measure_pixels(
    source: Source, data: DataConfig, image_size: Size, seed: int, *, most: int = 1000
) -> PixelStatistics:
    """Measure the validation crops of up to `most` images drawn by the seed.

    Raises `ValueError` if no image of the sample can be read, or if a channel is the same everywhere.
    """
    # Drawn by the seed, so that a restarted run measures the same.
    chosen = np.sort(keyed_permutation(seed, len(source), "statistics")[:most])
    workers = resolve_workers(data.workers, source)
    # Integer sums are exact, so the result does not depend on workers or batches.
    totals = np.zeros((2, data.channels), dtype=np.int64)
    images, bad = 0, []
    for batch in eval_batches(source, data, image_size, 50, chosen, workers=workers):
        values = batch.images.numpy().astype(np.int64)
        totals += np.stack([values.sum(axis=(0, 2, 3)), (values**2).sum(axis=(0, 2, 3))])
        images += len(batch.samples)
        bad += batch.bad
    if not images:
        raise UsageError(
            f"data.normalize auto: none of {len(chosen)} images of {source.spec} can be read, such as "
            f"{bad[0].name}: {bad[0].reason}; repair them, or give data.mean and data.std"
        )
    # Computed in Python's unbounded integers, up to one division at the end.
    pixels = images * math.prod(pair(image_size))
    mean, std = [], []
    for channel, (total, squares) in enumerate(totals.T.tolist()):
        # pixels * squares - total² is pixels² times the variance, an exact integer: nothing cancels.
        deviation = math.sqrt(pixels * squares - total**2) / pixels / 255
        if round(deviation, 6) == 0:
            raise UsageError(
                f"data.normalize auto: channel {channel} of {data.channels} has the same value everywhere in "
                f"{images} images of {source.spec}; leave that channel out of the files, or give data.mean "
                "and data.std with data.normalize given"
            )
        mean.append(round(total / pixels / 255, 6))
        std.append(round(deviation, 6))
    return PixelStatistics(tuple(mean), tuple(std), images)


# ----------------------------------------------------------------------------------------------- quarantine


class TooManyBadImages(DataError):  # noqa: N818 - says what happened
    """More files are unreadable than `data.max_bad_fraction` allows."""


def most_bad(max_bad_fraction: float, num_files: int) -> float:
    """The number of unreadable files to accept: a share, but at least one, unless the share is 0."""
    # A share of a small folder may be less than one file, and one bad file must not stop a run.
    return max(1, max_bad_fraction * num_files) if max_bad_fraction else 0


class QuarantineLog:
    """One JSON line per unreadable file, however often it is read, restarts included."""

    def __init__(
        self, path: Path, num_files: int, max_bad_fraction: float, setting: str = "data.max_bad_fraction"
    ) -> None:
        self._path, self._num_files, self._max_bad_fraction = path, num_files, max_bad_fraction
        self._setting = setting
        self._bad: dict[int, BadSample] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        # A crash while writing leaves an incomplete line: cut it off, its file will be read again.
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)
        for number, line in enumerate(content[:whole].splitlines(), start=1):
            try:
                bad = BadSample(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise UsageError(f"{path}, line {number}, is damaged ({error}); delete that file") from error
            self._bad[bad.sample] = bad

    @property
    def count(self) -> int:
        """Distinct unreadable files so far."""
        return len(self._bad)

    @property
    def bad(self) -> tuple[BadSample, ...]:
        """These files."""
        return tuple(self._bad.values())

    def add(self, bad: BadSample) -> None:
        """Record a file; raises `TooManyBadImages` beyond the limit, one file at least unless it is 0."""
        # Append, so that a crash costs at most one line. An image read in every epoch is one line.
        if bad.sample not in self._bad:
            self._bad[bad.sample] = bad
            line = json.dumps({"name": bad.name, "sample": bad.sample, "reason": bad.reason})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        if self.count > most_bad(self._max_bad_fraction, self._num_files):
            first = "".join(f"\n  {bad.name}: {bad.reason}" for bad in self.bad[:10])
            raise TooManyBadImages(
                f"{self.count} of {self._num_files} files cannot be read, more than {self._setting} "
                f"{self._max_bad_fraction:g} allows. The first are:{first}\nAll are listed in {self._path}. "
                f"Fix or remove them and delete that list, or raise {self._setting}."
            )
