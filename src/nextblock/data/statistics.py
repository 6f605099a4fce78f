"""The mean and deviation of a source's pixels, for `data.normalize auto`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from nextblock.config import DataConfig, Size
from nextblock.data.keyed import keyed_permutation
from nextblock.data.loader import eval_batches, resolve_workers
from nextblock.data.sources import Source

__all__ = ["STATISTICS_IMAGES", "PixelStatistics", "measure_pixels"]

STATISTICS_IMAGES = 1000
_BATCH = 50


class PixelStatistics(NamedTuple):
    """Mean and deviation of each channel, of pixels in [0, 1], to six digits, and of how many images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int


def measure_pixels(
    source: Source, data: DataConfig, image_size: Size, seed: int, *, most: int = STATISTICS_IMAGES
) -> PixelStatistics:
    """Measure the centre crops, as validation cuts them, of up to `most` images drawn by the seed.

    The sums are whole numbers, so they hang on neither workers nor batches. Raises `ValueError` where no
    image of the sample can be read, and where a channel is the same everywhere, which cannot be divided by.
    """
    chosen = np.sort(keyed_permutation(seed, len(source), "statistics")[:most])
    totals = np.zeros((2, data.channels), dtype=np.int64)
    images, first_bad = 0, None
    for batch in eval_batches(
        source, data, image_size, _BATCH, chosen, workers=resolve_workers(data.workers, source)
    ):
        totals += _sums(batch.images.numpy())
        images += len(batch.samples)
        first_bad = first_bad or next(iter(batch.bad), None)
    if not images:
        assert first_bad is not None
        raise ValueError(
            f"data.normalize auto: none of {len(chosen)} images of {source.spec} can be read, such as "
            f"{first_bad.name}: {first_bad.reason}; repair them, or give data.mean and data.std"
        )
    return _statistics(totals, images, data, image_size, source.spec)


def _sums(images: np.ndarray) -> Int64[np.ndarray, "2 c"]:
    """Sum and sum of squares of each channel's bytes."""
    values = images.astype(np.int64)
    return np.stack([values.sum(axis=(0, 2, 3)), (values**2).sum(axis=(0, 2, 3))])


def _statistics(
    totals: np.ndarray, images: int, data: DataConfig, image_size: Size, spec: str
) -> PixelStatistics:
    rows, columns = (image_size, image_size) if isinstance(image_size, int) else image_size
    pixels = images * rows * columns
    mean, std = [], []
    for channel, (total, squares) in enumerate(totals.T.tolist()):
        # Whole numbers until here: pixels² * variance, exactly.
        spread = math.sqrt(pixels * squares - total**2) / pixels / 255
        if round(spread, 6) == 0:
            raise ValueError(
                f"data.normalize auto: channel {channel} of {data.channels} has the same value everywhere in "
                f"{images} images of {spec}, so its deviation is 0; leave that channel out of the files, or "
                "give data.mean and data.std with data.normalize given"
            )
        mean.append(round(total / pixels / 255, 6))
        std.append(round(spread, 6))
    return PixelStatistics(tuple(mean), tuple(std), images)
