"""Pictures of evaluations: heads by learning rate, confused classes, where a head looks, a search, the suite.

They take plain rows and arrays.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch.nn.functional import pad

from nextblock.data import Source
from nextblock.logs import counted
from nextblock.models.heads import layer_words
from nextblock.visualize.figure import INK, MUTED, save_png, wrapped
from nextblock.visualize.sheet import Cell, draw_cells, pictures_of, shown_channels

MAX_LABELLED_CLASSES = 40
MAX_NAMED_LINES = 8
"""Of more lines only the winners' are named."""
DRAWN_QUERIES = 8
FAINT = 0.1
"""The weight of the image beneath a map of attention."""
MAX_COLUMNS = 7
"""Images found by a search in one line of its sheet."""

HEAD_COLOURS = {"attentive": "#0969da", "linear": "#c2410c", "ep": "#1a7f37"}
STYLES = {"model": "-", "untrained": "--", "pixels 16x16": ":", "colour histogram": "-."}
LINE = ("encoder", "head", "layers", "attention", "tokens", "weight_decay")
"""What makes a line: everything but the learning rate."""
GRID = "#d0d7de"


def draw_grid(rows: Sequence[Mapping[str, Any]], chosen_on: str | None, path: Path) -> bool:
    """Draw top-1 by learning rate and by layer, as far as these vary; False if there was nothing to choose.

    `rows` are the candidates: encoder, head, lr, layers, ..., top1 (None: diverged) and is_winner.
    """
    ours = [row for row in rows if row["encoder"] == "model"]
    panels = [_draw_rates] if len({row["lr"] for row in ours}) > 1 else []
    if any(len({tuple(row["layers"]) for row in ours if row["head"] == head}) > 1 for head in HEAD_COLOURS):
        panels.append(_draw_layers)
    if not panels or chosen_on is None:
        return False
    figure = Figure(figsize=(1.2 + 5.4 * len(panels), 5.0), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for one, draw in zip(axes, panels, strict=True):
        draw(one, rows)
        for row in ours:
            if row["is_winner"]:
                x = row["lr"] if draw is _draw_rates else sum(row["layers"]) / len(row["layers"])
                y, colour = 100 * (row["top1"] or 0), HEAD_COLOURS[row["head"]]
                one.plot(x, y, "*", color=colour, markersize=13, markeredgecolor="white", zorder=5)
        one.spines[["top", "right"]].set_visible(False)
        one.tick_params(which="both", labelsize=8, colors=INK)
        one.grid(axis="y", color=GRID, linewidth=0.6)
        one.set_axisbelow(True)
        one.margins(y=0.1)
        one.legend(fontsize=8, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.13))
    on = "images held out of train" if chosen_on == "choice" else chosen_on
    axes[0].set_ylabel(f"top-1 (%) on {on}", color=INK)
    save_png(figure, path, dpis=(160,))
    return True


def _draw_rates(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """A line for each choice of features, the winners' in front; of baselines the best at each rate."""
    lines: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        names = LINE if row["encoder"] == "model" else LINE[:2]
        lines.setdefault(tuple(str(row[name]) for name in names), []).append(row)
    of_ours = [line for line in lines if line[0] == "model"]
    for line, members in lines.items():
        encoder, head = line[:2]
        is_ours = encoder == "model"
        label = head if is_ours else f"{encoder}, {head}"
        # Only what distinguishes a line from its head's others.
        siblings = [one for one in of_ours if one[1] == head]
        for i, name in enumerate(LINE):
            if i > 1 and is_ours and len({one[i] for one in siblings}) > 1:
                value = members[0][name]
                label += f", {name.replace('_', ' ')} {layer_words(value) if name == 'layers' else value}"
        winner = next((row for row in members if row["is_winner"]), None)
        if winner is not None and winner["top1"] is not None:
            label += f": {100 * winner['top1']:.1f}"
        in_front = is_ours and winner is not None
        is_named = in_front or not is_ours or len(of_ours) <= MAX_NAMED_LINES
        rates = sorted({row["lr"] for row in members})
        alive = [row for row in members if row["top1"] is not None]
        # A gap if all heads of a rate diverged.
        best = [max((row["top1"] for row in alive if row["lr"] == lr), default=np.nan) for lr in rates]
        axes.plot(
            rates,
            [100 * value for value in best],
            STYLES.get(encoder, "--"),
            color=HEAD_COLOURS[head],
            linewidth=1.8 if in_front else 0.9,
            alpha=1 if in_front else 0.5,
            marker="o",
            markersize=3.5 if in_front else 2,
            label=label if is_named else None,
        )
    diverged = sorted({row["lr"] for row in rows if row["encoder"] == "model" and row["is_diverged"]})
    if diverged:
        where = axes.get_xaxis_transform()
        axes.plot(diverged, [0.02] * len(diverged), "x", color=MUTED, transform=where, label="some diverged")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate", color=INK)


def _draw_layers(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    """By layer the best of its learning rates; several layers together are a bar from first to last."""
    for head, colour in HEAD_COLOURS.items():
        best: dict[tuple[int, ...], float] = {}
        for row in rows:
            if (row["encoder"], row["head"]) == ("model", head) and row["top1"] is not None:
                layers = tuple(row["layers"])
                best[layers] = max(best.get(layers, 0.0), 100 * row["top1"])
        single = sorted((layers[0], top1) for layers, top1 in best.items() if len(layers) == 1)
        if single:
            axes.plot(*zip(*single, strict=True), "o-", color=colour, markersize=3.5, label=head)
        together = [(layers, top1) for layers, top1 in best.items() if len(layers) > 1]
        for i, (layers, top1) in enumerate(together):
            label = None if i else f"{head}, mean of several"
            axes.plot((layers[0], layers[-1]), (top1, top1), "|-", color=colour, markersize=9, label=label)
            axes.plot(layers, [top1] * len(layers), ".", color=colour, markersize=4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("layer of the encoder, from 0 (each at its best learning rate)", color=INK)


def draw_confusion(
    confusion: Sequence[Sequence[int]], class_names: Sequence[str], title: str, path: Path
) -> None:
    """Draw shares by true class (rows) and predicted class (columns), with numbers if there is room."""
    counts = np.array(confusion)
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
    # Cells of many classes are specks: small shares show in darker colours.
    scale = PowerNorm(1 if is_labelled else 0.4, vmin=0, vmax=100)
    colours = colormaps["Blues"].with_extremes(bad="#f0f0f0")
    picture = axes.imshow(100 * shares, cmap=colours, norm=scale, interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=30)
    bar.set_label("% of the true class", fontsize=8, color=INK)
    bar.ax.tick_params(labelsize=8)
    axes.set_xlabel("predicted class", color=INK)
    axes.set_ylabel("true class", color=INK)
    title = f"{title}, {counted(classes, 'class', 'classes')}, {counted(int(counts.sum()), 'image')}"
    axes.set_title(wrapped(title, width_in - 0.5, 10), fontsize=10, loc="left", color=INK, parse_math=False)
    axes.tick_params(labelsize=8)
    if is_labelled:
        axes.set_xticks(range(classes), names, rotation=90, fontsize=7, parse_math=False)
        axes.set_yticks(range(classes), names, fontsize=7, parse_math=False)
        size_pt = min(8.0, 22 / max(2, len(str(counts.max()))))
        for true, predicted in np.argwhere(counts):
            colour = "white" if shares[true, predicted] > 0.55 else INK
            place = {"ha": "center", "va": "center", "fontsize": size_pt, "color": colour}
            axes.text(predicted, true, str(counts[true, predicted]), **place)
    save_png(figure, path, dpis=(160,))


def draw_attention(
    images: UInt8[np.ndarray, "b h w c"],
    attention: Float[np.ndarray, "b q rows columns"],
    path: Path,
    *,
    unit: str = "query",
    names: Sequence[str] = (),
) -> None:
    """Draw images, the mean over queries of how they weigh the patches, and some queries by themselves.

    `unit` is what has a map: a query, or a head of a query. The maps of an image have one scale.
    """
    count, queries = attention.shape[:2]
    chosen = np.unique(np.linspace(0, queries - 1, DRAWN_QUERIES, dtype=int))
    titles = [f"mean of {queries}", *(f"{unit} {number}" for number in chosen)]
    maps = np.concatenate([attention.mean(axis=1, keepdims=True), attention[:, chosen]], axis=1)
    (height, width), (rows, columns) = images.shape[1:3], maps.shape[2:]
    patches = np.arange(height)[:, None] * rows // height, np.arange(width) * columns // width
    cells, labels = [], []
    for image, some, name in zip(images, maps, names or [""] * count, strict=True):
        shown, largest = image[..., : shown_channels(image.shape[-1])], some.max()
        beneath = FAINT * shown.mean(axis=-1, keepdims=True) / 255
        colours = (1 - FAINT) * colormaps["inferno"](some / largest)[..., :3]
        pictures = [one[patches] + beneath for one in colours]
        cells.append([Cell(shown, name or "image"), *map(Cell, pictures, titles)])
        labels.append(f"0 to\n{100 * largest:.1f} %")
    caption = (
        "Colours are shares of the attention, from 0 (black) to the largest of the row (pale yellow), whose "
        "value is on the left. All maps of a row have this scale. The image is faint beneath them."
    )
    draw_cells(cells, path, title="Attention of a head over the patches", caption=caption, names=labels)


SUITE_STYLES = (
    ("o", "#c2410c"),
    ("s", MUTED),
    ("^", "#0969da"),
    ("D", "#8250df"),
    ("o", "#1a7f37"),
    ("v", "#1a7f37"),
)
"""Marker and colour of each model; the first is filled."""


def draw_suite(titles: Sequence[str], top1: Mapping[str, Sequence[float | None]], path: Path) -> Figure:
    """Draw the top-1 accuracies of up to six models by benchmark, the first in front; None has no dot."""
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    for (label, values), (marker, colour) in zip(top1.items(), SUITE_STYLES, strict=False):
        known = [(100 * value, row) for row, value in enumerate(values) if value is not None]
        is_first = label == next(iter(top1))
        style = {"mfc": colour, "ms": 7, "zorder": 3} if is_first else {"mfc": "none", "ms": 5.5}
        x, y = [x for x, _ in known], [row for _, row in known]
        axes.plot(x, y, marker, color=colour, label=label, **style)
    axes.set_yticks(range(len(titles)), titles)
    axes.set_ylim(len(titles) - 0.5, -0.5)
    axes.set_xlim(-1, 101)
    axes.set_xlabel("top-1 accuracy of an attentive probe (%)", color=INK)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    save_png(figure, path)
    return figure


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
