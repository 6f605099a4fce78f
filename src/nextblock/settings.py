"""Base of all settings: typed and bounded values from Python, YAML or the command line; durations."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from nextblock.errors import UsageError

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
Auto = Annotated[None, Rule(lambda _: True, "auto")]
"""None in Python, "auto" in text: the value is derived. Any other None is written "none"."""

_UNITS = {
    "ep": ("epochs", "800ep"),
    "st": ("steps", "500000st"),
    "sa": ("samples", "2000000sa"),
    "min": ("minutes", "30min"),
    "%": ("percent", "2.5%"),
}
"""What each unit means, and an example."""


@dataclass(frozen=True, kw_only=True)
class Duration:
    """A length of training: "800ep" (epochs), "500st" (steps), "2000sa" (samples), "30min" or "2.5%"."""

    value: float
    unit: Literal["epochs", "steps", "samples", "minutes", "percent"]

    @classmethod
    def parse(cls, text: str, *, allow: tuple[str, ...] = ("ep", "st", "sa")) -> Duration:
        """Read a duration; `allow` names the units that make sense for the setting."""
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([a-z%]+)\s*", str(text))
        if match is None or match[2] not in allow:
            raise UsageError(f"{text!r} is not a duration here; write {duration(*allow).words}")
        return cls(value=float(match[1]), unit=_UNITS[match[2]][0])  # type: ignore[arg-type]

    def steps(self, *, batch_size: int, steps_per_epoch: int, total_steps: int | None = None) -> int:
        """Convert to optimizer steps, rounded to the nearest; samples are divided by the batch size."""
        if self.unit == "epochs":
            return round(self.value * steps_per_epoch)
        if self.unit == "samples":
            return round(self.value / batch_size)
        if self.unit == "percent":
            assert total_steps is not None, "a share needs a whole"
            return round(self.value / 100 * total_steps)
        assert self.unit == "steps", "minutes have no number of steps"
        return round(self.value)


def duration(*units: str, least: float = 1e-9) -> Rule:
    """Return the rule of a duration in these units, above 0 unless `least` is 0."""

    # `least` is 0 for warm-up, where "0%" means none.
    def holds(text: str) -> bool:
        try:
            return Duration.parse(text, allow=units).value >= least
        except ValueError:
            return False

    examples = (f"{example} ({meaning})" for meaning, example in map(_UNITS.__getitem__, units))
    return Rule(holds, "a number and its unit, such as " + ", ".join(examples))


# ------------------------------------------------------------------------------------------- reading a value


NONE_WORDS = ("none", "null")
"""`null` is YAML's word, which `--print_config` prints."""
# Python's int() and float() accept more than anybody means: other scripts' digits, "1_0", "nan", "inf".
_INTEGER = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]{3})*)")
_NUMBER = re.compile(r"[+-]?([0-9]+(_[0-9]{3})*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_value(name: str, value: Any, hint: Any) -> Any:
    """Convert a value to its type: text becomes a number, a list or a pair ("64", "32,64", "32x64").

    A string setting keeps its text, but `~/` becomes the home folder. Raises `UsageError` if nothing fits.
    """
    try:
        return _read(value, hint)
    except ValueError:
        choices = choices_of(hint)
        for word in value if isinstance(value, list | tuple) else [value]:
            near = [] if word in choices else difflib.get_close_matches(str(word).lower(), choices, 1, 0.65)
            near = ["cuda"] if word == "gpu" and "cuda" in choices else near
            require(not near, f"{name} is {word!r}; did you mean {''.join(near)}?")
        shown = repr(value) if isinstance(value, str) else typed(value)
        raise UsageError(f"{name} is {shown}; it must be {describe_type(hint)}") from None


def choices_of(hint: Any) -> list[str]:
    """The words that a type allows, including those of a list's elements."""
    if get_origin(hint) is Literal:
        return [word for word in get_args(hint) if isinstance(word, str)]
    return [word for arg in get_args(hint) for word in choices_of(arg)]


def typed(value: Any) -> str:
    """Format a value as it would be typed: "0.5,1", "none", "true"."""
    if isinstance(value, list | tuple):
        return ",".join(map(typed, value))
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _read(value: Any, hint: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value  # numpy's and torch's numbers and arrays
    origin, args = get_origin(hint), get_args(hint)
    # Text comes from the command line or YAML and is parsed by the hint. Anything else comes from Python and
    # must have the right type already, except that an int passes for a float.
    text = value if isinstance(value, str) else None
    if origin is Annotated:
        parsed = _read(value, args[0])
        if args[1].holds(parsed):
            return parsed
    elif origin in (Union, types.UnionType):
        if value == "auto" and Auto in args:
            return None
        # Try the value's own type first: text for `str | tuple` stays text, and becomes a list only if the
        # hint has no str. The others follow in written order, and the first that fits wins.
        for kind in sorted(args, key=lambda kind: type(value) not in kinds_of(kind)):
            with contextlib.suppress(ValueError):
                return _read(value, kind)
    elif origin is Literal:
        # YAML's null may be one of the words. Compare types too, because True == 1.
        value = "none" if value is None else value
        value = text.lower() if text is not None and text.lower() in args else value
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif origin is tuple:
        parts = value if text is None else split_list(text, args[0])
        if args[-1] is Ellipsis and isinstance(value, int | float | Path):
            parts = [value]
        if isinstance(parts, list | tuple):
            kinds = args[:1] * len(parts) if args[-1] is Ellipsis else args
            return tuple(_read(part, kind) for part, kind in zip(parts, kinds, strict=True))
    elif hint is type(None):
        if value is None or (text or "").lower() in NONE_WORDS:
            return None
    elif hint is str and isinstance(value, str | Path):
        # Only `~` and `~/` mean the home folder: `~x` is an ordinary name. pathlib's expanduser raises if
        # the home folder is unknown, os.path's does not.
        is_home = str(value) == "~" or str(value).startswith("~/")
        return os.path.expanduser(str(value)) if is_home else str(value)  # noqa: PTH111
    elif hint is bool and text is not None:
        if text.lower() in _SWITCH:
            return _SWITCH[text.lower()]
    # ASCII digits without leading zeros: nobody means int("１２") or YAML's 012 = 10.
    elif hint in (int, float) and text is not None:
        if (_INTEGER if hint is int else _NUMBER).fullmatch(text.strip(" ")):
            return hint(text)
    elif hint in (int, float):
        if isinstance(value, hint | int) and not isinstance(value, bool):
            return value
    elif isinstance(hint, type) and isinstance(value, hint):
        return value
    raise ValueError


def split_list(text: str, kind: Any) -> list[Any]:
    """Split "[a, b]", "(1, 2)", "1,2" or "32x64"; a list of strings is split only inside brackets."""
    text = text.strip(" ")
    if text[:1] + text[-1:] in ("[]", "()"):
        try:
            # Parse YAML instead of splitting at commas: parts may be quoted, or lists.
            return _value_of(_compose(f"[{text[1:-1]}]"), "a value")
        except ValueError:
            return [text]  # unchanged: a file name, or for the error message
    return [text] if kinds_of(kind) == [str] else re.split(r" *, *|(?<=[0-9]) *x *(?=[0-9])", text)


def describe_type(hint: Any) -> str:
    """Describe a setting's type for an error message: "a whole number from 1 or none"."""
    args, origin = get_args(hint), get_origin(hint)
    if origin is Annotated:
        return f"{describe_type(args[0])} {args[1].words}" if args[0] in (int, float) else args[1].words
    if origin is Literal:
        return listed([*map(str, args)], "or")
    if origin in (Union, types.UnionType):
        return listed([describe_type(arg) for arg in args], "or")
    if origin is tuple:
        count, each = "" if args[-1] is Ellipsis else f" of {len(args)}", describe_type(args[0])
        plural = re.sub("^a (whole )?number", r"\1numbers", each)
        return f"a list{count}, each {each}" if plural == each else f"a list{count or ' of'} {plural}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}
    return words.get(hint) or hint.__name__


@functools.cache
def kinds_of(hint: Any) -> list[Any]:
    """The types that a hint allows, without their bounds: `Count | None` -> [int, NoneType]."""
    if get_origin(hint) is Annotated:
        return kinds_of(get_args(hint)[0])
    if get_origin(hint) in (Union, types.UnionType):
        return [kind for arg in get_args(hint) for kind in kinds_of(arg)]
    return [hint]


# Annotations are strings (`from __future__ import annotations`); evaluating them is slow, so do it once.
@functools.cache
def _own_types(cls: type) -> dict[str, Any]:
    return get_type_hints(cls, include_extras=True)


class Setting(NamedTuple):
    """One setting: its dotted name, type, default (`MISSING` if required), and its dataclass."""

    name: str
    hint: Any
    default: Any
    owner: type


def setting_types(cls: type, prefix: str = "") -> Iterator[Setting]:
    """Yield every setting of a config, including those of its sections."""
    for field in fields(cls):
        hint = _own_types(cls)[field.name]
        if is_dataclass(hint):
            yield from setting_types(hint, f"{prefix}{field.name}.")  # type: ignore[arg-type]
        else:
            yield Setting(f"{prefix}{field.name}", hint, field.default, cls)


def check_types(config: Any, section: str = "") -> None:
    """Convert each field to its type, or raise; call this first in a `__post_init__`."""
    for name, hint in _own_types(type(config)).items():
        value = getattr(config, name)
        parsed = read_value(f"{section}.{name}" if section else name, value, hint)
        if parsed is not value:  # the dataclass is frozen, but this runs in its constructor
            object.__setattr__(config, name, parsed)


# ------------------------------------------------------------------------------------------- dicts and YAML


def to_dict(config: Any) -> dict[str, Any]:
    """Convert a config to plain dicts, lists and numbers, ready for YAML or JSON."""
    # YAML and JSON have no tuples: they are written as lists, and `from_dict` converts them back.
    return asdict(
        config, dict_factory=lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}
    )


def from_dict(cls: Callable[..., T], values: Mapping[str, Any]) -> T:
    """Build a config from `to_dict`'s output, dotted names or keywords; reject unknown and missing keys."""
    # Dotted names become nested dicts first: "model.depth" and {"model": {"depth": 1}} are the same, and each
    # section then checks its own names.
    known, hints = {f.name: f for f in fields(cls)}, _own_types(cls)  # type: ignore[arg-type]
    given: dict[str, Any] = {}
    for name, value in values.items():
        section, _, rest = name.partition(".")
        if name in ("token_px", "tokenizer") and value is None:  # retired settings, null in older files
            continue
        if (name, value) == ("tokenizer", "kmeans") and "target" in known:  # its name in older files
            name, section, value = "target", "target", "tokens"
        # Raise instead of dropping it: a misspelt setting would silently keep its default.
        if section not in known:
            raise UsageError(f"unknown setting {name!r}; {nearest_name(name, sorted(known))}")
        given[section] = {**given.get(section, {}), rest: value} if rest else value
    for name, value in given.items():
        if isinstance(value, Mapping):
            if is_dataclass(hints[name]):
                given[name] = from_dict(hints[name], value)  # type: ignore[arg-type]
        elif type(value) not in (tuple, *kinds_of(hints[name])):
            # Lists become tuples, paths text. What cannot be read is left for the config to refuse.
            with contextlib.suppress(ValueError):
                given[name] = _read(value, hints[name])
    required = (f.name for f in known.values() if f.default is MISSING and f.default_factory is MISSING)
    missing = [name for name in required if name not in given]
    require(not missing, f"{listed(missing)} must be given")
    return cls(**given)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


_ODD_SPACE = re.compile(r"[\u00a0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u2064\u3000\ufeff\t]")


def read_yaml(path: str) -> dict[str, tuple[Any, str]]:
    """Read a settings file as {dotted name: (text, list or None, "FILE, line N")}."""
    require(Path(path).is_file(), f"--config {path} is not a file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    # YAML treats these as letters: a name or value would differ from what the screen shows.
    odd = _ODD_SPACE.search(text)
    if odd is not None:
        line, code = text.count("\n", 0, odd.start()) + 1, f"{ord(odd[0]):04X}"
        raise UsageError(
            f'{path}, line {line}: an odd space (U+{code}); type a plain one, or write "\\u{code}" in quotes'
        )
    found: dict[str, tuple[Any, str]] = {}

    def collect(node: Any, prefix: str) -> None:
        for key, value in node.value:
            name, line = f"{prefix}{key.value}", _line(key)
            if value.id == "mapping":
                collect(value, f"{name}.")
            elif name in found:  # YAML's own loader would keep the last
                raise UsageError(f"{line}: {name} is given twice (also {found[name][1]}); keep one")
            else:
                found[name] = _value_of(value, name), line

    try:
        root = _compose(text)
        if root is not None and root.id == "mapping":
            collect(root, "")
    except ValueError as error:
        raise UsageError(f"{path}, {error}") from None
    require(bool(found), f"{path} has no settings; write lines such as `seed: 1`, or see --print_config")
    return {name: (value, f"{path}, {line}") for name, (value, line) in found.items()}


def _compose(text: str) -> Any:
    """Parse YAML to a tree of nodes, in which every scalar is still the typed text; None if it is empty."""
    # The setting's type decides what a text means: no value becomes a date, an octal number or an object.
    import yaml

    try:
        # Aliases can grow without bound, and tags can name Python objects. Neither is needed here.
        for event in yaml.parse(text, yaml.SafeLoader):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise UsageError(f"{_line(event)}: a value cannot begin with &, * or !; put it in quotes")
        return yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise UsageError(f"{where}not YAML: {problem or error}; indent with spaces, `name: value`") from None


def _line(node: Any) -> str:
    return f"line {node.start_mark.line + 1}"


def _value_of(node: Any, name: str) -> Any:
    """A node of YAML as text, None, or a list of these."""
    if node.id == "sequence":
        return [_value_of(item, name) for item in node.value]
    if node.id == "mapping":
        raise UsageError(f"{_line(node)}: {name} cannot hold `name: value`")
    if node.style is not None:  # quoted: text, whatever it says
        return node.value
    # An empty value is often a forgotten one, or `#` in a path; `~` is often a home folder. Neither is read
    # as YAML's null.
    if node.value in ("", "~"):
        why = "is ~" if node.value else "has no value (# begins a comment)"
        raise UsageError(f"{_line(node)}: {name} {why}; write none, or put text in quotes")
    return None if node.value.lower() in NONE_WORDS else node.value


# --------------------------------------------------------------------------------------------------- refusals


def listed(names: Sequence[str], last: str = "and") -> str:
    """Join names as in a sentence: "a, b and c"."""
    return f" {last} ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def nearest_name(name: str, known: list[str]) -> str:
    """End an error message with the known name nearest to a misspelt one, or with up to 40 known names."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.65)
    more = f" and {len(known) - 40} more" if len(known) > 40 else ""
    return f"did you mean {close[0]!r}?" if close else "known: " + ", ".join(known[:40]) + more


def require(holds: bool, message: str) -> None:
    """Raise `UsageError` with this message unless the condition holds."""
    if not holds:
        raise UsageError(message)
