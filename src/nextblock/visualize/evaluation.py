"""Pictures of a probe: how its heads fared by learning rate and by layer, and which classes they mix up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
from jaxtyping import Float, Int64
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nextblock.evaluate.probe.config import EncoderName, ProbeCandidate, ProbeResult, ProbeRow
from nextblock.evaluate.probe.recipes import HeadName
from nextblock.evaluate.probe.tables import layer_words
from nextblock.visualize.figure import INK, MUTED, save_png, wrapped

__all__ = ["draw_confusion", "draw_probe"]

MAX_LABELLED_CLASSES = 40
MAX_NAMED_LINES = 8
"""Beyond so many lines only the winners' are named."""

HEAD_COLOURS: dict[HeadName, str] = {"attentive": "#0969da", "linear": "#c2410c", "mlp": "#1a7f37"}
BASELINE_STYLES: dict[EncoderName, str] = {"untrained": "--", "raw pixels": ":"}
GRID = "#d0d7de"


def draw_probe(result: ProbeResult, out: Path) -> list[Path]:
    """Draw probe.png, and confusion-HEAD.png for each head on the trained encoder, into `out`.

    Returns what was drawn: probe.png only where several learning rates or choices of layers competed, a
    confusion matrix only where the result has one.
    """
    drawn = []
    if (curves := _curves(result)) is not None:
        save_png(curves, out / "probe.png", dpis=(160,))
        drawn.append(out / "probe.png")
    for head in get_args(HeadName):
        row = _measured(result, head)
        if row is not None and row.confusion is not None:
            path = out / f"confusion-{head}.png"
            title = f"{row.head} head on {row.split}: top-1 {row.top1:.1%}"
            draw_confusion(row.confusion, result.class_names, title, path)
            drawn.append(path)
    return drawn


# ------------------------------------------------------------------------------------------------ the curves


class _Kind(NamedTuple):
    """What makes a line: everything but the learning rate."""

    encoder: EncoderName
    head: HeadName
    layers: tuple[int, ...]
    attention: str | None
    tokens: str | None
    weight_decay: float


def _curves(result: ProbeResult) -> Figure | None:
    """Top-1 by learning rate and by layer, as far as these vary; None where there was nothing to choose."""
    grid = [candidate for candidate in result.grid if candidate.chosen_on is not None]
    trained = [candidate for candidate in grid if candidate.encoder == "trained"]
    panels = []
    if len({candidate.lr for candidate in trained}) > 1:
        panels.append(_draw_rates)
    if any(len(_choices(trained, head)) > 1 for head in get_args(HeadName)):
        panels.append(_draw_layers)
    if not panels:
        return None
    figure = Figure(figsize=(1.2 + 5.4 * len(panels), 5.0), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for one, draw in zip(axes, panels, strict=True):
        draw(one, grid)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(which="both", labelsize=8, colors=INK)
        one.grid(axis="y", color=GRID, linewidth=0.6)
        one.set_axisbelow(True)
        one.margins(y=0.1)
        one.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    if panels[0] is _draw_rates and result.resolved.get("official_warmup_trap"):
        axes[0].set_xlabel("learning rate as given (the official trap: a tenth of it counts)", color=INK)
    split = {"choice": "held out of train"}.get(str(grid[0].chosen_on), grid[0].chosen_on)
    axes[0].set_ylabel(f"top-1 (%), {split}", color=INK)
    return figure


def _draw_rates(axes: Axes, grid: Sequence[ProbeCandidate]) -> None:
    """A line for each head x layers x attention, the winners in front; baselines by the best of theirs."""
    trained = [candidate for candidate in grid if candidate.encoder == "trained"]
    lines = list(dict.fromkeys(map(_kind, trained)))
    winners = {_kind(candidate) for candidate in trained if candidate.winner}
    for kind in lines:
        in_front = kind in winners
        is_named = in_front or len(lines) <= MAX_NAMED_LINES
        axes.plot(
            *_by_rate([candidate for candidate in trained if _kind(candidate) == kind]),
            color=HEAD_COLOURS[kind.head],
            linewidth=1.8 if in_front else 0.9,
            alpha=1 if in_front else 0.45,
            marker="o",
            markersize=3.5 if in_front else 2.5,
            label=_words(kind, [line for line in lines if line.head == kind.head]) if is_named else None,
        )
    for encoder, style in BASELINE_STYLES.items():
        for head in get_args(HeadName):
            others = [one for one in grid if (one.encoder, one.head) == (encoder, head)]
            if others:
                label = f"{encoder}, {head}" if len({line.head for line in lines}) > 1 else encoder
                colour = HEAD_COLOURS[head]
                axes.plot(*_by_rate(others), style, color=colour, linewidth=1, alpha=0.7, label=label)
    _mark(axes, [(one.lr, one) for one in trained if one.winner])
    diverged = sorted({one.lr for one in trained if one.diverged})
    if diverged:
        heights = [0.02] * len(diverged)
        where = axes.get_xaxis_transform()
        axes.plot(diverged, heights, "x", color=MUTED, markersize=5, transform=where, label="some diverged")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=INK)


def _draw_layers(axes: Axes, grid: Sequence[ProbeCandidate]) -> None:
    """By layer the best of its learning rates; several together are a bar from the first to the last."""
    trained = [candidate for candidate in grid if candidate.encoder == "trained"]
    for head in get_args(HeadName):
        best = _choices(trained, head)
        single = sorted((layers[0], top1) for layers, top1 in best.items() if len(layers) == 1)
        colour = HEAD_COLOURS[head]
        if single:
            axes.plot(
                *zip(*single, strict=True), "o-", color=colour, markersize=3.5, linewidth=1.5, label=head
            )
        together = [(layers, top1) for layers, top1 in best.items() if len(layers) > 1]
        for number, (layers, top1) in enumerate(together):
            label = f"{head}, mean of several" if number == 0 else None
            ends = (min(layers), max(layers))
            axes.plot(ends, (top1, top1), "|-", color=colour, markersize=9, linewidth=2.2, label=label)
            axes.plot(layers, [top1] * len(layers), ".", color=colour, markersize=4)
    winners = [one for one in trained if one.winner]
    _mark(axes, [(sum(one.layers) / len(one.layers), one) for one in winners])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer of the encoder, from 0 (each at its best learning rate)", color=INK)


def _choices(trained: Sequence[ProbeCandidate], head: HeadName) -> dict[tuple[int, ...], float]:
    """Of each choice of layers the best top-1 in percent, where it is known."""
    best: dict[tuple[int, ...], float] = {}
    for one in trained:
        if one.head == head and one.top1 is not None:
            best[one.layers] = max(best.get(one.layers, 0.0), 100 * one.top1)
    return best


def _by_rate(candidates: Sequence[ProbeCandidate]) -> tuple[list[float], list[float]]:
    """Learning rates, and the best top-1 in percent at each; a gap where all diverged."""
    rates = sorted({candidate.lr for candidate in candidates})
    known = {
        rate: [100 * one.top1 for one in candidates if one.lr == rate and one.top1 is not None]
        for rate in rates
    }
    return rates, [max(known[rate], default=float("nan")) for rate in rates]


def _mark(axes: Axes, winners: Sequence[tuple[float, ProbeCandidate]]) -> None:
    """A star with its number on each head that won: that of the best above it, those of others below."""
    known = [(x, one, one.top1) for x, one in winners if one.top1 is not None]
    for place, (x, one, top1) in enumerate(sorted(known, key=lambda winner: -winner[2])):
        colour = HEAD_COLOURS[one.head]
        axes.plot(x, 100 * top1, "*", color=colour, markersize=13, markeredgecolor="white", zorder=5)
        axes.annotate(
            f"{100 * top1:.1f}",
            (x, 100 * top1),
            xytext=(0, -15 if place else 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=colour,
        )


def _kind(one: ProbeCandidate) -> _Kind:
    return _Kind(one.encoder, one.head, one.layers, one.attention, one.tokens, one.weight_decay)


def _words(kind: _Kind, siblings: Sequence[_Kind]) -> str:
    """What tells a line from its head's other lines."""
    return ", ".join(_telling(kind, siblings))


def _telling(kind: _Kind, siblings: Sequence[_Kind]) -> Iterator[str]:
    yield kind.head
    varying = {name for name in _Kind._fields if len({getattr(one, name) for one in siblings}) > 1}
    if "layers" in varying:
        yield f"layer{'s' * (len(kind.layers) > 1)} {layer_words(kind.layers)}"
    if "attention" in varying:
        yield f"attention {kind.attention}"
    if "tokens" in varying:
        yield f"tokens {kind.tokens}"
    if "weight_decay" in varying:
        yield f"decay {kind.weight_decay:g}"


# ---------------------------------------------------------------------------------------------- the confusion


def _measured(result: ProbeResult, head: HeadName) -> ProbeRow | None:
    """The trained encoder's row of a head: of the test if there are several."""
    rows = [row for row in result.rows if (row.encoder, row.head) == ("trained", head)]
    return next((row for row in rows if row.split == "test"), rows[0] if rows else None)


def draw_confusion(
    confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str, path: Path
) -> None:
    """Draw shares by true class, with the numbers of images where there is room for them.

    `confusion` has the true class in rows and the predicted one in columns.
    """
    save_png(_confusion(np.array(confusion), class_names, title), path, dpis=(160,))


def _confusion(counts: Int64[np.ndarray, "c c"], class_names: Sequence[str], title: str) -> Figure:
    classes = len(counts)
    is_labelled = classes <= MAX_LABELLED_CLASSES
    side_in = max(3.6, 0.32 * classes) if is_labelled else 7.2
    names = [name if len(name) <= 24 else f"{name[:13]}…{name[-10:]}" for name in class_names]
    margin_in = 0.9 + (0.075 * max(map(len, names)) if is_labelled else 0)
    width_in = side_in + margin_in + 0.8
    figure = Figure(figsize=(width_in, side_in + margin_in + 0.5), layout="constrained")
    axes = figure.subplots()
    images = counts.sum(axis=1, keepdims=True)
    shares = np.where(images > 0, counts / np.maximum(images, 1), np.nan)
    colours = colormaps["Blues"].with_extremes(bad="#f0f0f0")
    # Of a great many classes single cells are specks: small shares show in darker colours.
    scale = PowerNorm(1 if is_labelled else 0.4, vmin=0, vmax=100)
    picture = axes.imshow(100 * shares, cmap=colours, norm=scale, interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("% of the true class", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8)
    axes.set_xlabel("predicted class", color=INK)
    axes.set_ylabel("true class", color=INK)
    title = f"{title}, {classes} classes, {counts.sum()} images"
    axes.set_title(wrapped(title, width_in - 0.5, 10), fontsize=10, loc="left", color=INK, parse_math=False)
    if is_labelled:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(classes), names, fontsize=7, parse_math=False)
        _write_counts(axes, counts, shares)
    else:
        axes.tick_params(labelsize=8)
    return figure


def _write_counts(axes: Axes, counts: Int64[np.ndarray, "c c"], shares: Float[np.ndarray, "c c"]) -> None:
    """The number of images in every cell that has some."""
    size_pt = min(8.0, 22 / max(2, len(str(counts.max()))))
    for true, told in np.argwhere(counts):
        colour = "white" if shares[true, told] > 0.55 else INK
        axes.text(
            told, true, str(counts[true, told]), ha="center", va="center", fontsize=size_pt, color=colour
        )
