"""What every figure here shares: the colours of its words, a text that wraps, a file that appears whole.

Figures are made through matplotlib's objects (`matplotlib.figure.Figure`), never through pyplot's global
state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

__all__ = ["INK", "MUTED", "save_png", "wrapped"]

INK = "#1f2328"
MUTED = "#656d76"


def wrapped(text: str, width_in: float, size_pt: float) -> str:
    """Break `text` into lines that fit `width_in` inches, by DejaVu Sans' mean letter width."""
    return textwrap.fill(text, width=max(20, int(width_in * 72 / (size_pt * 0.54))), break_on_hyphens=False)


def save_png(
    figure: Figure, path: Path, *, dpis: Sequence[int] = (200,), max_bytes: int | None = None
) -> None:
    """Write a PNG aside, then rename it: at the first of `dpis` that stays under `max_bytes`, or the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    try:
        for dpi in dpis:
            figure.savefig(aside, format="png", dpi=dpi, facecolor="white")
            if max_bytes is None or aside.stat().st_size <= max_bytes:
                break
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
