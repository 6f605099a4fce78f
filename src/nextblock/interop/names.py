"""Tools for foreign weights: renaming by a table, sizes from shapes, and refusals that name the file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import inf, nextafter
from typing import Any

import torch
from torch import Tensor

from nextblock.checkpoint import CheckpointError, MissingSettingError, build_model
from nextblock.config import ModelConfig
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier


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
        raise CheckpointError(f"{origin} lacks {name!r}; use the complete original file")
    return held[name]


def shape_of(weights: Mapping[str, Tensor], name: str, ndim: int, origin: str) -> tuple[int, ...]:
    """Shape of a tensor that determines sizes; `CheckpointError` unless it has `ndim` axes."""
    shape = tuple(needed(weights, name, origin).shape)
    if len(shape) != ndim:
        raise CheckpointError(
            f"{origin} holds {name} of shape {shape}, not of {ndim} axes; take the original"
        )
    return shape


def encoder_sizes(weights: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    """Settings of an encoder that its shapes show, under our names; patches must be square."""
    name = "encoder.patch_embed.proj.weight"
    width, channels, rows, columns = shape_of(weights, name, 4, origin)
    if rows != columns:
        raise CheckpointError(f"{origin} has patches of {rows}x{columns} px; they must be square")
    _, depth, ratio = layer_sizes(weights, "encoder", origin)
    sizes = {"embed_dim": width, "depth": depth, "mlp_ratio": ratio}
    return {"patch_size": rows, "in_chans": channels, **sizes}


def layer_sizes(weights: Mapping[str, Tensor], part: str, origin: str) -> tuple[int, int, float]:
    """Width, number and MLP ratio of the layers of "encoder" or "predictor"."""
    width, hidden = shape_of(weights, f"{part}.blocks.0.mlp.fc2.weight", 2, origin)
    # The quotient may round down, and int(width * ratio) is then one too small. The next larger float fixes
    # that, as its error is far less than one channel.
    ratio = hidden / width
    ratio = ratio if int(width * ratio) == hidden else nextafter(ratio, inf)
    return width, count_numbered(weights, f"{part}.blocks."), ratio


def count_numbered(weights: Mapping[str, Any], prefix: str) -> int:
    """Number of parts under `prefix` ("encoder.blocks."), from the highest number."""
    numbers = [int(match[1]) for name in weights if (match := re.match(rf"{re.escape(prefix)}(\d+)\.", name))]
    return 1 + max(numbers, default=-1)


def known_heads(heads: int | None, sizes: Mapping[str, Any], origin: str) -> int:
    """Return the number of attention heads; `MissingSettingError` if it is None.

    No shape shows it, and any divisor of the width would load but compute something else: it is not guessed.
    """
    if heads is None:
        raise MissingSettingError(
            num_heads=f"{origin} does not record how many attention heads its encoder has "
            f"({sizes['embed_dim']} wide, {sizes['depth']} layers); give them: num_heads= (--num_heads)"
        )
    return int(heads)


def unlike(settings: Mapping[str, Any], fixed: Mapping[str, Any]) -> list[str]:
    """List the settings that have another value than the only one that is implemented."""
    return [
        f"{name} is {settings[name]!r}, only {value!r} is known"
        for name, value in fixed.items()
        if settings.get(name, value) != value
    ]


def refuse(wrong: Sequence[str], layout: str, origin: str) -> None:
    """Refuse a file with settings or parts under which its weights compute something else."""
    if wrong:
        reasons = "; ".join(wrong)
        raise CheckpointError(f"{origin} is {layout} model of a kind that is not implemented: {reasons}")


def build(
    config: ModelConfig, weights: Mapping[str, Tensor], origin: str, head: HeadConfig | None = None
) -> NextBlockModel | ImageClassifier:
    """Build a model, or a classifier if there is a `head`, from weights under a model's names."""
    # Nothing is skipped: an unknown name, a missing tensor or another shape is refused, as each would mean
    # another function.
    if head is not None:
        weights = {n if n.startswith("head.") else f"encoder_model.{n}": w for n, w in weights.items()}
    return build_model(config, weights, origin, head)
