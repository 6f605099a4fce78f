"""Accuracies by benchmark as a picture: a row for each, a model's dot among published ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nextblock.visualize.figure import INK, MUTED, save_png

STYLES = (
    ("o", "#c2410c"),
    ("s", MUTED),
    ("^", "#0969da"),
    ("D", "#8250df"),
    ("o", "#1a7f37"),
    ("v", "#1a7f37"),
)
"""Marker and colour of each model; the first is filled."""


def draw_suite(
    titles: Sequence[str], top1: Mapping[str, Sequence[float | None]], path: Path | None = None
) -> Figure:
    """Draw the top-1 accuracies of up to six models, the first in front; None has no dot."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    for (label, values), (marker, colour) in zip(top1.items(), STYLES, strict=False):
        known = [(100 * value, row) for row, value in enumerate(values) if value is not None]
        is_first = label == next(iter(top1))
        style = {"mfc": colour, "ms": 7, "zorder": 3} if is_first else {"mfc": "none", "ms": 5.5}
        x, y = [x for x, _ in known], [row for _, row in known]
        axes.plot(x, y, marker, color=colour, label=label, **style)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_xlim(-1, 101)
    axes.set_xlabel("top-1 accuracy of an attentive probe (%)", color=INK)
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    if path is not None:
        save_png(figure, path)
    return figure
