"""Decode an image file's bytes to pixels, or give the reason why that fails.

torchcodec decodes JPEG (Pillow's pixels, in half the time), tifffile decodes TIFF with bands or 16-bit
colour, and Pillow the rest. The content decides, never the file name. The rules are the same for all: images
are rotated as Pillow's `getexif` says, alpha is composited over a background, 16 bits are divided by 257 and
rounded, and the first frame is used.
"""

from __future__ import annotations

import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageFile, JpegImagePlugin, TiffImagePlugin
from torch import Tensor

from nextblock.logs import counted

log = logging.getLogger(__name__)

Decoder = Literal["auto", "pillow", "fast"]
Background = Literal["white", "grey", "black"]

# From a JPEG's upright height and width, and the axes (-2, -1) of the stored image that are flipped to make
# it upright, to the factor (1, 2, 4 or 8) by which decoding may shrink it.
Reduce = Callable[[int, int, tuple[int, ...]], int]

Box = tuple[int, int, int, int]  # left, top, right, bottom

# Formats read by Pillow. Its other formats are not photographs, and some run programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_BEHIND = {"white": 255, "grey": 128, "black": 0}
# Pixels converted at a time, so that float64 copies never cover the whole image.
_PART_PX = 1 << 18
# Encoders write about ten scans in a JPEG; each costs as much time as the whole image.
_MAX_SCANS = 100
# Axes to flip for an EXIF orientation, after rows and columns are swapped for 5 to 8.
_FLIPS: dict[int, tuple[int, ...]] = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
# How torch reports failed allocations, as RuntimeError.
_NO_MEMORY = re.compile(r"allocate memory|CPUAllocator|nsufficient memory|bad_alloc")
_HEIC_BRAND = re.compile(rb"hei[cxms]|hev[cx]")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# Channels by Pillow's mode; all other modes have three.
_CHANNELS = {"RGBA": 4, "LA": 2, "RGBa": 4, "La": 2, "L": 1, "1": 1, "I": 1, "I;16": 1, "I;16B": 1, "PA": 4}
# Samples of a 16-bit PNG by Pillow's raw mode, and the raw mode for the bytes that the first one drops.
_DEEP_PNG = {"LA;16B": (2, "RGBA"), "RGB;16B": (3, "RGB;16L"), "RGBA;16B": (4, "RGBA;16L")}
_GREY, _COLOUR, _CMYK = 1, 2, 5  # TIFF photometric
# Photometric and number of 16-bit samples that Pillow cuts to 8 bits, does not read, or does not invert.
_DEEP_TIFF = ((_COLOUR, 3), (_COLOUR, 4), (_GREY, 2), (0, 1), (_CMYK, 4))
# None, LZW, deflate, PackBits, deflate, LZMA, zstd: they never unpack to more than requested.
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)
_NO_RANGE = "have no fixed range; save 8 or 16 bits a channel"


class BadImageError(ValueError):
    """A file is not a readable image; the message gives the reason without the file name."""


def decode_image(
    content: bytes,
    *,
    decoder: Decoder = "auto",
    max_pixels: int = 178_956_970,
    channels: int = 3,
    background: Background = "white",
    reduce: Reduce | None = None,
) -> UInt8[Tensor, "c h w"]:
    """Decode a file's content; raises `BadImageError` if it is unreadable, MemoryError if memory is short.

    Three channels are RGB, one is grey (ITU-R 601 luma). Any other number must match the file: the bands of a
    TIFF, or colour or grey with alpha. Headers are checked against `max_pixels` before decoding. With decoder
    "fast", `reduce` chooses the factor by which decoding shrinks a JPEG.
    """
    if not content:
        raise BadImageError("the file is empty (0 bytes)")
    # Every path reads the header first and refuses images that would take more memory than max_pixels pixels.
    with pillow_errors():
        if content[:4] in TIFF_STARTS:
            pixels = _decode_tiff(content, max_pixels, channels, background)
            if pixels is not None:
                return pixels
        image = open_image(content)
        check_pixels(image.size, max_pixels)
        with pillow_errors(image.size):
            if isinstance(image, JpegImagePlugin.JpegImageFile) and channels in (1, 3):
                return _decode_jpeg(image, content, decoder, channels, reduce)
            if image.format == "PNG" and image.tile and image.tile[0].args in _DEEP_PNG:
                return _decode_deep_png(image, content, channels, background)
            return image_to_tensor(image, channels, background)


@contextmanager
def pillow_errors(size: tuple[int, int] | None = None) -> Iterator[None]:
    """Turn a decoder's errors into `BadImageError`, or into MemoryError with the (width, height) if given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImageError:
        raise
    except Exception as error:
        # On corrupt input Pillow's parsers raise nearly anything: struct.error, IndexError, ... Running out
        # of memory is different: the file may be good, so it must not be skipped as bad.
        text = str(error) or type(error).__name__
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
            text = f"not enough memory to decode {size[0]} x {size[1]} pixels" if size else text
            raise MemoryError(text) from error
        if isinstance(error, Image.DecompressionBombError):  # WebP: Pillow checks while it reads the header
            raise BadImageError(f"more pixels than Pillow reads: {text}") from error
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        raise BadImageError(f"truncated or corrupt: {text}") from error


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Read only the header; pixels are decoded on first access."""
    brands = content[8 : min(int.from_bytes(content[:4]), 256)] if content[4:8] == b"ftyp" else b""
    if _HEIC_BRAND.search(brands) and b"avi" not in brands:
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            raise BadImageError("HEIC needs pillow-heif: pip install pillow-heif") from None
        return HeifImageFile(io.BytesIO(content), "")  # registering it would change Pillow globally
    # Image.open limits pixels by a module variable, which is not ours to change: call its parsers directly.
    Image.init()
    for name in FORMATS:
        parse, accept = Image.OPEN[name]
        if accept and accept(content[:16]) is True:
            if name == "JPEG":  # its factory would also parse the other pictures of an MPO
                return JpegImagePlugin.JpegImageFile(io.BytesIO(content), "")
            return parse(io.BytesIO(_without_texts(content) if name == "PNG" else content), "")
    raise BadImageError(f"not an image of a known format (it starts with {repr(content[:8])[1:]})")


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """Raise `BadImageError` if an image of this (width, height) has more than `max_pixels` pixels."""
    number = size[0] * size[1]
    if number > max_pixels:
        size_text = f"{size[0]} x {size[1]} = {number:,} pixels"
        raise BadImageError(f"{size_text}, more than data.max_pixels ({max_pixels:,})")


def orientation_of(image: Image.Image) -> int:
    """The EXIF or XMP orientation, 1 to 8; 1 (upright) if it is missing or damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # a damaged block can raise anything; the pixels may be fine
        log.debug("damaged EXIF block: %s", error)
        return 1
    return value if value in range(1, 9) else 1


def image_to_tensor(
    image: Image.Image, channels: int = 3, background: Background = "white"
) -> UInt8[Tensor, "c h w"]:
    """The upright pixels of a Pillow image of any mode, channels-last in memory, which resizes faster.

    `channels` is 3 for RGB, 1 for grey, or the image's own number; otherwise raises `BadImageError`.
    """
    stored = _CHANNELS.get(image.mode, 3)
    _check_channels({1: 2, 3: 4}.get(stored, stored) if "transparency" in image.info else stored, channels)
    is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_deep:
        raise BadImageError(f"32-bit pixels (Pillow's mode {image.mode}) {_NO_RANGE}")
    image.load()
    orientation = orientation_of(image)  # after loading, which rotates a TIFF and resets this to 1
    if image.mode == "RGB" and "transparency" not in image.info and channels == 3:
        return _upright(rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w"), orientation)

    def convert(box: Box) -> np.ndarray:
        part = image.crop(box)
        if is_deep:  # Pillow's own conversion would clip 16 bits at 255
            values = np.asarray(part).astype(np.uint16)[..., None]
            return _eight_bits(_with_alpha(values, image), channels, background)
        return _from_mode(part, channels, background)

    return _in_parts(image.size, channels, orientation, convert)


# ----------------------------------------------------------------------------------------- samples to pixels


def _check_channels(stored: int, wanted: int) -> None:
    if stored != wanted and wanted not in (1, 3):
        raise BadImageError(f"has {stored} channel{'s' * (stored != 1)}, data.channels is {wanted}")


def _in_parts(
    size: tuple[int, int], channels: int, orientation: int, convert: Callable[[Box], np.ndarray]
) -> Tensor:
    """Convert an image of this stored (width, height) part by part; returns its upright pixels."""
    width, height = size
    pixels = np.empty((height, width, channels), np.uint8)
    columns = min(width, _PART_PX)
    rows = _PART_PX // columns
    for top in range(0, height, rows):
        for left in range(0, width, columns):
            box = left, top, min(left + columns, width), min(top + rows, height)
            pixels[top : box[3], left : box[2]] = convert(box)
    return _upright(rearrange(torch.from_numpy(pixels), "h w c -> c h w"), orientation)


def _upright(pixels: UInt8[Tensor, "c h w"], orientation: int) -> UInt8[Tensor, "c rows columns"]:
    """Rotate stored pixels by their orientation, 1 to 8; any other value means 1."""
    if orientation in (5, 6, 7, 8):
        pixels = rearrange(pixels, "c h w -> c w h")
    return torch.flip(pixels, _FLIPS[orientation]) if orientation in _FLIPS else pixels


def _from_mode(image: Image.Image, channels: int, background: Background) -> np.ndarray:
    """The pixels of an image with at most 8 bits per sample."""
    image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image  # not premultiplied
    if channels in (2, 4):
        return np.asarray(image.convert("LA" if channels == 2 else "RGBA"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        behind = Image.new("RGBA", image.size, (*[_BEHIND[background]] * 3, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    image = image if image.mode == "L" and channels == 1 else image.convert("RGB")
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def _with_alpha(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """Add an alpha channel to 16-bit samples if one colour of the image is transparent."""
    if "transparency" not in image.info:
        return values
    is_seen = (values != np.asarray(image.info["transparency"])).any(-1, keepdims=True)
    return np.concatenate([values, is_seen.astype(np.uint16) * 65535], axis=-1)


def _eight_bits(
    values: np.ndarray, channels: int, background: Background = "white", *, is_premultiplied: bool = False
) -> np.ndarray:
    """Convert samples (h w c) to 8-bit pixels. If 2 or 4 become RGB or grey, the last is alpha."""
    pixels = values
    if channels in (1, 3) and values.shape[-1] in (2, 4):
        colour, alpha = values[..., :-1].astype(np.float64), values[..., -1:] / 65535
        colour = colour if is_premultiplied else colour * alpha
        pixels = np.minimum(colour + 257 * _BEHIND[background] * (1 - alpha), 65535)
    if values.dtype != np.uint8:
        # 65535 = 255 * 257. Round once, after compositing: rounding twice could be off by one.
        pixels = np.rint(pixels / 257).astype(np.uint8)
    if channels == 1 and pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    return np.broadcast_to(pixels, (*pixels.shape[:2], channels))


# ------------------------------------------------------------------------------------------------------ JPEG


@cache
def _torchcodec() -> Callable[..., Any] | None:
    """The JPEG decoder of torchcodec, or None (logged once) if it does not work here."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        log.warning("torchcodec cannot decode images here (%s); Pillow does it, more slowly", error)
        return None
    return decode_jpeg


def jpeg_decoder(decoder: Decoder) -> Literal["torchcodec", "pillow", "pillow-draft"]:
    """The JPEG decoder that training uses in this installation with this setting."""
    if decoder == "fast":
        return "pillow-draft"
    return "torchcodec" if decoder == "auto" and _torchcodec() else "pillow"


def _decode_jpeg(
    image: JpegImagePlugin.JpegImageFile,
    content: bytes,
    decoder: Decoder,
    channels: int,
    reduce: Reduce | None,
) -> UInt8[Tensor, "c h w"]:
    # Pillow has read up to the end of the first scan's header. libjpeg stops after that scan if it has all
    # components and is not progressive, as in most photos.
    assert image.fp is not None
    start, components = image.fp.tell(), len(image.getbands())
    header = b"\xff\xda\0" + bytes((6 + 2 * components, components))
    if "progression" in image.info or not content.startswith(header, start - 8 - 2 * components):
        # In coded pixels, 0xff is followed by 0 or a restart marker, so further scans and the end of the
        # picture are found by their bytes alone. Anything after the end (a phone's video, say) is cut off.
        end = content.find(b"\xff\xd9", start)
        if 0 <= end < len(content) - 2:
            content = content[: end + 2]
            image = JpegImagePlugin.JpegImageFile(io.BytesIO(content), "")
        if content.count(b"\xff\xda", start) >= _MAX_SCANS:
            raise BadImageError(f"a JPEG of more than {_MAX_SCANS} scans, which would take minutes")
    orientation = orientation_of(image)
    if decoder == "fast" and reduce and image.mode in ("RGB", "L"):
        height, width = image.size if orientation > 4 else image.size[::-1]
        factor = reduce(height, width, _FLIPS.get(orientation, ()))
        if factor > 1:
            # libjpeg skips the high frequencies of every 8 x 8 block, which is cheaper than decoding all.
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
            return image_to_tensor(image, channels)
    decode = None if decoder == "pillow" else _torchcodec()
    if decode is None:
        return image_to_tensor(image, channels)
    # Unlike Pillow, torchcodec rotates images itself, so remove EXIF and XMP first.
    parts, end = [], 0
    for name, data in image.applist:
        segment = b"\xff\xe1" + (len(data) + 2).to_bytes(2) + data
        if name == "APP1" and (place := content.find(segment, end)) >= 0:
            parts.append(content[end:place])
            end = place + len(segment)
    try:
        pixels = _upright(decode(b"".join([*parts, content[end:]])), orientation)
    except RuntimeError as error:
        log.debug("torchcodec failed, Pillow decodes the image: %s", error)
        return image_to_tensor(image, channels)
    if channels == 3:
        return pixels
    return image_to_tensor(Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()), channels)


# ------------------------------------------------------------------------------------------------------- PNG


def _without_texts(content: bytes) -> bytes:
    """Remove texts and colour profiles from a PNG, except those that may hold its orientation."""
    # Pillow refuses a PNG with more than a megabyte of compressed text as a possible bomb, but the text is
    # not needed. A chunk is its length, its kind, the content and a checksum of 4 bytes.
    parts, start, place = [], 0, 8
    while place < len(content):
        kind, end = content[place + 4 : place + 8], place + 12 + int.from_bytes(content[place : place + 4])
        may_turn = content.startswith((b"Raw profile type exif\0", b"XML:com.adobe.xmp\0"), place + 8)
        if kind in (b"tEXt", b"zTXt", b"iTXt", b"iCCP") and not may_turn:
            parts.append(content[start:place])
            start = end
        place = end
    return b"".join([*parts, content[start:]])


def _decode_deep_png(
    image: ImageFile.ImageFile, content: bytes, channels: int, background: Background
) -> Tensor:
    """Decode all 16 bits of a PNG; Pillow would keep 8 of each colour."""
    # Pillow's unpackers take the high bytes of big-endian samples (RGB;16B) or of little-endian ones
    # (RGB;16L); the latter are the low bytes of a big-endian file. Grey with alpha is read as four bytes.
    number, low_mode = _DEEP_PNG[str(image.tile[0].args)]
    _check_channels(number + ("transparency" in image.info), channels)
    halves = [image] if number == 2 else [image, open_image(content)]
    halves[-1].tile = [image.tile[0]._replace(args=low_mode)]
    for half in halves:
        half.load()

    def convert(box: Box) -> np.ndarray:
        parts = [np.asarray(half.crop(box)) for half in halves]
        high, low = parts if len(parts) == 2 else (parts[0][..., ::2], parts[0][..., 1::2])
        values = high.astype(np.uint16) << 8 | low
        return _eight_bits(_with_alpha(values, image), channels, background)

    # Read the orientation only now: EXIF may come after the pixels.
    return _in_parts(image.size, channels, orientation_of(image), convert)


# ------------------------------------------------------------------------------------------------------ TIFF


def _decode_tiff(content: bytes, max_pixels: int, channels: int, background: Background) -> Tensor | None:
    """Decode bands and 16-bit colour; None if Pillow should read the file. Always checks the header."""
    if content[:4] == b"MM\0+":
        raise BadImageError("big-endian BigTIFF is not read; save it as little-endian")
    # Use only Pillow's directory parser: Pillow itself refuses bands before it shows the header. This old
    # class returns every value as a tuple.
    file = io.BytesIO(content)
    tags = TiffImagePlugin.ImageFileDirectory_v1(file.read(16 if content[2:4] == b"+\0" else 8))
    file.seek(tags.next)
    tags.load(file)
    (width, *_), (height, *_), bits = tags[256], tags[257], tags.get(258, (1,))
    check_pixels((width, height), max_pixels)
    kind, number = tags.get(262, (0,))[0], tags.get(277, (len(bits),))[0]
    columns, rows = (tags[322][0], tags[323][0]) if 324 in tags else (width, height)
    # Tiles at the right and bottom edge are decoded whole, however far they extend beyond the image.
    padded = math.ceil(width / columns) * columns * math.ceil(height / rows) * rows
    if min(width, height, number, rows, columns) < 1 or padded > max(max_pixels, 1 << 24):
        raise BadImageError(f"its tiles of {columns} x {rows} unpack to none or too many pixels")

    # Pillow decodes what it reads correctly, tifffile what Pillow cuts to 8 bits or does not support.
    extra = number - {_GREY: 1, _COLOUR: 3}.get(kind, number)
    if channels not in (1, 3):
        if kind not in (_GREY, _COLOUR):
            raise BadImageError(f"its colours (TIFF photometric {kind}) are not channels; save them as RGB")
        _check_channels(number, channels)
    elif extra > 1 and number != channels:
        if (kind, bits[0]) == (_COLOUR, 8) and number <= 6:
            return None  # Pillow drops the extra samples of RGB
        raise BadImageError(f"has {counted(number, 'channel')}, data.channels is {channels}")
    elif not (bits[0] == 16 and (kind, number) in _DEEP_TIFF) and (kind, number) != (_GREY, 3):
        return None

    with pillow_errors((width, height)):
        values = _tiff_samples(content, (height, width, number))
        alpha = {1, 2} & set(tags.get(338, ()))  # 1: the colours are premultiplied
        if kind == 0:
            values = ~values  # white is 0
        elif extra and number != channels and channels in (1, 3) and not alpha:
            values = values[..., :-1]

        def convert(box: Box) -> np.ndarray:
            left, top, right, bottom = box
            part = values[top:bottom, left:right]
            if kind == _CMYK:
                return _from_mode(Image.fromarray(_eight_bits(part, 4), "CMYK"), channels, background)
            return _eight_bits(part, channels, background, is_premultiplied=1 in alpha)

        xmp = _XMP_ORIENTATION.search(tags[700] if isinstance(tags.get(700), bytes) else b"")
        orientation = tags.get(274, (int(xmp[1]) if xmp else 1,))[0]
        return _in_parts((width, height), channels, orientation, convert)


def _tiff_samples(content: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """The stored samples of the first page, (h w c)."""
    try:
        import imagecodecs  # noqa: F401 - tifffile unpacks with it
        import tifffile
    except ImportError:
        raise BadImageError(
            "TIFF of bands or of 16-bit colour needs pip install tifffile imagecodecs"
        ) from None
    with tifffile.TiffFile(io.BytesIO(content)) as file:
        page = file.pages.first
        height, width, number = shape
        planes = number if page.planarconfig == 2 else 1
        if page.shaped != (planes, 1, height, width, number // planes):
            raise BadImageError("its TIFF tags contradict each other")
        if page.bitspersample not in (8, 16) or page.dtype not in (np.uint8, np.uint16):
            raise BadImageError(f"{page.bitspersample}-bit samples of type {page.dtype} {_NO_RANGE}")
        packing = int(page.compression), int(page.predictor)
        # tifffile decodes predictor 2 wrongly in uncompressed files.
        if packing[0] not in _LOSSLESS or packing[1] not in (1, 2) or packing == (1, 2):
            raise BadImageError(f"TIFF compression {packing} is not read; save it with deflate")
        # Compression adds little overhead; reading a file that lists the same bytes many times takes hours.
        counts, segments = page.databytecounts, math.prod(page.chunked)
        most = segments * (4 * math.prod(page.chunks) * page.dtype.itemsize + 1024)
        ends = [offset + count for offset, count in zip(page.dataoffsets, counts, strict=False)]
        if len(ends) < segments or min(counts) < 1 or max(ends) > len(content) or sum(counts) > most:
            raise BadImageError("truncated or corrupt: strips or tiles are missing or too long")
        values = page.asarray(squeeze=False, maxworkers=1)[:, 0]
    return np.moveaxis(values[..., 0], 0, -1) if planes > 1 else values[0]
