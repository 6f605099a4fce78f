"""Show results: rows as a table (terminal, Markdown, CSV, notebook), and pictures in a notebook.

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
    """A table column: its key in the rows, its title, and a function from (value, row) to text."""

    key: str
    title: str
    show: Callable[[Any, Row], str] = lambda value, _: "" if value is None else str(value)


def percent(value: float | None, row: Row, key: str = "") -> str:
    """Format a share in percent, with its standard error if the row has `KEY_se`.

    0 % and 100 % have no error: the images do not differ, so it would come out as zero.
    """
    if value is None:
        return ""
    error = row.get(f"{key}_se") if 0 < value < 1 else None
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def image(name: str, _: Row) -> str:
    """The end of an image's name, which is long if it has folders."""
    return end_of(name, 60)


def share(key: str, title: str) -> Column:
    """A column of shares in percent, with standard errors."""
    return Column(key, title, lambda value, row: percent(value, row, key))


def difference(key: str, title: str) -> Column:
    """A column of differences in percentage points, with standard errors."""

    def show(value: float | None, row: Row) -> str:
        return "" if value is None else f"{100 * value:+.1f} ± {100 * row[f'{key}_se']:.1f}"

    return Column(key, title, show)


def lead(title: str) -> Column:
    """The column of the model's paired leads over its baselines."""
    return difference("lead", title)


def number(key: str, title: str, form: str = "g") -> Column:
    """A column of numbers, formatted with `form`."""
    return Column(key, title, lambda value, _: "" if value is None else format(value, form))


class Table(NamedTuple):
    """Rows, and the columns to show."""

    rows: Sequence[Row]
    columns: Sequence[Column]

    def cells(self) -> list[list[str]]:
        """The text of each cell; empty columns are dropped, here and in `head`."""
        return [[one.show(row.get(one.key), row) for one in self._shown] for row in self.rows]

    @property
    def head(self) -> list[str]:
        """The titles of the columns that are not empty."""
        return [one.title for one in self._shown]

    @property
    def _shown(self) -> list[Column]:
        return [c for c in self.columns if any(c.show(row.get(c.key), row) for row in self.rows)]

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.cells()]
        return "".join(f"| {' | '.join(map(escape_markdown, line))} |\n" for line in lines)

    def _repr_html_(self) -> str:
        """The table in HTML, for notebooks."""
        lines = [("th", self.head), *(("td", cells) for cells in self.cells())]
        rows = ("".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in cells) for tag, cells in lines)
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in rows) + "</table>"

    def rich(self) -> RichTable:
        """The table for the terminal: one line per row, never truncated."""
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
        """Print the table at full width: truncated numbers would be useless."""
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
        """Draw the pictures in a notebook; elsewhere print their paths."""
        ipython = sys.modules.get("IPython")  # only looked up: a notebook has imported it
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
    """Format all values of all rows as CSV, each made safe by `safe_cell`."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with io.StringIO(newline="") as text:
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: safe_cell(value) for name, value in row.items()} for row in rows)
        return text.getvalue()


def safe_cell(value: Any) -> Any:
    """Prepare a value for CSV: join lists by spaces, quote text that a spreadsheet would run."""
    if isinstance(value, list | tuple):
        return " ".join(str(safe_cell(one)) for one in value)
    if not isinstance(value, str):
        return value
    # OWASP, "CSV injection": a spreadsheet runs such a cell as a formula. Python's csv does not quote "\r".
    return ("'" if value[:1] in tuple("=+-@\t\r") else "") + value.replace("\r", " ")


def escape_markdown(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")


def finite(value: Any) -> Any:
    """Replace NaN and infinity by None, since JSON has neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def end_of(name: str, letters: int) -> str:
    """Shorten a name to its end, at most `letters` characters with the ellipsis."""
    return name if len(name) <= letters else f"…{name[len(name) - letters + 1 :]}"
