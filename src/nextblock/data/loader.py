"""Batches in an order that is a function of the seed alone, decoded while the step before computes.

A step's samples are f(seed, step), see `order`; an image's crop is f(seed, visit, sample), see `transforms`.
So neither depends on the number of worker processes, on the size of the micro-batches, or on where a run was
interrupted: to start at step one million costs what it costs to start at step zero. An unreadable image
leaves a hole in its batch.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.utils.data import get_worker_info

from nextblock.config import DataConfig, Size, pair
from nextblock.data.decode import BadImageError
from nextblock.data.order import StepKeys, sample_order
from nextblock.data.random import keyed_rng
from nextblock.data.sources.base import DataError, Source
from nextblock.data.transforms import Crop, EvalCrop, Key, TrainCrop
from nextblock.data.workers import Note, run_in_workers
from nextblock.errors import UsageError

log = logging.getLogger(__name__)

# Images that travel from a worker at once; the main process joins chunks to micro-batches.
CHUNK = 64


class BadSample(NamedTuple):
    """An image that could not be read: its number in the source, its name, and why."""

    sample: int
    name: str
    reason: str


class Batch(NamedTuple):
    """Images, their numbers in the source, and those that are missing because they cannot be read."""

    images: UInt8[Tensor, "b c h w"] | Float[Tensor, "b c h w"]
    """Bytes, to be normalised on the device; floats if they are normalised."""
    samples: Int64[Tensor, " b"]
    bad: tuple[BadSample, ...]
    visits: Int64[Tensor, " b"]
    """How often each image's source had been traversed before; 0 in evaluation."""
    drop_path: Float[Tensor, "b draws"]
    """Uniform in [0, 1), f(seed, visit, sample): what drop path compares with its rate."""


NO_IMAGES = Batch(
    torch.empty(0),
    torch.empty(0, dtype=torch.int64),
    (),
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, 0),
)
"""What a rank computes on that has no images left, or failed: the others wait for it in every pass."""


class Step(NamedTuple):
    """One optimizer step."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.index, of no use here
    """Number of the step, from 0."""
    keys: StepKeys
    """The samples of the global batch, over all ranks; some may turn out to be unreadable."""
    micro_batches: Iterator[Batch]
    """This rank's images, as they arrive. They can be consumed once, and only before the next step."""
    num_micro_batches: int
    """How many there are: as many on all ranks."""


class TrainLoader:
    """Endless iterator over training steps from `start_step`; each `iter()` begins there again.

    `batch_size` is the global one. Rank r of w takes the r-th of w contiguous parts of every step's samples,
    as equal as can be, in micro-batches. All ranks have as many micro-batches, since they meet after each; if
    a rank has no sample left, its micro-batches are empty. `drop_path_draws`: numbers drawn for each image.
    `unit`: so many samples that follow each other are never divided; a micro-batch is a multiple of it.
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
        self._read = _Reader(source, crop, seed, drop_path_draws)
        self._start_step, self._workers, self._pin_memory = start_step, workers, pin_memory
        micro = micro_batch_size or batch_size
        chunk = CHUNK if workers else micro
        self._micro_batches = _share(self.batch_size, micro, chunk, rank, world_size, unit)

    def __iter__(self) -> Iterator[Step]:
        # Workers ask _keys for work ahead of this loop, but hand out chunks in its order. So the next chunks
        # are always those of the next micro-batch, and nothing has to be matched up.
        chunks = self._read.chunks(self._keys(), self._workers, len(self._micro_batches[0]))
        for index in count(self._start_step):
            # A generator: a micro-batch is handed out as soon as its chunks are there, while workers decode
            # those that follow.
            batches = (_join(chunks, parts, self._pin_memory) for parts in self._micro_batches)
            yield Step(index, self.order.keys(index), batches, len(self._micro_batches))
            for _ in batches:  # those that the step left, lest the next step gets them
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

    Rank r of w gets the r-th of w contiguous parts. All ranks get as many batches, the last perhaps empty.
    """
    # Without visits: a key's first number is 0, and nothing is drawn by it.
    chosen = np.arange(len(source)) if indices is None else np.asarray(indices, dtype=np.int64)
    chunk = min(batch_size, CHUNK) if workers else batch_size
    batches = _share(len(chosen), batch_size, chunk, rank, world_size)
    keys = ([(0, sample) for sample in chosen[part].tolist()] for parts in batches for part in parts)
    read = _Reader(source, EvalCrop(data=data, image_size=image_size))
    chunks = read.chunks(keys, workers, -(-batch_size // chunk))
    return (_join(chunks, parts, pin_memory=False) for parts in batches)


# --------------------------------------------------------------------------------------- reading and joining


class _Chunk(NamedTuple):
    """Some images of a micro-batch: a tensor, in shared memory if a worker read them, or an array."""

    images: Tensor | np.ndarray
    keys: list[Key]
    bad: list[BadSample]
    drop_path: np.ndarray


class _Reader:
    """What a worker runs: keys in, a chunk of crops out."""

    def __init__(self, source: Source, crop: Crop, seed: int = 0, drop_path_draws: int = 0) -> None:
        self._source, self._crop, self._seed, self._draws = source, crop, seed, drop_path_draws

    def chunks(
        self, keys: Iterable[list[Key]], workers: int, chunks_per_micro_batch: int
    ) -> Iterator[_Chunk]:
        """Chunks in the order of their keys."""
        # Workers hold a whole micro-batch ready while the step computes on the one before: however large it
        # is, the step then waits only if decoding is slower than computing.
        ahead = max(2, 1 + -(-chunks_per_micro_batch // max(1, workers)))
        return run_in_workers(self, keys, self._source, workers, ahead=ahead)

    def __call__(self, keys: list[Key], note: Note) -> _Chunk:
        crop, read = self._crop, list[Key]()
        images = torch.empty((len(keys), crop.data.channels, *pair(crop.image_size)), dtype=crop.dtype)
        drop_path = np.empty((len(keys), self._draws), dtype=np.float32)
        bad: list[BadSample] = []
        # Holes: what cannot be read takes no row, so later images move up, and the tensors are cut at the
        # end. Crops and drop path are functions of the image's key, so the others stay what they would be.
        for key in keys:
            note(key[1])  # before it is read: if that kills the process, the note remains
            try:
                image = crop.read(self._source, key)
            except BadImageError as error:
                bad.append(BadSample(key[1], self._source.name(key[1]), str(error)))
                continue
            assert image.shape == images.shape[1:], f"a crop of {tuple(image.shape)}"
            images[len(read)] = image
            drop_path[len(read)] = keyed_rng(self._seed, "drop-path", *key).random(self._draws)
            read.append(key)
        images = images[: len(read)]
        if get_worker_info() is not None:
            # Left alone, torch moves images to shared memory as they are sent, in a thread whose failure
            # nobody hears of: the main process would wait for ever. If it is full, bytes go through a pipe.
            try:
                images.share_memory_()
            except RuntimeError:
                return _Chunk(images.numpy(), read, bad, drop_path[: len(read)])
        return _Chunk(images, read, bad, drop_path[: len(read)])


def _join(chunks: Iterator[_Chunk], parts: list[slice], pin_memory: bool) -> Batch:
    """The next chunks, one for each part, as one batch; each is copied into place as it arrives."""
    images, end = torch.empty(0), 0
    keys: list[Key] = []
    bad: list[BadSample] = []
    drop_path: list[np.ndarray] = []
    for place in range(len(parts)):
        chunk = next(chunks)
        if isinstance(chunk.images, np.ndarray):
            _warn_of_pipes()
        # A single chunk is the batch as it is. Several are copied, into page-locked memory if asked: copies
        # from there to the device overlap with its computing.
        arrived = torch.as_tensor(chunk.images)
        if len(parts) == 1 and not pin_memory:
            images = arrived
        elif place == 0:
            size = parts[-1].stop - parts[0].start
            images = torch.empty((size, *arrived.shape[1:]), dtype=arrived.dtype, pin_memory=pin_memory)
        if images is not arrived:
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
    """A rank's contiguous share of `total` samples: for each batch the slices of its chunks."""
    # Rounding the borders of the shares down makes shares that differ by one at most and leave no gap.
    units = -(-total // unit)
    start, stop = (min(total, unit * (units * number // world_size)) for number in (rank, rank + 1))
    # Batches are counted by the largest share: a rank with less has its last one short or empty.
    begins = range(start, start + unit * -(-units // world_size), batch_size)
    return [_slices(min(begin, stop), min(begin + batch_size, stop), chunk) for begin in begins]


def _slices(start: int, stop: int, size: int) -> list[slice]:
    """Parts of at most `size`; of nothing, one empty part."""
    # An empty part still makes an empty micro-batch, which a rank without samples needs.
    return [slice(begin, min(begin + size, stop)) for begin in range(start, max(stop, start + 1), size)]


# ----------------------------------------------------------------------------------------------- quarantine


class TooManyBadImages(DataError):  # noqa: N818 - it says what happened
    """More of the files are unreadable than `data.max_bad_fraction` allows."""


class QuarantineLog:
    """One JSON line for every unreadable file, however often it is met, restarts included."""

    def __init__(
        self, path: Path, num_files: int, max_bad_fraction: float, setting: str = "data.max_bad_fraction"
    ) -> None:
        self._path, self._num_files, self._max_bad_fraction = path, num_files, max_bad_fraction
        self._setting = setting
        self._bad: dict[int, BadSample] = {}
        if not path.exists():
            return
        content = path.read_bytes()
        # A crash while a line was written leaves it without its end: cut it off, the file is met again.
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
        """Note a file; `TooManyBadImages` if there are more than the limit, which is one file at least."""
        # Appended, so that a crash costs one line at most, and an image met in every epoch is one line.
        if bad.sample not in self._bad:
            self._bad[bad.sample] = bad
            line = json.dumps({"name": bad.name, "sample": bad.sample, "reason": bad.reason})
            with self._path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        # A share of a small folder may be less than one file, and one bad file must not stop a run.
        allowed = max(1, self._max_bad_fraction * self._num_files) if self._max_bad_fraction else 0
        if self.count > allowed:
            first = "".join(f"\n  {bad.name}: {bad.reason}" for bad in self.bad[:10])
            raise TooManyBadImages(
                f"{self.count} of {self._num_files} files cannot be read, more than {self._setting} "
                f"{self._max_bad_fraction:g} allows. The first are:{first}\nAll are listed in {self._path}. "
                f"Fix or remove them and delete that list, or raise {self._setting}."
            )
