"""From words on the command line to settings: the preset, then all --config files, then all flags.

The order on the line does not matter, but for a flag given several times: the last counts, or, where the
setting is a list, all of them in this order (`--data.train A --data.train B`). Whatever is wrong raises
`ValueError` with what would be right.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import types
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from nextblock.config import RunConfig
from nextblock.presets import get_preset
from nextblock.settings import describe_type, flatten, from_dict, nearest_name, to_dict

__all__ = ["DEFAULT_PRESET", "build_parser", "parse", "parse_run", "parse_settings", "resolve"]

DEFAULT_PRESET = "xtra-b16"
"""What a run starts from when no preset is named."""


def build_parser(verb: str, about: str) -> ArgumentParser:
    """A parser of one verb; its errors are raised, not printed."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=f"nextblock {verb}", description=about, exit_on_error=False)


def parse(parser: ArgumentParser, argv: Sequence[str]) -> Namespace:
    """Parse words; an unknown or wrong one is refused, the unknown one with the nearest known."""
    known = [name.removeprefix("--") for action in parser._actions for name in action.option_strings]
    argv = [_with_underscores(word, known) for word in argv]
    for word in argv:
        name = word.split("=", 1)[0]
        if name.startswith("--") and name.removeprefix("--") not in known:
            raise ValueError(f"unknown setting {name}; {_nearest(name, known, dashes='--')}")
    try:
        return parser.parse_args(_with_lists(parser, argv))
    except argparse.ArgumentError as error:
        raise ValueError(_plainly(parser, _one_line(str(error)))) from error


def parse_settings(
    parser: ArgumentParser, config: type, argv: Sequence[str], *, overwrite: str | None = None
) -> tuple[dict[str, Any], bool]:
    """Values for the fields of `config`, each of which is a flag, and whether to end with a line of JSON.

    `overwrite` says what the flag --overwrite replaces, for a config with such a field.
    """
    words, found = _taken(argv, ("--config",))
    parser.add_class_arguments(config, None, skip=set() if overwrite is None else {"overwrite"})
    if overwrite is not None:
        parser.add_argument("--overwrite", action="store_true", help=f"replace {overwrite} in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, [*_config_words(parser, found["--config"]), *words])
    values = dict(vars(parser.instantiate(options)))
    is_json = values.pop("json")
    del values["config"]
    return values, is_json


def parse_run(parser: ArgumentParser, argv: Sequence[str]) -> tuple[RunConfig, Namespace]:
    """A run's settings, and whatever other flags the parser has."""
    words, found = _taken(argv, ("--preset", "--config"))
    configs = found["--config"]
    # A config file's preset counts if no flag names one.
    in_files = [_read_config(path).get("preset") for path in configs]
    presets = found["--preset"] or [preset for preset in in_files if preset is not None]
    base = get_preset(presets[-1] if presets else DEFAULT_PRESET).config
    base = base if presets else replace(base, preset=None)
    parser.add_class_arguments(RunConfig, None)
    parser.set_defaults(flatten(to_dict(base)))
    preset_words = ["--preset", presets[-1]] if presets else []
    namespace = parse(parser, [*_config_words(parser, configs), *preset_words, *words])
    names = {name.split(".", 1)[0] for name in to_dict(base)}
    instantiated = parser.instantiate(namespace)
    config = RunConfig(**{name: instantiated[name] for name in names})
    return config, namespace


def resolve(base: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """A run's settings with some changed, by dotted name ("optim.lr") or nested dicts; for Python."""
    values = flatten(to_dict(base))
    for name, value in flatten(overrides).items():
        if name not in values:
            raise ValueError(f"unknown setting {name!r}; {nearest_name(name, list(values))}")
        values[name] = value
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[key] = value
    return from_dict(RunConfig, nested)


def _with_underscores(word: str, known: Sequence[str]) -> str:
    """`--image-size 384` for `--image_size 384`: the name as it is known, where only dashes differ."""
    name, equals, value = word.partition("=")
    if not name.startswith("--"):
        return word
    plain = name.removeprefix("--").replace("-", "_")
    return f"--{plain}{equals}{value}" if plain in known else word


def _taken(argv: Sequence[str], flags: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The words without these flags, and the values of each, in their order."""
    words: list[str] = []
    found: dict[str, list[str]] = {flag: [] for flag in flags}
    left = iter(argv)
    for word in left:
        name, has_value, value = word.partition("=")
        if name not in found:
            words.append(word)
            continue
        given = value if has_value else next(left, None)
        if given is None:
            raise ValueError(f"{name} needs a value")
        found[name].append(given)
    return words, found


def _config_words(parser: ArgumentParser, paths: Sequence[str]) -> list[str]:
    """Let a parser that has all its other flags read these files; the words with which it does."""
    parser.add_argument("--config", action="config", help="YAML file of settings; may be given several times")
    settings = [action.dest for action in parser._actions]
    for path in paths:
        for name in flatten(_read_config(path)):
            if name not in settings:
                raise ValueError(f"--config {path}: unknown setting {name}; {_nearest(name, settings)}")
    return [word for path in paths for word in ("--config", path)]


def _with_lists(parser: ArgumentParser, argv: Sequence[str]) -> list[str]:
    """The words, with all values of a flag whose setting is a list in one word, `--data.weights=[0.8, 0.2]`.

    A value that is a list itself, or null, replaces what came before it.
    """
    hints = {
        name: getattr(action, "_typehint", None)
        for action in parser._actions
        for name in action.option_strings
    }
    kept: list[str] = []
    values: dict[str, list[str]] = {}
    words = iter(argv)
    for word in words:
        name, has_value, value = word.partition("=")
        if not _is_list(hints.get(name)):
            kept.append(word)
            continue
        value = value if has_value else next(words, None)
        if value is None or (not has_value and value.startswith("--")):
            raise ValueError(f"{name} needs a value")
        if name not in values or _stands_alone(value) or _stands_alone(values[name][-1]):
            values[name] = []
        values[name].append(value)
    return kept + [f"{name}={_as_list(given, hints[name])}" for name, given in values.items()]


def _stands_alone(value: str) -> bool:
    return value.startswith("[") or value == "null"


def _is_list(hint: Any) -> bool:
    """Whether a setting may be a list, and a number alone is none of its values."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return any(get_origin(kind) is tuple for kind in kinds) and not {int, float} & set(kinds)


def _as_list(values: list[str], hint: Any) -> str:
    """Values as jsonargparse reads a list; one alone stays as it is where the setting takes it alone."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if len(values) == 1 and (_stands_alone(values[0]) or str in kinds):
        return values[0]
    elements = next(get_args(kind) for kind in kinds if get_origin(kind) is tuple)
    are_numbers = set(elements) <= {int, float, Ellipsis}
    return f"[{', '.join(values)}]" if are_numbers else json.dumps(values)


def _read_config(path: str) -> dict[str, Any]:
    if not Path(path).is_file():
        raise ValueError(f"--config {path} is no file")
    try:
        content = yaml.safe_load(Path(path).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is no YAML: {_one_line(str(error))}") from error
    if not isinstance(content, dict):
        raise ValueError(  # noqa: TRY004 - wrong usage, as all of these
            f"--config {path} holds no settings; write lines such as `seed: 1`, or see --print_config"
        )
    return content


def _nearest(name: str, known: list[str], dashes: str = "") -> str:
    close = difflib.get_close_matches(name.removeprefix("--"), known, n=1, cutoff=0.5)
    return f"did you mean {dashes}{close[0]}?" if close else "--help lists all"


def _plainly(parser: ArgumentParser, complaint: str) -> str:
    """Say a complaint of jsonargparse about a value in our words: the setting, the value, what it must be."""
    missing = re.match(r"the following arguments are required: (.+)", complaint)
    if missing is not None:
        flags = {action.dest: action.option_strings for action in parser._actions}
        names = [f"--{name}" if flags.get(name) else name.upper() for name in missing[1].split(", ")]
        return f"{' and '.join(names)} must be given; --help tells more"
    match = re.match(r'Parser key "([\w.]+)": .*(?:Got|Given) value: (.*)$', complaint)
    hints = {action.dest: getattr(action, "_typehint", None) for action in parser._actions}
    if match is None or hints.get(match[1]) is None:
        return complaint
    return f"{match[1]} is {match[2]}; it must be {describe_type(hints[match[1]])}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
