"""Any source as tar shards in the WebDataset layout, which slow disks and servers read fast.

    DST/shard-000000.tar    KEY.jpg and, if there are labels, KEY.cls (the class's name); its index beside it
    DST/names.tsv           KEY and the image's name in the source
    DST/manifest.json       counts, classes, the source, the settings, and the finished shards
    DST/quarantine.jsonl    unreadable images, and shards of the source that end early, if any

The shards depend on the source and the settings alone, not on the number of workers. Each appears whole or
not at all. It is then noted in the manifest, so interrupted packing resumes after the last finished shard.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import tarfile
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from nextblock.atomic import OUTPUT_MARK, WriteError, exclusive, write_text
from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError, check_pixels, pillow_errors
from nextblock.data.loader import BadSample, QuarantineLog
from nextblock.data.sources import Source
from nextblock.data.sources.base import check_size, decode, open_encoded
from nextblock.data.sources.tar import TarSource, tar_index
from nextblock.data.subsets import named
from nextblock.data.workers import Note, resolve_workers, run_in_workers
from nextblock.settings import check_types, require

__all__ = ["PackConfig", "Packed", "pack"]

log = logging.getLogger(__name__)

Progress = Callable[[int], None] | None
Member = tuple[str, bytes]

# Most pixels of a scene, or of a band of it, that are held at once: 1.6 GB of colour.
MAX_SCENE_PIXELS = 536_870_912

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
# First bytes of files that are kept, and their extensions. JPEG 2000 is missing, as few programs read it.
_STARTS = {
    **{b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif", b"P": "ppm"},
    **{b"ftypavi": "avif", b"ftyp": "heic"},
    **dict.fromkeys(_TIFF, "tif"),
}
# TIFF compressions read in bands: none, LZW, JPEG, deflate, PackBits, deflate, LZMA, zstd.
_COMPRESSION = (1, 5, 7, 8, 32773, 32946, 34925, 50000)


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How images are written to shards."""

    shard_mb: float = 256.0
    """Size of a shard in megabytes; a larger image, or all tiles of one, makes a larger shard."""
    resize_px: int | None = None
    """Shrink images whose shorter side is longer than this; null: keep the size, and the bytes."""
    quality: int = 90
    """Quality of JPEG and WebP, 1 to 100."""
    format: Literal["jpeg", "webp", "png"] | None = None
    """Re-encode every image; null: only those that are shrunk or cut (as JPEG), or are not files (as PNG)."""
    tile_px: int | None = None
    """Cut images that are wider or higher into square tiles of this side, the last ones overlapping."""
    workers: int | None = None
    """Processes that read and encode; null: up to 8, one less than there are cores; 0: the main process."""

    def __post_init__(self) -> None:
        check_types(self)
        for name, least in (
            ("shard_mb", 0.001),
            ("resize_px", 1),
            ("quality", 1),
            ("tile_px", 1),
            ("workers", 0),
        ):
            value = getattr(self, name)
            require(value is None or value >= least, f"{name} is {value}; use at least {least}")
        require(self.quality <= 100, f"quality is {self.quality}; use 1 to 100")
        require(not (self.resize_px and self.tile_px), "give either resize_px or tile_px, not both")


class Packed(NamedTuple):
    """What was written."""

    place: str
    spec: str
    """How to name it as a source."""
    shards: int
    samples: int
    images: int
    """Of the source; each is a sample, or several tiles, or bad."""
    bad: int
    damage: list[str]
    num_bytes: int


def pack(
    source: Source, dst: Path, config: PackConfig, data: DataConfig, progress: Progress = None
) -> Packed:
    """Write shards of all readable images of a source; `progress` is called with the number of images done.

    The same call resumes interrupted packing, or reads what is finished. `ValueError` if `dst` holds
    something else, `TooManyBadImages` beyond data.max_bad_fraction, `InUseError`, `WriteError`.
    """
    if (config.resize_px or config.tile_px or config.format) and data.channels not in (1, 3):
        raise ValueError(
            f"data.channels is {data.channels}, and only 1 or 3 can be encoded; leave out resize_px, tile_px "
            "and format to keep the files as they are"
        )
    settings = {"source": source.fingerprint, **asdict(config)}
    settings |= {name: getattr(data, name) for name in ("channels", "decoder", "background", "max_pixels")}
    del settings["workers"]
    try:
        in_use = dst.is_file() or any(dst.glob("[!.]*"))
        if in_use and not ((dst / OUTPUT_MARK).exists() and (dst / "manifest.json").exists()):
            raise ValueError(f"{dst} exists and holds something else; give a new folder")
        with exclusive(dst):
            manifest = _open_manifest(dst, settings)
            if not manifest["finished"]:
                _write_shards(_Encoder(source, config, data), dst, manifest, progress)
                _finish(source, dst, manifest, data)
    except OSError as error:
        raise WriteError(
            f"cannot write to {dst}: {error.strerror or error}. Make room, then run the same command again"
        ) from error
    shards = manifest["shards"]
    span = "000000" if len(shards) == 1 else f"{{000000..{len(shards) - 1:06d}}}"
    return Packed(
        place=str(dst),
        spec=str(dst / f"shard-{span}.tar"),
        shards=len(shards),
        num_bytes=sum(shard["bytes"] for shard in shards),
        **{name: manifest[name] for name in ("samples", "images", "bad", "damage")},
    )


def _open_manifest(dst: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier call with these settings noted, up to the first lost shard; or a new manifest."""
    path = dst / "manifest.json"
    if not path.exists():
        write_text(path, json.dumps({"finished": False, "settings": settings, "shards": []}))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        there, shards = manifest["settings"], manifest["shards"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {dst}") from error
    differ = [f"{k} {there.get(k)!r}, not {new!r}" for k, new in settings.items() if there.get(k) != new]
    if differ:
        raise ValueError(f"{dst} holds shards of other settings ({'; '.join(differ)}); give another folder")
    for number, shard in enumerate(shards):
        path = dst / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            log.warning("%s is missing or has changed; packing continues from it", path)
            del shards[number:]
            manifest["finished"] = False
            break
    return manifest


def _write_shards(encoder: _Encoder, dst: Path, manifest: dict[str, Any], progress: Progress) -> None:
    """Write the shards that are missing, and note each in the manifest as soon as it is whole."""
    source, config, data = encoder
    shards, bad = manifest["shards"], dst / "quarantine.jsonl"
    start = shards[-1]["next"] if shards else 0
    # An interrupted call may have noted bad images of the shard that it did not finish. They are read again.
    if bad.exists():
        noted = bad.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        write_text(bad, "".join(f"{line}\n" for line in noted if 0 <= json.loads(line)["sample"] < start))
    quarantine = QuarantineLog(bad, len(source), data.max_bad_fraction)

    def images() -> Generator[tuple[int, int, list[Member]], None, None]:
        """The readable images from `start` on: the number of their shard, their own, and their members."""
        numbers, shard, used = range(start, len(source)), len(shards), 0
        results = run_in_workers(encoder, numbers, source, resolve_workers(config.workers, source))
        for index, (members, reason) in zip(numbers, results, strict=True):
            if reason:
                quarantine.add(BadSample(index, source.name(index), reason))
            # In a tar, a member takes a header of 512 bytes, and its content filled up to a multiple of 512.
            # A shard begins with an image, not with a later tile: one number says where packing resumes.
            size = sum(512 + -(-len(content) // 512) * 512 for _, content in members)
            if used and used + size > config.shard_mb * 1e6:
                shard, used = shard + 1, 0
            used += size
            if members:
                yield shard, index, members
            if progress is not None:
                progress(index + 1)

    with closing(images()) as found:
        for number, group in groupby(found, key=itemgetter(0)):
            path = dst / f"shard-{number:06d}.tar"
            aside = path.with_name(f".writing-{path.name}")  # if left over, the next call replaces it
            with tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
                for _, index, members in group:
                    for name, content in members:
                        head = tarfile.TarInfo(name)  # time and owner 0: equal images, equal bytes
                        head.size = len(content)
                        tar.addfile(head, io.BytesIO(content))
                    start = index + 1
            with aside.open("rb") as file:
                os.fsync(file.fileno())
            aside.replace(path)
            tar_index(path, data)
            shards.append({"name": path.name, "bytes": path.stat().st_size, "next": start})
            write_text(dst / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def _finish(source: Source, dst: Path, manifest: dict[str, Any], data: DataConfig) -> None:
    """Write names.tsv, complete the manifest and the quarantine list, and name classes without an image."""
    if not manifest["shards"]:
        raise ValueError(f"{source.spec!r}: none of its {len(source)} images can be read")
    packed = TarSource(str(dst), [dst / shard["name"] for shard in manifest["shards"]], data)
    keys = [Path(packed.name(index)).stem for index in range(len(packed))]
    write_text(
        dst / "names.tsv", "".join(f"{key}\t{source.name(int(key.partition('_')[0]))}\n" for key in keys)
    )
    quarantine = QuarantineLog(dst / "quarantine.jsonl", len(source), math.inf)
    bad = [sample.sample for sample in quarantine.bad]
    for number, damage in enumerate(source.damage):  # these have numbers that no image has
        quarantine.add(BadSample(-1 - number, damage.shard, damage.reason))
    classes = source.class_names if source.has_labels else ()
    found = set(np.delete(source.labels, bad).tolist()) if classes else set()
    absent = [name for label, name in enumerate(classes) if label not in found]
    absent += source.empty_classes() if classes else []
    if absent:
        log.warning("%s: %d classes have no image in the shards: %s", dst, len(absent), named(absent))
    manifest |= {"finished": True, "source": source.spec, "classes": classes, "images": len(source)}
    manifest |= {"samples": len(packed), "bad": len(bad), "damage": list(map(str, source.damage))}
    write_text(dst / "manifest.json", json.dumps(manifest, indent=1) + "\n")


# --------------------------------------------------------------------------------------------------- images


class _Encoder(NamedTuple):
    """What a worker runs: the members that an image becomes; or none, and why it cannot be read."""

    source: Source
    config: PackConfig
    data: DataConfig

    def __call__(self, index: int, note: Note) -> tuple[list[Member], str]:
        note(index)
        source = self.source
        members: list[Member] = []
        try:
            for ending, content in self._files(index):
                members.append((f"{index:09d}{ending}", content))
                if source.has_labels:
                    label = source.class_names[source.labels[index]].encode()
                    members.append((members[-1][0].rpartition(".")[0] + ".cls", label))
        except BadImageError as error:
            return [], str(error)
        except OSError as error:
            return [], f"cannot be read: {error.strerror or error}"
        return members, ""

    def _files(self, index: int) -> list[Member]:
        """The files that an image becomes, with what follows its number in their names."""
        (source, config, data), tile = self, self.config.tile_px
        content = source.content(index) if tile is None else None
        if tile is not None and (file := open_encoded(source, index)):
            data = replace(data, max_pixels=MAX_SCENE_PIXELS)
            with file:
                if tiles := self._tiles(tiff_bands(file, tile, data), tile, "jpeg"):
                    return tiles
                check_size(file.seek(0, io.SEEK_END), data)
                file.seek(0)
                content = file.read()
        # Decoded even if the bytes are kept: that is how an unreadable image is found.
        pixels = source.read(index) if content is None else decode(content, data)
        default = "png" if content is None else "jpeg"
        height, width = pixels.shape[1:]
        if tile is not None and max(height, width) > tile:
            bands = ((top, pixels[:, top : top + tile]) for top in starts(height, tile))
            return self._tiles(bands, tile, default)
        is_shrunk = config.resize_px is not None and min(height, width) > config.resize_px
        if content and not config.format and not is_shrunk:
            start = content[4:11] if content[4:8] == b"ftyp" else content[:4]
            for magic, extension in _STARTS.items():
                if start.startswith(magic):
                    return [(f".{extension}", content)]
        return [self._encode(pixels, default)]

    def _tiles(self, bands: Iterator[tuple[int, Tensor]], tile: int, default: str) -> list[Member]:
        return [
            self._encode(band[:, :, left : left + tile], default, f"_{top:06d}_{left:06d}")
            for top, band in bands
            for left in starts(band.shape[2], tile)
        ]

    def _encode(self, pixels: UInt8[Tensor, "c h w"], default: str, place: str = "") -> Member:
        kind, resize_px = self.config.format or default, self.config.resize_px
        values = np.ascontiguousarray(rearrange(pixels, "c h w -> h w c").numpy())
        file = io.BytesIO()
        try:
            image = Image.fromarray(values[..., 0] if len(pixels) == 1 else values)
            if resize_px is not None and (shorter := min(image.size)) > resize_px:
                width, height = (max(1, round(side * (resize_px / shorter))) for side in image.size)
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            image.save(file, kind.upper(), **({} if kind == "png" else {"quality": self.config.quality}))
        except (OSError, ValueError, TypeError) as error:  # too large for the format, or of other channels
            raise BadImageError(f"cannot be written as {kind}: {error}") from error
        return f"{place}.{'jpg' if kind == 'jpeg' else kind}", file.getvalue()


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length; the last ends with it, and so may overlap the one before."""
    return [*range(0, length - tile, tile), max(0, length - tile)]


# --------------------------------------------------------------------------------------------- large scenes


def tiff_bands(
    file: io.BufferedIOBase, tile: int, data: DataConfig
) -> Iterator[tuple[int, UInt8[Tensor, "c h w"]]]:
    """Bands of `tile` rows of a TIFF's first page, each with its first row; none: decode it whole.

    None for small images, and for TIFFs that are turned, in one segment (strip or tile), or of rare kinds.
    """
    if file.read(4) not in _TIFF:
        return
    file.seek(0)  # tifffile begins where the file stands
    try:
        import imagecodecs  # noqa: F401 - tifffile unpacks with it
        from tifffile import TiffFile, imwrite

        with pillow_errors():
            page: Any = TiffFile(cast("Any", file), name="scene").pages.first
            (planes, depth, length, width, samples), is_jpeg = page.shaped, page.compression == 7
            rows, columns = page.tilelength or page.rowsperstrip, page.tilewidth or width
            is_turned = b"tiff:Orientation" in page.tags.valueof(700, b"")  # by XMP; the tag goes before
            if (
                max(length, width) <= tile
                or not planes == depth == page.tags.valueof(274, 1 - is_turned) == 1
                or len(page.dataoffsets) < 2
                or min(page.databytecounts) < 1
                or (page.bitspersample, page.dtype) not in ((8, np.uint8), (16, np.uint16))
                or page.compression not in _COMPRESSION
                or page.photometric not in ((2, 6) if is_jpeg and samples == 3 else (0, 1, 2))
                # The memory of a band and of the segments in it is known before any is read.
                or (tile + rows) * (width + columns) * samples > 3 * MAX_SCENE_PIXELS
            ):
                return
    except (ImportError, BadImageError):  # decoding the file whole says what is wrong
        return
    across, tops = -(-width // columns), starts(length, tile)
    segments = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    if len(segments) < across * -(-length // rows) or max(map(sum, segments)) > file.seek(0, io.SEEK_END):
        raise BadImageError("truncated: strips or tiles are missing, or end after the file")
    kind, colours = (2, 3) if page.photometric in (2, 6) else (int(page.photometric), 1)
    extra = [*page.extrasamples, *[0] * samples][: samples - colours]
    layout: dict[str, Any] = {"planarconfig": 1, "extrasamples": extra} if samples > 1 else {}
    # `held` is what was read from row `above`, where a band begins, to row `below`. So every segment is read
    # once, in the file's order, and no more than a band and a row of segments is in memory.
    held, row, above, below = [], [], 0, 0
    for number, (offset, count) in enumerate(segments):
        file.seek(offset)
        packed = file.read(count)
        with pillow_errors():
            if is_jpeg:  # it states a size of its own, for which its decoder makes room
                check_pixels(Image.open(io.BytesIO(packed), formats=("JPEG",)).size, rows * columns)
            row.append(page.decode(packed, number, jpegtables=page.jpegtables)[0][0])
            if len(row) < across:
                continue
            held.append(np.concatenate(row, axis=1)[: length - below, :width])
        row, below = [], below + len(held[-1])
        while tops and below >= min(tops[0] + tile, length):
            held, above = [np.concatenate(held)[tops[0] - above :]], tops.pop(0)
            # Written as a small TIFF, alpha and 16 bits become pixels as those of any other TIFF do.
            small, band = io.BytesIO(), held[0][:tile]
            with pillow_errors():
                band = band[..., 0] if samples == 1 else band
                imwrite(small, band, photometric=kind, metadata=None, **layout)
            yield above, decode(small.getvalue(), data)
