"""What all settings share: typed and bounded values from Python, YAML and the command line; durations."""

from __future__ import annotations

import difflib
import functools
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


# ------------------------------------------------------------------------------------------ types with bounds


@dataclass(frozen=True)
class Rule:
    """A bound in a type: `Annotated[int, Rule(lambda n: n >= 1, "from 1")]`."""

    holds: Callable[[Any], bool]
    words: str
    """Ends "it must be a whole number ..."; for text and pairs it is the whole phrase."""


Count = Annotated[int, Rule(lambda n: n >= 1, "from 1")]
Natural = Annotated[int, Rule(lambda n: n >= 0, "from 0")]
Positive = Annotated[float, Rule(lambda x: 0 < x < math.inf, "above 0")]
Amount = Annotated[float, Rule(lambda x: 0 <= x < math.inf, "from 0")]
Share = Annotated[float, Rule(lambda x: 0 <= x <= 1, "from 0 to 1")]

_UNITS = {"ep": "epochs", "st": "steps", "sa": "samples", "min": "minutes", "%": "percent"}
_EXAMPLES = {"ep": "800ep", "st": "500000st", "sa": "2000000sa", "min": "30min", "%": "2.5%"}


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training: "800ep" (epochs), "500st" (steps), "2000sa" (samples), "30min" or "2.5%"."""

    value: float
    unit: Literal["epochs", "steps", "samples", "minutes", "percent"]

    @classmethod
    def parse(cls, text: str, *, allow: tuple[str, ...] = ("ep", "st", "sa")) -> Duration:
        """Read a duration; `allow` names the units that make sense where it is used."""
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z%]+)\s*", str(text))
        if match is None or match[2] not in allow:
            raise ValueError(f"{text!r} is not a duration here; write {_durations(allow)}")
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


def _durations(units: tuple[str, ...]) -> str:
    return "a number and its unit, such as " + ", ".join(f"{_EXAMPLES[u]} ({_UNITS[u]})" for u in units)


def duration(*units: str, least: float = 1e-9) -> Rule:
    """The rule of a duration in these units, above 0 unless `least` is 0."""

    def holds(text: str) -> bool:
        try:
            return Duration.parse(text, allow=units).value >= least
        except ValueError:
            return False

    return Rule(holds, _durations(units))


# ------------------------------------------------------------------------------------------- reading a value


class _Unfit(Exception):  # noqa: N818 - read_value makes a ValueError of it
    pass


_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]{3})*)")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]{3})*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_value(name: str, value: Any, hint: Any) -> Any:
    """The value as its type says: text becomes a number, a list, a pair ("64", "32,64", "32x64").

    A string setting keeps its text, but for `~/`, which is the home folder. What does not fit is refused.
    """
    try:
        return _read(value, hint)
    except _Unfit:
        raise ValueError(f"{name} is {value!r}; it must be {describe_type(hint)}") from None


def _read(value: Any, hint: Any) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        found = _read(value, args[0])
        if args[1].holds(found):
            return found
        raise _Unfit
    if origin in (Union, types.UnionType):
        # The value's own type first: text for `str | tuple` stays text, and is read only where it cannot.
        for kind in sorted(args, key=lambda kind: _base(kind) is not type(value)):
            try:
                return _read(value, kind)
            except _Unfit:
                continue
        raise _Unfit
    if origin is Literal and any(value == arg and type(value) is type(arg) for arg in args):
        return value
    if origin is tuple:
        parts = split_list(value, args[0]) if isinstance(value, str) else value
        kinds = args[:1] * len(parts) if args[-1] is Ellipsis and isinstance(parts, list | tuple) else args
        if isinstance(parts, list | tuple) and len(parts) == len(kinds):
            return tuple(map(_read, parts, kinds))
    if hint is str and isinstance(value, str | Path):
        text = str(value)
        # expanduser of os: it leaves the text as it is where nobody's home is known. `~x` is a name like any.
        return os.path.expanduser(text) if text == "~" or text.startswith("~/") else text  # noqa: PTH111
    if hint is bool and isinstance(value, str) and value.lower() in _SWITCH:
        return _SWITCH[value.lower()]
    # ASCII only, and no leading zeros: int("１２") and YAML's 012 = 10 are not what anybody means.
    if hint is int and isinstance(value, str) and _INTEGER.fullmatch(value.strip(" ")):
        return int(value)
    if hint is float and isinstance(value, str) and _NUMBER.fullmatch(value.strip(" ")):
        return float(value)
    if hint in (int, float) and isinstance(value, hint | int) and not isinstance(value, bool):
        return value
    if hint not in (int, float) and isinstance(hint, type) and isinstance(value, hint):
        return value
    raise _Unfit


def _base(hint: Any) -> Any:
    return _base(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def split_list(text: str, kind: Any) -> list[Any]:
    """The parts of "[a, b]", "(1, 2)", "1,2" or "32x64"; text that may hold commas is one part."""
    text = text.strip(" ")
    if text[:1] + text[-1:] in ("[]", "()"):
        try:
            return _plain_yaml(f"[{text[1:-1]}]")
        except ValueError:
            return [text]  # as it was typed, for the error or a file's name
    return [text] if _base(kind) is str else re.split(r" *, *|(?<=[0-9]) *x *(?=[0-9])", text)


def describe_type(hint: Any) -> str:
    """A setting's type as an error message says it: "a whole number from 1 or null"."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return f"{describe_type(args[0])} {args[1].words}" if args[0] in (int, float) else args[1].words
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(arg) for arg in args)
    if origin is tuple:
        number = "a list" if args[-1] is Ellipsis else f"a list of {len(args)}"
        return f"{number}, each {describe_type(args[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    return words.get(hint) or hint.__name__


def kinds_of(hint: Any) -> list[Any]:
    """The types that a hint allows, without their bounds: `Count | None` -> [int, NoneType]."""
    hint = _base(hint)
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return [kind for arg in get_args(hint) for kind in kinds_of(arg)]


@functools.cache
def _own_types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


class Setting(NamedTuple):
    """One setting of a config."""

    name: str
    """Dotted: "optim.lr"."""
    hint: Any
    default: Any
    """`MISSING` if it must be given."""
    owner: type
    """The dataclass that has it."""


def setting_types(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Every setting of a config, those of its sections included."""
    for field in fields(cls):
        hint = _own_types(cls)[field.name]
        if is_dataclass(hint):
            yield from setting_types(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield Setting(f"{prefix}{field.name}", hint, field.default, cls)


def check_types(config: Any, section: str = "") -> None:
    """Give each field the value that its type says, or refuse it; first thing in a `__post_init__`."""
    for name, hint in _own_types(type(config)).items():
        value = getattr(config, name)
        found = read_value(f"{section}.{name}" if section else name, value, hint)
        if found is not value:
            object.__setattr__(config, name, found)


# ------------------------------------------------------------------------------------------- dicts and YAML


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain dicts, lists and numbers, ready for YAML or JSON."""
    return asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


_RETIRED = ("token_px",)
"""Settings that older files hold as null."""


def from_dict(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Build a config from what `to_dict` wrote; refuse unknown keys, with the nearest, and missing ones."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    built = {}
    for name, value in values.items():
        if name in _RETIRED and value is None:
            continue
        if name not in known:
            raise ValueError(f"unknown setting {name!r}; {nearest_name(name, sorted(known))}")
        hint = _own_types(cls)[name]  # type: ignore[arg-type]
        if is_dataclass(hint) and isinstance(value, Mapping):
            built[name] = from_dict(hint, value)  # type: ignore[arg-type]
        else:
            built[name] = tuple(value) if isinstance(value, list) else value
    required = (f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING)
    missing = [name for name in required if name not in built]
    require(not missing, f"{' and '.join(missing)} must be given")
    return cls(**built)


def from_keywords(cls: Callable[..., T], settings: Mapping[str, Any]) -> T:
    """Build a config from a Python call's keywords, as `from_dict` does; a path stands for its text."""
    return from_dict(cls, {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted names as nested dicts: what `flatten` undoes."""
    found: dict[str, Any] = {}
    for name, value in flat.items():
        *sections, leaf = name.split(".")
        functools.reduce(lambda inner, section: inner.setdefault(section, {}), sections, found)[leaf] = value
    return found


_ODD_SPACE = re.compile(r"[\u00a0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff\t]")


def read_yaml(path: str) -> dict[str, tuple[Any, str]]:
    """A file of settings: {dotted name: (text, list or None, where it stands)}.

    Every scalar stays the text that was typed, so that the setting's type decides what it means, and no
    value is ever a date, an octal number or a Python object.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config {path} is not a file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    odd = _ODD_SPACE.search(text)
    if odd is not None:
        line = text.count("\n", 0, odd.start()) + 1
        raise ValueError(
            f"{path}, line {line}: an odd space (U+{ord(odd[0]):04X}); type a plain one, or write "
            f'"\\u{ord(odd[0]):04x}" between double quotes'
        )
    found: dict[str, tuple[Any, str]] = {}
    try:
        content = _plain_yaml(text, found)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    if content is not None or not found:
        raise ValueError(f"{path} has no settings; write lines such as `seed: 1`, or see --print_config")
    return {name: (value, f"{path}, {line}") for name, (value, line) in found.items()}


def _plain_yaml(text: str, found: dict[str, tuple[Any, str]] | None = None) -> Any:
    """YAML's lists and text; a mapping at the top goes to `found` by dotted names, and gives None."""
    import yaml

    def at(node: Any) -> str:
        return f"line {node.start_mark.line + 1}"

    def value_of(node: Any, name: str) -> Any:
        if isinstance(node, yaml.SequenceNode):
            return [value_of(item, name) for item in node.value]
        if isinstance(node, yaml.MappingNode):
            raise ValueError(f"{at(node)}: {name} cannot hold `name: value`")  # noqa: TRY004
        if node.style is not None:  # quoted: text, whatever it says
            return node.value
        if node.value in ("", "~"):
            told = "has no value (# begins a comment)" if node.value == "" else "is ~"
            raise ValueError(f"{at(node)}: {name} {told}; write null for none, or put text in quotes")
        return None if node.value.lower() == "null" else node.value

    def collect(node: Any, prefix: str) -> None:
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode):
                collect(value, f"{name}.")
            elif found is not None and name in found:
                raise ValueError(f"{at(key)}: {name} is given twice (also {found[name][1]}); keep one")
            elif found is not None:
                found[name] = value_of(value, name), at(key)

    try:
        # Aliases can grow without bound, and tags can name Python objects: neither has a use here.
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ValueError(f"{at(event)}: a value cannot begin with &, * or !; put it in quotes")
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}not YAML: {problem or error}; indent with spaces, `name: value`") from None
    if isinstance(node, yaml.MappingNode) and found is not None:
        return collect(node, "")
    return None if node is None else value_of(node, "a value")


# --------------------------------------------------------------------------------------------------- refusals


def nearest_name(name: str, known: list[str]) -> str:
    """The end of an error message: the known name close to a misspelt one, or all of them."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known)


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
