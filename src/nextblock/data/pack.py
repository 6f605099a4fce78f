"""Any source as tar shards in the WebDataset layout, with what training needs to start at once.

    DST/shard-000000.tar                  KEY.jpg and, where there are labels, KEY.cls (the class's name)
    DST/shard-000000.tar.nextblock-index  where everything lies in it
    DST/names.tsv                         KEY and the image's name in the source
    DST/manifest.json                     counts, classes, the source, the settings
    DST/quarantine.jsonl                  images that could not be read and are not packed, if there are any,
                                          and shards of the source that end early

The shards are a function of the source and the settings, whatever the number of workers. A shard appears
whole or not at all; packing that was stopped goes on after the last whole one when it is started again, and
packing that is complete from the first shard that has gone since.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import math
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nextblock.atomic import write_text
from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError, decode_image, open_image, pillow_errors
from nextblock.data.loader import BadSample, resolve_workers
from nextblock.data.quarantine import QuarantineLog
from nextblock.data.scenes import read_bands, starts
from nextblock.data.sources import Source
from nextblock.data.sources.tar import damage_of
from nextblock.data.sources.tar_index import tar_index
from nextblock.data.workers import from_workers, start_worker
from nextblock.settings import check_types, require

__all__ = ["PackConfig", "PackError", "Packed", "pack"]

log = logging.getLogger(__name__)

_ENDINGS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "TIFF": "tif",
    "BMP": "bmp",
    "GIF": "gif",
    "PPM": "ppm",
    "AVIF": "avif",
    "HEIF": "heic",
}
_BLOCK = 512


class PackError(RuntimeError):
    """Shards cannot be written."""


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """What becomes of the images on their way into shards."""

    shard_mb: float = 256.0
    """Size of a shard in megabytes; a single larger image makes a larger one."""
    resize_px: int | None = None
    """Shrink images whose shorter side is longer than this; null: keep the size, and the bytes."""
    quality: int = 90
    """Quality of JPEG and WebP, 1 to 100."""
    format: Literal["jpeg", "webp", "png"] | None = None
    """Re-encode every image; null: only those that are shrunk or cut, as JPEG, or whose source has no files,
    as PNG."""
    tile_px: int | None = None
    """Cut pictures that are wider or higher into square tiles of this side, the last ones overlapping."""
    workers: int | None = None
    """Processes that read and encode; null: up to 8, one less than there are cores; 0: the main process."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.shard_mb > 0, f"shard_mb is {self.shard_mb}; use more than 0")
        require(1 <= self.quality <= 100, f"quality is {self.quality}; use 1 to 100")
        for name in ("resize_px", "tile_px"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; use at least 1")
        require(self.workers is None or self.workers >= 0, f"workers is {self.workers}; use 0 or more")
        require(
            self.resize_px is None or self.tile_px is None,
            f"resize_px {self.resize_px} and tile_px {self.tile_px} exclude each other; give one of them",
        )

    def settings(self) -> dict[str, Any]:
        """What the shards depend on."""
        return {name: value for name, value in asdict(self).items() if name != "workers"}


class Packed(NamedTuple):
    """What was written."""

    place: str
    spec: str
    """How to name it as a source."""
    shards: int
    samples: int
    images: int
    """Of the source; each is a sample, or several tiles, or broken."""
    bad: int
    damage: list[str]
    """Of the source's own shards: those that cannot be read to their end, and why."""
    num_bytes: int


class Part(NamedTuple):
    """A file to pack."""

    suffix: str
    """What the key has beyond the image's number: a tile's place."""
    ending: str
    content: bytes


def pack(
    source: Source,
    dst: Path,
    config: PackConfig,
    data: DataConfig,
    progress: Callable[[int], None] | None = None,
) -> Packed:
    """Write shards of all images of a source that can be read; `progress` is told how many are done.

    `ValueError` where the folder holds something else, `TooManyBadImages` beyond data.max_bad_fraction,
    `PackError` where a shard cannot be written.
    """
    is_encoded = (config.resize_px, config.tile_px, config.format) != (None, None, None)
    if is_encoded and data.channels not in (1, 3):
        raise ValueError(
            f"data.channels is {data.channels}, and only 1 or 3 can be encoded; leave resize_px, tile_px and "
            "format out, which keeps the files as they are"
        )
    if dst.exists() and not dst.is_dir():
        raise ValueError(f"{dst} is a file, and shards are written to a folder; give another name")
    of_data = {name: getattr(data, name) for name in ("channels", "decoder", "max_pixels")}
    settings = {"source": source.fingerprint, **config.settings(), **of_data}
    manifest = dst / "manifest.json"
    try:
        done = _finished(manifest, settings) if manifest.exists() else None
        if done is not None:
            return done
        journal = _Journal(dst, settings)
        _write_all(source, dst, config, data, journal, progress)
        done = _summary(source, dst, journal)
        names = source.class_names if source.has_labels else ()
        about = {"source": source.spec, "settings": settings, "classes": list(names)}
        told = {**done._asdict(), **about, "journal": journal.shards}
        write_text(manifest, json.dumps(told, indent=1) + "\n")
        journal.path.unlink()
    except OSError as error:
        raise PackError(f"cannot write to {dst}: {error.strerror or error}; {_remedy(error)}") from error
    return done


def _remedy(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "give a folder in which you may write"
    room = "make room and " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"{room}run it again (whole shards are kept), or give another folder"


def _finished(manifest: Path, settings: dict[str, Any]) -> Packed | None:
    """What an earlier call wrote, if it was told the same; None, with its journal, if some has gone since."""
    told, dst = json.loads(manifest.read_text()), manifest.parent
    if told["settings"] != settings:
        raise ValueError(_is_other(dst, told["settings"], settings))
    if len(_whole(dst, told["journal"])) < len(told["journal"]):
        write_text(dst / "packing.jsonl", _lines(settings, *told["journal"]))
        manifest.unlink()
        return None
    return Packed(**{name: told[name] for name in Packed._fields})


def _whole(dst: Path, shards: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The shards, of those a journal names, before the first that is not there as it was written."""

    def size(path: Path) -> int:
        return path.stat().st_size if path.is_file() else -1

    num_names_bytes = size(dst / "names.tsv")
    for number, shard in enumerate(shards):
        if size(dst / shard["shard"]) != shard["bytes"] or num_names_bytes < shard["names_bytes"]:
            log.warning("%s: %s has gone or changed; packing goes on from it", dst, shard["shard"])
            return shards[:number]
    return shards


def _is_other(dst: Path, there: dict[str, Any], asked: dict[str, Any]) -> str:
    differ = [
        f"{key} {there.get(key)!r}, not {asked[key]!r}" for key in asked if there.get(key) != asked[key]
    ]
    return f"{dst} holds shards of other settings ({'; '.join(differ)}); give another folder, or remove it"


def _summary(source: Source, dst: Path, journal: _Journal) -> Packed:
    shards, damage = journal.shards, damage_of(source)
    quarantine = QuarantineLog(dst / "quarantine.jsonl", len(source), math.inf)
    for number, damaged in enumerate(damage):  # no images: they get numbers that no image has
        quarantine.add(BadSample(-1 - number, damaged.shard, damaged.reason))
    if not shards:
        raise ValueError(f"{source.spec!r}: none of its {len(source)} images can be read")
    last = f"{len(shards) - 1:06d}"
    return Packed(
        place=str(dst),
        spec=str(dst / ("shard-000000.tar" if len(shards) == 1 else f"shard-{{000000..{last}}}.tar")),
        shards=len(shards),
        samples=sum(shard["samples"] for shard in shards),
        images=len(source),
        bad=quarantine.count - len(damage),
        damage=list(map(str, damage)),
        num_bytes=sum(shard["bytes"] for shard in shards),
    )


# ----------------------------------------------------------------------------------------------- writing


class _Journal:
    """Which shards are whole, one JSON line each after one of settings: what a restart goes on from."""

    def __init__(self, dst: Path, settings: dict[str, Any]) -> None:
        self.path = dst / "packing.jsonl"
        self.shards: list[dict[str, Any]] = []
        if self.path.exists():
            lines = self.path.read_bytes()
            whole = [json.loads(line) for line in lines[: lines.rfind(b"\n") + 1].splitlines()]
            if whole and whole[0] != settings:
                raise ValueError(_is_other(dst, whole[0], settings))
            self.shards = _whole(dst, whole[1:])
        elif dst.exists() and any(dst.iterdir()):
            raise ValueError(f"{dst} is not empty; give a new folder, or remove it")
        dst.mkdir(parents=True, exist_ok=True)
        write_text(self.path, _lines(settings, *self.shards))
        names = dst / "names.tsv"  # of a shard that did not become whole it may hold some
        with names.open("ab") as file:
            file.truncate(self.shards[-1]["names_bytes"] if self.shards else 0)

    @property
    def next(self) -> tuple[int, int]:
        """The image, and which of its parts, that the next shard begins with."""
        return (self.shards[-1]["next_image"], self.shards[-1]["next_part"]) if self.shards else (0, 0)

    def add(self, shard: dict[str, Any]) -> None:
        self.shards.append(shard)
        with self.path.open("a") as file:
            file.write(json.dumps(shard) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _write_all(
    source: Source,
    dst: Path,
    config: PackConfig,
    data: DataConfig,
    journal: _Journal,
    progress: Callable[[int], None] | None,
) -> None:
    first, skip = journal.next
    quarantine = QuarantineLog(dst / "quarantine.jsonl", len(source), data.max_bad_fraction)
    labels = source.labels if source.has_labels else None
    with closing(_Writer(dst, journal, config.shard_mb * 1e6, data)) as writer:
        for index, parts in _encoded(source, config, data, first):
            if isinstance(parts, str):
                quarantine.add(BadSample(index, source.name(index), parts))
                parts = []
            name = " ".join(source.name(index).split())
            label = None if labels is None else source.class_names[labels[index]]
            for number, part in enumerate(parts):
                if index == first and number < skip:
                    continue
                writer.add(f"{index:09d}{part.suffix}", part, label, name, (index, number))
            if progress is not None:
                progress(index + 1)
        writer.finish((len(source), 0))


class _Writer:
    """The shard that is being filled."""

    def __init__(self, dst: Path, journal: _Journal, shard_bytes: float, data: DataConfig) -> None:
        self._dst, self._journal, self._shard_bytes, self._data = dst, journal, shard_bytes, data
        self._tar: tarfile.TarFile | None = None
        self._samples = 0
        self._names: list[str] = []

    def add(self, key: str, part: Part, label: str | None, name: str, place: tuple[int, int]) -> None:
        members = [(f"{key}.{part.ending}", part.content)]
        members += [] if label is None else [(f"{key}.cls", label.encode())]
        size = sum(_BLOCK + -(-len(content) // _BLOCK) * _BLOCK for _, content in members)
        if self._tar is not None and self._tar.offset + size > self._shard_bytes:
            self.finish(place)
        if self._tar is None:
            self._tar = tarfile.open(self._aside, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for member, content in members:
            head = tarfile.TarInfo(member)  # with the time 0 and the owner 0: equal bytes for equal images
            head.size = len(content)
            self._tar.addfile(head, io.BytesIO(content))
        self._samples += 1
        self._names.append(f"{key}\t{name}\n")

    def close(self) -> None:
        """Drop the shard that is not whole."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        self._aside.unlink(missing_ok=True)

    def finish(self, next_place: tuple[int, int]) -> None:
        """Make the shard appear under its name, if anything is in it, and note where the next begins."""
        if self._tar is None:
            return
        self._tar.close()
        path = self._dst / f"shard-{len(self._journal.shards):06d}.tar"
        with self._aside.open("rb") as file:
            os.fsync(file.fileno())
        self._aside.replace(path)
        tar_index(path, self._data)
        with (self._dst / "names.tsv").open("a", encoding="utf-8") as file:
            file.writelines(self._names)
            file.flush()
            os.fsync(file.fileno())
        self._journal.add(
            {
                "shard": path.name,
                "samples": self._samples,
                "bytes": path.stat().st_size,
                "next_image": next_place[0],
                "next_part": next_place[1],
                "names_bytes": (self._dst / "names.tsv").stat().st_size,
            }
        )
        self._tar, self._samples, self._names = None, 0, []

    @property
    def _aside(self) -> Path:
        return self._dst / "shard.part"


def _lines(*values: dict[str, Any]) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


# ---------------------------------------------------------------------------------------------- encoding


class _Encoder(Dataset):
    """What a worker runs: an image's number in, its parts or why there are none out."""

    def __init__(self, source: Source, config: PackConfig, data: DataConfig) -> None:
        self._source, self._config, self._data = source, config, data

    def __getitem__(self, index: int) -> tuple[int, list[Part] | str]:
        try:
            return index, list(_parts(self._source, index, self._config, self._data))
        except BadImageError as error:
            return index, str(error)


def _encoded(
    source: Source, config: PackConfig, data: DataConfig, first: int
) -> Iterator[tuple[int, list[Part] | str]]:
    """The parts of every image from `first` on, in order."""
    workers = resolve_workers(config.workers, source)
    loader: DataLoader[tuple[int, list[Part] | str]] = DataLoader(
        _Encoder(source, config, data),
        batch_size=None,
        sampler=range(first, len(source)),
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=start_worker if workers else None,
        generator=torch.Generator(),  # without one of its own it draws from the global one
    )
    yield from from_workers(loader)


def _as_it_is(item: Any) -> Any:
    return item


def _parts(source: Source, index: int, config: PackConfig, data: DataConfig) -> Iterator[Part]:
    content = source.content(index)
    if content is None:
        yield from _encode(source.read(index), config, config.format or "png")
        return
    with pillow_errors():
        image = open_image(content)
        ending = _ENDINGS.get(image.format or "")
    if config.tile_px is not None and max(image.size) > config.tile_px:
        for top, band in read_bands(content, config.tile_px, data):
            for left in starts(band.shape[2], config.tile_px):
                tile = band[:, :, left : left + config.tile_px]
                yield _part(tile, config, config.format or "jpeg", f"_{top:06d}_{left:06d}")
        return
    # Decoded even where the bytes are kept: that is how a broken file is told.
    pixels = decode_image(content, decoder=data.decoder, max_pixels=data.max_pixels, channels=data.channels)
    is_kept = config.format is None and (
        config.resize_px is None or min(pixels.shape[1:]) <= config.resize_px
    )
    if is_kept and ending is not None:
        yield Part("", ending, content)
    else:
        yield from _encode(pixels, config, config.format or "jpeg")


def _encode(pixels: Tensor, config: PackConfig, format: str) -> Iterator[Part]:  # noqa: A002 - its name
    """An image shrunk, or cut, or neither, and encoded."""
    if config.tile_px is None or max(pixels.shape[1:]) <= config.tile_px:
        yield _part(pixels, config, format, "")
        return
    for top in starts(pixels.shape[1], config.tile_px):
        for left in starts(pixels.shape[2], config.tile_px):
            tile = pixels[:, top : top + config.tile_px, left : left + config.tile_px]
            yield _part(tile, config, format, f"_{top:06d}_{left:06d}")


def _part(pixels: UInt8[Tensor, "c h w"], config: PackConfig, format: str, suffix: str) -> Part:  # noqa: A002
    channels, height, width = pixels.shape
    values = np.ascontiguousarray(rearrange(pixels, "c h w -> h w c").numpy())
    image = Image.fromarray(values[..., 0] if channels == 1 else values)
    if config.resize_px is not None and min(height, width) > config.resize_px:
        scale = config.resize_px / min(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = image.resize(size, Image.Resampling.LANCZOS)
    file = io.BytesIO()
    lossy = {"quality": config.quality} if format != "png" else {}
    image.save(file, format.upper(), **lossy)
    return Part(suffix, _ENDINGS[format.upper()], file.getvalue())
