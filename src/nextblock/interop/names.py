"""How official files call things: explicit name tables, read in both directions, and what they cannot say.

A rule is a pair of names, (official, ours), with placeholders: `{rest}` stands for any end of a name, any
other word in braces for a number. The rules of a table exclude each other, so that it is one-to-one.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from math import inf, nextafter
from typing import Any

from torch import Tensor

from nextblock.checkpoint import CheckpointError, MissingSettingError
from nextblock.models.heads import ImageClassifier

__all__ = [
    "NameTable",
    "count_numbered",
    "log_left_out",
    "needed",
    "on_cpu",
    "patch_shape",
    "ratio_of",
    "refuse_differences",
    "require_heads",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NameTable:
    """Rules of renaming between an official layout and ours."""

    layout: str
    """What the layout is called in messages: "XTRA"."""
    rules: tuple[tuple[str, str], ...]
    """Pairs (official name, our name)."""

    def to_ours(self, weights: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
        """Rename what an official file holds; a name that fits no rule is refused."""
        unknown = origin + " holds {!r}, which is no part of an " + self.layout + " model"
        return _renamed(weights, self.rules, unknown)

    def to_official(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename what a model of ours holds; a name that fits no rule is refused."""
        unknown = "the model holds {!r}, for which official " + self.layout + " files have no name"
        return _renamed(weights, tuple((ours, official) for official, ours in self.rules), unknown)

    def under(self, prefix: str) -> NameTable:
        """The same table for a part of a larger model of ours, whose names begin with `prefix`."""
        return replace(self, rules=tuple((official, prefix + ours) for official, ours in self.rules))

    def __add__(self, other: NameTable) -> NameTable:
        """The rules of both."""
        return replace(self, rules=self.rules + other.rules)


def _renamed(
    weights: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...], unknown: str
) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        fits = ((match, target) for source, target in rules if (match := _pattern(source).fullmatch(name)))
        match, target = next(fits, (None, ""))
        if match is None:
            raise CheckpointError(unknown.format(name))
        new_name = target.format(**match.groupdict())
        assert new_name not in renamed, f"two names mean {new_name}"
        renamed[new_name] = tensor
    return renamed


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Make an expression of a name with placeholders, its groups called as they are."""
    named = re.sub(r"\\{(\w+)\\}", lambda word: _group(word[1]), re.escape(template))
    return re.compile(named)


def _group(word: str) -> str:
    return f"(?P<{word}>{'.+' if word == 'rest' else r'[0-9]+'})"


def needed(held: Mapping[str, Any], name: str, origin: str) -> Any:
    """The tensor, or the setting, of this name; refused where a file lacks it."""
    if name not in held:
        raise CheckpointError(
            f"{origin} lacks {name!r}, without which the model cannot be built; take the original, whole file"
        )
    return held[name]


def patch_shape(weights: Mapping[str, Any], name: str, origin: str) -> tuple[int, int, int]:
    """(width, channels, patch size in pixels) of the projection of square patches."""
    shape = tuple(needed(weights, name, origin).shape)
    if len(shape) != 4:
        raise CheckpointError(
            f"{origin} embeds its patches by {name} of shape {shape}; only convolutions (width, channels, "
            "rows, columns) are known"
        )
    width, channels, rows, columns = shape
    if rows != columns:
        raise CheckpointError(f"{origin} has patches of {rows}x{columns} px; they must be square")
    return width, channels, rows


def count_numbered(weights: Mapping[str, Any], prefix: str, origin: str) -> int:
    """How many parts there are under `prefix` ("enc.blocks."), by the highest number that follows it."""
    found = (re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in weights)
    numbers = [int(match[1]) for match in found if match is not None]
    if not numbers:
        needed({}, f"{prefix}0", origin)
    return 1 + max(numbers)


def refuse_differences(
    layout: str, settings: Iterable[tuple[str, Any, Any]], *, to_timm: bool = False
) -> None:
    """Refuse to write a model that a layout cannot express.

    `settings` are (name, value, the one value that the layout knows); all that differ are named. `to_timm`
    says whether timm's format could hold the whole of it.
    """
    wrong = [
        f"{name} is {value!r}, there it is always {needed!r}"
        for name, value, needed in settings
        if value != needed
    ]
    if wrong:
        raise CheckpointError(
            f"{layout} files cannot hold this model: {'; '.join(wrong)}. Keep it as nextblock's own file"
            + (", or convert it to timm" if to_timm else "")
        )


def log_left_out(classifier: ImageClassifier) -> None:
    """Say what of a classifier has no place in official classifier files."""
    if classifier.encoder_model.predictor is not None:
        log.info("left out: the encoder's predictor, for which official classifier files have no place")
    if classifier.class_names is not None:
        log.info("left out: the names of the %d classes", len(classifier.class_names))


def on_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are written: on the CPU, in order of their indices."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def ratio_of(hidden: int, width: int) -> float:
    """The ratio that an MLP's hidden width is of its width, such that `int(width * ratio)` gives it back."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else nextafter(ratio, inf)


def require_heads(heads: int | None, size: tuple[int, int], origin: str) -> int:
    """The number of attention heads, refused where nothing tells it: a wrong one changes features unseen.

    `size` is the encoder's (width, layers).
    """
    if heads is None:
        raise MissingSettingError(
            "num_heads",
            f"{origin} does not tell how many attention heads its encoder has ({size[0]} wide, {size[1]} "
            "layers): give it as num_heads= (--num_heads)",
        )
    return int(heads)
