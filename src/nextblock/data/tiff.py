"""TIFF files that Pillow cannot read, or not exactly: several bands, and 16 bits a sample in colour.

The layout (strips or tiles, samples interleaved or in planes, either byte order, BigTIFF) is read here. The
compressed bytes are not: they are handed to Pillow's libtiff as a grey picture of bytes, and the predictor is
undone afterwards, so whatever is packed losslessly (LZW, deflate, PackBits, zstd, LZMA) can be read.
"""

from __future__ import annotations

import io
import struct
from typing import NamedTuple

import numpy as np
from einops import rearrange
from PIL import TiffImagePlugin

__all__ = ["TiffHeader", "UnreadableTiffError", "is_tiff", "read_tiff_header", "read_tiff_samples"]

GREY, COLOUR = 1, 2
"""Values of `TiffHeader.photometric`: grey (or bands that are no colours), red green blue."""

_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_PACKED = {
    1: "raw",
    5: "LZW",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    50000: "zstd",
}


class UnreadableTiffError(ValueError):
    """A TIFF file of a kind that is not read here; the message says which."""


class TiffHeader(NamedTuple):
    """What the first page of a TIFF file is."""

    width: int
    height: int
    channels: int
    bits: int
    """Of every sample; 0 where they differ."""
    is_unsigned: bool
    photometric: int
    extra: tuple[int, ...]
    """What samples beyond grey or colour are: 0 unknown, 1 alpha (multiplied already), 2 alpha."""
    orientation: int
    is_planar: bool
    compression: int
    predictor: int
    fill_order: int
    byte_order: str
    """As numpy writes it: < or >."""
    segment: tuple[int, int]
    """Height and width of a tile, or of a strip."""
    is_tiled: bool
    offsets: tuple[int, ...]
    counts: tuple[int, ...]


def is_tiff(content: bytes) -> bool:
    """Whether a file begins as TIFF or BigTIFF."""
    return content[:4] in _STARTS


def read_tiff_header(content: bytes) -> TiffHeader:
    """Read the tags of the first page; whatever Pillow raises on damaged ones passes through."""
    if content[:4] == b"MM\0+":
        raise UnreadableTiffError("big-endian BigTIFF is not read; save it as little-endian")
    file = io.BytesIO(content)
    start = file.read(16 if content[2:4] == b"+\0" else 8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(start)
    file.seek(tags.next)
    tags.load(file)
    width, height = _number(tags, 256), _number(tags, 257)
    bits = _numbers(tags, 258) or (1,)
    formats = _numbers(tags, 339) or (1,)
    is_tiled = 324 in tags
    rows = _number(tags, 323) if is_tiled else min(_number(tags, 278, height), height)
    return TiffHeader(
        width=width,
        height=height,
        channels=_number(tags, 277, len(bits)),
        bits=bits[0] if len(set(bits)) == 1 else 0,
        is_unsigned=set(formats) == {1},
        photometric=_number(tags, 262, 0),
        extra=_numbers(tags, 338),
        orientation=_number(tags, 274, 1),
        is_planar=_number(tags, 284, 1) == 2,
        compression=_number(tags, 259, 1),
        predictor=_number(tags, 317, 1),
        fill_order=_number(tags, 266, 1),
        byte_order="<" if content[:1] == b"I" else ">",
        segment=(rows, _number(tags, 322) if is_tiled else width),
        is_tiled=is_tiled,
        offsets=_numbers(tags, 324 if is_tiled else 273),
        counts=_numbers(tags, 325 if is_tiled else 279),
    )


def read_tiff_samples(content: bytes, header: TiffHeader, *, max_samples: int) -> np.ndarray:
    """The samples as they are stored, (h w c), uint8 or uint16 in this machine's byte order, not yet turned.

    Raises `UnreadableTiffError` for a layout that is not read here, for segments that lie outside the file,
    and where tiles would unpack to more than `max_samples` samples.
    """
    _check(header)
    rows, columns = header.segment
    padded = -(-header.width // columns) * columns
    tall = -(-header.height // rows) * rows if header.is_tiled else header.height
    if padded * tall * header.channels > max_samples:
        raise UnreadableTiffError(f"its tiles of {columns} x {rows} unpack to too many pixels")
    number = -(-header.width // columns) * -(-header.height // rows)
    planes, samples = (header.channels, 1) if header.is_planar else (1, header.channels)
    if min(len(header.offsets), len(header.counts)) < number * planes:
        raise UnreadableTiffError(
            f"{len(header.offsets)} strips or tiles are listed, {number * planes} are needed"
        )
    decoded = []
    for plane in range(planes):
        part = slice(plane * number, (plane + 1) * number)
        packed = _segments(content, header.offsets[part], header.counts[part], padded * tall * samples)
        image = _unpack(packed, header, (tall, padded), samples)
        decoded.append(_undo_predictor(image, header)[: header.height, : header.width])
    return np.concatenate(decoded, axis=2) if planes > 1 else decoded[0]


def _check(header: TiffHeader) -> None:
    if header.bits not in (8, 16) or not header.is_unsigned:
        what = f"{header.bits}-bit" if header.bits else "differing"
        raise UnreadableTiffError(
            f"{what} {'' if header.is_unsigned else 'signed or floating-point '}samples have no fixed "
            "range; save 8 or 16 bits a channel"
        )
    if header.compression not in _PACKED:
        known = ", ".join(sorted(set(_PACKED.values())))
        raise UnreadableTiffError(f"TIFF compression {header.compression} is not read; use one of {known}")
    if header.predictor not in (1, 2) or header.fill_order != 1:
        raise UnreadableTiffError(
            f"TIFF predictor {header.predictor} and fill order {header.fill_order} are not read; use 1 and 1"
        )
    if min(header.width, header.height, header.channels, *header.segment) < 1:
        raise UnreadableTiffError(f"{header.width} x {header.height} pixels in strips or tiles of nothing")


def _segments(content: bytes, offsets: tuple[int, ...], counts: tuple[int, ...], size: int) -> list[bytes]:
    # Nothing that packs losslessly grows to more than a little over its size.
    if sum(counts) > 4 * size + 1024 * len(counts):
        raise UnreadableTiffError("its strips or tiles are longer than what they hold")
    for offset, count in zip(offsets, counts, strict=True):
        if offset < 0 or count < 0 or offset + count > len(content):
            raise UnreadableTiffError(
                f"truncated: a strip or tile ends at {offset + count:,} of {len(content):,} bytes"
            )
    return [content[offset : offset + count] for offset, count in zip(offsets, counts, strict=True)]


def _unpack(packed: list[bytes], header: TiffHeader, size: tuple[int, int], samples: int) -> np.ndarray:
    """Undo the compression: the same segments as a file of one grey channel of bytes, read by Pillow."""
    width_in_bytes = samples * header.bits // 8
    rows, columns = header.segment
    counts = [len(segment) for segment in packed]
    offsets = (8 + np.concatenate([[0], np.cumsum(counts)[:-1]])).tolist()
    tags = {256: [size[1] * width_in_bytes], 257: [size[0]], 258: [8], 259: [header.compression], 262: [1]}
    tags[324 if header.is_tiled else 273] = offsets
    tags[325 if header.is_tiled else 279] = counts
    tags |= {322: [columns * width_in_bytes], 323: [rows]} if header.is_tiled else {278: [rows]}
    tags[277] = [1]
    with TiffImagePlugin.TiffImageFile(io.BytesIO(_grey_file(packed, tags)), "") as image:
        image.load()
        values = np.asarray(image)
    dtype = np.dtype(f"{header.byte_order}u{header.bits // 8}")
    values = np.ascontiguousarray(values).view(dtype).astype(dtype.newbyteorder("="), copy=False)
    return values.reshape(*size, samples)


def _grey_file(packed: list[bytes], tags: dict[int, list[int]]) -> bytes:
    """A little-endian TIFF file of these segments and tags, every value a 32-bit number."""
    body = b"".join(packed)
    body += b"\0" * (-len(body) % 4)
    arrays = {tag: struct.pack(f"<{len(values)}I", *values) for tag, values in tags.items()}
    place = 8 + len(body)
    entries = []
    for tag in sorted(tags):
        data = arrays[tag]
        if len(data) <= 4:
            entries.append(struct.pack("<HHI", tag, 4, 1) + data)
            continue
        entries.append(struct.pack("<HHII", tag, 4, len(data) // 4, place))
        body += data
        place += len(data)
    directory = struct.pack("<H", len(entries)) + b"".join(entries) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", place) + body + directory


def _undo_predictor(image: np.ndarray, header: TiffHeader) -> np.ndarray:
    """Sum up differences between neighbours in a row, of a strip or a tile, modulo their range."""
    if header.predictor == 1:
        return image
    segments = rearrange(image, "h (n w) c -> h n w c", w=header.segment[1])
    summed = np.cumsum(segments, axis=2, dtype=image.dtype)
    return rearrange(summed, "h n w c -> h (n w) c")


def _number(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int, default: int | None = None) -> int:
    numbers = _numbers(tags, tag)
    if not numbers and default is None:
        raise UnreadableTiffError(f"the TIFF tag {tag} is missing")
    return numbers[0] if numbers else int(default or 0)


def _numbers(tags: TiffImagePlugin.ImageFileDirectory_v2, tag: int) -> tuple[int, ...]:
    value = tags.get(tag, ())
    values = value if isinstance(value, tuple | list) else (value,)
    if not all(isinstance(one, int) for one in values):
        raise UnreadableTiffError(f"the TIFF tag {tag} holds no whole numbers")
    return tuple(values)
