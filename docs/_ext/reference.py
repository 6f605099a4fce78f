"""The parts of the reference that are made from the code: settings, commands, presets, signatures.

Settings and commands that a page names are linked to the reference.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import MISSING
from functools import cache
from typing import Any, get_args
from unittest.mock import patch

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.docutils import SphinxDirective

from nextblock.cli import main
from nextblock.cli.arguments import Parser, sentences
from nextblock.cli.verbs import VERBS
from nextblock.config import RunConfig
from nextblock.plan import count_parameters
from nextblock.presets import PRESETS
from nextblock.settings import Auto, Setting, describe_type, flatten, setting_types, to_dict, typed

COMMANDS = "reference/commands"
RUN = {setting.name: setting for setting in setting_types(RunConfig)}
RUN_SECTIONS = [name for name in RUN if "." in name]
GENERAL = {"json", "config", "print_config", "overwrite", "devices"}
"""Options that the commands' page describes once."""


def described(setting: Setting) -> str:
    """What a setting does, as its dataclass says; its type and default."""
    sentence = marked(sentences(setting.owner).get(setting.name.rpartition(".")[2], ""))
    is_auto = setting.default is None and Auto in get_args(setting.hint)
    default = "auto" if is_auto else typed(setting.default) or "[]"
    end = "required" if setting.default is MISSING else f"default `{default}`"
    return f"{sentence}\n\n*{describe_type(setting.hint)}* · {end}"


def marked(text: str) -> str:
    """Plain help as Markdown: the names of settings and flags as code, and nothing else as markup."""
    parts = re.split(r"(`[^`]+`|(?<![\w.-])--[a-z_.]+)", text.replace("<", "&lt;").replace("*", r"\*"))
    text = "".join(f"`{part}`" if part.startswith("--") else part for part in parts)
    names = "|".join(sorted(map(re.escape, RUN_SECTIONS), key=len, reverse=True))
    return re.sub(rf"(?<![`\w./-])({names})(?![\w`])", r"`\1`", text)


@cache
def parser_of(verb: str) -> Parser:
    """The parser that a command makes for itself."""
    caught: list[Parser] = []
    with patch.object(Parser, "help", lambda self, **_: caught.append(self) or ""):
        main([*verb.split(), "--help"])
    return caught[0]


class Settings(SphinxDirective):
    """`{settings} SECTION`: every setting of a section of a run's settings."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Entries that other pages can link to."""
        rows = [one for one in RUN.values() if (one.name.rpartition(".")[0] or "run") == self.arguments[0]]
        entries = [f"````{{confval}} {row.name}\n{described(row)}\n````\n" for row in rows]
        return self.parse_text_to_nodes("\n".join(entries))


class Command(SphinxDirective):
    """`{command} VERB`: what it does, examples, and its options."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        """The command's row and its parser as text."""
        verb = self.arguments[0]
        examples = "\n".join(f"nextblock {verb} {example}".rstrip() for example in VERBS[verb].examples)
        text = [f"{VERBS[verb].about}.\n\n```sh\n{examples}\n```\n"]
        if verb == "data":  # its commands have the options
            return self.parse_text_to_nodes(text[0])
        text += [f"```{{program}} nextblock {verb}\n```\n"]
        parser = parser_of(verb)
        settings = {id(action): setting for action, setting in parser.described}
        for action in parser._actions:
            setting = settings.get(id(action))
            if action.dest in GENERAL or action.dest in RUN_SECTIONS:
                continue
            words = marked(str(action.help).replace("%%", "%"))
            words = f"{words[:1].upper()}{words[1:]}." if setting is None else described(setting)
            name = action.option_strings[-1] if action.option_strings else str(action.metavar)
            value = f" {action.metavar}" if action.option_strings and action.nargs != 0 else ""
            text.append(f"````{{option}} {name}{value}\n{words}\n````\n")
        shared = [f"`--{name}`" for name in RUN_SECTIONS if name in {one.dest for one in parser._actions}]
        if len(shared) == len(RUN_SECTIONS):
            text.append("All [settings of a run](settings.md) are options as well.\n")
        elif shared:
            text.append(f"Of the [settings of a run](settings.md) also {', '.join(shared)}.\n")
        return self.parse_text_to_nodes("\n".join(text))


class Presets(SphinxDirective):
    """`{presets} GROUP`: a table of the group's presets, and what each is."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """The registry's rows as text."""
        rows = [preset for preset in PRESETS.values() if preset.group == self.arguments[0]]
        table = ["| preset | images | px | encoder M | with predictor M |", "|---|---|---|---:|---:|"]
        entries = []
        for preset in rows:
            model, count = preset.config.model, count_parameters(preset.config.model)
            millions = f"{count.encoder / 1e6:,.1f} | {(count.encoder + count.predictor) / 1e6:,.1f}"
            table.append(f"| `{preset.name}` | {preset.images} | {typed(model.image_size)} | {millions} |")
            base = RunConfig() if preset.base is None else PRESETS[preset.base].config
            theirs, ours = flatten(to_dict(base)), flatten(to_dict(preset.config))
            changed = [name for name in ours if ours[name] != theirs[name] and name != "preset"]
            settings = ", ".join(f"`{name} {typed(ours[name])}`" for name in changed)
            end = f"Published: {preset.published}." if preset.published else ""
            differs = f"Differs from {f'`{preset.base}`' if preset.base else 'the defaults'} in {settings}."
            # All sizes have one sentence, and an ablation's says what it changes.
            words = {"size": [differs], "ablation": [marked(preset.about), end]}
            parts = words.get(preset.group, [marked(preset.about), end, differs])
            entries.append(f"`{preset.name}`\n: {' '.join(parts)}\n")
        table = [] if self.arguments[0] == "ablation" else [*table, ""]
        return self.parse_text_to_nodes("\n".join([*table, *entries]))


class Links(SphinxPostTransform):
    """Inline code that begins with a setting or a command leads to the reference."""

    default_priority = 5  # before cross-references are resolved

    def run(self, **_: Any) -> None:
        """Wrap each in a reference, except in headings and in links."""
        for literal in list(self.document.findall(nodes.literal)):
            words = literal.astext().removeprefix("--").split()
            parent = literal.parent
            if not words or isinstance(parent, nodes.title | nodes.reference | pending_xref):
                continue
            verb = " ".join(words[1:3]) if " ".join(words[1:3]) in VERBS else " ".join(words[1:2])
            link: nodes.Element
            if words[0] in RUN and "." in words[0]:
                link = pending_xref(
                    "", literal.deepcopy(), refdomain="std", reftype="confval", reftarget=words[0],
                    refdoc=self.env.docname, refexplicit=True, refwarn=True,
                )  # fmt: skip
            elif words[0] == "nextblock" and verb in VERBS and self.env.docname != COMMANDS:
                place = self.app.builder.get_relative_uri(self.env.docname, COMMANDS)
                anchor = f"{place}#nextblock-{verb.replace(' ', '-')}"
                link = nodes.reference("", "", literal.deepcopy(), refuri=anchor, internal=True)
            else:
                continue
            parent.replace(literal, link)


class _Verbatim:
    """An annotation that prints as it stands in the source."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def write_signature(
    _app: Sphinx, what: str, _name: str, found: Any, *_: Any
) -> tuple[str, str | None] | None:
    """Signatures as the source has them, with the shapes of tensors."""
    if what == "class" and not hasattr(found, "forward"):
        return "", None  # results and settings: their fields say more
    if what not in ("function", "method", "class"):
        return None
    signature = inspect.signature(found)
    parameters = [
        one.replace(
            annotation=one.annotation if one.annotation is one.empty else _Verbatim(str(one.annotation))
        )
        for one in signature.parameters.values()
        if one.name != "self"
    ]
    returns = signature.return_annotation
    shown = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    return shown, None if returns is signature.empty or what == "class" else str(returns)


def leave_out_aliases(_app: Sphinx, _what: str, _name: str, _found: Any, *rest: Any) -> None:
    """Drop the docstring that Python gives each field of a named tuple."""
    lines: list[str] = rest[-1]
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of it."""
    directives: dict[str, type[Directive]] = {"settings": Settings, "command": Command, "presets": Presets}
    for name, directive in directives.items():
        app.add_directive(name, directive)
    app.add_post_transform(Links)
    app.connect("autodoc-process-signature", write_signature)
    app.connect("autodoc-process-docstring", leave_out_aliases)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
