"""What the names and shapes of foreign weights tell: our names for them, and the sizes of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor

from nextblock.checkpoint import CheckpointError


def renamed(
    weights: Mapping[str, Any], table: Mapping[str, str], layout: str, origin: str
) -> dict[str, Tensor]:
    """The tensors of an official file under our names.

    `table` has expressions for the beginning of a name, and what stands there in ours; the first that fits
    counts. Raises `CheckpointError` if none fits, or if two tensors would have one name.
    """
    # Two names that became one would lose a tensor: refused, like a name that no rule fits.
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        start = next((start for start in table if re.match(start, name)), None)
        new = "" if start is None else re.sub(start, table[start], name, count=1)
        if not new or new in ours:
            raise CheckpointError(f"{origin} holds {name!r}, which is not in the {layout} layout")
        ours[new] = tensor
    return ours


def fused(weights: Mapping[str, Tensor], parts: Sequence[str], origin: str) -> dict[str, Tensor]:
    """Separate maps to queries, keys and values, called `parts`, joined under the name "qkv"."""
    joined = dict(weights)
    for name in weights:
        if match := re.fullmatch(rf"(.+\.){parts[0]}\.(\w+)", name):
            # Rows in the order q, k, v, as timm's attention takes the joint map apart. Each part goes over
            # its heads in the same order in both layouts, so nothing within it moves.
            three = [f"{match[1]}{part}.{match[2]}" for part in parts]
            joined[f"{match[1]}qkv.{match[2]}"] = torch.cat([needed(weights, part, origin) for part in three])
            for part in three:
                del joined[part]
    return joined


def needed(held: Mapping[str, Any], name: str, origin: str) -> Any:
    """The tensor, or the setting, of this name; refused if a file lacks it."""
    if name not in held:
        raise CheckpointError(
            f"{origin} lacks {name!r}, without which no model can be built; take the original, whole file"
        )
    return held[name]


def only_tensors(weights: Mapping[str, Any], origin: str) -> Mapping[str, Tensor]:
    """The same weights; refused if one of them is no tensor."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{origin} holds {name!r} of type {kind}; take the original file")
    return weights


def shape_of(weights: Mapping[str, Tensor], name: str, ndim: int, origin: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from; refused if it has another number of axes."""
    shape = tuple(needed(weights, name, origin).shape)
    if len(shape) != ndim:
        raise CheckpointError(
            f"{origin} holds {name} of shape {shape}, not of {ndim} axes; take the original"
        )
    return shape


def patch_shape(weights: Mapping[str, Tensor], name: str, origin: str) -> tuple[int, int, int]:
    """(width, channels, patch size in pixels) of the convolution that embeds square patches."""
    width, channels, rows, columns = shape_of(weights, name, 4, origin)
    if rows != columns:
        raise CheckpointError(f"{origin} has patches of {rows}x{columns} px; they must be square")
    return width, channels, rows


def count_numbered(weights: Mapping[str, Any], prefix: str, origin: str) -> int:
    """How many parts there are under `prefix` ("enc.blocks."), by the highest number; at least one."""
    numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
    return 1 + max(numbers) if numbers else needed({}, f"{prefix}0", origin)


def ratio_of(hidden: int, width: int) -> float:
    """The ratio that an MLP's hidden width is of its width, such that `int(width * ratio)` gives it back."""
    # The quotient may round down, and int(width * ratio) is then one less than `hidden`. The next larger
    # float is enough: it is too large by far less than one channel.
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else nextafter(ratio, inf)


def unknown_heads(size: tuple[int, int], origin: str) -> str:
    """Why the caller has to tell the heads of an encoder (width, layers): a wrong number fits unnoticed."""
    return (
        f"{origin} does not record how many attention heads its encoder has ({size[0]} wide, {size[1]} "
        "layers); give them: num_heads= (--num_heads)"
    )
