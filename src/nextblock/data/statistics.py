"""The mean and deviation of a source's pixels, for `data.normalize auto`."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from nextblock.config import DataConfig, Size, pair
from nextblock.data.loader import eval_batches
from nextblock.data.random import keyed_permutation
from nextblock.data.sources.base import Source
from nextblock.data.workers import resolve_workers
from nextblock.errors import UsageError

BATCH_SIZE = 50


class PixelStatistics(NamedTuple):
    """Mean and deviation of each channel to six digits, for pixels in [0, 1], and the number of images."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    images: int


def measure_pixels(
    source: Source, data: DataConfig, image_size: Size, seed: int, *, most: int = 1000
) -> PixelStatistics:
    """Measure the validation crops of up to `most` images drawn by the seed.

    Raises `ValueError` if no image of the sample can be read, or if a channel is the same everywhere.
    """
    # Drawn by the seed, so that a restarted run measures the same.
    chosen = np.sort(keyed_permutation(seed, len(source), "statistics")[:most])
    workers = resolve_workers(data.workers, source)
    # Integer sums are exact, so the result does not depend on workers or batches.
    totals = np.zeros((2, data.channels), dtype=np.int64)
    images, bad = 0, []
    for batch in eval_batches(source, data, image_size, BATCH_SIZE, chosen, workers=workers):
        values = batch.images.numpy().astype(np.int64)
        totals += np.stack([values.sum(axis=(0, 2, 3)), (values**2).sum(axis=(0, 2, 3))])
        images += len(batch.samples)
        bad += batch.bad
    if not images:
        raise UsageError(
            f"data.normalize auto: none of {len(chosen)} images of {source.spec} can be read, such as "
            f"{bad[0].name}: {bad[0].reason}; repair them, or give data.mean and data.std"
        )
    # Computed in Python's unbounded integers, up to one division at the end.
    pixels = images * math.prod(pair(image_size))
    mean, std = [], []
    for channel, (total, squares) in enumerate(totals.T.tolist()):
        # pixels * squares - total² is pixels² times the variance, an exact integer: nothing cancels.
        deviation = math.sqrt(pixels * squares - total**2) / pixels / 255
        if round(deviation, 6) == 0:
            raise UsageError(
                f"data.normalize auto: channel {channel} of {data.channels} has the same value everywhere in "
                f"{images} images of {source.spec}; leave that channel out of the files, or give data.mean "
                "and data.std with data.normalize given"
            )
        mean.append(round(total / pixels / 255, 6))
        std.append(round(deviation, 6))
    return PixelStatistics(tuple(mean), tuple(std), images)
