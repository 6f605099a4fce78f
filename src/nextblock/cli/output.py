"""Terminal output of verbs: lines, tables, and JSON on the last line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def say(*lines: str) -> None:
    """Print lines verbatim, without wrapping, colours or markup."""
    from rich.console import Console

    console = Console()
    for line in lines:
        console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", below: str = ""
) -> None:
    """Print a table, and sentences below it; without `head`, a grid of names and values."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*head, title=escape(title)) if head else Table.grid(padding=(0, 2))
    for row in rows:
        table.add_row(*map(escape, row))
    console = Console()
    console.print(table, highlight=False)
    if below:
        console.print(below, highlight=False, markup=False)


def end_with_json(values: Any) -> None:
    """Print values as one line of JSON."""
    write(json.dumps(values) + "\n")


def write(text: str) -> None:
    """Print text as it is; the output may be closed, or its reader gone (`| head`)."""
    try:
        print(text, end="", flush=True)  # noqa: T201 - without rich, which takes long to import
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(f"nextblock: the output cannot be written: {error.strerror}\n")
        # As rich does. Python would flush again at exit, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
