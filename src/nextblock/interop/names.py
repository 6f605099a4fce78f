"""How official files call things: tables of names, and the sizes that names and shapes tell.

A rule is a pair of names, (official, ours), with placeholders: `{rest}` stands for any end of a name, any
other word in braces for a number. The rules of a table exclude each other.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from math import inf, nextafter
from typing import Any

from torch import Tensor

from nextblock.checkpoint import CheckpointError, MissingSettingError

__all__ = [
    "count_numbered",
    "needed",
    "only_tensors",
    "patch_shape",
    "ratio_of",
    "renamed",
    "require_heads",
    "shape_of",
    "untold_heads",
]

Rules = tuple[tuple[str, str], ...]


def renamed(weights: Mapping[str, Any], rules: Rules, layout: str, origin: str) -> dict[str, Tensor]:
    """The tensors of an official file under our names; a name that fits no rule is refused."""
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        fits = ((match, target) for source, target in rules if (match := _pattern(source).fullmatch(name)))
        match, target = next(fits, (None, ""))
        if match is None:
            raise CheckpointError(f"{origin} holds {name!r}, which is no part of an {layout} model")
        ours[target.format(**match.groupdict())] = tensor
    return ours


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """An expression for a name with placeholders, its groups called like them."""

    def group(word: re.Match[str]) -> str:
        return f"(?P<{word[1]}>{'.+' if word[1] == 'rest' else r'[0-9]+'})"

    return re.compile(re.sub(r"\\{(\w+)\\}", group, re.escape(template)))


def needed(held: Mapping[str, Any], name: str, origin: str) -> Any:
    """The tensor, or the setting, of this name; refused if a file lacks it."""
    if name not in held:
        raise CheckpointError(
            f"{origin} lacks {name!r}, without which the model cannot be built; take the original, whole file"
        )
    return held[name]


def only_tensors(weights: Mapping[str, Any], origin: str) -> Mapping[str, Tensor]:
    """The same weights; refused if one of them is no tensor."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(
                f"{origin} holds {name!r} of type {type(tensor).__name__}, not a tensor; take the original "
                "file"
            )
    return weights


def shape_of(weights: Mapping[str, Tensor], name: str, ndim: int, origin: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from; refused if it has another number of axes."""
    shape = tuple(needed(weights, name, origin).shape)
    if len(shape) != ndim:
        raise CheckpointError(
            f"{origin} holds {name} of shape {shape}, not of {ndim} axes; take the original file"
        )
    return shape


def patch_shape(weights: Mapping[str, Any], name: str, origin: str) -> tuple[int, int, int]:
    """(width, channels, patch size in pixels) of the projection of square patches."""
    shape = needed(weights, name, origin).shape
    if len(shape) != 4:
        raise CheckpointError(
            f"{origin} embeds its patches by {name} of shape {tuple(shape)}; only convolutions (width, "
            "channels, rows, columns) are known"
        )
    width, channels, rows, columns = shape
    if rows != columns:
        raise CheckpointError(f"{origin} has patches of {rows}x{columns} px; they must be square")
    return width, channels, rows


def count_numbered(weights: Mapping[str, Any], prefix: str, origin: str) -> int:
    """How many parts there are under `prefix` ("enc.blocks."); by the highest number.

    Refused if there is none.
    """
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in weights)
    numbers = [int(match[1]) for match in found if match is not None]
    if not numbers:
        needed({}, f"{prefix}0", origin)
    return 1 + max(numbers)


def ratio_of(hidden: int, width: int) -> float:
    """The ratio that an MLP's hidden width is of its width, such that `int(width * ratio)` gives it back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else nextafter(ratio, inf)


def require_heads(heads: int | None, size: tuple[int, int], origin: str) -> int:
    """The number of attention heads, refused if nothing tells it: a wrong one changes features unseen.

    `size` is the encoder's (width, layers).
    """
    if heads is None:
        raise MissingSettingError(num_heads=untold_heads(size, origin))
    return int(heads)


def untold_heads(size: tuple[int, int], origin: str) -> str:
    """Why the caller has to give the number of attention heads."""
    return (
        f"{origin} does not tell how many attention heads its encoder has ({size[0]} wide, {size[1]} "
        "layers): give it as num_heads= (--num_heads)"
    )
