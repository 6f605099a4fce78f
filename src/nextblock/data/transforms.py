"""Transforms of one image for a batch, as functions of the seed, the visit and the sample."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from nextblock.config import DataConfig, Size, pair
from nextblock.data.augment import Box, draw_crop, finish_crop, reduced_box, reduction, train_crop, val_crop
from nextblock.data.random import keyed_rng, keyed_seed
from nextblock.data.sources.base import Source
from nextblock.errors import UsageError

# (visit, sample).
Key = tuple[int, int]

# timm's name of the RandAugment policy that official XTRA probes with.
POLICY = "rand-m9-mstd0.5-inc1"


@dataclass(frozen=True, kw_only=True)
class Crop(ABC):
    """Turns a source's image into an image of a batch."""

    data: DataConfig
    image_size: Size
    seed: int = 0
    dtype: ClassVar[torch.dtype] = torch.uint8

    @abstractmethod
    def __call__(self, image: Tensor, key: Key) -> Tensor:
        """Crop an image's pixels."""

    def read(self, source: Source, key: Key) -> Tensor:
        """Read and crop a source's image; raises `BadImageError` if it cannot be read."""
        return self(source.read(key[1]), key)


class EvalCrop(Crop):
    """The crop for validation and evaluation, without randomness."""

    def __call__(self, image: UInt8[Tensor, "c h w"], key: Key) -> Tensor:  # noqa: ARG002
        """Crop an image's pixels."""
        return val_crop(image, self.image_size, self.data)


class TrainCrop(Crop):
    """The training augmentation: `augment.train_crop` with the generator of (seed, visit, sample)."""

    def __call__(self, image: UInt8[Tensor, "c h w"], key: Key) -> Tensor:
        """Crop an image's pixels."""
        return train_crop(image, self.image_size, self.data, keyed_rng(self.seed, "augment", *key))

    def read(self, source: Source, key: Key) -> Tensor:
        """Read and crop; if `data.decoder` is fast, a JPEG is decoded no larger than the crop needs."""
        if self.data.decoder != "fast":
            return super().read(source, key)
        # Draw the crop in the full picture, whose size is in the header, exactly as without reduction. Then
        # decode at the largest reduction that leaves the crop at least as large as its target.
        rng, size = keyed_rng(self.seed, "augment", *key), pair(self.image_size)
        drawn: list[tuple[bool, Box, int]] = []

        def reduce(height: int, width: int, flips: tuple[int, ...]) -> int:
            flip, box = draw_crop(height, width, self.data, rng)
            factor = reduction(box, size)
            # A side that the factor does not divide is padded at the stored right and bottom. A flip moves
            # the padding to the left and top, and thereby the crop.
            top = box[0] + (-height % factor if -2 in flips else 0)
            left = box[1] + (-width % factor if -1 in flips else 0)
            drawn.append((flip, (top, left, box[2], box[3]), factor))
            return factor

        pixels = source.read(key[1], reduce)
        if not drawn:  # not a JPEG, so `reduce` was not called, and nothing was drawn
            return self(pixels, key)
        # From here on as without reduction: the generator has drawn the crop, but not yet the colours.
        ((flip, box, factor),) = drawn
        box = reduced_box(box, (pixels.shape[1], pixels.shape[2]), factor)
        return finish_crop(pixels, flip, box, size, self.data, rng)


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

    def __call__(self, image: UInt8[Tensor, "3 h w"], key: Key) -> Float[Tensor, "3 rows columns"]:
        """Crop an image's pixels."""
        # timm works on Pillow images.
        picture = Image.fromarray(np.ascontiguousarray(rearrange(image, "c h w -> h w c").numpy()))
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
