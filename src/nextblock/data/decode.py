"""Bytes of an image file to pixels, or a reason why that cannot be done.

torchcodec decodes JPEG (Pillow's pixels, in half the time), tifffile TIFF of bands or 16-bit colour, Pillow
the rest; the content decides, never the name. One set of rules: images are turned as Pillow's `getexif` says,
alpha is composited over a background, 16 bits are divided by 257 and rounded, the first frame is taken.
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

# Given a JPEG's upright height and width, and which axes (-2, -1) of the stored image are flipped to make it
# upright: by how much (1, 2, 4 or 8) it may be reduced while it is decoded.
Reduce = Callable[[int, int, tuple[int, ...]], int]

Box = tuple[int, int, int, int]  # left, top, right, bottom

# What Pillow is asked to read. Its other formats are no photographs, and some run programs (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

_BEHIND = {"white": 255, "grey": 128, "black": 0}
# Pixels converted at a time, so that doubles and copies never exist for the whole image.
_PART_PX = 1 << 18
# Encoders write about ten scans in a JPEG; each costs as much time as the whole image.
_MAX_SCANS = 100
# Axes to flip for an EXIF orientation, after rows and columns are swapped for 5 to 8.
_FLIPS: dict[int, tuple[int, ...]] = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
# What torch raises as RuntimeError.
_NO_MEMORY = re.compile(r"allocate memory|CPUAllocator|nsufficient memory|bad_alloc")
_HEIC_BRAND = re.compile(rb"hei[cxms]|hev[cx]")
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([0-9])')
# Channels by Pillow's mode; the others are colours, three.
_CHANNELS = {"RGBA": 4, "LA": 2, "RGBa": 4, "La": 2, "L": 1, "1": 1, "I": 1, "I;16": 1, "I;16B": 1, "PA": 4}
# Samples of a 16-bit PNG by Pillow's raw mode, and the raw mode that keeps what the first one drops.
_DEEP_PNG = {"LA;16B": (2, "RGBA"), "RGB;16B": (3, "RGB;16L"), "RGBA;16B": (4, "RGBA;16L")}
_GREY, _COLOUR, _CMYK = 1, 2, 5  # TIFF photometric
# Photometric and samples of 16 bits that Pillow cuts to 8, does not read, or does not invert.
_DEEP_TIFF = ((_COLOUR, 3), (_COLOUR, 4), (_GREY, 2), (0, 1), (_CMYK, 4))
# None, LZW, deflate, PackBits, deflate, LZMA, zstd: they unpack to no more than asked for.
_LOSSLESS = (1, 5, 8, 32773, 32946, 34925, 50000)
_NO_RANGE = "have no fixed range; save 8 or 16 bits a channel"


class BadImageError(ValueError):
    """A file that is no readable image; the message is the reason, without the file's name."""


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

    Three channels are RGB, one is grey (ITU-R 601 luma). Any other number must be what the file stores: the
    bands of a TIFF, or colour or grey with alpha. Headers are checked against `max_pixels` before decoding.
    With decoder "fast", `reduce` is called with a JPEG's upright height and width, and returns by how much
    the decoded image may be smaller: 1, 2, 4 or 8.
    """
    if not content:
        raise BadImageError("the file is empty (0 bytes)")
    # Every path reads the header first, and refuses what would take more memory than max_pixels pixels may.
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
    """Turn what a decoder raises into `BadImageError` or, with the (width, height) if given, MemoryError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BadImageError:
        raise
    except Exception as error:
        # On corrupt input Pillow's parsers let nearly anything through: struct.error, IndexError, ... Memory
        # that is short is another matter: the file may be good, so it must not be skipped as a bad one.
        text = str(error) or type(error).__name__
        if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _NO_MEMORY.search(text)):
            text = f"not enough memory to decode {size[0]} x {size[1]} pixels" if size else text
            raise MemoryError(text) from error
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        raise BadImageError(f"truncated or corrupt: {text}") from error


def open_image(content: bytes) -> ImageFile.ImageFile:
    """Read the header only; the pixels are decoded when they are asked for."""
    brands = content[8 : min(int.from_bytes(content[:4]), 256)] if content[4:8] == b"ftyp" else b""
    if _HEIC_BRAND.search(brands) and b"avi" not in brands:
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            raise BadImageError("HEIC needs pillow-heif: pip install pillow-heif") from None
        return HeifImageFile(io.BytesIO(content), "")  # registering it would change the user's Pillow
    # Image.open has a limit of pixels in a module variable, which is not ours to change: ask its parsers.
    Image.init()
    for name in FORMATS:
        parse, accept = Image.OPEN[name]
        if accept and accept(content[:16]) is True:
            if name == "JPEG":  # its factory would also look for the further pictures of an MPO
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
    """The EXIF or XMP orientation, 1 to 8; 1 (upright) if there is none or its block is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # a damaged block raises anything; the picture itself may be fine
        log.debug("damaged EXIF block: %s", error)
        return 1
    return value if value in range(1, 9) else 1


def image_to_tensor(
    image: Image.Image, channels: int = 3, background: Background = "white"
) -> UInt8[Tensor, "c h w"]:
    """The upright pixels of a Pillow image of any mode, channels-last in memory, which resizes faster.

    `channels` is 3 for RGB, 1 for grey, or as many as the image has; otherwise raises `BadImageError`.
    """
    found = _CHANNELS.get(image.mode, 3)
    _check_channels({1: 2, 3: 4}.get(found, found) if "transparency" in image.info else found, channels)
    is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if image.mode in ("I", "F") and not is_deep:
        raise BadImageError(f"32-bit pixels (Pillow's mode {image.mode}) {_NO_RANGE}")
    image.load()
    orientation = orientation_of(image)  # after loading, which turns a TIFF and then says 1
    if image.mode == "RGB" and "transparency" not in image.info and channels == 3:
        return _upright(rearrange(torch.from_numpy(np.array(image)), "h w c -> c h w"), orientation)

    def convert(box: Box) -> np.ndarray:
        part = image.crop(box)
        if is_deep:  # converted by Pillow, 16 bits would be cut off at 255
            values = np.asarray(part).astype(np.uint16)[..., None]
            return _eight_bits(_with_alpha(values, image), channels, background)
        return _from_mode(part, channels, background)

    return _in_parts(image.size, channels, orientation, convert)


# ----------------------------------------------------------------------------------------- samples to pixels


def _check_channels(found: int, wanted: int) -> None:
    if found != wanted and wanted not in (1, 3):
        raise BadImageError(f"has {found} channel{'s' * (found != 1)}, data.channels is {wanted}")


def _in_parts(
    size: tuple[int, int], channels: int, orientation: int, convert: Callable[[Box], np.ndarray]
) -> Tensor:
    """The upright pixels of an image of this stored (width, height), converted in parts of few pixels."""
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
    """Turn stored pixels by their orientation, 1 to 8; others mean 1."""
    if orientation in (5, 6, 7, 8):
        pixels = rearrange(pixels, "c h w -> c w h")
    return torch.flip(pixels, _FLIPS[orientation]) if orientation in _FLIPS else pixels


def _from_mode(image: Image.Image, channels: int, background: Background) -> np.ndarray:
    """The pixels of an image of 8 bits or fewer a sample."""
    image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image  # not premultiplied
    if channels in (2, 4):
        return np.asarray(image.convert("LA" if channels == 2 else "RGBA"))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        behind = Image.new("RGBA", image.size, (*[_BEHIND[background]] * 3, 255))
        image = Image.alpha_composite(behind, image.convert("RGBA"))
    image = image if image.mode == "L" and channels == 1 else image.convert("RGB")
    return np.asarray(image) if channels == 3 else np.asarray(image.convert("L"))[..., None]


def _with_alpha(values: np.ndarray, image: Image.Image) -> np.ndarray:
    """16-bit samples, with alpha if a colour of the image is transparent."""
    if "transparency" not in image.info:
        return values
    is_seen = (values != np.asarray(image.info["transparency"])).any(-1, keepdims=True)
    return np.concatenate([values, is_seen.astype(np.uint16) * 65535], axis=-1)


def _eight_bits(
    values: np.ndarray, channels: int, background: Background = "white", *, is_premultiplied: bool = False
) -> np.ndarray:
    """Samples (h w c) as 8-bit pixels. If RGB or grey is wanted of 2 or 4, the last is alpha."""
    pixels = values
    if channels in (1, 3) and values.shape[-1] in (2, 4):
        colour, alpha = values[..., :-1].astype(np.float64), values[..., -1:] / 65535
        colour = colour if is_premultiplied else colour * alpha
        pixels = np.minimum(colour + 257 * _BEHIND[background] * (1 - alpha), 65535)
    if values.dtype != np.uint8:
        # 65535 = 255 * 257. Rounded once, after compositing: twice could be off by one.
        pixels = np.rint(pixels / 257).astype(np.uint8)
    if channels == 1 and pixels.shape[-1] == 3:
        return np.asarray(Image.fromarray(np.ascontiguousarray(pixels)).convert("L"))[..., None]
    return np.broadcast_to(pixels, (*pixels.shape[:2], channels))


# ------------------------------------------------------------------------------------------------------ JPEG


@cache
def _torchcodec() -> Callable[..., Any] | None:
    """The JPEG decoder of torchcodec, or None (logged once) if this installation has none that works."""
    try:
        from torchcodec.decoders import decode_jpeg
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        log.warning("torchcodec cannot decode images here (%s); Pillow does it, more slowly", error)
        return None
    return decode_jpeg


def jpeg_decoder(decoder: Decoder) -> Literal["torchcodec", "pillow", "pillow-draft"]:
    """What decodes JPEG for training in this installation under this setting."""
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
        # In coded pixels, 0xff is followed by 0 or by a restart marker, so further scans and the picture's
        # end are found by their bytes alone. What follows the end (a phone's film, say) is cut off.
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
            # libjpeg leaves out the fine part of every 8 x 8 block of frequencies: cheaper than all of it.
            image.draft(None, (max(1, image.width // factor), max(1, image.height // factor)))
            return image_to_tensor(image, channels)
    decode = None if decoder == "pillow" else _torchcodec()
    if decode is None:
        return image_to_tensor(image, channels)
    # torchcodec turns an image by itself, unlike Pillow, so it gets it without EXIF and XMP.
    plain = content
    for name, data in image.applist:
        if name == "APP1":
            plain = plain.replace(b"\xff\xe1" + (len(data) + 2).to_bytes(2) + data, b"", 1)
    try:
        pixels = _upright(decode(plain), orientation)
    except RuntimeError as error:
        log.debug("torchcodec failed, Pillow decodes the image: %s", error)
        return image_to_tensor(image, channels)
    if channels == 3:
        return pixels
    return image_to_tensor(Image.fromarray(rearrange(pixels, "c h w -> h w c").numpy()), channels)


# ------------------------------------------------------------------------------------------------------- PNG


def _without_texts(content: bytes) -> bytes:
    """A PNG without the texts and colour profiles that Pillow would unpack, but for what may turn it."""
    # Pillow refuses a PNG with more than a megabyte of compressed text (a bomb, for all it knows), but nobody
    # needs the text. A chunk is its length, its kind, the content and a checksum of 4 bytes.
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
    """All 16 bits of a PNG, of whose colours Pillow keeps 8."""
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

    # The orientation is known now, as EXIF may come after the pixels.
    return _in_parts(image.size, channels, orientation_of(image), convert)


# ------------------------------------------------------------------------------------------------------ TIFF


def _decode_tiff(content: bytes, max_pixels: int, channels: int, background: Background) -> Tensor | None:
    """Bands, and 16-bit colour; None if Pillow is to read the file, whose header is checked all the same."""
    if content[:4] == b"MM\0+":
        raise BadImageError("big-endian BigTIFF is not read; save it as little-endian")
    # Pillow's parser of directories, used alone: Pillow refuses bands before it tells their header. This old
    # class gives every value as a tuple.
    file = io.BytesIO(content)
    tags = TiffImagePlugin.ImageFileDirectory_v1(file.read(16 if content[2:4] == b"+\0" else 8))
    file.seek(tags.next)
    tags.load(file)
    (width, *_), (height, *_), bits = tags[256], tags[257], tags.get(258, (1,))
    check_pixels((width, height), max_pixels)
    kind, number = tags.get(262, (0,))[0], tags.get(277, (len(bits),))[0]
    columns, rows = (tags[322][0], tags[323][0]) if 324 in tags else (width, height)
    # Tiles at the right and bottom edge are decoded whole, however far they reach beyond the image.
    padded = math.ceil(width / columns) * columns * math.ceil(height / rows) * rows
    if min(width, height, number, rows, columns) < 1 or padded > max(max_pixels, 1 << 24):
        raise BadImageError(f"its tiles of {columns} x {rows} unpack to none or too many pixels")

    # Who decodes: Pillow what it reads rightly, tifffile what Pillow cuts to 8 bits or does not know.
    extra = number - {_GREY: 1, _COLOUR: 3}.get(kind, number)
    if channels not in (1, 3):
        if kind not in (_GREY, _COLOUR):
            raise BadImageError(f"its colours (TIFF photometric {kind}) are no channels; save them as RGB")
        _check_channels(number, channels)
    elif extra > 1 and number != channels:
        if (kind, bits[0]) == (_COLOUR, 8) and number <= 6:
            return None  # Pillow leaves out the further samples of RGB
        raise BadImageError(f"has {counted(number, 'channel')}, data.channels is {channels}")
    elif not (bits[0] == 16 and (kind, number) in _DEEP_TIFF) and (kind, number) != (_GREY, 3):
        return None

    with pillow_errors((width, height)):
        values = _tiff_samples(content, (height, width, number))
        alpha = {1, 2} & set(tags.get(338, ()))  # 1 is multiplied into the colours already
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
    """The samples of the first page, (h w c), as they are stored."""
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
        # tifffile undoes predictor 2 wrongly if nothing is packed.
        if packing[0] not in _LOSSLESS or packing[1] not in (1, 2) or packing == (1, 2):
            raise BadImageError(f"TIFF compression {packing} is not read; save it with deflate")
        # Packing adds little; the same bytes listed again and again would be read for hours.
        counts, segments = page.databytecounts, math.prod(page.chunked)
        most = segments * (4 * math.prod(page.chunks) * page.dtype.itemsize + 1024)
        ends = [offset + count for offset, count in zip(page.dataoffsets, counts, strict=False)]
        if len(ends) < segments or min(counts) < 1 or max(ends) > len(content) or sum(counts) > most:
            raise BadImageError("truncated or corrupt: strips or tiles are missing or too long")
        values = page.asarray(squeeze=False, maxworkers=1)[:, 0]
    return np.moveaxis(values[..., 0], 0, -1) if planes > 1 else values[0]
