"""The verbs that evaluate: words to settings, a call, a table."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

from nextblock.cli.output import end_with_json, say
from nextblock.launch import find_world


def run_verb(verb: str, settings: type, about: str, argv: Sequence[str]) -> int:
    """Parse the words, call `nextblock.VERB`, print its table and notes on rank 0."""
    from nextblock.cli.arguments import Parser, parse_settings

    values, is_json = parse_settings(Parser(verb, about), settings, argv, overwrite="another result")
    result = getattr(importlib.import_module("nextblock"), verb)(**values)
    if find_world().rank == 0:
        result.table.print()
        say(*result.notes)
        if is_json:
            end_with_json(result.as_dict())
    return 0
