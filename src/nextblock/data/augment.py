"""Crops of one image for a batch, as functions of the image and of (seed, visit, sample).

The training crop is torchvision's random resized crop and the pixels are those of its v2 functions (bicubic,
antialiased, on uint8). The kernel is called directly, because torchvision takes seconds to import; only
colour jitter and timm's transform import it.
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from nextblock.config import DataConfig, Size, pair
from nextblock.data.random import keyed_rng, keyed_seed
from nextblock.data.sources.base import Source
from nextblock.errors import UsageError

Box = tuple[int, int, int, int]  # top, left, height and width, in pixels
Key = tuple[int, int]  # (visit, sample)

# timm's name of the RandAugment policy that official XTRA probes with.
POLICY = "rand-m9-mstd0.5-inc1"

# ------------------------------------------------------------------------------------- crops of a source


@dataclass(frozen=True, kw_only=True)
class Crop(ABC):
    """Turns a source's image into an image of a batch."""

    data: DataConfig
    image_size: Size
    seed: int = 0
    dtype: ClassVar[torch.dtype] = torch.uint8

    @abstractmethod
    def read(self, source: Source, key: Key) -> Tensor:
        """Read and crop a source's image; raises `BadImageError` if it cannot be read."""


class EvalCrop(Crop):
    """The crop for validation and evaluation, without randomness."""

    def read(self, source: Source, key: Key) -> Tensor:
        """Read and crop a source's image."""
        return val_crop(source.read(key[1]), self.image_size, self.data)


class TrainCrop(Crop):
    """The training augmentation: `train_crop` with the generator of (seed, visit, sample)."""

    def read(self, source: Source, key: Key) -> Tensor:
        """Read and crop; if `data.decoder` is fast, a JPEG is decoded no larger than the crop needs."""
        # Draw the crop in the full picture, whose size is in the header, exactly as without reduction. Then
        # decode at the largest reduction that leaves the crop at least as large as its target: a crop that is
        # enlarged afterwards would be blurred where full decoding is sharp.
        rng, size = keyed_rng(self.seed, "augment", *key), pair(self.image_size)
        drawn: list[tuple[bool, Box]] = []

        def reduce(height: int, width: int, flips: tuple[int, ...]) -> int:
            flip, box = _draw_crop(height, width, self.data, rng)
            fitting = [f for f in (2, 4, 8) if box[2] >= f * size[0] and box[3] >= f * size[1]]
            factor = max(fitting, default=1)
            # A side that the factor does not divide is padded at the stored right and bottom. A flip moves
            # the padding to the left and top, and thereby the crop.
            top = box[0] + (-height % factor if -2 in flips else 0)
            left = box[1] + (-width % factor if -1 in flips else 0)
            # Round corners, not sides: a box that reaches the edge of the picture still does.
            corners = (top, left, top + box[2], left + box[3])
            top, left, bottom, right = (round(corner / factor) for corner in corners)
            drawn.append((flip, (top, left, bottom - top, right - left)))
            return factor

        pixels = source.read(key[1], reduce if self.data.decoder == "fast" else None)
        if not drawn:  # `reduce` was not called: the picture is no JPEG, or the decoder is exact
            return train_crop(pixels, size, self.data, rng)
        # From here on as without reduction: the generator has drawn the crop, but not yet the colours.
        return _finish_crop(pixels, *drawn[0], size, self.data, rng)


@dataclass(frozen=True, kw_only=True)
class TimmCrop(Crop):
    """timm's training transform for classifiers, as official XTRA probes with it; normalised floats.

    RandAugment (`POLICY`), random erasing of a quarter of the images with noise, crops of 8 % to 100 % of the
    area, width over height from 3/4 to 4/3 (timm's defaults), and flips with probability `data.flip`.
    """

    dtype: ClassVar[torch.dtype] = torch.float32

    def __post_init__(self) -> None:
        if self.data.channels != 3:
            raise UsageError(
                f"augment timm changes colours, but data.channels is {self.data.channels}; use augment crop"
            )

    def read(self, source: Source, key: Key) -> Float[Tensor, "3 rows columns"]:
        """Read and transform a source's image."""
        # timm works on Pillow images.
        pixels = rearrange(source.read(key[1]), "c h w -> h w c")
        picture = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
        with seeded_globally(keyed_seed(self.seed, "timm", *key)):
            return self._transform(picture)

    @cached_property
    def _transform(self) -> Any:
        from timm.data.auto_augment import RandAugment
        from timm.data.transforms_factory import create_transform

        transform: Any = create_transform(
            (3, *pair(self.image_size)),
            is_training=True,
            hflip=self.data.flip,
            auto_augment=POLICY,
            interpolation="bicubic",
            mean=self.data.mean,
            std=self.data.std,
            re_prob=0.25,
            re_mode="pixel",
            re_count=1,
        )
        # Replaced in this transform only; the timm module is unchanged.
        (policy,) = (part for part in transform.transforms if isinstance(part, RandAugment))
        for operation in policy.ops:
            if operation.name == "PosterizeIncreasing":
                operation.aug_fn = _posterize
        return transform


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    # timm's strongest keeps 0 bits of each colour, which is black, and Pillow 13 refuses it.
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU), then restore them."""
    # Third-party augmentation draws from these. Seeding per image makes it independent of worker processes,
    # and of everything else in this process.
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global one is meant
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


# ------------------------------------------------------------------------------------------------- training


def train_crop(
    image: UInt8[Tensor, "c h w"], size: Size, data: DataConfig, rng: np.random.Generator
) -> UInt8[Tensor, "c rows columns"]:
    """A random crop resized to `size`, flipped left to right with probability `data.flip`.

    With `data.color_jitter`, its colours change with probability `data.color_jitter_prob`.
    """
    flip, box = _draw_crop(image.shape[-2], image.shape[-1], data, rng)
    return _finish_crop(image, flip, box, pair(size), data, rng)


# Drawing and cutting are separate: the box is drawn in the full image, but may be cut from a reduced one.
def _draw_crop(height: int, width: int, data: DataConfig, rng: np.random.Generator) -> tuple[bool, Box]:
    flip = rng.random() < data.flip
    return flip, random_resized_crop_box(height, width, data.crop_scale, data.crop_ratio, rng)


def _finish_crop(
    image: Tensor, flip: bool, box: Box, size: tuple[int, int], data: DataConfig, rng: np.random.Generator
) -> Tensor:
    top, left, rows, columns = box
    crop = resize(image[:, top : top + rows, left : left + columns], size)
    crop = crop.flip(-1) if flip else crop
    # Draw this last, so that crops are the same with and without it.
    if data.color_jitter is not None and rng.random() < data.color_jitter_prob:
        return color_jitter(crop, data.color_jitter, rng)
    return crop


def random_resized_crop_box(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> Box:
    """Draw a crop: its share of the area uniformly from `scale`, width over height log-uniformly.

    Returns the first of ten draws that fits, else the largest centred crop with an allowed ratio
    (torchvision's `RandomResizedCrop.get_params`). Uses only `rng.random`, whose stream numpy keeps stable.
    """
    # Two draws per try, then two for the position, always in this order: that makes crops reproducible.
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_low + (log_high - log_low) * rng.random())
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.random() * (height - crop_height + 1))
            left = int(rng.random() * (width - crop_width + 1))
            return top, left, crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < ratio[0]:
        crop_height = max(1, min(height, round(width / ratio[0])))
    elif width / height > ratio[1]:
        crop_width = max(1, min(width, round(height * ratio[1])))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def color_jitter(
    image: UInt8[Tensor, "c h w"], strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> UInt8[Tensor, "c h w"]:
    """Change brightness, contrast, saturation and hue in random order; for grey, only the first two.

    The first three are multiplied by a factor drawn uniformly from 1 - strength to 1 + strength. The hue, a
    circle of length 1, shifts by up to its strength either way (torchvision's `ColorJitter`).
    """
    from torchvision.transforms.v2 import functional

    centres = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
    changes = [(getattr(functional, f"adjust_{name}"), centre) for name, centre in centres.items()]
    # Four factors and four sort keys, always drawn: a strength of 0 does not change the other draws.
    drawn = [rng.random() for _ in range(8)]
    for i in sorted(range(4), key=lambda i: drawn[4 + i]):
        if strengths[i] > 0:
            change, centre = changes[i]
            image = change(image, centre + strengths[i] * (2 * drawn[i] - 1))
    return image


# ----------------------------------------------------------------------------------------------- evaluation


def val_crop(image: UInt8[Tensor, "c h w"], size: Size, data: DataConfig) -> UInt8[Tensor, "c rows columns"]:
    """The deterministic crop for validation and evaluation, chosen by `data.val_crop`."""
    if data.val_crop == "center":
        return eval_crop(image, size, data.resize_px(size))
    rows, columns = pair(size)
    # Whole pixels, rounded down as in timm.
    height, width = (data.resize_px(size) * side // min(rows, columns) for side in (rows, columns))
    if data.val_crop == "squash":
        return _centre(resize(image, (height, width)), (rows, columns))
    # Border: shrink the whole picture until its longer side, relative to the frame, fits.
    ratio = max(image.shape[-2] / height, image.shape[-1] / width)
    height, width = (max(1, round(side / ratio)) for side in image.shape[-2:])
    inside = _centre(resize(image, (height, width)), (min(height, rows), min(width, columns)))
    fill = torch.tensor([round(255 * part) for part in data.mean], dtype=torch.uint8)
    whole = fill[:, None, None].repeat(1, rows, columns)
    top, left = (rows - inside.shape[1]) // 2, (columns - inside.shape[2]) // 2
    whole[:, top : top + inside.shape[1], left : left + inside.shape[2]] = inside
    return whole


def eval_crop(image: UInt8[Tensor, "c h w"], size: Size, resize_px: int) -> UInt8[Tensor, "c rows columns"]:
    """Resize the shorter side to `resize_px`, then cut `size` out of the middle.

    If a side would then be smaller than the crop, the image is enlarged until it covers the crop.
    """
    rows, columns = pair(size)
    # Keep only the middle of a narrow strip: 1 x 1,000,000 pixels would become 300 x 300,000,000.
    height, width = min(image.shape[1], 32 * image.shape[2]), min(image.shape[2], 32 * image.shape[1])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    image = image[:, top : top + height, left : left + width]
    # Truncate like torchvision, so that the pixels agree.
    short = min(height, width)
    target = int(resize_px * height / short), int(resize_px * width / short)
    if target[0] < rows or target[1] < columns:
        scale = max(rows / height, columns / width)
        target = max(rows, round(scale * height)), max(columns, round(scale * width))
    return _centre(resize(image, target), (rows, columns))


def _centre(image: Tensor, size: tuple[int, int]) -> Tensor:
    rows, columns = size
    top, left = round((image.shape[1] - rows) / 2), round((image.shape[2] - columns) / 2)
    return image[:, top : top + rows, left : left + columns]


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
        raise UsageError(
            f"the images have {channels} channels, data.mean has {len(mean)} and data.std {len(std)}; give "
            "one number per channel"
        )
    # In place, to avoid copies: floats take four times the memory of bytes.
    shift, scale = (_per_channel(numbers, images.device) for numbers in (mean, std))
    return images.float().div_(255).sub_(shift).div_(scale)


@lru_cache(maxsize=16)
def _per_channel(numbers: tuple[float | int, ...], device: torch.device) -> Float[Tensor, "c 1 1"]:
    # Cached: a copy from Python to a GPU waits for all of the GPU's work. Not an inference tensor, so that
    # training can use it even if inference asked first.
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float32, device=device).view(-1, 1, 1)
