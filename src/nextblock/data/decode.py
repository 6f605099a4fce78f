"""Bytes of an image file to pixels, or a reason in words why that cannot be.

JPEG goes through torchcodec (Pillow's pixels, bit for bit, in about half the time), TIFF of many bands or of
16-bit colour through `tiff`, everything else through Pillow. What a file holds is told by its content, never
by its name. Alpha is composited over white, 16 bits are scaled by 1/257, EXIF rotation is applied, and of an
animation the first frame is taken. Asked for other than one or three channels, those that the file stores are
given as they are.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

from nextblock.data.orientation import turn
from nextblock.data.tiff import (
    COLOUR,
    GREY,
    UnreadableTiffError,
    is_tiff,
    read_tiff_header,
    read_tiff_samples,
)

__all__ = [
    "BadImageError",
    "check_pixels",
    "decode_image",
    "grey",
    "image_to_tensor",
    "jpeg_decoder",
    "open_image",
    "orientation_of",
    "pillow_errors",
]

log = logging.getLogger(__name__)

Decoder = Literal["auto", "pillow", "fast"]

_AVIF = ("AVIF",) if find_spec("PIL.AvifImagePlugin") else ()  # since Pillow 11.3
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", *_AVIF)
"""What Pillow is asked to recognise. Its other formats are no photographs, and some run programs (EPS)."""

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_HEIC_BRANDS = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis"}
_DEEP_TIFF = ((COLOUR, 3), (COLOUR, 4), (GREY, 2))
"""Photometric and samples of 16 bits of which Pillow keeps 8, or which it does not read."""
_STORED = {"RGBA": 4, "LA": 2, "RGBa": 4, "La": 2, "L": 1, "1": 1, "I;16": 1, "I;16B": 1, "PA": 4}
"""Channels that an image of a mode has; of other modes, colours of whatever kind, three."""
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(ValueError):
    """A file that is no readable image; the message is the reason, without the file's name."""


def decode_image(
    content: bytes, *, decoder: Decoder = "auto", max_pixels: int = 178_956_970, channels: int = 3
) -> UInt8[Tensor, "c h w"]:
    """Decode a file's content; raises `BadImageError` when that cannot be done.

    Three channels are RGB, one is grey (of colours their luma, ITU-R 601), whatever the file stores. Any
    other number must be what the file stores: the bands of a TIFF file, colour or grey with its alpha. The
    size is checked against `max_pixels` from the header, before any pixel is decoded.
    """
    if not content:
        raise BadImageError("the file is empty (0 bytes)")
    with pillow_errors():
        if is_tiff(content):
            pixels = _decode_tiff(content, max_pixels, channels)
            if pixels is not None:
                return pixels
        image = open_image(content)
        check_pixels(image.size, max_pixels)
        if channels not in (1, 3):
            return _decode_as_stored(image, content, decoder, channels)
        is_grey = _is_grey(image)
        pixels = None
        if decoder != "pillow" and image.format in ("JPEG", "MPO"):
            pixels = _decode_with_torchcodec("decode_jpeg", content)
        elif decoder != "pillow" and _is_deep_colour_png(content):
            pixels = _decode_deep_png(image, content)
        if pixels is None:
            pixels = image_to_tensor(image)
        return pixels if channels == 3 else pixels[:1].contiguous() if is_grey else grey(pixels)


def image_to_tensor(image: Image.Image, channels: int = 3) -> UInt8[Tensor, "c h w"]:
    """The pixels of a Pillow image of any mode, channels-last in memory, which resizes faster.

    `channels` is 3 for RGB, 1 for grey, or as many as the image has; `BadImageError` where it has others.
    """
    if channels not in (1, 3):
        return _stored(image, channels)
    image.load()
    image = _upright(image)
    is_grey = channels == 1 and _is_grey(image)
    pixels = rearrange(torch.from_numpy(np.array(_to_rgb(image))), "h w c -> c h w")
    return pixels if channels == 3 else pixels[:1].contiguous() if is_grey else grey(pixels)


def grey(pixels: UInt8[Tensor, "3 h w"]) -> UInt8[Tensor, "1 h w"]:
    """The luma of RGB pixels, as Pillow computes it."""
    image = Image.fromarray(np.ascontiguousarray(rearrange(pixels, "c h w -> h w c").numpy()))
    return torch.from_numpy(np.array(image.convert("L")))[None]


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into `BadImageError`, and keep its warnings to itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadImageError, MemoryError):
        raise
    except UnreadableTiffError as error:
        raise BadImageError(str(error)) from error
    except Exception as error:
        # On corrupt input Pillow's parsers let nearly anything through: struct.error, IndexError, ...
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        text = str(error) or type(error).__name__
        raise BadImageError(f"truncated or corrupt: {text}") from error


# --------------------------------------------------------------------------------------------------- header


def open_image(content: bytes) -> Image.Image:
    """Read the header only; the pixels are decoded when they are asked for."""
    if _is_heic(content):
        return _open_heic(content)
    try:
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError:
        start = content[:8]
        raise BadImageError(
            f"not an image of a known format, or a damaged header (it begins with {start!r})"
        ) from None
    except Image.DecompressionBombError:
        # Pillow's own limit is a module variable, which is not ours to change: ask its parsers directly.
        for name in FORMATS:
            factory, accept = Image.OPEN[name]
            if accept is not None and accept(content[:16]) is True:
                return factory(io.BytesIO(content), "")
        raise


def _is_heic(content: bytes) -> bool:
    if content[4:8] != b"ftyp":
        return False
    length = min(int.from_bytes(content[:4], "big"), 256)
    brands = {content[8:12]} | {content[i : i + 4] for i in range(16, length, 4)}
    return bool(brands & _HEIC_BRANDS) and not brands & {b"avif", b"avis"}


def _open_heic(content: bytes) -> Image.Image:
    """By pillow-heif's class itself, so that the user's Pillow does not change."""
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise BadImageError("HEIC needs pillow-heif: pip install 'nextblock[heic]'") from None
    try:
        return HeifImageFile(io.BytesIO(content), "")
    except SyntaxError as error:
        raise BadImageError(f"truncated or corrupt: {error}") from error


def check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    """`BadImageError` for a (width, height) of more pixels than that."""
    width, height = size
    if width * height > max_pixels:
        raise BadImageError(
            f"{width} x {height} = {width * height:,} pixels, more than data.max_pixels ({max_pixels:,})"
        )


# ----------------------------------------------------------------------------------------------- torchcodec


@cache
def _torchcodec(name: str) -> Callable[..., Tensor] | None:
    """A function of torchcodec.decoders, or None (said once) where this installation has no such thing."""
    try:
        from torchcodec import decoders

        return getattr(decoders, name)
    except (ImportError, AttributeError, OSError, RuntimeError) as error:
        log.warning("torchcodec cannot decode images here (%s); Pillow does it, more slowly", error)
        return None


def jpeg_decoder(decoder: Decoder) -> Literal["torchcodec", "pillow", "simplejpeg"]:
    """What decodes JPEG for training in this installation under this setting.

    `ValueError` where the setting asks for a package that is not there.
    """
    if decoder == "fast":
        if find_spec("simplejpeg") is None:
            raise ValueError(
                "data.decoder fast needs simplejpeg: pip install 'nextblock[fast]', or use data.decoder auto"
            )
        return "simplejpeg"
    if decoder == "pillow" or _torchcodec("decode_jpeg") is None:
        return "pillow"
    return "torchcodec"


def _decode_with_torchcodec(function: str, content: bytes, **options: object) -> Tensor | None:
    """Pixels, or None where Pillow has to try: torchcodec is absent or refuses the file."""
    decode = _torchcodec(function)
    if decode is None:
        return None
    try:
        return decode(content, **options)
    except RuntimeError as error:
        log.debug("torchcodec refused an image that is now given to Pillow: %s", error)
        return None


def _is_deep_colour_png(content: bytes) -> bool:
    """Whether it is a PNG of 16 bits a channel and more than one channel, of which Pillow keeps 8 bits."""
    if content[:8] != b"\x89PNG\r\n\x1a\n" or content[12:16] != b"IHDR" or len(content) < 26:
        return False
    bits, colour_type = struct.unpack_from("BB", content, 24)
    return bits == 16 and colour_type != 0


def _deep_png(image: Image.Image, content: bytes, mode: str) -> Tensor | None:
    """All 16 bits of a PNG's samples; None where Pillow has to do."""
    if orientation_of(image) != 1:
        return None
    return _decode_with_torchcodec("decode_png", content, mode=mode, output_dtype=torch.uint16)


def _decode_deep_png(image: Image.Image, content: bytes) -> Tensor | None:
    """Composite at 16 bits, then scale by 1/257."""
    pixels = _deep_png(image, content, "RGB_ALPHA")
    return None if pixels is None else _over_white(pixels[:3].double(), pixels[3:].double() / 65535)


def _over_white(colour: Tensor, alpha: Tensor) -> Tensor:
    """Composite 16-bit colours over white, and scale to 8 bits."""
    return ((colour * alpha + 65535 * (1 - alpha)) / 257).round().to(torch.uint8)


# ----------------------------------------------------------------------------------------- channels as stored


def _decode_as_stored(image: Image.Image, content: bytes, decoder: Decoder, channels: int) -> Tensor:
    if not _is_deep_colour_png(content):
        return _stored(image, channels)
    _check_channels({2: 3, 4: 2}.get(content[25], 4), channels)
    pixels = None
    if decoder != "pillow":
        pixels = _deep_png(image, content, "GRAY_ALPHA" if channels == 2 else "RGB_ALPHA")
    if pixels is not None:
        return (pixels.double() / 257).round().to(torch.uint8)
    return _as_mode(image, channels)  # Pillow keeps 8 bits, and grey with alpha as RGBA


def _stored(image: Image.Image, channels: int) -> Tensor:
    _check_channels(_channels_of(image), channels)
    return _as_mode(image, channels)


def _as_mode(image: Image.Image, channels: int) -> Tensor:
    image.load()
    image = _upright(image)
    for premultiplied, plain in (("La", "LA"), ("RGBa", "RGBA")):
        image = image.convert(plain) if image.mode == premultiplied else image
    mode = {2: "LA", 4: "RGBA"}[channels]
    return rearrange(torch.from_numpy(np.array(image.convert(mode))), "h w c -> c h w")


def _channels_of(image: Image.Image) -> int:
    number = _STORED.get(image.mode, 3)
    return {1: 2, 3: 4}.get(number, number) if "transparency" in image.info else number


def _check_channels(found: int, wanted: int) -> None:
    if found != wanted:
        raise BadImageError(f"has {found} channel{'s' * (found != 1)}, data.channels is {wanted}")


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "La", "I", *_SIXTEEN_BITS)


# ----------------------------------------------------------------------------------------------------- TIFF


def _decode_tiff(content: bytes, max_pixels: int, channels: int) -> Tensor | None:
    """Bands, and 16-bit colour; None where Pillow is to read the file, as one of one channel or three."""
    header = read_tiff_header(content)
    check_pixels((header.width, header.height), max_pixels)
    kind, number = header.photometric, header.channels
    if channels not in (1, 3):
        if kind not in (GREY, COLOUR):
            raise BadImageError(f"its colours (TIFF photometric {kind}) are no channels; save them as RGB")
        _check_channels(number, channels)
    elif number - {GREY: 1, COLOUR: 3}.get(kind, number) > 1 and number != channels:
        # Further samples of RGB, up to three, are left out by Pillow, which reads 8 bits of them.
        if kind == COLOUR and number <= 6 and header.bits == 8:
            return None
        _check_channels(number, channels)
    elif not (header.bits == 16 and (kind, number) in _DEEP_TIFF) and (
        (kind, number) != (GREY, channels) or number == 1
    ):
        return None
    samples = read_tiff_samples(content, header, max_samples=max(max_pixels, 1 << 24) * number)
    values = rearrange(torch.from_numpy(samples.astype(np.int32)), "h w c -> c h w")
    if number == channels:
        pixels = (values if header.bits == 8 else (values + 128) // 257).to(torch.uint8)
    else:
        pixels = _composite(values.double(), header.extra, channels)
    return turn(pixels, header.orientation).contiguous()


def _composite(values: Tensor, extra: tuple[int, ...], channels: int) -> Tensor:
    """16-bit colour or grey, with whatever its further sample is, as RGB or grey."""
    number = 3 if len(values) >= 3 else 1
    colour, alpha = values[:number], values[number : number + 1] / 65535
    if 1 in extra:  # multiplied by its alpha already
        pixels = ((colour + 65535 * (1 - alpha)).clamp(max=65535) / 257).round().to(torch.uint8)
    else:
        pixels = _over_white(colour, alpha if 2 in extra else torch.ones(()))
    if number == channels:
        return pixels
    return grey(pixels) if channels == 1 else pixels.expand(3, -1, -1)


# --------------------------------------------------------------------------------------------------- Pillow


def orientation_of(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or its block is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # a damaged block raises anything; the picture itself may be fine
        log.debug("damaged EXIF block: %s", error)
        return 1
    return value if value in _TRANSPOSE else 1


def _upright(image: Image.Image) -> Image.Image:
    orientation = orientation_of(image)
    return image if orientation == 1 else image.transpose(_TRANSPOSE[orientation])


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode in _SIXTEEN_BITS or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _from_16_bits(image)
    if image.mode in ("I", "F"):
        raise BadImageError(
            f"32-bit pixels (Pillow's mode {image.mode}) have no fixed range; save 8 or 16 bits a channel"
        )
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode in ("La", "RGBa"):
            image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return grey.convert("RGB")
