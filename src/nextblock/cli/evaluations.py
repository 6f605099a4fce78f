"""The verbs that evaluate: words to settings, a call, a table."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nextblock.cli.output import end_with_json, say
from nextblock.launch import find_world, launch
from nextblock.settings import Count

if TYPE_CHECKING:
    from nextblock.evaluate.evaluation import Result


def run_verb(
    verb: str,
    settings: type,
    about: str,
    argv: Sequence[str],
    *,
    draw: Callable[[Result, Path], None] | None = None,
) -> int:
    """Parse the words, call `nextblock.VERB`, print its table and notes on rank 0; `draw` into OUT."""
    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser(verb, about)
    parser.add_argument(
        "--devices", type=Count, help="processes on this machine, one for each GPU or CPU core"
    )
    values, is_json = parse_settings(parser, settings, argv, overwrite="another result")
    devices = values.pop("devices")
    if devices is not None:
        return launch(verb, argv, devices, values["device"])
    result = getattr(importlib.import_module("nextblock"), verb)(**values)
    if find_world().rank == 0:
        result.table.print()
        say(*result.notes)
        if draw is not None:
            draw(result, Path(values["out"]))
        if is_json:
            end_with_json(result.as_dict())
    return 0
