"""The benchmarks' accuracies as a picture: a row each, a model's dot among published ones."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from nextblock.evaluate.suite.benchmarks import BENCHMARKS, FIFTEEN
from nextblock.evaluate.suite.published import PUBLISHED
from nextblock.visualize.figure import INK, MUTED, save_png

__all__ = ["draw_suite", "save_suite"]

_BESIDE = {
    "MAE, ViT-H/14": ("s", MUTED),
    'AIM-0.6B, "ViT-H/14"': ("^", "#0969da"),
    "DINOv2, ViT-g/14 at 516 px": ("D", "#8250df"),
    "XTRA, 100 epochs, ViT-H/14": ("o", "#1a7f37"),
    "XTRA, 800 epochs, ViT-B/16": ("v", "#1a7f37"),
}
"""Published models drawn beside, as hollow markers of a shape and a colour."""

_OURS = "#c2410c"


def draw_suite(top1_percent: Mapping[str, float], model: str) -> Figure:
    """Draw top-1 accuracy in percent by benchmark; a benchmark without a number has no dot."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    rows = range(len(FIFTEEN))
    titles = {benchmark.name: benchmark.title for benchmark in BENCHMARKS}
    for published in PUBLISHED:
        label = f"{published.model}, {published.architecture}"
        if label in _BESIDE:
            known = [(top1, row) for top1, row in zip(published.top1, rows, strict=True) if top1 is not None]
            marker, colour = _BESIDE[label]
            axes.plot(
                *zip(*known, strict=True), marker, color=colour, markerfacecolor="none", ms=5.5, label=label
            )
    ours = [
        (top1_percent[name], row) for row, name in zip(rows, FIFTEEN, strict=True) if name in top1_percent
    ]
    if ours:
        axes.plot(*zip(*ours, strict=True), "o", color=_OURS, ms=7, label=Path(model).name or model)
    axes.set_yticks(list(rows), [titles[name] for name in FIFTEEN])
    axes.set_ylim(len(FIFTEEN) - 0.5, -0.5)
    axes.set_xlim(-1, 101)
    axes.set_xlabel("top-1 accuracy of an attentive probe (%)", color=INK)
    axes.grid(color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def save_suite(path: Path, top1_percent: Mapping[str, float], model: str) -> None:
    """Write the picture as a PNG, whole or not at all."""
    save_png(draw_suite(top1_percent, model), path)
