"""What becomes of one image on its way into a batch: a function of the seed, the visit and the sample.

Third-party augmentation draws from global generators. `seeded_globally` seeds those for one image and puts
them back, so neither worker processes nor anything else in the process makes a difference.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from nextblock.config import DataConfig, Size, pair
from nextblock.data.augment import Draw, draw_crop, finish_crop, reduced_box, reduction, train_crop, val_crop
from nextblock.data.random import keyed_rng, keyed_seed
from nextblock.data.sources.base import Source

__all__ = ["Crop", "Decoded", "EvalCrop", "Key", "TimmCrop", "TrainCrop", "seeded_globally"]

# (visit, sample).
Key = tuple[int, int]


class Decoded(NamedTuple):
    """One decoded image, and the function that crops it."""

    pixels: UInt8[Tensor, "c h w"]
    cut: Callable[[Tensor], Tensor]


@runtime_checkable
class Crop(Protocol):
    """Makes one image of a batch from a source's image."""

    @property
    def data(self) -> DataConfig:
        """How images are read."""
        ...

    @property
    def image_size(self) -> Size:
        """Size of every crop in pixels."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """uint8, or float32 if the crops are normalised already."""
        ...

    def decode(self, source: Source, key: Key) -> Decoded:
        """Decode an image, to be cropped later; `BadImageError` if it cannot be read."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainCrop:
    """The training augmentation: `augment.train_crop` with the generator of (seed, visit, sample)."""

    data: DataConfig
    image_size: Size
    seed: int
    dtype: torch.dtype = torch.uint8

    def __call__(self, image: UInt8[Tensor, "c h w"], key: Key) -> UInt8[Tensor, "c rows columns"]:
        """Crop an image's pixels."""
        return train_crop(image, self.image_size, self.data, self._rng(key))

    def decode(self, source: Source, key: Key) -> Decoded:
        """Decode an image; a large JPEG no larger than its crop needs, if `data.decoder` is fast."""
        if self.data.decoder != "fast":
            return Decoded(source.read(key[1]), partial(self, key=key))
        # The crop is drawn in the full picture, from its header, exactly as without reduction. Then the
        # picture is decoded at the largest reduction that leaves the crop at least as large as its target.
        rng, size = self._rng(key), pair(self.image_size)
        drawn: list[tuple[Draw, int]] = []

        def reduce(height: int, width: int, flips: tuple[int, ...]) -> int:
            draw = draw_crop(height, width, self.data, rng)
            factor = reduction(draw.box, size)
            # A side that the factor does not divide is padded at the stored right and bottom. A flip brings
            # the padding to the left and top, and so moves the crop.
            top, left, *sides = draw.box
            top += -height % factor if -2 in flips else 0
            left += -width % factor if -1 in flips else 0
            drawn.append((Draw(draw.flip, (top, left, sides[0], sides[1])), factor))
            return factor

        pixels = source.read(key[1], reduce)
        if not drawn:  # no JPEG
            return Decoded(pixels, partial(self, key=key))
        ((draw, factor),) = drawn
        draw = Draw(draw.flip, reduced_box(draw.box, (pixels.shape[1], pixels.shape[2]), factor))
        return Decoded(pixels, partial(finish_crop, draw=draw, size=size, data=self.data, rng=rng))

    def _rng(self, key: Key) -> np.random.Generator:
        return keyed_rng(self.seed, "augment", *key)


@dataclass(frozen=True, kw_only=True)
class EvalCrop:
    """The crop for validation and evaluation, without randomness."""

    data: DataConfig
    image_size: Size
    dtype: torch.dtype = torch.uint8

    def __call__(self, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "c rows columns"]:
        """Crop an image's pixels."""
        return val_crop(image, self.image_size, self.data)

    def decode(self, source: Source, key: Key) -> Decoded:
        """Decode an image."""
        return Decoded(source.read(key[1]), self)


# ------------------------------------------------------------------------------------------- timm's transform

POLICY = "rand-m9-mstd0.5-inc1"


@contextmanager
def seeded_globally(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (its CPU's), and put them back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is the global one that is meant
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@dataclass(frozen=True, kw_only=True)
class TimmCrop:
    """timm's training transform for classifiers, as official XTRA probes with it; normalised floats.

    RandAugment (`POLICY`), random erasing of a quarter of the images with noise, crops of 8 % to 100 % of the
    area, width over height from 3/4 to 4/3 (timm's defaults), and flips with probability `data.flip`.
    """

    data: DataConfig
    image_size: Size
    seed: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.data.channels != 3:
            raise ValueError(
                f"augment timm changes colours, but data.channels is {self.data.channels}; use augment crop"
            )

    def __call__(self, image: UInt8[Tensor, "3 h w"], key: Key) -> Float[Tensor, "3 rows columns"]:
        """Crop an image's pixels."""
        picture = Image.fromarray(np.ascontiguousarray(rearrange(image, "c h w -> h w c").numpy()))
        with seeded_globally(keyed_seed(self.seed, "timm", *key)):
            return self._transform(picture)

    def decode(self, source: Source, key: Key) -> Decoded:
        """Decode an image."""
        return Decoded(source.read(key[1]), partial(self, key=key))

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
        (policy,) = (part for part in transform.transforms if isinstance(part, RandAugment))
        for operation in policy.ops:
            if operation.name == "PosterizeIncreasing":
                operation.aug_fn = _posterize
        return transform


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep the highest `bits` bits of each colour. timm's strongest asks for 0, which Pillow 13 refuses."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
