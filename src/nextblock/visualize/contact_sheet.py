"""A sheet of a search: every query at the left, the images nearest to it beside it, nearest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from torch.nn.functional import pad

from nextblock.data import Source
from nextblock.visualize.sheet import Cell, draw_cells, pictures_of

MAX_COLUMNS = 7


def draw_contact_sheet(
    rows: Sequence[Mapping[str, Any]], queries: Source, source: Source, path: Path
) -> None:
    """Draw the rows of a search as a PNG; channels that are no colours are drawn each by itself."""

    def cell(images: Source, index: int, words: str, *, is_query: bool) -> Cell:
        pixels = images.read(index)
        height, width = pixels.shape[1:]
        # White at two sides makes any image a square.
        square = pad(pixels, (0, max(0, height - width), 0, max(0, width - height)), value=255)
        return Cell(pictures_of(square[None])[0], words, (0, 0, 1, 1) if is_query else None)

    lines: list[list[Cell]] = []
    for query, group in groupby(rows, key=lambda row: row["query_index"]):
        found = [
            cell(
                source,
                row["index"],
                f"{row['similarity']:.3f}\n{row['class'] or row['name']}",
                is_query=row["is_query"],
            )
            for row in group
        ]
        for start in range(0, len(found), MAX_COLUMNS):
            first = cell(queries, query, f"query\n{queries.name(query)}", is_query=False)
            lines.append([first, *found[start : start + MAX_COLUMNS]])
    caption = "Below each image: its cosine similarity, its class or name. Framed: the query itself."
    draw_cells(lines, path, title="Nearest images", caption=caption)
