"""Training crops of large JPEG photos, decoded no larger than they are needed (`data.decoder fast`).

libjpeg decodes at a half, a quarter or an eighth for less than the whole, as it leaves out the fine half of
every 8 x 8 block of frequencies before turning it into pixels. The crop is drawn in the full picture, just as
without, and then looked for in the small one.
"""

from __future__ import annotations

import logging
from functools import partial

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from torch import Tensor

from nextblock.config import DataConfig, Size, pair
from nextblock.data.augment import Box, Decoded, draw_crop, finish_crop, resize
from nextblock.data.decode import check_pixels, grey, open_image, orientation_of, pillow_errors
from nextblock.data.orientation import stored_box, stored_size, turn

__all__ = ["fast_decode", "reduction"]

log = logging.getLogger(__name__)

JPEG_START = b"\xff\xd8\xff"


def fast_decode(content: bytes, size: Size, data: DataConfig, rng: np.random.Generator) -> Decoded | None:
    """For nearly `train_crop`'s crop, decode a JPEG file at the largest reduction that leaves enough.

    The box in the reduced picture is rounded to its nearest whole pixels, so an edge is off by half a pixel
    of it at most. None, with `rng` perhaps moved, where the file is no JPEG in colour or grey, or damaged:
    then the exact path tells. Raises `BadImageError` for a picture beyond `data.max_pixels`.
    """
    if data.channels not in (1, 3) or content[:3] != JPEG_START:
        return None
    with pillow_errors():
        image = open_image(content)
        check_pixels(image.size, data.max_pixels)
        orientation = orientation_of(image)
    if image.mode not in ("RGB", "L"):
        return None
    stored = image.height, image.width
    upright, target = stored_size(stored, orientation), stored_size(pair(size), orientation)
    draw = draw_crop(upright[0], upright[1], data, rng)
    box = stored_box(draw.box, upright, orientation)
    factor = reduction(box, target)
    pixels = _decode(content, stored, factor, is_grey=data.channels == 1 and image.mode == "L")
    if pixels is None:
        return None
    top, left, rows, columns = _reduced(box, (pixels.shape[1], pixels.shape[2]), factor)
    finish = partial(finish_crop, data=data, rng=rng, flip=draw.flip)

    def cut(pixels: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "channels rows columns"]:
        crop = pixels[:, top : top + rows, left : left + columns]
        if crop.shape[0] > data.channels:
            crop = grey(crop)
        return finish(turn(resize(crop, target), orientation))

    return Decoded(pixels, cut)


def reduction(box: Box, target: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 by which the box may shrink and still be no smaller than the target."""
    fitting = [f for f in (2, 4, 8) if box[2] >= f * target[0] and box[3] >= f * target[1]]
    return max(fitting, default=1)


def _reduced(box: Box, size: tuple[int, int], factor: int) -> Box:
    """The box in the reduced picture, to whole pixels."""
    top, left = round(box[0] / factor), round(box[1] / factor)
    bottom, right = round((box[0] + box[2]) / factor), round((box[1] + box[3]) / factor)
    return top, left, min(bottom, size[0]) - top, min(right, size[1]) - left


def _decode(content: bytes, stored: tuple[int, int], factor: int, *, is_grey: bool) -> Tensor | None:
    import simplejpeg

    height, width = -(-stored[0] // factor), -(-stored[1] // factor)
    try:
        pixels = simplejpeg.decode_jpeg(
            content,
            "GRAY" if is_grey else "RGB",
            min_height=height,
            min_width=width,
            min_factor=factor,
        )
    except ValueError as error:
        log.debug("simplejpeg refused an image that is now decoded in full: %s", error)
        return None
    if pixels.shape[:2] != (height, width):  # a header that two parsers read in two ways
        return None
    return rearrange(torch.from_numpy(pixels), "h w c -> c h w")
