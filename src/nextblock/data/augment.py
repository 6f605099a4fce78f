"""Crops, flips and changed colours of uint8 images: pure functions of an image and a generator.

The crop is torchvision's random resized crop and the pixels are those of its v2 functions (bicubic,
antialiased, on uint8). The kernel is called directly, as torchvision takes seconds to import; only changing
colours imports it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, UInt8
from torch import Tensor

from nextblock.config import DataConfig, Size, pair

__all__ = [
    "Box",
    "Draw",
    "color_jitter",
    "draw_crop",
    "eval_crop",
    "finish_crop",
    "normalize",
    "random_resized_crop_box",
    "reduced_box",
    "reduction",
    "resize",
    "train_crop",
    "val_crop",
]

# Top, left, height and width, in pixels.
Box = tuple[int, int, int, int]


def random_resized_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a crop: its share of the area uniformly from `scale`, width over height log-uniformly.

    Of ten draws the first that fits is taken; if none does, the largest centred crop whose ratio is allowed
    (torchvision's `RandomResizedCrop.get_params`). Only `rng.random` is used, so the stream is a stable one.
    """
    # Two draws for each try, then two for the place, always in this order: crops are reproducible by that.
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    return _centre_box(height, width, ratio)


def _centre_box(height: int, width: int, ratio: tuple[float, float]) -> Box:
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = max(1, min(width, round(height * ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


class Draw(NamedTuple):
    """Where a training crop lies, and whether it is flipped left to right."""

    flip: bool
    box: Box


def draw_crop(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> Draw:
    """Draw the crop of an image of this size, as `train_crop` does."""
    flip = rng.random() < data.flip
    return Draw(flip, random_resized_crop_box(height, width, data.crop_scale, data.crop_ratio, rng))


def finish_crop(
    image: UInt8[Tensor, "c h w"],
    draw: Draw,
    size: tuple[int, int],
    data: DataConfig,
    rng: np.random.Generator,
) -> UInt8[Tensor, "c rows columns"]:
    """Cut the crop that was drawn, resize and flip it; with `data.color_jitter`, change its colours."""
    top, left, rows, columns = draw.box
    crop = resize(image[:, top : top + rows, left : left + columns], size)
    crop = crop.flip(-1) if draw.flip else crop
    # Drawn last, so that crops are the same with and without it.
    if data.color_jitter is not None and rng.random() < data.color_jitter_prob:
        return color_jitter(crop, data.color_jitter, rng)
    return crop


def train_crop(
    image: UInt8[Tensor, "c h w"], size: Size, data: DataConfig, rng: np.random.Generator
) -> UInt8[Tensor, "c rows columns"]:
    """A random crop resized to `size`, flipped left to right with probability `data.flip`.

    With `data.color_jitter`, its colours are changed with probability `data.color_jitter_prob`.
    """
    draw = draw_crop(image.shape[-2], image.shape[-1], data, rng)
    return finish_crop(image, draw, pair(size), data, rng)


def reduction(box: Box, target: tuple[int, int]) -> int:
    """The largest of 1, 2, 4, 8 by which the box can shrink and still be no smaller than the target."""
    # The crop must not be enlarged afterwards: that would be blurred where full decoding is sharp.
    fitting = [f for f in (2, 4, 8) if box[2] >= f * target[0] and box[3] >= f * target[1]]
    return max(fitting, default=1)


def reduced_box(box: Box, size: tuple[int, int], factor: int) -> Box:
    """The box in a picture reduced to `size` (height, width), rounded to whole pixels."""
    top, left = round(box[0] / factor), round(box[1] / factor)
    bottom, right = round((box[0] + box[2]) / factor), round((box[1] + box[3]) / factor)
    return top, left, min(bottom, size[0]) - top, min(right, size[1]) - left


def color_jitter(
    image: UInt8[Tensor, "c h w"], strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> UInt8[Tensor, "c h w"]:
    """Change brightness, contrast, saturation and hue, in random order; of grey, the first two.

    The first three are multiplied by a factor drawn uniformly from 1 - strength to 1 + strength; the hue, a
    circle of length 1, is turned by up to its strength either way (torchvision's `ColorJitter`). As in
    `random_resized_crop_box` only `rng.random` is used.
    """
    from torchvision.transforms.v2 import functional

    changes = (
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    )
    centres = (1.0, 1.0, 1.0, 0.0)
    # Four factors and four keys to sort by, drawn whatever the strengths: a strength of 0 moves no other.
    drawn = [rng.random() for _ in range(8)]
    for i in sorted(range(4), key=lambda i: drawn[4 + i]):
        if strengths[i] > 0:
            image = changes[i](image, centres[i] + strengths[i] * (2 * drawn[i] - 1))
    return image


def val_crop(image: UInt8[Tensor, "c h w"], size: Size, data: DataConfig) -> UInt8[Tensor, "c rows columns"]:
    """The crop for validation and evaluation that `data.val_crop` asks for: no chance in it."""
    if data.val_crop == "center":
        return eval_crop(image, size, data.resize_px(size))
    rows, columns = pair(size)
    # Whole pixels rounded down, as timm has them.
    height, width = (data.resize_px(size) * side // min(rows, columns) for side in (rows, columns))
    if data.val_crop == "squash":
        return _centre(resize(image, (height, width)), (rows, columns))
    return _bordered(image, (height, width), (rows, columns), data.mean)


def _bordered(
    image: Tensor, frame: tuple[int, int], size: tuple[int, int], mean: tuple[float, ...]
) -> Tensor:
    """The centre of a frame in the mean colour, in the middle of which the whole picture lies."""
    # The whole picture shrinks until its longer side, relative to the frame, fits.
    ratio = max(side / most for side, most in zip(image.shape[-2:], frame, strict=True))
    height, width = (max(1, round(side / ratio)) for side in image.shape[-2:])
    inside = _centre(resize(image, (height, width)), (min(height, size[0]), min(width, size[1])))
    fill = torch.tensor([round(255 * part) for part in mean], dtype=torch.uint8)
    whole = fill[:, None, None].repeat(1, *size)
    top, left = (size[0] - inside.shape[1]) // 2, (size[1] - inside.shape[2]) // 2
    whole[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
    return whole


def _centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = size
    top, left = round((image.shape[1] - rows) / 2), round((image.shape[2] - columns) / 2)
    return image[:, top : top + rows, left : left + columns]


def eval_crop(image: UInt8[Tensor, "c h w"], size: Size, resize_px: int) -> UInt8[Tensor, "c rows columns"]:
    """The centre of the image: the shorter side resized to `resize_px`, then `size` cut out of the middle.

    Where that would leave the picture smaller than the crop along a side, it is enlarged until it covers it.
    """
    rows, columns = pair(size)
    image = _without_far_ends(image)
    height, width = _covering_size(image.shape[-2], image.shape[-1], (rows, columns), resize_px)
    return _centre(resize(image, (height, width)), (rows, columns))


def _without_far_ends(image: Tensor, most: int = 32) -> Tensor:
    """The middle of a strip `most` times as long as wide, or longer, which resized would fill the memory."""
    # The shorter side is resized to a fixed length: one pixel by a million would become 300 by 300 million.
    height, width = image.shape[-2:]
    rows, columns = min(height, most * width), min(width, most * height)
    top, left = (height - rows) // 2, (width - columns) // 2
    return image[:, top : top + rows, left : left + columns]


def _covering_size(height: int, width: int, crop: tuple[int, int], resize_px: int) -> tuple[int, int]:
    # If the fixed length would leave the picture narrower than the crop, it is enlarged until it covers it.
    short = min(height, width)
    # Truncated like torchvision's, so that the pixels agree with it.
    resized = int(resize_px * height / short), int(resize_px * width / short)
    if resized[0] >= crop[0] and resized[1] >= crop[1]:
        return resized
    scale = max(crop[0] / height, crop[1] / width)
    return max(crop[0], round(scale * height)), max(crop[1], round(scale * width))


def resize(image: UInt8[Tensor, "c h w"], size: tuple[int, int]) -> UInt8[Tensor, "c rows columns"]:
    """Resize to (rows, columns): bicubic, antialiased, on bytes."""
    if image.shape[-2:] == size:
        return image
    return F.interpolate(image[None], size=size, mode="bicubic", align_corners=False, antialias=True)[0]


def normalize(
    images: UInt8[Tensor, "b c h w"], mean: tuple[float | int, ...], std: tuple[float | int, ...]
) -> Float[Tensor, "b c h w"]:
    """Scale bytes to [0, 1], subtract each channel's mean and divide by its deviation, on their device."""
    channels = images.shape[1]
    if not channels == len(mean) == len(std):
        raise ValueError(
            f"the images have {channels} channels, data.mean has {len(mean)} and data.std {len(std)}; give "
            "one number per channel"
        )
    # In place, one pass each over the batch: a batch of floats is four times the bytes.
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
    return images.float().div_(255).sub_(shift).div_(scale)
