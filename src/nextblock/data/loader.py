"""Batches in an order that is a function of the seed alone, decoded while the step before computes.

A step's samples are f(seed, step), see `order`; an image's crop is f(seed, visit, sample), see `transforms`.
So neither depends on the number of worker processes, on the size of the micro-batches, or on where a run was
interrupted: to start at step one million costs what it costs to start at step zero. An unreadable image
leaves a hole in its batch.
"""

from __future__ import annotations

import json
import logging
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
from nextblock.data.transforms import Crop, Decoded, EvalCrop, Key, TrainCrop
from nextblock.data.workers import Note, run_in_workers

__all__ = ["BadSample", "Batch", "QuarantineLog", "Step", "TooManyBadImages", "TrainLoader", "eval_batches"]

log = logging.getLogger(__name__)

# Images that travel from a worker at once; the main process joins chunks to micro-batches.
CHUNK = 64

# Images decoded before they are cropped, or fewer once their pixels take so many bytes. To and fro between
# decoding and cropping empties the processor's caches; holding more makes the C library return memory to
# the system and take it again.
GROUP, GROUP_BYTES = 8, 2**21


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


class Step(NamedTuple):
    """One optimizer step."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride] - hides tuple.index, of no use here
    """Number of the step, from 0."""
    keys: StepKeys
    """The samples of the global batch, over all ranks; some may turn out to be unreadable."""
    micro_batches: Iterator[Batch]
    """This rank's images, as they arrive. They can be consumed once, and only before the next step."""


# ------------------------------------------------------------------------------------------------- training


class TrainLoader:
    """Endless iterator over training steps from `start_step`; each `iter()` begins there again.

    `batch_size` is the global one. Rank r of w takes the r-th of w contiguous parts of every step's samples,
    as equal as can be, in micro-batches. All ranks have as many micro-batches, since they meet after each; if
    a rank has no sample left, its micro-batches are empty. `drop_path_draws`: numbers drawn for each image.
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
    ) -> None:
        micro = batch_size if micro_batch_size is None else micro_batch_size
        _check_at_least(1, batch_size=batch_size, micro_batch_size=micro, world_size=world_size)
        _check_at_least(0, start_step=start_step, workers=workers, rank=rank)
        if rank >= world_size:
            raise ValueError(f"rank is {rank} of {world_size}; ranks run from 0 to {world_size - 1}")
        self.order = sample_order(source, data, seed=seed, batch_size=batch_size)
        self.batch_size, self.steps_per_epoch = self.order.batch_size, self.order.steps_per_epoch
        crop = crop or TrainCrop(data=data, image_size=image_size, seed=seed)
        self._read = _Reader(source, crop, seed, drop_path_draws)
        self._start_step, self._workers, self._pin_memory = start_step, workers, pin_memory
        # A step's samples, as slices: for each micro-batch the chunks that workers make.
        self._micro_batches = [
            _slices(part.start, part.stop, CHUNK) if workers else [part]
            for part in _rank_slices(self.batch_size, micro, rank, world_size)
        ]

    def __iter__(self) -> Iterator[Step]:
        # Workers ask _keys for work ahead of this loop, but hand out chunks in its order. So the next chunks
        # are always those of the next micro-batch, and nothing has to be matched up.
        chunks = self._read.chunks(self._keys(), self._workers, len(self._micro_batches[0]))
        for index in count(self._start_step):
            batches = (
                _join(chunks, sum(part.stop - part.start for part in parts), len(parts), self._pin_memory)
                for parts in self._micro_batches
            )
            yield Step(index, self.order.keys(index), batches)
            for _ in batches:  # those that the step left, lest the next step gets them
                pass

    def _keys(self) -> Iterator[list[Key]]:
        for step in count(self._start_step):
            _, visits, samples = self.order.keys(step)
            for parts in self._micro_batches:
                for part in parts:
                    yield list(zip(visits[part].tolist(), samples[part].tolist(), strict=True))


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
    keys = ([(0, sample) for sample in chosen[part].tolist()] for parts in batches for part in parts)
    read = _Reader(source, EvalCrop(data=data, image_size=image_size))

    def generate() -> Iterator[Batch]:
        chunks = read.chunks(keys, workers, -(-batch_size // chunk))
        for parts in batches:
            yield _join(chunks, parts[-1].stop - parts[0].start, len(parts), pin_memory=False)

    return generate()


# --------------------------------------------------------------------------------------- reading and joining


class _Chunk(NamedTuple):
    """Some images of a micro-batch: a tensor, in shared memory if a worker read them, or an array."""

    images: Tensor | np.ndarray
    keys: list[Key]
    bad: tuple[BadSample, ...]
    drop_path: np.ndarray


class _Reader:
    """What a worker runs: keys in, a chunk of crops out."""

    def __init__(self, source: Source, crop: Crop, seed: int = 0, drop_path_draws: int = 0) -> None:
        self._source, self._crop, self._seed, self._draws = source, crop, seed, drop_path_draws

    def chunks(
        self, keys: Iterable[list[Key]], workers: int, chunks_per_micro_batch: int
    ) -> Iterator[_Chunk]:
        """Chunks in the order of their keys.

        Workers hold a whole micro-batch ready while the step computes on the one before: however large it
        is, the step then waits only if decoding is slower than computing.
        """
        ahead = max(2, 1 + -(-chunks_per_micro_batch // max(1, workers)))
        return run_in_workers(self, keys, self._source, workers, ahead=ahead)

    def __call__(self, keys: list[Key], note: Note) -> _Chunk:
        crop = self._crop
        images = torch.empty((len(keys), crop.data.channels, *pair(crop.image_size)), dtype=crop.dtype)
        group: list[Decoded] = []
        read: list[Key] = []
        bad: list[BadSample] = []
        # Holes: what cannot be read takes no row, so later images move up, and the tensor is cut at the end.
        for key in keys:
            sample = key[1]
            note(sample)
            try:
                group.append(crop.decode(self._source, key))
            except BadImageError as error:
                bad.append(BadSample(sample, self._source.name(sample), str(error)))
                continue
            read.append(key)
            if len(group) == GROUP or sum(decoded.pixels.nbytes for decoded in group) >= GROUP_BYTES:
                _crop_into(images[len(read) - len(group) :], group)
        _crop_into(images[len(read) - len(group) :], group)
        drop_path = [keyed_rng(self._seed, "drop-path", *key).random(self._draws) for key in read]
        return _Chunk(
            _to_send(images[: len(read)]),
            read,
            tuple(bad),
            np.array(drop_path, dtype=np.float32).reshape(len(read), self._draws),
        )


def _crop_into(images: Tensor, group: list[Decoded]) -> None:
    """Make the crops of a group the first of these images, and empty it."""
    for place, decoded in enumerate(group):
        crop = decoded.cut(decoded.pixels)
        assert crop.shape == images.shape[1:], f"a crop of {tuple(crop.shape)}, not {tuple(images.shape[1:])}"
        images[place] = crop
    group.clear()


def _to_send(images: Tensor) -> Tensor | np.ndarray:
    """Images as a worker sends them: in shared memory, or, if that is full, as bytes through a pipe.

    torch would move them to shared memory as they are sent, in a thread whose failure nobody hears of: the
    main process would wait for ever.
    """
    if get_worker_info() is None:
        return images
    try:
        return images.share_memory_()
    except RuntimeError:
        return images.numpy()


def _join(chunks: Iterator[_Chunk], size: int, number: int, pin_memory: bool) -> Batch:
    """The next `number` chunks as one batch of up to `size` images, each copied into place as it arrives."""
    images, end = torch.empty(0), 0
    keys: list[Key] = []
    bad: list[BadSample] = []
    drop_path: list[np.ndarray] = []
    for place in range(number):
        chunk = next(chunks)
        if isinstance(chunk.images, np.ndarray):
            _warn_of_pipes()
        arrived = torch.as_tensor(chunk.images)
        if number == 1 and not pin_memory:
            images = arrived
        elif place == 0:
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


def _rank_slices(batch_size: int, micro_batch_size: int, rank: int, world_size: int) -> list[slice]:
    """The micro-batches of a rank within the global batch, as many as on every other rank."""
    # Rounding the borders down, not the shares, makes shares that differ by one at most and leave no gap.
    # Micro-batches are counted by the largest share: a rank with less has its last ones short or empty.
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


# ----------------------------------------------------------------------------------------------- quarantine


class TooManyBadImages(DataError):  # noqa: N818 - it says what happened
    """More of the files are unreadable than `data.max_bad_fraction` allows."""


class QuarantineLog:
    """One JSON line for every unreadable file, however often it is met, restarts included."""

    def __init__(self, path: Path, num_files: int, max_bad_fraction: float) -> None:
        self._path, self._num_files, self._max_bad_fraction = path, num_files, max_bad_fraction
        self._bad = {bad.sample: bad for bad in _read_quarantine(path)}

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
                f"{self.count} of {self._num_files} files cannot be read, more than data.max_bad_fraction "
                f"{self._max_bad_fraction:g} allows. The first are:{first}\nAll are listed in {self._path}. "
                "Fix or remove them and delete that list, or raise data.max_bad_fraction."
            )


def _read_quarantine(path: Path) -> list[BadSample]:
    """What an earlier part of the run wrote. A last line that a crash cut off is removed from the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    # A crash while a line was written leaves it without its end.
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as file:
            file.truncate(whole)
    entries = []
    for number, line in enumerate(content[:whole].splitlines(), start=1):
        try:
            entry = json.loads(line)
            entries.append(BadSample(entry["sample"], entry["name"], entry["reason"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is damaged ({error}); delete that file") from error
    return entries
