"""The loss curve as a PNG, for the report in Markdown."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

from nextblock.errors import UsageError
from nextblock.logs import printable
from nextblock.report.read import RunSummary
from nextblock.visualize.words import BASELINE_WORDS


def plot_losses(summary: RunSummary, path: Path) -> None:
    """Draw the losses by step, those that need no model as horizontal lines, and the learning rate below."""
    from matplotlib.figure import Figure

    from nextblock.visualize.figure import MUTED, save_png

    if not summary.train:
        raise UsageError(
            f"{summary.training_dir / 'metrics.jsonl'} holds no training step yet; train before drawing"
        )
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps, values = summary.series("loss")
    line, label = {"color": "#0969da", "linewidth": 1.6}, "training"
    if len(values) > 100:
        losses.plot(steps, values, **{**line, "linewidth": 0.7}, alpha=0.3)
        # A running mean over the last fiftieth of the curve, at least ten values.
        window, sums = max(10, len(values) // 50), [0.0, *accumulate(values)]
        starts = [max(0, end - window) for end in range(1, len(sums))]
        values = [(sums[end] - sums[start]) / (end - start) for end, start in enumerate(starts, start=1)]
        label = "training (smoothed)"
    losses.plot(steps, values, **line, label=label)
    if summary.val:
        line = {"color": "#bc4c00", "linewidth": 1.6, "marker": "o", "markersize": 3}
        losses.plot(*summary.series("val_loss"), **line, label="validation")
    for name, value in summary.baselines.items():
        # Two lines may lie close together: their words stand at different places.
        is_plain = name in ("zero", "uniform", "chance")
        style, x, side = ("--", 1.0, "right") if is_plain else (":", 0.5, "center")
        losses.axhline(value, color=MUTED, linewidth=1.1, linestyle=style)
        losses.annotate(
            f"{BASELINE_WORDS.get(name, name)}: {value:.3f}",
            (x, value),
            xytext=(0, 2),
            xycoords=losses.get_yaxis_transform(),
            textcoords="offset points",
            ha=side,
            va="bottom",
            fontsize=8,
            color=MUTED,
        )
    losses.margins(y=0.08)
    losses.set_ylabel("loss")
    losses.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=8, frameon=False)
    rates.plot(*summary.series("lr"), color=MUTED, linewidth=1.2)
    rates.set_ylim(bottom=0)
    rates.set_ylabel("lr")
    rates.set_xlabel("step")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    rates.yaxis.get_offset_text().set_size(8)
    for axes in (losses, rates):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.grid(axis="y", linewidth=0.4, alpha=0.5)
    losses.set_title(f"Loss of {printable(summary.name)}", loc="left", fontsize=11, parse_math=False)
    save_png(figure, path, dpis=(160,))
