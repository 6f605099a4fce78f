"""A contact sheet: every query at the left, the images nearest to it beside it, nearest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextblock.data import Source
from nextblock.visualize.figure import INK, MUTED, save_png
from nextblock.visualize.sheet import MAX_PICTURE_BYTES, drawn_channels, shortened, side_by_side

CELL_IN = 1.35
MAX_COLUMNS = 7
ACCENT = "#bc4c00"


def draw_contact_sheet(
    rows: Sequence[Mapping[str, Any]], queries: Source, source: Source, path: Path
) -> None:
    """Draw the rows of a search as a PNG; channels that are no colours are drawn each by itself."""
    found = [list(group) for _, group in groupby(rows, key=lambda row: row["query_index"])]
    columns = min(MAX_COLUMNS, max(map(len, found)))
    lines = [-(-len(group) // columns) for group in found]
    figure = Figure(figsize=(CELL_IN * (columns + 1), (CELL_IN + 0.45) * sum(lines)), layout="constrained")
    grid = figure.subplots(sum(lines), columns + 1, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for group, top in zip(found, [sum(lines[:number]) for number in range(len(lines))], strict=True):
        query = group[0]["query_index"]
        _draw(grid[top, 0], queries, query, ["query", queries.name(query)], INK)
        for number, row in enumerate(group):
            line, column = divmod(number, columns)
            words = [f"{row['similarity']:.3f}", row["class"] or row["name"]]
            color = ACCENT if row["is_query"] else MUTED
            _draw(grid[top + line, 1 + column], source, row["index"], words, color)
    save_png(figure, path, dpis=(200, 150, 110, 80, 60), max_bytes=MAX_PICTURE_BYTES)


def _draw(axes: Axes, source: Source, index: int, words: Sequence[str], color: str) -> None:
    pixels = source.read(index)
    shown = side_by_side(pixels[None, : drawn_channels(len(pixels))])[0]
    picture = rearrange(shown.expand(3, -1, -1), "c h w -> h w c").numpy()
    axes.axis("on")
    axes.imshow(picture, interpolation="nearest" if max(picture.shape[:2]) < 128 else "antialiased")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=color, linewidth=1.2)
    axes.set_title(
        "\n".join(shortened(word, 20) for word in words), fontsize=7, color=color, y=0, va="top", pad=-3
    )
