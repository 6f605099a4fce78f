"""`nextblock bench WHAT`: measure speed against the plain alternative."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from nextblock.bench import BENCHES
from nextblock.cli.output import end_with_json, say
from nextblock.errors import UsageError
from nextblock.settings import nearest_name

if TYPE_CHECKING:
    from rich.table import Table

    from nextblock.bench.measure import BenchResult, Row


def run(argv: Sequence[str]) -> int:
    """Run the named bench, print a table."""
    if not argv or argv[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    what, rest = argv[0], argv[1:]
    if what not in BENCHES:
        raise UsageError(f"unknown bench {what!r}; {nearest_name(what, list(BENCHES))}")

    from rich.console import Console

    from nextblock.cli.arguments import Parser, built

    target, about = BENCHES[what]
    module, _, name = target.partition(":")
    bench = getattr(importlib.import_module(module), name)
    parser = Parser(f"bench {what}", f"Measure {about}.")
    parser.add_settings(bench, skip=("quick",))
    parser.add_argument("--quick", action="store_true", help="few repetitions: a first idea")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse(rest)
    result: BenchResult = replace(built(bench, options), quick=options.quick).run()
    console = Console()
    console.print(_table(result))
    for note in result.notes:
        say(note)
    if options.json:
        end_with_json(result.to_dict())
    return 0


def _table(result: BenchResult) -> Table:
    from rich.table import Table

    has_plain = any(row.plain is not None for row in result.rows)
    table = Table("what", *(("ours", "plain") if has_plain else ("measured",)), "", "ratio", "budget")
    for row in result.rows:
        plain = "-" if row.plain is None else _number(row.plain)
        values = (_number(row.ours), plain) if has_plain else (_number(row.ours),)
        table.add_row(
            row.what, *values, row.unit, "-" if row.ratio is None else f"{row.ratio:.2f}", _budget(row)
        )
    return table


def _budget(row: Row) -> str:
    if row.at_least is not None:
        return f"at least {row.at_least:g}"
    return "" if row.at_most is None else f"at most {row.at_most:g} {row.unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _help() -> str:
    benches = "\n".join(f"  {name:<10}{about}" for name, (_, about) in BENCHES.items())
    return (
        "usage: nextblock bench WHAT [--quick] [--json] [--SETTING VALUE ...]\n\n"
        "Measure speed as a ratio to a plain alternative, on this machine, in turns.\n\n"
        f"benches:\n{benches}\n\n"
        "nextblock bench WHAT --help lists its settings.\n"
    )
