"""`nextblock probe`: what a frozen encoder's features are worth."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from nextblock.evaluate.probe_config import ProbeConfig, ProbeResult
from nextblock.settings import from_keywords, to_dict

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["probe", "run"]


def run(argv: Sequence[str]) -> int:
    """Parse the words, probe, print a table."""
    from rich.console import Console

    from nextblock.cli.arguments import build_parser, parse

    parser = build_parser("probe", "Train heads on a frozen encoder's features and measure their accuracy.")
    parser.add_class_arguments(ProbeConfig, None, skip={"overwrite"})
    parser.add_argument("--overwrite", action="store_true", help="replace another result in --out")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parse(parser, argv)
    values = {name: value for name, value in parser.instantiate(options).items() if name != "json"}
    result = probe(**values)
    Console().print(_table(result))
    if options.json:
        sys.stdout.write(json.dumps(to_dict(result)) + "\n")
    return 0


def probe(**settings: Any) -> ProbeResult:
    """Probe a model as `nextblock probe` does; `settings` are the fields of `ProbeConfig`.

    Paths and lists may stand for strings and tuples.
    """
    from nextblock.evaluate.probe import probe as probe_with

    return probe_with(from_keywords(ProbeConfig, settings))


def _table(result: ProbeResult) -> Table:
    from rich.table import Table

    table = Table("encoder", "head", "measured on", "images", "top-1", "top-5")
    for row in result.rows:
        table.add_row(row.encoder, row.head, row.split, str(row.images), f"{row.top1:.1%}", f"{row.top5:.1%}")
    return table
