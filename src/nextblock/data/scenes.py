"""Pictures too large to be held whole, read in horizontal bands.

A TIFF is read strip by strip or tile by tile: each is handed to the decoder as a small TIFF of its own. Other
formats, and TIFFs in planes or in one strip, have to be decoded whole, up to MAX_SCENE_PIXELS.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import torch
from jaxtyping import UInt8
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Directory
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError, decode_image, open_image, pillow_errors
from nextblock.data.tiff import TiffHeader, UnreadableTiffError, is_tiff, read_tiff_header

__all__ = ["MAX_SCENE_PIXELS", "read_bands", "starts"]

MAX_SCENE_PIXELS = 536_870_912
"""Of what must be decoded whole: 1.6 GB of colour."""

_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR = 258, 259, 262, 266, 277, 284
_PREDICTOR, _COLOURS, _EXTRA, _FORMAT, _JPEG_TABLES = 317, 320, 338, 339, 347
_SUBSAMPLING, _REFERENCE = 530, 532
_KEPT = (
    *(_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _PREDICTOR, _COLOURS, _EXTRA),
    *(_FORMAT, _JPEG_TABLES, _SUBSAMPLING, _REFERENCE),
)
_LONG = 4
_START = {b"II": b"II*\0\x08\0\0\0", b"MM": b"MM\0*\0\0\0\x08"}


def starts(length: int, tile: int) -> list[int]:
    """Where tiles begin that cover a length; the last ends with it, and so may overlap the one before."""
    if length <= tile:
        return [0]
    number = -(-length // tile)
    return [*(place * tile for place in range(number - 1)), length - tile]


def read_bands(content: bytes, tile: int, data: DataConfig) -> Iterator[tuple[int, UInt8[Tensor, "c h w"]]]:
    """The picture in bands of `tile` rows (or all, if it has fewer), each with the row that it begins at.

    A picture no larger than a tile is one band. `BadImageError` where it cannot be read, or has more than
    MAX_SCENE_PIXELS pixels and is not in strips or tiles.
    """
    header = _tiff_in_parts(content)
    if header is None:
        yield from _bands_of_whole(content, tile, data)
        return
    segments = _Segments(content, header, data)
    for top in starts(header.height, tile):
        yield top, segments.band(top, min(tile, header.height))


def _bands_of_whole(content: bytes, tile: int, data: DataConfig) -> Iterator[tuple[int, Tensor]]:
    with pillow_errors():
        width, height = open_image(content).size
    if width * height > MAX_SCENE_PIXELS:
        raise BadImageError(
            f"{width} x {height} = {width * height:,} pixels that are not in strips or tiles, so that they "
            f"would have to be decoded at once; the most is {MAX_SCENE_PIXELS:,}: save it as a tiled TIFF"
        )
    pixels = decode_image(content, decoder=data.decoder, max_pixels=MAX_SCENE_PIXELS, channels=data.channels)
    height = pixels.shape[1]
    for top in starts(height, tile):
        yield top, pixels[:, top : top + min(tile, height)]


def _tiff_in_parts(content: bytes) -> TiffHeader | None:
    """The header of a TIFF that can be read part by part, else None."""
    if not is_tiff(content):
        return None
    try:
        with pillow_errors():
            header = read_tiff_header(content)
    except (BadImageError, UnreadableTiffError):
        return None  # what is wrong with it is told by the decoder
    rows, columns = header.segment
    if header.is_planar or header.orientation != 1 or min(rows, columns, header.width, header.height) < 1:
        return None
    is_in_parts = rows * columns < header.width * header.height
    return header if is_in_parts and rows * columns <= MAX_SCENE_PIXELS else None


class _Segments:
    """The strips or tiles of a TIFF; those that the last band needed are kept for the next."""

    def __init__(self, content: bytes, header: TiffHeader, data: DataConfig) -> None:
        self._content, self._header, self._data = content, header, data
        self._across = -(-header.width // header.segment[1])
        needed = self._across * -(-header.height // header.segment[0])
        if min(len(header.offsets), len(header.counts)) < needed:
            raise BadImageError(f"{len(header.offsets)} strips or tiles are listed, {needed} are needed")
        with pillow_errors():
            self._tags = _directory(content)
        self._kept: dict[int, Tensor] = {}

    def band(self, top: int, height: int) -> Tensor:
        """Some rows of the picture, as wide as it is."""
        rows, columns = self._header.segment
        first, last = top // rows, (top + height - 1) // rows
        numbers = range(first * self._across, (last + 1) * self._across)
        self._kept = {
            number: self._kept[number] if number in self._kept else self._decode(number) for number in numbers
        }
        channels = {part.shape[0] for part in self._kept.values()}
        if len(channels) > 1:
            raise BadImageError(f"its strips or tiles differ in channels: {sorted(channels)}")
        band = torch.empty((channels.pop(), height, self._header.width), dtype=torch.uint8)
        for number, part in self._kept.items():
            above, left = number // self._across * rows, number % self._across * columns
            begin, end = max(top, above), min(top + height, above + part.shape[1])
            width = min(columns, self._header.width - left)
            band[:, begin - top : end - top, left : left + width] = part[
                :, begin - above : end - above, :width
            ]
        return band

    def _decode(self, number: int) -> Tensor:
        header = self._header
        rows, columns = header.segment
        offset, count = header.offsets[number], header.counts[number]
        if offset < 0 or count < 0 or offset + count > len(self._content):
            raise BadImageError(
                f"truncated: a strip or tile ends at {offset + count:,} of {len(self._content):,} bytes"
            )
        if not header.is_tiled:
            rows = min(rows, header.height - number * rows)
        with pillow_errors():
            file = _small_tiff(self._tags, (rows, columns), self._content[offset : offset + count])
        part = decode_image(
            file, decoder=self._data.decoder, max_pixels=MAX_SCENE_PIXELS, channels=self._data.channels
        )
        if part.shape[1:] != (rows, columns):
            raise BadImageError(f"a strip or tile of {columns} x {rows} pixels has other ones")
        return part


def _small_tiff(tags: Directory, size: tuple[int, int], packed: bytes) -> bytes:
    """A TIFF of one strip, told to be what the picture's are."""
    small = Directory(_START[tags.prefix])
    for tag in _KEPT:
        if tag in tags:
            small.tagtype[tag] = tags.tagtype[tag]
            small[tag] = tags[tag]
    numbers = {256: size[1], 257: size[0], 273: 0, 278: size[0], 279: len(packed)}
    for tag, number in numbers.items():
        small.tagtype[tag] = _LONG
        small[tag] = number
    file = io.BytesIO()
    small.save(file)
    return file.getvalue() + packed


def _directory(content: bytes) -> Directory:
    """The tags of the first page."""
    file = io.BytesIO(content)
    tags = Directory(file.read(16 if content[2:4] in (b"+\0", b"\0+") else 8))
    file.seek(tags.next)
    tags.load(file)
    return tags
