"""timm's augmentation for training classifiers, as official XTRA probes with it, made a function of its key.

timm draws from the global generators of Python, numpy and torch. Here they are seeded for one image at a time
by (seed, visit, sample) and put back, so neither workers nor anything else in the process is noticed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from nextblock.config import DataConfig, Size, pair
from nextblock.data.augment import Decoded
from nextblock.data.keyed import keyed_seed
from nextblock.data.loader import Key
from nextblock.data.sources import Source

__all__ = ["TimmCrop", "seeded_globally"]

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
    """timm's training transform of one image, a function of (seed, visit, sample), normalised floats.

    RandAugment (`POLICY`), random erasing of a quarter of the images with noise, crops of 8 % to 100 % of the
    area, width over height from 3/4 to 4/3, as by timm's defaults, and flips as `data.flip` says.
    """

    data: DataConfig
    image_size: Size
    seed: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.data.channels != 3:
            raise ValueError(
                f"augment timm changes colours, data.channels is {self.data.channels}; use augment crop"
            )

    def __call__(self, image: UInt8[Tensor, "3 h w"], key: Key) -> Float[Tensor, "3 rows columns"]:
        """The crop of an image's pixels."""
        picture = Image.fromarray(np.ascontiguousarray(rearrange(image, "c h w -> h w c").numpy()))
        with seeded_globally(keyed_seed(self.seed, "timm", *key)):
            return self._transform(picture)

    def decode(self, source: Source, key: Key) -> Decoded:
        """A source's image, to be cropped; `BadImageError` where it cannot be read."""
        return Decoded(source.read(key[1]), partial(self, key=key))

    @cached_property
    def _transform(self) -> Any:
        from timm.data.auto_augment import RandAugment
        from timm.data.transforms_factory import create_transform

        made: Any = create_transform(
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
        (policy,) = (part for part in made.transforms if isinstance(part, RandAugment))
        for operation in policy.ops:
            if operation.name == "PosterizeIncreasing":
                operation.aug_fn = _posterize
        return made


def _posterize(image: Image.Image, bits: int, **_: object) -> Image.Image:
    """Keep so many bits of each colour: of none, which timm asks for at its strongest, Pillow may refuse."""
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)
