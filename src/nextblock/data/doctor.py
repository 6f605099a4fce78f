"""Examine the content of sources: `examine` reads all images, `shared_images` a few."""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cached_property, partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextblock.config import DataConfig, Size
from nextblock.data.decode import BadImageError, open_image, orientation_of, pillow_errors
from nextblock.data.loader import BadSample, TrainLoader
from nextblock.data.random import keyed_permutation, keyed_rng
from nextblock.data.sources import Source
from nextblock.data.sources.base import decode
from nextblock.data.sources.names import text
from nextblock.data.subsets import named
from nextblock.data.workers import Note, run_in_workers
from nextblock.logs import counted

# A readable image: its number in the source, a hash of its content, (height, width) of the upright picture.
# Among 13 million different images, the probability of any two equal 64-bit hashes is 1 in 200,000.
IMAGE = np.dtype([("index", "i8"), ("digest", "u8"), ("size", "i4", (2,)), ("is_blank", "?")])


class Examination:
    """Findings about a source's images; `images` are the readable ones, ascending, of dtype `IMAGE`."""

    def __init__(self, source: Source, channels: int) -> None:
        self.source = source
        self.spec = text(os.fsencode(source.spec))
        self.images = np.zeros(0, IMAGE)
        self.bad: list[BadSample] = []
        self.kinds = Counter[str]()  # formats and special properties
        self.sums = np.zeros((2, channels))

    @property
    def examined(self) -> int:
        """Number of images examined, including unreadable ones."""
        return len(self.images) + len(self.bad)

    @property
    def mean_std(self) -> np.ndarray:
        """Mean and deviation of each channel, for pixels in [0, 1]; images have equal weight."""
        # The variance is the mean square minus the squared mean; rounding may make it negative.
        mean, square = self.sums / max(1, len(self.images))
        return np.array([mean, np.sqrt(np.maximum(square - mean**2, 0))])

    def names(self, images: np.ndarray) -> list[str]:
        """Names of some of `images`."""
        return [self.source.name(index) for index in images["index"].tolist()]

    @cached_property
    def class_counts(self) -> dict[str, int]:
        """Readable images of each class; empty if there are no labels."""
        if not self.source.has_labels:
            return {}
        names = [text(os.fsencode(name)) for name in self.source.class_names]
        labels = self.source.labels[self.images["index"]]
        return dict(zip(names, np.bincount(labels, minlength=len(names)).tolist(), strict=True))

    @property
    def sides_px(self) -> dict[str, tuple[float, float, float]]:
        """Smallest, median and largest shorter and longer side; empty without images."""
        if not len(self.images):
            return {}
        sides = zip(("shorter", "longer"), np.sort(self.images["size"], axis=1).T, strict=True)
        return {name: (float(px.min()), float(np.median(px)), float(px.max())) for name, px in sides}

    @cached_property
    def duplicates(self) -> list[np.ndarray]:
        """Groups of images with the same content, ordered by their first image."""
        # Equal digests get equal numbers; only numbers that occur several times form groups.
        _, numbers, counts = np.unique(self.images["digest"], return_inverse=True, return_counts=True)
        groups = defaultdict[int, list[int]](list)
        for place in np.flatnonzero(counts[numbers] > 1).tolist():
            groups[numbers[place]].append(place)
        return [self.images[places] for places in groups.values()]

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = ("spec", "examined", "kinds", "sides_px", "class_counts")
        return {name: getattr(self, name) for name in names} | {
            "images": len(self.source),
            "bad": [bad._asdict() for bad in self.bad],
            "damaged_shards": [damage._asdict() for damage in self.source.damage],
            "mean_std": self.mean_std.tolist(),
            "duplicates": [self.names(group) for group in self.duplicates],
            "blank": self.names(self.images[self.images["is_blank"]]),
        }


def examine(
    source: Source,
    data: DataConfig,
    *,
    samples: int | None = None,
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Examination:
    """Decode all images as training does, or always the same `samples` of them.

    `progress` is called with the numbers of examined and of unreadable images.
    """
    # Sorted, because archives are read fastest from front to back.
    indices = np.arange(len(source))
    if samples is not None and samples < len(source):
        indices = np.sort(keyed_permutation(0, len(source), "doctor")[:samples])
    examination, images = Examination(source, data.channels), []
    for look in run_in_workers(partial(_look_at, source, data), map(int, indices), source, workers, ahead=32):
        if isinstance(look, BadSample):
            examination.bad.append(look)
        else:
            image, kinds, moments = look
            images.append(image)
            examination.kinds.update(kinds)
            examination.sums += moments
        if progress is not None:
            progress(len(images) + len(examination.bad), len(examination.bad))
    examination.images = np.array(images, IMAGE)
    return examination


def _look_at(
    source: Source, data: DataConfig, index: int, note: Note
) -> tuple[tuple[Any, ...], list[str], np.ndarray] | BadSample:
    """A row of `IMAGE`, its kinds, and each channel's mean and mean square; or why it is unreadable."""
    note(index)
    try:
        # Read the file once, for its hash, its header and its pixels.
        content = source.content(index)
        pixels = source.read(index) if content is None else decode(content, data)
    except BadImageError as error:
        return BadSample(index, source.name(index), str(error))
    if len(pixels) != data.channels:
        reason = f"has {counted(len(pixels), 'channel')}, data.channels is {data.channels}"
        return BadSample(index, source.name(index), reason)
    # Counts of the 256 values make the moments independent of the order of pixels.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels]).numpy()
    values = np.arange(256) / 255
    moments = np.array([counts @ values, counts @ values**2]) / pixels[0].numel()
    # One value per channel: a blank image.
    is_blank = np.count_nonzero(counts) == len(pixels)
    digest = _digest(pixels if content is None else content)
    kinds = ["raw pixels"] if content is None else _kinds_of(content)
    return (index, digest, (pixels.shape[1], pixels.shape[2]), is_blank), kinds, moments


def _digest(image: bytes | Tensor) -> int:
    """A hash of a file's content, or of the pixels of an image that is not a file."""
    content = image if isinstance(image, bytes) else image.numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _kinds_of(content: bytes) -> list[str]:
    """The format and special properties of a readable file, from its header."""
    try:
        with pillow_errors():
            image = open_image(content)
    except BadImageError:  # a library other than Pillow decoded it
        return ["other"]
    # Pillow's mode shows 16 bits only for grey images. A PNG has its depth in byte 24, a TIFF in tag 258.
    depth = content[24] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(258, (8,)))
    kinds = {
        str(image.format): True,
        "16 bits": depth == 16 or image.mode.startswith("I;16"),
        "alpha": image.has_transparency_data,
        "grey": image.mode.partition(";")[0] in ("1", "L", "LA", "I"),
        "rotated by EXIF": orientation_of(image) != 1,
    }
    return [kind for kind, is_so in kinds.items() if is_so]


def crops_per_core_s(source: Source, data: DataConfig, image_size: Size) -> float | None:
    """Training crops per second of one core's CPU time, so without waiting for a disk.

    Measured on 64 images; None if none of them can be read.
    """
    # With steps of one image, an epoch includes every source of a mixture, however small.
    loader = TrainLoader(source, data, image_size=image_size, seed=0, batch_size=1)
    counts = (len(batch.images) for step in loader for batch in step.micro_batches)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # One thread, as in a worker; and CPU time, because other processes may use the core too.
    try:
        next(counts)  # draws the order and loads libraries
        started_s = time.process_time()
        crops = sum(islice(counts, 64))
        return crops / max(time.process_time() - started_s, 1e-9) if crops else None
    finally:
        torch.set_num_threads(threads)


# -------------------------------------------------------------------------------------------------- leakage


class Shared(NamedTuple):
    """Validation images that are also training images; `str` gives one sentence."""

    pairs: list[tuple[str, str]]
    """Names in validation and in training; empty if the lists are equal and nothing was read."""
    num_compared: int

    def __str__(self) -> str:
        if not self.pairs:
            return "validation and training are the same list of images; take them out of one side"
        names = named([" = ".join(dict.fromkeys(pair)) for pair in self.pairs], 5)
        which = f"{len(self.pairs):,} of the {self.num_compared:,} validation images compared"
        return f"{which} are also training images ({names}); take them out of one side"


def shared_images(train: Source, val: Source, *, most: int = 200, others: int = 1000) -> Shared | None:
    """Quickly search for validation images in the training data; None if there are none.

    Compares `most` validation images with `others` training images of the same file name and `others` of any
    name. So it misses re-encoded copies, and in a large source copies with other names. Sources on a server
    are compared only by their lists.
    """
    is_same_list = train.fingerprint == val.fingerprint
    specs = [getattr(part, "of", part).spec for source in (train, val) for part in source.parts]
    if any("://" in spec for spec in specs):  # reading a few images would fetch as many shards
        return Shared([], 0) if is_same_list else None
    chosen = _drawn(len(val), most)
    wanted = dict(_digests(val, chosen))
    files = {val.name(index).rpartition("/")[2] for index in wanted.values()}
    # Candidates: the same place in the same list, the same file name (moved to another folder), any.
    alike = [index for index in _drawn(len(train), 200_000) if train.name(index).rpartition("/")[2] in files]
    candidates = [*(chosen if is_same_list else ()), *alike[:others], *_drawn(len(train), others)]
    # A dictionary drops repeated candidates, so each image is read once.
    twins: dict[int, int] = {}
    for digest, index in _digests(train, dict.fromkeys(candidates)):
        if digest in wanted:
            twins.setdefault(wanted[digest], index)
    pairs = [(val.name(index), train.name(twin)) for index, twin in sorted(twins.items())]
    return Shared(pairs, len(wanted)) if pairs else None


def _drawn(length: int, most: int) -> list[int]:
    """Up to `most` random numbers below `length`, ascending."""
    return np.sort(keyed_rng(0, "shared").choice(length, min(length, most), replace=False)).tolist()


def _digests(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Digest and number of each readable image."""
    for index in indices:
        # Skip unreadable and empty files, which would all match each other.
        with suppress(BadImageError):
            content = source.content(index)
            if content != b"":
                yield _digest(source.read(index) if content is None else content), index
