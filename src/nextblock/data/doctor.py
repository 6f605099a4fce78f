"""What a source holds, found by reading it through before a training rather than in the middle of one.

Every image is decoded as training decodes it, in worker processes, and little is kept of it: a digest of 16
bytes, its height, its width and its number. So a million images take 32 MB here.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int32, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextblock.config import DataConfig, Size
from nextblock.data.decode import BadImageError, decode_image, open_image, orientation_of, pillow_errors
from nextblock.data.keyed import keyed_permutation
from nextblock.data.loader import BadSample, TrainLoader
from nextblock.data.sources import Source
from nextblock.data.tiff import is_tiff, read_tiff_header
from nextblock.data.workers import from_workers, start_worker

__all__ = ["Duplicates", "Examination", "Statistics", "duplicates", "examine", "images_per_core_s"]

CHUNK = 32
"""Images that a worker looks at before it tells."""
RATE_IMAGES, RATE_S = 64, 10.0
"""The rate is measured on so many images, or for so long."""
RATE_BATCH = 8
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF")
"""Formats whose further frames are moments; those of others are views, pages or sizes."""

Progress = Callable[[int, int], None]
"""Told how many images have been examined, and how many of them cannot be read."""


class Statistics(NamedTuple):
    """Mean and deviation per channel, of pixels in [0, 1]; every image counts alike, as in training."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


class Examination:
    """What was found in a source's images, in the order of their numbers."""

    def __init__(self, source: Source, indices: Int64[np.ndarray, " n"], channels: int) -> None:
        self.source = source
        self.indices = indices
        """Numbers of the images that are examined, ascending: all of them or a sample."""
        self.examined = 0
        self.elapsed_s = 0.0
        self.formats, self.modes, self.traits = Counter[str](), Counter[str](), Counter[str]()
        self.digests = np.zeros((len(indices), 16), dtype=np.uint8)
        self.sizes = np.zeros((len(indices), 2), dtype=np.int32)
        """(height, width) of each; zero where an image cannot be read."""
        self._bad_places, self._reasons = array("q"), list[str]()
        self._sums = np.zeros((2, channels))

    def add(self, part: _Part) -> None:
        """Note the next images."""
        here = slice(self.examined, self.examined + len(part.sizes))
        self.digests[here], self.sizes[here] = part.digests, part.sizes
        for place, reason in part.bad:
            self._bad_places.append(self.examined + place)
            self._reasons.append(reason)
        self.formats += part.formats
        self.modes += part.modes
        self.traits += part.traits
        self._sums += part.sums
        self.examined += len(part.sizes)

    @property
    def num_bad(self) -> int:
        """Images that cannot be read."""
        return len(self._bad_places)

    @property
    def num_readable(self) -> int:
        """Images that can."""
        return self.examined - self.num_bad

    def bad(self) -> Iterator[BadSample]:
        """Those that cannot be read, in order, with their reasons."""
        for place, reason in zip(self._bad_places, self._reasons, strict=True):
            yield BadSample(int(self.indices[place]), self.name(place), reason)

    def name(self, place: int) -> str:
        """Name of the image at this place among the examined."""
        return self.source.name(int(self.indices[place]))

    @property
    def readable(self) -> Bool[np.ndarray, " n"]:
        """Which of the examined can be read."""
        return self.sizes[:, 0] > 0

    @property
    def statistics(self) -> Statistics | None:
        """Of all that can be read; None where nothing can."""
        if not self.num_readable:
            return None
        mean, square = self._sums / self.num_readable
        std = np.sqrt(np.maximum(square - mean**2, 0))
        return Statistics(tuple(mean.tolist()), tuple(std.tolist()))

    def class_counts(self) -> Int64[np.ndarray, " classes"] | None:
        """Readable examined images by class, empty classes too; None where the source has no labels."""
        if not self.source.has_labels:
            return None
        labels = self.source.labels[self.indices[self.readable]]
        return np.bincount(labels, minlength=len(self.source.class_names)).astype(np.int64)


def examine(
    source: Source,
    data: DataConfig,
    *,
    samples: int | None = None,
    seed: int = 0,
    workers: int = 0,
    progress: Progress | None = None,
) -> Examination:
    """Read a source through, or a random `samples` of its images."""
    indices = _chosen(len(source), samples, seed)
    found = Examination(source, indices, data.channels)
    started_s = time.perf_counter()
    parts: DataLoader[_Part] = DataLoader(
        _Looker(source, data),
        batch_sampler=(indices[start : start + CHUNK] for start in range(0, len(indices), CHUNK)),  # type: ignore[arg-type]
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        generator=torch.Generator(),
    )
    for part in from_workers(parts):
        found.add(part)
        if progress is not None:
            progress(found.examined, found.num_bad)
    found.elapsed_s = time.perf_counter() - started_s
    return found


def _chosen(length: int, samples: int | None, seed: int) -> Int64[np.ndarray, " n"]:
    if samples is None or samples >= length:
        return np.arange(length, dtype=np.int64)
    return np.sort(keyed_permutation(seed, length, "doctor")[:samples]).astype(np.int64)


def _as_it_is(part: Any) -> Any:
    return part


# -------------------------------------------------------------------------------------------- a look at each


class _Part(NamedTuple):
    """Of some images in a row: a digest and a size each, and sums over those that can be read."""

    digests: UInt8[np.ndarray, "n 16"]
    sizes: Int32[np.ndarray, "n 2"]
    formats: Counter[str]
    modes: Counter[str]
    traits: Counter[str]
    sums: Float64[np.ndarray, "2 channels"]
    """Of the images' means and of their mean squares."""
    bad: list[tuple[int, str]]
    """Place among these images, reason."""


class _Looker(Dataset):
    """What a worker runs: numbers of images in, what they are out."""

    def __init__(self, source: Source, data: DataConfig) -> None:
        self._source = source
        self._data = data

    def __getitems__(self, indices: Int64[np.ndarray, " n"]) -> _Part:
        part = _Part(
            np.zeros((len(indices), 16), dtype=np.uint8),
            np.zeros((len(indices), 2), dtype=np.int32),
            Counter(),
            Counter(),
            Counter(),
            np.zeros((2, self._data.channels)),
            [],
        )
        for place, index in enumerate(indices):
            try:
                self._look(int(index), place, part)
            except BadImageError as error:
                part.bad.append((place, str(error)))
        return part

    def _look(self, index: int, place: int, part: _Part) -> None:
        content = self._source.content(index)
        if content is None:
            pixels = self._source.read(index)
            self._check_channels(pixels)
            file = _FileKind("no files", f"{len(pixels)} channels", ())
            digest = _digest(repr(tuple(pixels.shape)).encode() + pixels.contiguous().numpy().tobytes())
        else:
            data = self._data
            pixels = decode_image(
                content, decoder=data.decoder, max_pixels=data.max_pixels, channels=data.channels
            )
            self._check_channels(pixels)
            file = _file_kind(content, self._source.name(index))
            digest = _digest(content)
        moments = _moments(pixels)
        part.digests[place] = digest
        part.sizes[place] = pixels.shape[-2:]
        part.formats[file.format] += 1
        part.modes[file.mode] += 1
        part.traits.update(file.traits)
        part.traits["one colour"] += not _deviates(moments)
        part.sums[:] += moments

    def _check_channels(self, pixels: Tensor) -> None:
        if len(pixels) != self._data.channels:
            raise BadImageError(f"it has {len(pixels)} channels, data.channels is {self._data.channels}")


def _digest(content: bytes) -> UInt8[np.ndarray, " 16"]:
    return np.frombuffer(hashlib.blake2b(content, digest_size=16).digest(), dtype=np.uint8)


def _moments(pixels: UInt8[Tensor, "c h w"]) -> Float64[np.ndarray, "2 c"]:
    """Mean and mean square of every channel, of pixels in [0, 1]; exact, by counting values."""
    values = np.arange(256) / 255
    counts = [torch.bincount(channel.flatten(), minlength=256).numpy() for channel in pixels]
    number = pixels[0].numel()
    return np.array(
        [[count @ values / number for count in counts], [count @ values**2 / number for count in counts]]
    )


def _deviates(moments: Float64[np.ndarray, "2 c"]) -> bool:
    """Whether the pixels of any channel differ."""
    return bool((moments[1] - moments[0] ** 2 > 1e-9).any())


class _FileKind(NamedTuple):
    """What a file's header tells."""

    format: str
    mode: str
    traits: tuple[str, ...]


def _file_kind(content: bytes, name: str) -> _FileKind:
    """Format, mode and what is worth knowing of a file that could be decoded."""
    try:
        with pillow_errors():
            image = open_image(content)
            found = {
                "16 bits": _has_16_bits(image, content),
                "alpha": image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info,
                "palette": image.mode in ("P", "PA"),
                "grey": image.mode in ("1", "L", "LA", "La", "I") or image.mode.startswith("I;16"),
                "CMYK": image.mode == "CMYK",
                "rotated by EXIF": orientation_of(image) != 1,
                "animated": getattr(image, "n_frames", 1) > 1 and image.format in ANIMATED,
                "named as another format": _is_misnamed(name, image.format),
            }
            return _FileKind(str(image.format), image.mode, tuple(trait for trait in found if found[trait]))
    except BadImageError:
        return _tiff_kind(content)


def _tiff_kind(content: bytes) -> _FileKind:
    """Of what was decoded although Pillow does not know it: a TIFF file of many bands."""
    if not is_tiff(content):
        return _FileKind("other", "other", ())
    header = read_tiff_header(content)
    mode = f"{header.channels} bands of {header.bits} bits"
    return _FileKind("TIFF", mode, ("16 bits",) if header.bits == 16 else ())


def _has_16_bits(image: Image.Image, content: bytes) -> bool:
    if image.format == "PNG":
        return content[24] == 16  # of the header, by the standard; Pillow tells it of grey ones alone
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, (1,))
        return max(bits) == 16
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")


def _is_misnamed(name: str, found: str | None) -> bool:
    """Whether the name's ending is another format's."""
    named = Image.registered_extensions().get(PurePosixPath(name).suffix.lower(), found)
    return named != found and {named, found} != {"JPEG", "MPO"}


# ------------------------------------------------------------------------------------------------ duplicates


class Duplicates(NamedTuple):
    """Groups of images with the same content, two and more, by their first image's place."""

    places: Int64[np.ndarray, " n"]
    """All places, those of a group one after the other and ascending."""
    starts: Int64[np.ndarray, " groups"]
    lengths: Int64[np.ndarray, " groups"]

    def __len__(self) -> int:
        return len(self.starts)

    def group(self, number: int) -> Int64[np.ndarray, " n"]:
        """The places of one group."""
        return self.places[self.starts[number] : self.starts[number] + self.lengths[number]]

    @property
    def surplus(self) -> int:
        """Images that repeat an earlier one."""
        return int((self.lengths - 1).sum())


def duplicates(digests: UInt8[np.ndarray, "n 16"], readable: Bool[np.ndarray, " n"]) -> Duplicates:
    """Group equal digests of readable images."""
    where = np.flatnonzero(readable)
    low, high = np.ascontiguousarray(digests[where]).view("<u8").reshape(-1, 2).T
    order = np.lexsort((low, high))  # stable, so that places ascend within a group
    low, high, places = low[order], high[order], where[order]
    is_first = np.ones(len(places), dtype=bool)
    is_first[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    starts = np.flatnonzero(is_first)
    lengths = np.diff(np.append(starts, len(places)))
    starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    by_first = np.argsort(places[starts], kind="stable")
    return Duplicates(places, starts[by_first], lengths[by_first])


# ------------------------------------------------------------------------------------------------------ rate


def images_per_core_s(source: Source, data: DataConfig, image_size: Size) -> float | None:
    """Training crops that one core makes in a second of its time, reading and decoding included.

    Waiting for a disk is not in it. None where none of the images tried can be read.
    """
    loader = TrainLoader(source, data, image_size=image_size, seed=0, batch_size=min(RATE_BATCH, len(source)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        steps = iter(loader)
        next(steps)  # the order is drawn, libraries are loaded
        images, elapsed_s, started_s = 0, 0.0, time.process_time()
        for _ in range(RATE_IMAGES // RATE_BATCH):
            images += sum(len(batch.images) for batch in next(steps).micro_batches)
            elapsed_s = time.process_time() - started_s
            if elapsed_s > RATE_S:
                break
    finally:
        torch.set_num_threads(threads)
    return images / max(elapsed_s, 1e-9) if images else None
