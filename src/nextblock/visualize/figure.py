"""Shared by all figures: text colours, placing in inches, wrapped text, atomic PNG files.

Figures are `matplotlib.figure.Figure` objects, without pyplot's global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nextblock.atomic import make_directory, mark_output, write_aside

INK = "#1f2328"
MUTED = "#656d76"


def wrapped(text: str, width_in: float, size_pt: float) -> str:
    """Break `text` into lines that fit `width_in` inches, by DejaVu Sans' mean letter width."""
    return textwrap.fill(text, width=max(20, int(width_in * 72 / (size_pt * 0.54))), break_on_hyphens=False)


def axes_at(figure: Figure, left_in: float, top_in: float, width_in: float, height_in: float) -> Axes:
    """Add axes at a place given in inches from the figure's top left."""
    wide_in, high_in = figure.get_size_inches()
    bottom_in = high_in - top_in - height_in
    return figure.add_axes((left_in / wide_in, bottom_in / high_in, width_in / wide_in, height_in / high_in))


def text_at(figure: Figure, x_in: float, y_in: float, words: str, **style: Any) -> None:
    """Add plain text at a place given in inches from the figure's top left."""
    width_in, height_in = figure.get_size_inches()
    figure.text(x_in / width_in, 1 - y_in / height_in, words, parse_math=False, **{"color": INK, **style})


def save_png(
    figure: Figure, path: Path, *, dpis: Sequence[int] = (200,), max_bytes: int | None = None
) -> None:
    """Write a PNG atomically, at the first of `dpis` that stays under `max_bytes`, or the last."""
    is_new = not path.parent.exists()
    make_directory(path.parent)
    with write_aside(path) as aside:
        if is_new:
            mark_output(path.parent)
        for dpi in dpis:
            figure.savefig(aside, format="png", dpi=dpi, facecolor="white")
            if max_bytes is None or aside.stat().st_size <= max_bytes:
                break
