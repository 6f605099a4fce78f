"""Bytes of an image file to RGB pixels, or a reason in words why that cannot be.

JPEG goes through torchcodec (Pillow's pixels, bit for bit, in about half the time), everything else through
Pillow. What a file holds is told by its content, never by its name. Alpha is composited over white, 16 bits
are scaled by 1/257, EXIF rotation is applied, and of an animation the first frame is taken.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from PIL import ExifTags, Image
from torch import Tensor

__all__ = [
    "BadImageError",
    "check_pixels",
    "decode_image",
    "image_to_tensor",
    "jpeg_decoder",
    "pillow_errors",
]

log = logging.getLogger(__name__)

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
"""What Pillow is asked to recognise. Its other formats are no photographs, and some run programs (EPS)."""

_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
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
    content: bytes, *, decoder: Literal["auto", "pillow"] = "auto", max_pixels: int = 178_956_970
) -> UInt8[Tensor, "3 h w"]:
    """Decode a file's content to RGB; raises `BadImageError` when that cannot be done.

    The size is checked against `max_pixels` from the header, before any pixel is decoded.
    """
    if not content:
        raise BadImageError("the file is empty (0 bytes)")
    with pillow_errors():
        image = _open(content)
        check_pixels(image.size, max_pixels)
        if decoder == "auto" and image.format in ("JPEG", "MPO"):
            pixels = _decode_with_torchcodec("decode_jpeg", content)
            if pixels is not None:
                return pixels
        if decoder == "auto" and _is_deep_colour_png(content):
            pixels = _decode_deep_png(image, content)
            if pixels is not None:
                return pixels
        return image_to_tensor(image)


def image_to_tensor(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """The pixels of a Pillow image of any mode as RGB, channels-last in memory, which resizes faster."""
    image.load()
    image = _upright(image)
    return rearrange(torch.from_numpy(np.array(_to_rgb(image))), "h w c -> c h w")


@contextmanager
def pillow_errors() -> Iterator[None]:
    """Turn whatever a decoder raises into `BadImageError`, and keep its warnings to itself."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (BadImageError, MemoryError):
        raise
    except Exception as error:
        # On corrupt input Pillow's parsers let nearly anything through: struct.error, IndexError, ...
        if isinstance(error, OSError) and error.strerror:
            raise BadImageError(f"cannot be read: {error.strerror}") from error
        text = str(error) or type(error).__name__
        raise BadImageError(f"truncated or corrupt: {text}") from error


# --------------------------------------------------------------------------------------------------- header


def _open(content: bytes) -> Image.Image:
    """Read the header only."""
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


def jpeg_decoder(decoder: Literal["auto", "pillow"]) -> Literal["torchcodec", "pillow"]:
    """What decodes JPEG in this installation under this setting."""
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


def _decode_deep_png(image: Image.Image, content: bytes) -> Tensor | None:
    """Composite at 16 bits, then scale by 1/257."""
    pixels = _decode_with_torchcodec("decode_png", content, mode="RGB_ALPHA", output_dtype=torch.uint16)
    if pixels is None or _orientation(image) != 1:
        return None
    colour, alpha = pixels[:3].double(), pixels[3:].double() / 65535
    over_white = colour * alpha + 65535 * (1 - alpha)
    return (over_white / 257).round().to(torch.uint8)


# --------------------------------------------------------------------------------------------------- Pillow


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where there is none or its block is damaged."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # a damaged block raises anything; the picture itself may be fine
        log.debug("damaged EXIF block: %s", error)
        return 1
    return value if value in _TRANSPOSE else 1


def _upright(image: Image.Image) -> Image.Image:
    orientation = _orientation(image)
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
