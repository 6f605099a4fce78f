"""Parse the command line into settings: first the preset, then --config files, then flags.

The order of words does not matter. Repeating a flag overrides its value, or extends it if the setting is a
list (`--data.train A --data.train B`). A mistake raises `UsageError`, which says what to type. The type of a
setting alone decides how its text is read.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import inspect
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import MISSING, is_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from nextblock.cli.output import write
from nextblock.cli.verbs import VERBS
from nextblock.config import RunConfig
from nextblock.errors import UsageError
from nextblock.logs import quote
from nextblock.presets import DEFAULT_PRESET, PRESETS, get_preset, resolve
from nextblock.settings import (
    NONE_WORDS,
    Auto,
    Setting,
    choices_of,
    from_dict,
    kinds_of,
    listed,
    read_value,
    read_yaml,
    require,
    setting_types,
    split_list,
    to_dict,
    typed,
)

_SLIPS = {
    ("data", "images", "dataset"): ("data.train", "train", "data"),
    ("model", "size", "arch", "name", "preset"): ("preset", "model"),
    ("epochs",): ("train.duration 100ep",),
    ("steps",): ("train.duration 10000st",),
    ("gpu", "gpus"): ("train.device cuda", "device cuda"),
    ("val", "validation"): ("data.val", "test"),
    ("checkpoint", "pretrained"): ("model.init", "model"),
    ("output", "output_dir"): ("out",),
}
"""Names that other programs use, and our settings for them."""


class Parser(argparse.ArgumentParser):
    """Parser of one command, in which every flag has a type that decides how `parse` reads its text.

    argparse keeps the flags and formats their help. It does not parse: it takes a value such as "-1e-3" for a
    flag, and explains unknown words poorly.
    """

    def __init__(self, verb: str) -> None:
        self.verb = VERBS[verb]
        self.hints: dict[str, Any] = {}
        self.described: list[tuple[argparse.Action, Setting]] = []
        super().__init__(
            prog=f"nextblock {verb}", allow_abbrev=False, add_help=False, conflict_handler="resolve"
        )
        self.add_argument("--json", action="store_true", help="print one line of JSON at the end")

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:  # type: ignore[override]
        """Add an argument as in argparse, but `type` may be any annotation, such as `int | None`."""
        hint = options.pop("type", None)
        if hint is not None:
            metavar = _metavar(hint) if names[0].startswith("--") else names[0].upper()
            options = {"metavar": metavar, **options}
        action = super().add_argument(*names, **options)
        if hint is not None:
            self.hints[action.dest] = hint
        return action

    def add_settings(self, cls: type, section: str = "", skip: Collection[str] = ()) -> dict[str, Any]:
        """Add a flag for each setting of a config; return the types by name."""
        hints = {}
        for setting in setting_types(cls, f"{section}." if section else ""):
            if setting.name.rpartition(".")[2] in skip:
                continue
            # No defaults: a flag that is not given must not override a config file.
            action = self.add_argument(f"--{setting.name}", type=setting.hint, default=argparse.SUPPRESS)
            self.described.append((action, setting))
            hints[setting.name] = setting.hint
        return hints

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Collect all texts of each flag, then convert them to its type."""
        if {"-h", "--help", "--help-all"} & set(argv):
            write(self.help(is_whole="--help-all" in argv))
            raise SystemExit(0)
        flags = {name: action for action in self._actions for name in action.option_strings}
        known = [name.removeprefix("--") for name in flags]
        texts: dict[str, list[str]] = {}
        words: list[tuple[str, str]] = []  # each word that belongs to no flag, and the "--flag=value" before
        before, remaining = "", iter(argv)
        for word in remaining:
            name, has_value, value = word.partition("=")
            if not name.startswith("--"):
                words.append((word, before))
                continue
            # Accept `--batch-size` for `--batch_size`.
            name = name if name in flags else name.replace("-", "_").replace("__", "--", 1)
            if name not in flags:
                following = value if has_value else next(remaining, "--")
                following = "" if following.startswith("-") else following
                meant = suggestion(name.removeprefix("--"), known, following)
                hint = f"did you mean --{meant}?" if meant else f"{self.prog} --help-all lists all"
                raise UsageError(f"unknown setting {word.partition('=')[0]}; {hint}")
            is_switch = flags[name].nargs == 0
            require(not (is_switch and has_value), f"{name} takes no value")
            if not is_switch and not has_value:
                # A value never starts with "--", so a flag after a flag means that the value is missing.
                value = next(remaining, "--")
                require(not value.startswith("--"), f"{name} needs a value")
            texts.setdefault(flags[name].dest, []).append(value)
            before = f"{name}={value}"
        options, missing = argparse.Namespace(), []
        for action in self._actions:
            name, value = action.dest, action.default
            if action.option_strings:
                if name in texts:
                    value = action.nargs == 0 or _from_texts(name, texts[name], self.hints[name])
                elif action.required:
                    missing.append(f"--{name}")
            elif words or action.nargs == "?":
                count = len(words) if action.nargs == "+" else 1
                taken, words = [word for word, _ in words[:count]], words[count:]
                hint = self.hints[name]
                if action.nargs == "+":
                    value = read_value(name, taken, tuple[hint, ...])
                elif taken:
                    value = read_value(name, taken[0], hint)
            else:
                missing.append(name.upper())
            if value is not argparse.SUPPRESS:
                setattr(options, name, value)
        if words:
            together = [word for word, flag in words if flag == words[0][1]]
            meant = self._meant_by_words(together, words[0][1], known)
            raise UsageError(f"{together[0]!r} is unexpected; {meant}")
        require(not missing, f"{listed(missing)} must be given; see {self.prog} --help")
        return options

    def _meant_by_words(self, words: Sequence[str], before: str, known: Sequence[str]) -> str:
        """Suggest what to type instead of words without a flag; `before` is the flag before them."""
        word, path = words[0], Path(words[0])
        flag, _, value = before.removeprefix("--").partition("=")
        hint, values = self.hints.get(flag, str), [quote(text) for text in (value, *words)]
        element, joined = _element(hint), f"--{flag} {','.join(values)}"
        if element is not None:
            each = " ".join(f"--{flag} {value}" for value in values)
            return f"write {each}" if kinds_of(element) == [str] else f"write {joined} or {each}"
        if any(get_origin(kind) is tuple for kind in kinds_of(hint)):  # a number or a pair
            return f"write {joined}"
        choices = [name for name, hint in self.hints.items() if word.lower() in choices_of(hint)]
        if choices:
            return f"did you mean --{choices[0]} {word}?"
        # A bare word is most often a preset, a run, a config file, or a folder of images.
        preset = difflib.get_close_matches(word, [*PRESETS], n=1, cutoff=0.7)
        if "preset" in known and preset and not path.exists():
            return f"did you mean --preset {preset[0]}?"
        if (path / "config.yaml").is_file():
            return f"did you mean --{'out' if 'preset' in known else 'model'} {word}?"
        if path.suffix in (".yaml", ".yml"):
            return f"did you mean --config {word}?"
        source = next((name for name in ("data.train", "train", "data", "model") if name in known), None)
        if source is None or word == "help":
            return f"see {self.prog} --help"
        return f"did you mean --{source} {word}?"

    def help(self, *, is_whole: bool) -> str:
        """Format the help: a sentence, examples, and the usual settings; or all settings by section."""
        # Sentences are read here and not in `add_settings`, because reading sources is slower than parsing.
        for action, (name, hint, default, owner) in self.described:
            words = "auto" if default is None and Auto in get_args(hint) else typed(default) or "[]"
            words = "required" if default is MISSING else f"default: {words}"
            sentence = sentences(owner).get(name.rpartition(".")[2], "")
            action.help = f"{sentence} ({words})".replace("%", "%%")
        self.described.clear()
        shared = ("json", "overwrite", "config", "print_config")
        positional = [action for action in self._actions if not action.option_strings]
        flags = {action.dest: action for action in self._actions if action.option_strings}
        parts: dict[str, list[argparse.Action]] = {}
        if is_whole:
            parts |= {"arguments": positional, "settings": []}
            for name, action in flags.items():
                title = "every command" if name in shared else name.rpartition(".")[0] or "settings"
                parts.setdefault(title, []).append(action)
        else:
            usual = self.verb.usual.split() or [name for name in flags if name not in shared]
            parts["usual settings"] = [*positional, *(flags[name] for name in usual if name in flags)]
        formatter = self._get_formatter()
        for title in sorted(parts, key="every command".__eq__):
            formatter.start_section(title)
            formatter.add_arguments(parts[title])
            formatter.end_section()
        examples = "".join(f"  {self.prog} {example}".rstrip() + "\n" for example in self.verb.examples)
        end = "" if is_whole else f"\nall settings: {self.prog} --help-all\n"
        return f"{self.verb.about}.\n\n{examples}\n{formatter.format_help()}{end}"


def _element(hint: Any) -> Any:
    """The type of a list's elements; None if the setting is not a list, such as a number or pair."""
    kinds = kinds_of(hint)
    elements = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    return elements[0] if elements and not {int, float} & set(kinds) else None


def _from_texts(name: str, texts: Sequence[str], hint: Any) -> Any:
    """Read the value of a flag from all its texts."""
    kinds, element = kinds_of(hint), _element(hint)
    nones = NONE_WORDS + ("auto",) * (Auto in get_args(hint)) if type(None) in kinds else ()
    # For a list setting, texts add up. But "none" and a whole "[A, B]" replace the texts before them, and the
    # next text replaces them in turn. For any other setting, the last text counts.
    wholes = [i for i, text in enumerate(texts) if text[:1] == "[" or text in nones or element is None]
    kept = texts[max(wholes, default=-1) + 1 :] or texts[-1:]
    if kept[0] in nones:
        is_file = str in kinds and Path(kept[0]).exists()
        require(not is_file, f"{name} {kept[0]} means no value; write ./{kept[0]} for the file of that name")
        return None
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    is_list = len(kept) > 1 or kept[0].startswith("[") or not {str, kept[0]} & {*kinds, *words}
    if element is not None and is_list:
        return read_value(name, [part for text in kept for part in split_list(text, element)], hint)
    return read_value(name, kept[0], hint)


def built(cls: type, options: argparse.Namespace, section: str = "") -> Any:
    """Build a config from the options that were given."""
    prefix = f"{section}." if section else ""
    names = {setting.name for setting in setting_types(cls, prefix)}
    return from_dict(cls, {k.removeprefix(prefix): v for k, v in vars(options).items() if k in names})


def _metavar(hint: Any) -> str:
    # The first type is the usual one.
    kind, *others = kinds_of(hint)
    if get_origin(kind) is Literal:
        return "|".join(
            [*map(str, get_args(kind)), *["A,B,..."] * any(get_origin(other) is tuple for other in others)]
        )
    if get_origin(kind) is tuple:
        return "TEXT" if kinds_of(get_args(kind)[0]) == [str] else "A,B,..."  # text may hold commas
    return {int: "N", float: "X", bool: "true|false"}.get(kind, "TEXT")


@functools.cache
def sentences(cls: type) -> dict[str, str]:
    """Read the docstring below each field of a dataclass and of its base classes."""
    # Python discards docstrings of fields, so they are read from the source. Base classes come first, so that
    # a redeclared field gets its newest docstring.
    sentences = {}
    for owner in reversed([base for base in cls.__mro__ if is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        for field, below in pairwise(tree.body):  # type: ignore[attr-defined]
            if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr):
                sentences[ast.unparse(field.target)] = " ".join(ast.literal_eval(below.value).split())
    return sentences


def parse_settings(
    parser: Parser, config: type, argv: Sequence[str], *, overwrite: str | None = None
) -> tuple[dict[str, Any], bool]:
    """Parse values for the fields of `config`, with a flag each; also return whether --json is given.

    `overwrite` describes, in the help of --overwrite, what it replaces; None if `config` has no such field.
    """
    others = [action.dest for action in parser._actions if action.dest != "json"]
    hints = parser.add_settings(config, skip=() if overwrite is None else ("overwrite",))
    if overwrite is not None:
        parser.add_argument("--overwrite", action="store_true", help=f"replace {overwrite} in --out")
    layers, options = _layers(parser, hints, argv)
    values = {name: value for layer in layers for name, value in layer.items()}
    if overwrite is not None:
        values["overwrite"] = options.overwrite
    # Checked here and not by argparse, because a config file may give required settings.
    required = [setting.name for setting in setting_types(config) if setting.default is MISSING]
    missing = [f"--{name}" for name in required if name not in values]
    require(not missing, f"{listed(missing)} must be given; see {parser.prog} --help")
    settings = from_dict(config, values)
    _print_if_asked(settings, options)
    given = {name: getattr(options, name) for name in others}
    return given | {name: getattr(settings, name) for name in config.__dataclass_fields__}, options.json


def parse_run(parser: Parser, argv: Sequence[str]) -> tuple[RunConfig, argparse.Namespace]:
    """Parse a run's settings, and return them with the parser's other options."""
    hints = parser.add_settings(RunConfig)
    if "--print_config" in argv:  # --out is not one of the settings that are printed
        for action in parser._actions:
            action.required = False
    layers, options = _layers(parser, hints, argv)
    # All other settings override the preset, wherever it is named. A flag's preset overrides a config file's.
    preset = next((layer["preset"] for layer in reversed(layers) if layer.get("preset") is not None), None)
    config = replace(resolve(get_preset(preset or DEFAULT_PRESET).config, *layers), preset=preset)
    config.check_trainable()
    _print_if_asked(config, options)
    return config, options


def _layers(
    parser: Parser, hints: Mapping[str, Any], argv: Sequence[str]
) -> tuple[list[dict[str, Any]], argparse.Namespace]:
    """Return the settings of each --config file in order, then those of the flags; and all options."""
    several = tuple[str, ...]
    parser.add_argument("--config", type=several, metavar="FILE", help="YAML file of settings; repeatable")
    parser.add_argument("--print_config", action="store_true", help="print all settings as YAML, and exit")
    options = parser.parse(argv)
    others = vars(options).keys() - hints.keys()
    # Each file stays a separate layer, because `resolve` derives dependent settings layer by layer.
    files = [_read_file(path, hints, others) for path in options.config or ()]
    return [*files, {name: value for name, value in vars(options).items() if name in hints}], options


def _read_file(path: str, hints: Mapping[str, Any], others: Collection[str]) -> dict[str, Any]:
    values = {}
    is_preset, is_run = path in PRESETS, (Path(path) / "config.yaml").is_file()
    require(not is_preset or Path(path).exists(), f"--config {path} is a preset; write --preset {path}")
    require(not is_run, f"--config {path} is a run; write --config {path}/config.yaml for its settings")
    for name, (value, where) in read_yaml(path).items():
        if name not in hints:
            meant = suggestion(name, list(hints))
            why = f"unknown setting {name}; " + (f"did you mean {meant}?" if meant else "see --help-all")
            if any(known.startswith(f"{name}.") for known in hints):
                why = f"{name} is a section; write its settings below it, one `name: value` per line"
            elif name in others:
                why = f"{name} cannot be set in a file; give it as --{name} on the command line"
            raise UsageError(f"{where}: {why}")
        values[name] = read_value(f"{where}: {name}", value, hints[name])
    return values


def _print_if_asked(config: Any, options: argparse.Namespace) -> None:
    if options.print_config:
        import yaml

        settings = {name: value for name, value in to_dict(config).items() if name != "overwrite"}
        write(yaml.safe_dump(settings, sort_keys=False))
        raise SystemExit(0)


def suggestion(name: str, known: Sequence[str], value: str = "") -> str | None:
    """Suggest the setting meant by `name`: another program's name, another section, or a typo.

    The suggestion includes `value` if the setting takes it, alone or with a unit.
    """
    section, _, last = name.rpartition(".")
    # Other programs' names come first, because they resemble none of ours, or a wrong one.
    for words, meant in _SLIPS.items():
        for option in meant if {name, last} & set(words) else ():
            setting, _, example = option.partition(" ")
            if setting in known:
                example = re.sub("[0-9]+", value, example) if value.isdigit() else example
                return f"{setting} {example or value}".rstrip()
    # Later entries win in `leaves`, so a setting of the same section does. The start of a name matches too.
    ranked = sorted(known, key=lambda candidate: candidate.startswith(f"{section}."))
    leaves = {candidate.rpartition(".")[2]: candidate for candidate in ranked}
    near = [leaf for leaf in leaves if leaf == last or leaf.startswith(f"{last}_")]
    near += difflib.get_close_matches(last, list(leaves), n=1, cutoff=0.7)
    return leaves[near[0]] if near else None
