"""`nextblock search`: the images nearest to one."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextblock.cli.output import end_with_json, say
from nextblock.evaluate.search_config import SearchConfig
from nextblock.settings import from_dict

if TYPE_CHECKING:
    from rich.table import Table

    from nextblock.data import Source
    from nextblock.evaluate.search import QueryResult, SearchResult

TABLE_QUERIES, NAME_LETTERS = 4, 32


def run(argv: Sequence[str]) -> int:
    """Parse the words, search, print a table."""
    from rich.console import Console

    from nextblock.cli.arguments import Parser, parse_settings

    parser = Parser("search", "Find the images nearest to one, and draw them.")
    values, is_json = parse_settings(parser, SearchConfig, argv, overwrite="another sheet")
    result = search(**values)
    console = Console()
    for query in result.queries[:TABLE_QUERIES]:
        console.print(_table(query))
    if len(result.queries) > TABLE_QUERIES:
        console.print(f"and {len(result.queries) - TABLE_QUERIES} queries more, in the files")
    say(f"picture: {values['out']}")
    if result.bad:
        named = "; ".join(f"{bad.name}: {bad.reason}" for bad in result.bad[:3])
        words = f"unreadable images left out: {len(result.bad)} ({named})"
        say(words)
    if is_json:
        end_with_json(_as_json(result))
    return 0


def search(**settings: Any) -> SearchResult:
    """Search as `nextblock search` does; `settings` are the fields of `SearchConfig`.

    Paths may stand for strings.
    """
    from nextblock.atomic import write_text
    from nextblock.evaluate.search import search as search_with
    from nextblock.visualize.contact_sheet import draw_contact_sheet

    config = from_dict(SearchConfig, settings)
    out = Path(config.out)
    result = search_with(config)
    draw_contact_sheet(_sheet_rows(result), out, _subtitle(result, config))
    write_text(out.with_suffix(".csv"), _as_csv(result))
    write_text(out.with_suffix(".json"), json.dumps(_as_json(result), indent=1) + "\n")
    return result


def _sheet_rows(result: SearchResult) -> list[Any]:
    from nextblock.visualize.contact_sheet import Cell, SheetRow, thumbnail

    def picture(source: Source, index: int) -> Any:
        return thumbnail(source.read(index))

    rows = []
    for query in result.queries:
        cells = []
        for one in query.neighbours:
            first = f"{one.similarity:.4f}" + (", same image" if one.is_query else "")
            words = (first, *([] if one.class_name is None else [one.class_name]), one.name)
            cells.append(Cell(picture(result.source, one.index), words, one.is_query))
        asked = Cell(picture(result.query_source, query.index), ("query", query.name))
        rows.append(SheetRow(asked, tuple(cells)))
    return rows


def _subtitle(result: SearchResult, config: SearchConfig) -> str:
    of = "its features file" if config.features else f"layers {config.feature_settings.layers}"
    where = f"{result.searched:,} images of {result.source.spec}"
    return f"among {where}, by cosine similarity of {config.model} ({of})"


def _as_json(result: SearchResult) -> dict[str, Any]:
    return {
        "identity": result.identity,
        "searched": result.searched,
        "queries": [
            {"index": query.index, "name": query.name, "neighbours": [vars(one) for one in query.neighbours]}
            for query in result.queries
        ],
        "bad": [bad._asdict() for bad in result.bad],
    }


def _as_csv(result: SearchResult) -> str:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("query", "rank", "index", "name", "similarity", "class", "is_query"))
    for query in result.queries:
        for rank, one in enumerate(query.neighbours, start=1):
            is_query = str(one.is_query).lower()
            similarity = f"{one.similarity:.6f}"
            writer.writerow(
                (query.name, rank, one.index, one.name, similarity, one.class_name or "", is_query)
            )
    return text.getvalue()


def _table(query: QueryResult) -> Table:
    from rich.table import Column, Table
    from rich.text import Text

    from nextblock.cli.output import end_of

    table = Table(
        "similarity",
        Column("image", no_wrap=True),
        "class",
        "",
        title=Text(f"nearest to {query.name}"),
        title_justify="left",
    )
    for one in query.neighbours:
        same = "the query itself" if one.is_query else ""
        name = Text(end_of(one.name, NAME_LETTERS))
        table.add_row(f"{one.similarity:.4f}", name, Text(one.class_name or ""), same)
    return table
