"""What all settings share: durations, checks with a remedy, and the way to and from plain dicts."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = [
    "Duration",
    "check_types",
    "describe_type",
    "flatten",
    "from_dict",
    "from_keywords",
    "nearest_name",
    "require",
    "require_divides",
    "require_range",
    "to_dict",
]

T = TypeVar("T")


def nearest_name(name: str, known: list[str]) -> str:
    """The end of an error message: the known name closest to a misspelt one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)


_UNITS = {"ep": "epochs", "st": "steps", "sa": "samples", "min": "minutes", "%": "percent"}


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training: "800ep" (epochs), "500st" (steps), "2000sa" (samples), "30min" or "2.5%"."""

    value: float
    unit: Literal["epochs", "steps", "samples", "minutes", "percent"]

    @classmethod
    def parse(cls, text: str, *, allow: tuple[str, ...] = ("ep", "st", "sa")) -> Duration:
        """Read a duration; `allow` names the endings that make sense where it is used."""
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z%]+)\s*", str(text))
        if match is None or match[2] not in allow:
            examples = {"ep": "800ep", "st": "500000st", "sa": "2000000sa", "min": "30min", "%": "2.5%"}
            raise ValueError(
                f"{text!r} is not a duration here; write a number and its unit, such as "
                + ", ".join(f"{examples[unit]} ({_UNITS[unit]})" for unit in allow)
            )
        return cls(value=float(match[1]), unit=_UNITS[match[2]])  # type: ignore[arg-type]

    def steps(self, *, batch_size: int, steps_per_epoch: int, total_steps: int | None = None) -> int:
        """The same length in optimizer steps (rounded to the nearest; samples are divided by the batch)."""
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        if self.unit == "samples":
            return round(self.value / batch_size)
        if self.unit == "percent":
            assert total_steps is not None, "a share needs a whole"
            return round(self.value / 100 * total_steps)
        assert self.unit == "steps", "minutes have no number of steps"
        return round(self.value)


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and numbers, ready for YAML or JSON."""
    return asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def from_dict(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Build a config from what `to_dict` wrote; refuse unknown keys, with the nearest, and missing ones."""
    known = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    built = {}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; {nearest_name(name, sorted(known))}")
        if is_dataclass(hints[name]) and isinstance(value, Mapping):
            built[name] = from_dict(hints[name], value)  # type: ignore[arg-type]
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    missing = [name for name in _required(cls) if name not in built]
    require(not missing, f"{' and '.join(missing)} must be given")
    return cls(**built)


def from_keywords(cls: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """Build a config from a Python call's keywords, as `from_dict` does; a path stands for its text."""
    return from_dict(cls, {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})


def _required(cls: Any) -> list[str]:
    return [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def require(holds: bool, message: str) -> None:
    """Raise `ValueError` with this message unless the rule holds."""
    if not holds:
        raise ValueError(message)


def require_divides(whole: int, parts: int, whole_name: str, parts_name: str) -> None:
    """Refuse a whole that the parts do not divide."""
    require(
        whole % parts == 0,
        f"{whole_name} {whole} is not divisible by {parts_name} {parts}; change one of them",
    )


def require_range(name: str, bounds: tuple[float, float], low: float, high: float) -> None:
    """Refuse bounds that are not (smallest, largest) above `low` and up to `high`."""
    require(
        low < bounds[0] <= bounds[1] <= high,
        f"{name} is {bounds}; give (smallest, largest) above {low} and up to {high}",
    )


def check_types(config: Any, section: str = "") -> None:
    """Refuse a field whose value is not of its annotated type; first thing in a `__post_init__`."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not _is(value, hint):
            dotted = f"{section}.{name}" if section else name
            raise ValueError(f"{dotted} is {value!r}; it must be {describe_type(hint)}")


def _is(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(_is(value, arg) for arg in args)
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, tuple) and args[-1] is Ellipsis else args
        return isinstance(value, tuple) and len(value) == len(each) and all(map(_is, value, each))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def describe_type(hint: Any) -> str:
    """A setting's type as an error message says it: "int or null"."""
    args = get_args(hint)
    if get_origin(hint) is Literal:
        return " or ".join(repr(arg) for arg in args)
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if get_origin(hint) is tuple:
        return "(" + ", ".join("..." if arg is Ellipsis else describe_type(arg) for arg in args) + ")"
    return "null" if hint is type(None) else hint.__name__
