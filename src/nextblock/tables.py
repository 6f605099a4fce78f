"""How results are shown: rows as a table (terminal, Markdown, CSV, notebook), and pictures in a notebook.

Imports nothing heavy.
"""

from __future__ import annotations

import csv
import html
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Row = Mapping[str, Any]


class Column(NamedTuple):
    """A column of a table: its key in the rows, its head, and how a value is shown (the row is given too)."""

    key: str
    title: str
    show: Callable[[Any, Row], str] = lambda value, _: "" if value is None else str(value)


def percent(value: float | None, row: Row, key: str = "") -> str:
    """A share in percent, with its standard error if the row has one as `KEY_se`.

    None or all is shown alone: the error is computed from the images that differ, and there are none.
    """
    if value is None:
        return ""
    error = row.get(f"{key}_se") if 0 < value < 1 else None
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def share(key: str, title: str) -> Column:
    """A column of shares in percent, beside their standard errors."""
    return Column(key, title, lambda value, row: percent(value, row, key))


def difference(key: str, title: str) -> Column:
    """A column of differences in points of percent, beside their standard errors."""

    def show(value: float | None, row: Row) -> str:
        return "" if value is None else f"{100 * value:+.1f} ± {100 * row[f'{key}_se']:.1f}"

    return Column(key, title, show)


def lead(title: str) -> Column:
    """The column of the model's paired leads over its baselines."""
    return difference("lead", title)


def number(key: str, title: str, form: str = "g") -> Column:
    """A column of numbers in a format."""
    return Column(key, title, lambda value, _: "" if value is None else format(value, form))


class Table(NamedTuple):
    """Rows, and which of their values are shown, in which order."""

    rows: Sequence[Row]
    columns: Sequence[Column]

    def cells(self) -> list[list[str]]:
        """The text of each cell; a column without any text is left out of `head` too."""
        return [[one.show(row.get(one.key), row) for one in self._shown] for row in self.rows]

    @property
    def head(self) -> list[str]:
        """The titles of the columns that have a text in some row."""
        return [one.title for one in self._shown]

    @property
    def _shown(self) -> list[Column]:
        return [c for c in self.columns if any(c.show(row.get(c.key), row) for row in self.rows)]

    def markdown(self) -> str:
        """A table in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.cells()]
        return "".join(f"| {' | '.join(map(escape_markdown, line))} |\n" for line in lines)

    def _repr_html_(self) -> str:
        """A table in HTML, as a notebook shows it."""
        lines = [("th", self.head), *(("td", cells) for cells in self.cells())]
        rows = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) for tag, cells in lines)
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    def rich(self) -> RichTable:
        """A table for the terminal: one line a row, never cut."""
        from rich.box import SIMPLE
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(box=SIMPLE, pad_edge=False)
        for title in self.head:
            table.add_column(escape(title), no_wrap=True, overflow="ignore")
        for row in self.cells():
            table.add_row(*map(escape, row))
        return table

    def print(self) -> None:
        """Print it, as wide as it is: cut off, its numbers would be of no use."""
        from rich.console import Console

        console, table = Console(), self.rich()
        console.width = max(console.width, Console(width=500).measure(table).maximum)
        console.print(table)


class Shown:
    """A result with a picture, which a notebook draws when the result is a cell's last line."""

    picture: Any
    """Path of a PNG, or None."""

    @property
    def pictures(self) -> tuple[Path, ...]:
        """All pictures of the result."""
        return (self.picture,) if self.picture else ()

    def show(self) -> None:
        """Draw the pictures in a notebook; elsewhere print where they are."""
        ipython = sys.modules.get("IPython")  # not imported: neither notebook nor IPython
        shell = ipython and ipython.get_ipython()
        for path in self.pictures:
            if shell and hasattr(shell, "kernel"):
                from IPython.display import Image, display

                display(Image(filename=str(path)))
            else:
                sys.stdout.write(f"{path}\n")

    def _repr_png_(self) -> bytes | None:
        return self.picture.read_bytes() if self.picture and self.picture.is_file() else None


def write_csv(rows: Iterable[Row]) -> str:
    """All values of all rows as CSV, lists joined by a blank; text that a spreadsheet would run is quoted."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: safe_cell(value) for name, value in row.items()} for row in rows)
        return text.getvalue()


def safe_cell(value: Any) -> Any:
    """A value for a cell of a CSV file: lists joined by a blank, text that would be a formula quoted."""
    if isinstance(value, list | tuple):
        return " ".join(str(safe_cell(one)) for one in value)
    if not isinstance(value, str):
        return value
    # OWASP, "CSV injection": such a cell is a formula to a spreadsheet. Python's csv does not quote "\r".
    return ("'" if value[:1] in tuple("=+-@\t\r") else "") + value.replace("\r", " ")


def escape_markdown(text: str) -> str:
    """Text that stands for itself in a cell of a table in Markdown."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def finite(value: Any) -> Any:
    """The same value for JSON, which has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def end_of(name: str, letters: int) -> str:
    """At most `letters` of a name, its last ones, after an ellipsis if it is cut."""
    return name if len(name) <= letters else f"…{name[len(name) - letters + 1 :]}"
