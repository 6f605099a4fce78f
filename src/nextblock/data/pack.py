"""Pack any source into tar shards in the WebDataset layout, which slow disks and servers read fast.

    DST/shard-000000.tar    KEY.jpg and, if there are labels, KEY.cls (the class's name); its index beside it
    DST/names.tsv           KEY and the image's name in the source
    DST/manifest.json       counts, classes, the source, the settings, and the finished shards
    DST/quarantine.jsonl    unreadable images, if any

The shards depend only on the source and the settings, not on the number of workers. Each appears whole or
not at all, and is then recorded in the manifest, so interrupted packing resumes after the last finished one.
"""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from nextblock.atomic import OUTPUT_MARK, exclusive, write_aside, write_text
from nextblock.config import DataConfig, PackConfig
from nextblock.data.decode import TIFF_STARTS, BadImageError
from nextblock.data.loader import BadSample, QuarantineLog
from nextblock.data.sources import Source
from nextblock.data.sources.archives import TarSource, expand_braces, tar_index
from nextblock.data.sources.base import decode, digest
from nextblock.data.subsets import warn_of_absent_classes
from nextblock.data.workers import Note, resolve_workers, run_in_workers
from nextblock.errors import UsageError

log = logging.getLogger(__name__)

Progress = Callable[[int], None] | None
Member = tuple[str, bytes]

# First bytes of files that are kept, and their extensions. JPEG 2000 is missing: few programs read it.
_STARTS = {
    **{b"\xff\xd8": "jpg", b"\x89PNG": "png", b"RIFF": "webp", b"BM": "bmp", b"GIF8": "gif", b"P": "ppm"},
    **{b"ftypavi": "avif", b"ftyp": "heic"},
    **dict.fromkeys(TIFF_STARTS, "tif"),
}

# What a finished manifest says besides its shards.
_TOTALS = ("samples", "images", "bad", "damage")


class Packed(NamedTuple):
    """What was written; `spec` names it as a source."""

    place: str
    spec: str
    shards: int
    samples: int
    images: int
    """Images of the source; each is a sample, or several tiles, or bad."""
    bad: int
    damage: list[str]
    num_bytes: int


def pack(
    source: Source, dst: Path, config: PackConfig, data: DataConfig, progress: Progress = None
) -> Packed:
    """Write shards of all readable images of a source; `progress` is called with the number of images done.

    The same call resumes interrupted packing, or reads a finished result. Raises `ValueError` if `dst`
    contains something else, `TooManyBadImages` beyond data.max_bad_fraction, `InUseError`, `WriteError`.
    """
    if (config.resize_px or config.tile_px or config.format) and data.channels not in (1, 3):
        raise UsageError(
            f"data.channels is {data.channels}, but only 1 or 3 can be encoded; leave out resize_px, tile_px "
            "and format to keep the files as they are"
        )
    # All that the shards depend on: only a call with the same settings resumes an interrupted one.
    settings = {"source": source.fingerprint, **asdict(config)}
    settings |= {name: getattr(data, name) for name in ("channels", "decoder", "background", "max_pixels")}
    settings["labels"] = _hash_of_labels(source)
    del settings["workers"]
    if expand_braces(str(dst)) != [str(dst)]:
        raise UsageError(f"{dst} has braces, which would be read as numbers of shards; name another folder")
    in_use = dst.is_file() or any(dst.glob("[!.]*"))
    if in_use and not ((dst / OUTPUT_MARK).exists() and (dst / "manifest.json").exists()):
        raise UsageError(f"{dst} exists and contains something else; give a new folder")
    # Two processes in one folder would overwrite each other's shards.
    with exclusive(dst):
        manifest = _open_manifest(dst, settings)
        if not manifest["finished"]:
            _write_shards(_Encoder(source, config, data), dst, manifest, progress)
            _finish(source, dst, manifest, data)
    shards = manifest["shards"]
    span = "000000" if len(shards) == 1 else f"{{000000..{len(shards) - 1:06d}}}"
    return Packed(
        place=str(dst),
        spec=str(dst / f"shard-{span}.tar"),
        shards=len(shards),
        num_bytes=sum(shard["bytes"] for shard in shards),
        **{name: manifest[name] for name in _TOTALS},
    )


def _hash_of_labels(source: Source) -> str | None:
    """Identifies all labels, None if there are none; `ValueError` for a class that shards would change."""
    if not source.has_labels:
        return None
    if odd := [name for name in source.class_names if not name or name != name.strip()]:
        how = "reading a shard removes spaces around a class; rename it"
        raise UsageError(f"{source.spec!r}: the class {odd[0]!r} would be lost: {how}")
    return digest("\n".join(source.class_names).encode(), source.labels.astype("<i8").tobytes())[:16]


def _open_manifest(dst: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Read the manifest of an earlier call with these settings, up to the first lost shard, or make one."""
    path = dst / "manifest.json"
    if not path.exists():
        write_text(path, json.dumps({"finished": False, "settings": settings, "shards": []}))
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        saved, shards = dict(manifest["settings"]), manifest["shards"]
        sizes = [(dst / shard["name"], int(shard["bytes"]), int(shard["next"])) for shard in shards]
        _ = [manifest[name] for name in (_TOTALS if manifest["finished"] else ())]
    except (ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({error}); remove {dst}") from error
    differ = [f"{k} {saved.get(k)!r}, not {new!r}" for k, new in settings.items() if saved.get(k) != new]
    if differ:
        raise UsageError(f"{dst} holds shards of other settings ({'; '.join(differ)}); give another folder")
    # Each shard continues the previous one, so a lost shard and all after it are written again.
    for number, (path, size, _) in enumerate(sizes):
        if not path.is_file() or path.stat().st_size != size:
            log.warning("%s is missing or has changed; packing continues from it", path)
            del shards[number:]
            manifest["finished"] = False
            break
    return manifest


def _write_shards(encoder: _Encoder, dst: Path, manifest: dict[str, Any], progress: Progress) -> None:
    """Write the missing shards, and record each in the manifest as soon as it is whole."""
    source, config, data = encoder
    shards, bad = manifest["shards"], dst / "quarantine.jsonl"
    start = shards[-1]["next"] if shards else 0
    # An interrupted call may have recorded bad images of an unfinished shard. They are read again.
    if noted := QuarantineLog(bad, len(source), 1).bad:
        write_text(bad, "".join(json.dumps(one._asdict()) + "\n" for one in noted if one.sample < start))
    quarantine = QuarantineLog(bad, len(source), data.max_bad_fraction)

    def finish_shard(members: list[Member], following: int) -> None:
        path = dst / f"shard-{len(shards):06d}.tar"
        with write_aside(path) as aside, tarfile.open(aside, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                head = tarfile.TarInfo(name)  # time and owner stay 0: equal images give equal bytes
                head.size = len(content)
                tar.addfile(head, io.BytesIO(content))
        # The shard counts once the manifest names it. If the process is killed before that, the next call
        # writes the same bytes again.
        tar_index(path, data)
        shards.append({"name": path.name, "bytes": path.stat().st_size, "next": following})
        write_text(dst / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    # A shard stays in memory until it is full. It never splits the tiles of an image, so the number of the
    # next image is enough to resume.
    shard: list[Member] = []
    used, following = 0, start
    numbers = range(start, len(source))
    workers = resolve_workers(config.workers, source)
    with closing(run_in_workers(encoder, numbers, source, workers)) as results:
        for index, (members, reason) in zip(numbers, results, strict=True):
            if reason:
                quarantine.add(BadSample(index, source.name(index), reason))
            # A tar member takes a header of 512 bytes, and its content padded to a multiple of 512.
            size = sum(512 + -(-len(content) // 512) * 512 for _, content in members)
            if shard and used + size > config.shard_mb * 1e6:
                finish_shard(shard, following)
                shard, used = [], 0
            if members:
                shard += members
                used, following = used + size, index + 1
            if progress is not None:
                progress(index + 1)
    if shard:
        finish_shard(shard, following)


def _finish(source: Source, dst: Path, manifest: dict[str, Any], data: DataConfig) -> None:
    """Write names.tsv, complete the manifest, and warn about classes without an image."""
    if not manifest["shards"]:
        raise UsageError(f"{source.spec!r}: none of its {len(source)} images can be read")
    # Read the numbers of the packed images from the shards: an earlier call may have written some.
    packed = TarSource(str(dst), [dst / shard["name"] for shard in manifest["shards"]], data)
    keys = [Path(packed.name(index)).stem for index in range(len(packed))]
    write_text(
        dst / "names.tsv", "".join(f"{key}\t{source.name(int(key.partition('_')[0]))}\n" for key in keys)
    )
    bad = [sample.sample for sample in QuarantineLog(dst / "quarantine.jsonl", len(source), 1).bad]
    warn_of_absent_classes(str(dst), source, np.delete(np.arange(len(source)), bad))
    classes = source.class_names if source.has_labels else ()
    manifest |= {"finished": True, "source": source.spec, "classes": classes, "images": len(source)}
    manifest |= {"samples": len(packed), "bad": len(bad), "damage": list(map(str, source.damage))}
    write_text(dst / "manifest.json", json.dumps(manifest, indent=1) + "\n")


class _Encoder(NamedTuple):
    """The function that workers run: from an image to its members, or none and the reason."""

    source: Source
    config: PackConfig
    data: DataConfig

    def __call__(self, index: int, note: Note) -> tuple[list[Member], str]:
        note(index)
        members: list[Member] = []
        try:
            for place, extension, content in self._files(index):
                key = f"{index:09d}{place}"
                members.append((f"{key}.{extension}", content))
                if self.source.has_labels:
                    label = self.source.class_names[self.source.labels[index]]
                    members.append((f"{key}.cls", label.encode()))
        except BadImageError as error:
            return [], str(error)
        return members, ""

    def _files(self, index: int) -> Iterator[tuple[str, str, bytes]]:
        """The files of an image: the end of its name after its number, extension, and content."""
        (source, config, data), tile = self, self.config.tile_px
        content = source.content(index)
        # Decode even if the bytes are kept, to find unreadable images.
        pixels = source.read(index) if content is None else decode(content, data)
        height, width = pixels.shape[1:]
        is_cut = tile is not None and max(height, width) > tile
        is_shrunk = config.resize_px is not None and min(height, width) > config.resize_px
        if content and not (config.format or is_cut or is_shrunk):
            start = content[4:11] if content[4:8] == b"ftyp" else content[:4]
            for magic, extension in _STARTS.items():
                if start.startswith(magic):
                    yield "", extension, content
                    return
        # Pixels that do not come from a file have lost nothing yet, so keep them exactly, as PNG.
        kind = config.format or ("png" if content is None else "jpeg")
        extension = "jpg" if kind == "jpeg" else kind
        if tile is None or not is_cut:
            yield "", extension, self._encode(pixels, kind)
            return
        for top, left in product(_starts(height, tile), _starts(width, tile)):
            piece = pixels[:, top : top + tile, left : left + tile]
            yield f"_{top:06d}_{left:06d}", extension, self._encode(piece, kind)

    def _encode(self, pixels: UInt8[Tensor, "c h w"], kind: str) -> bytes:
        # Pillow wants channels last, and grey without a channel axis.
        values = np.ascontiguousarray(rearrange(pixels, "c h w -> h w c").numpy())
        file, resize_px = io.BytesIO(), self.config.resize_px
        try:
            image = Image.fromarray(values[..., 0] if len(pixels) == 1 else values)
            if resize_px is not None and (shorter := min(image.size)) > resize_px:
                width, height = (max(1, round(side * (resize_px / shorter))) for side in image.size)
                image = image.resize((width, height), Image.Resampling.LANCZOS)
            image.save(file, kind.upper(), **({} if kind == "png" else {"quality": self.config.quality}))
        except (OSError, ValueError, TypeError) as error:  # too large for the format, or wrong channels
            raise BadImageError(f"cannot be written as {kind}: {error}") from error
        return file.getvalue()


def _starts(length: int, tile: int) -> list[int]:
    """Starts of tiles that cover a length; the last ends with it, and may overlap the one before."""
    return [*range(0, length - tile, tile), max(0, length - tile)]
