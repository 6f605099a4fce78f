"""Renaming foreign weights, and deriving a model's sizes from their names and shapes."""

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
    """Rename the tensors of an official file to our names.

    `table` maps regular expressions for the start of a name to our replacement; the first match wins. Raises
    `CheckpointError` if none matches, or if two tensors would get the same name.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        start = next((start for start in table if re.match(start, name)), None)
        new = "" if start is None else re.sub(start, table[start], name, count=1)
        if not new or new in ours:
            raise CheckpointError(f"{origin} holds {name!r}, which is not in the {layout} layout")
        ours[new] = tensor
    return ours


def fused(weights: Mapping[str, Tensor], parts: Sequence[str], origin: str) -> dict[str, Tensor]:
    """Join separate layers for queries, keys and values, named `parts`, under the name "qkv"."""
    joined = dict(weights)
    for name in weights:
        if match := re.fullmatch(rf"(.+\.){parts[0]}\.(\w+)", name):
            # Rows in the order q, k, v, as timm's attention splits them. Both layouts order heads within a
            # part the same way, so no row moves within its part.
            three = [f"{match[1]}{part}.{match[2]}" for part in parts]
            joined[f"{match[1]}qkv.{match[2]}"] = torch.cat([needed(weights, part, origin) for part in three])
            for part in three:
                del joined[part]
    return joined


def needed(held: Mapping[str, Any], name: str, origin: str) -> Any:
    """Return the tensor or setting `name`; `CheckpointError` if the file lacks it."""
    if name not in held:
        raise CheckpointError(
            f"{origin} lacks {name!r}, without which no model can be built; use the complete original file"
        )
    return held[name]


def only_tensors(weights: Mapping[str, Any], origin: str) -> Mapping[str, Tensor]:
    """Return the same weights; `CheckpointError` if any is not a tensor."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{origin} holds {name!r} of type {kind}; take the original file")
    return weights


def shape_of(weights: Mapping[str, Tensor], name: str, ndim: int, origin: str) -> tuple[int, ...]:
    """Shape of a tensor that determines sizes; `CheckpointError` unless it has `ndim` axes."""
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
    """Number of parts under `prefix` ("enc.blocks."), from the highest number; at least one."""
    numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
    return 1 + max(numbers) if numbers else needed({}, f"{prefix}0", origin)


def ratio_of(hidden: int, width: int) -> float:
    """Ratio of an MLP's hidden width to its width, such that `int(width * ratio)` is `hidden`."""
    # The quotient may round down, and int(width * ratio) is then one too small. The next larger float fixes
    # that, as its error is far less than one channel.
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else nextafter(ratio, inf)


def unknown_heads(size: tuple[int, int], origin: str) -> str:
    """Message that asks for the heads of an encoder of `size` (width, layers)."""
    return (
        f"{origin} does not record how many attention heads its encoder has ({size[0]} wide, {size[1]} "
        "layers); give them: num_heads= (--num_heads)"
    )
