"""The eight EXIF orientations: pixels and boxes as they are stored, and as they stand upright."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Shaped
from torch import Tensor

__all__ = ["is_on_its_side", "stored_box", "stored_size", "turn"]

_FLIPS: dict[int, tuple[int, ...]] = {2: (-1,), 3: (-2, -1), 4: (-2,), 6: (-1,), 7: (-2, -1), 8: (-2,)}
"""Axes to flip, after rows and columns were swapped where the picture lies on its side."""


def is_on_its_side(orientation: int) -> bool:
    """Whether the stored rows are columns of the upright picture."""
    return orientation in (5, 6, 7, 8)


def stored_size(size: tuple[int, int], orientation: int) -> tuple[int, int]:
    """Height and width as stored of an upright picture of this size, and the other way round."""
    return (size[1], size[0]) if is_on_its_side(orientation) else size


def turn(pixels: Shaped[Tensor, "c h w"], orientation: int) -> Shaped[Tensor, "c rows columns"]:
    """Turn and mirror stored pixels so that they stand upright."""
    if is_on_its_side(orientation):
        pixels = rearrange(pixels, "c h w -> c w h")
    return torch.flip(pixels, _FLIPS[orientation]) if orientation in _FLIPS else pixels


def stored_box(
    box: tuple[int, int, int, int], size: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of the upright picture of this size, where it lies as stored."""
    top, left, rows, columns = box
    flips = _FLIPS.get(orientation, ())
    top = size[0] - top - rows if -2 in flips else top
    left = size[1] - left - columns if -1 in flips else left
    return (left, top, columns, rows) if is_on_its_side(orientation) else (top, left, rows, columns)
