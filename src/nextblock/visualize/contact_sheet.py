"""A contact sheet: every query at the left, the images nearest to it beside it, nearest first.

Laid out in inches; images keep their shape within squares of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from nextblock.visualize.figure import INK, MUTED, axes_at, save_png, text_at, wrapped
from nextblock.visualize.sheet import MAX_PICTURE_BYTES, shortened, shown_channels

__all__ = ["Cell", "SheetRow", "draw_contact_sheet", "thumbnail"]

THUMBNAIL_PX = 256
CELL_IN, GAP_IN, QUERY_GAP_IN, MARGIN_IN = 1.35, 0.16, 0.42, 0.35
CAPTION_IN, LINE_IN, BAND_GAP_IN = 0.64, 0.15, 0.12
MAX_COLUMNS = 6
ACCENT = "#bc4c00"


class Cell(NamedTuple):
    """An image with what is written below it."""

    picture: UInt8[np.ndarray, "h w 3"]
    words: tuple[str, ...]
    """A few short lines, the first in black."""
    is_marked: bool = False
    """Framed in colour."""


class SheetRow(NamedTuple):
    """A query and what was found."""

    query: Cell
    neighbours: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class _Layout:
    columns: int
    bands: tuple[int, ...]
    """Lines of neighbours of each query."""
    head_in: float

    @property
    def width_in(self) -> float:
        return 2 * MARGIN_IN + CELL_IN + QUERY_GAP_IN + self.columns * (CELL_IN + GAP_IN) - GAP_IN

    @property
    def height_in(self) -> float:
        return self.top_in(len(self.bands)) + 0.1

    def top_in(self, row: int) -> float:
        """Where a query's row begins."""
        return self.head_in + sum(count * (CELL_IN + CAPTION_IN) + BAND_GAP_IN for count in self.bands[:row])

    def cell_in(self, row: int, number: int | None) -> tuple[float, float]:
        """Upper left corner of a query's neighbour, or of the query itself (None)."""
        if number is None:
            return MARGIN_IN, self.top_in(row)
        band, column = divmod(number, self.columns)
        left = MARGIN_IN + CELL_IN + QUERY_GAP_IN + column * (CELL_IN + GAP_IN)
        return left, self.top_in(row) + band * (CELL_IN + CAPTION_IN)


def thumbnail(image: UInt8[Tensor, "c h w"]) -> UInt8[np.ndarray, "rows columns 3"]:
    """An image as colours, its longer side at most `THUMBNAIL_PX`; of many channels the first three."""
    shown = image[: shown_channels(len(image))].expand(3, -1, -1)
    picture = Image.fromarray(rearrange(shown, "c h w -> h w c").contiguous().numpy())
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    return np.asarray(picture)


def draw_contact_sheet(rows: Sequence[SheetRow], path: Path, subtitle: str) -> None:
    """Write the sheet as a PNG, in as many dots per inch as `MAX_PICTURE_BYTES` allows."""
    most = max(len(row.neighbours) for row in rows)
    columns = -(-most // -(-most // MAX_COLUMNS))
    layout = _Layout(
        columns=columns, bands=tuple(max(1, -(-len(row.neighbours) // columns)) for row in rows), head_in=0.0
    )
    words = wrapped(subtitle, layout.width_in - 2 * MARGIN_IN, 8.5)
    layout = _Layout(columns=columns, bands=layout.bands, head_in=0.72 + LINE_IN * (words.count("\n") + 1))
    figure = Figure(figsize=(layout.width_in, layout.height_in))
    text_at(figure, MARGIN_IN, 0.22, "Nearest images", size=13, weight="bold", va="top")
    text_at(figure, MARGIN_IN, 0.5, words, size=8.5, color=MUTED, va="top")
    for number, row in enumerate(rows):
        _draw_cell(figure, layout.cell_in(number, None), row.query, is_query=True)
        for place, cell in enumerate(row.neighbours):
            _draw_cell(figure, layout.cell_in(number, place), cell, is_query=False)
    save_png(figure, path, dpis=(200, 150, 110, 80, 60), max_bytes=MAX_PICTURE_BYTES)


def _draw_cell(figure: Figure, corner_in: tuple[float, float], cell: Cell, *, is_query: bool) -> None:
    x, y = corner_in
    axes = _axes(figure, x, y, cell.picture.shape[:2])
    enlarged = max(cell.picture.shape[:2]) < 128
    axes.imshow(cell.picture, interpolation="nearest" if enlarged else "antialiased", aspect="auto")
    axes.set_xticks([])
    axes.set_yticks([])
    strong = is_query or cell.is_marked
    for spine in axes.spines.values():
        spine.set(
            linewidth=1.6 if strong else 0.4, color=ACCENT if cell.is_marked else INK if strong else MUTED
        )
    for line, words in enumerate(cell.words):
        below = y + CELL_IN + 0.05 + line * LINE_IN
        color = ACCENT if cell.is_marked and line == 0 else INK if line == 0 else MUTED
        short = shortened(words, int(CELL_IN * 72 / (7.5 * 0.58)))
        text_at(figure, x + CELL_IN / 2, below, short, size=7.5, color=color, ha="center", va="top")


def _axes(figure: Figure, x_in: float, y_in: float, shape: tuple[int, ...]) -> Axes:
    """Axes of an image's shape, in the middle of its square."""
    height, width = (CELL_IN * side / max(shape) for side in shape)
    left, top = x_in + (CELL_IN - width) / 2, y_in + (CELL_IN - height) / 2
    return axes_at(figure, left, top, width, height)
