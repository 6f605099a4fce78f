"""The papers' figures, drawn by the code: the order of an image's blocks, and the attention mask."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Int64, UInt8
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

from nextblock.blocks import block_orders, may_attend, patches_of_blocks
from nextblock.config import ModelConfig, RunConfig, pair
from nextblock.logs import counted
from nextblock.presets import model_config
from nextblock.settings import require
from nextblock.visualize.figure import INK, MUTED, axes_at, save_png, text_at, wrapped

HIDDEN, EARLIER, OWN, PREFIX = range(4)
"""Why a token (row) attends to another (column), or that it does not."""
COLOURS = ("#f3f4f6", "#8ec5ff", "#0969da", "#f2b705")
ARROW, GREY = "#bc4c00", "#c9d1d9"
FEW = 16
"""Of more blocks neither their path nor their borders in the mask are drawn."""
TOP_IN, SIDE_IN = 0.95, 3.6


class Geometry(NamedTuple):
    """What is drawn of a model."""

    positions: Int64[np.ndarray, "rows columns"]
    """Of each patch, the place of its block in the order."""
    attends: UInt8[np.ndarray, "s s"]
    """Along the sequence, patches block by block in this order, behind the class token if there is one: how a
    token (row) attends to another (column)."""
    prefix: int
    """Blocks that all tokens attend to; 0: no prefix."""
    masked: int
    """Blocks at the end of the order that are masked and predicted."""


def geometry(config: ModelConfig, prefix: int | None = None) -> Geometry:
    """The order and the mask under which a model is trained; of several orders the first.

    `prefix` is a number of blocks along the order; None: half of them if the model is trained with a prefix,
    else none. Raises `UsageError` for a prefix that the model's mask cannot have.
    """
    k, m, q = config.num_blocks, config.patches_per_block, int(config.class_token)
    is_full = config.encoder_attention == "full" or config.mask_ratio is not None or k == 1
    if prefix is None:
        prefix = k // 2 if config.prefix else 0
    elif prefix:
        knows_prefix = not (is_full or q or config.predict_visible or config.predictor_attention != "native")
        require(knows_prefix, "the attention masks of this model have no prefix; leave --prefix out")
        require(
            0 <= prefix < k, f"prefix is {prefix}; it must be from 0 to {k - 1}, of {counted(k, 'block')}"
        )
    (order, *_) = block_orders(config.order, config.block_grid, config.order_seed)
    positions = torch.empty(config.num_patches, dtype=torch.int64)
    positions[patches_of_blocks(config.grid, pair(config.block_size))[order]] = torch.arange(k)[:, None]

    # Along the sequence: the class token, which sees itself alone and is seen by all, then block by block.
    sequence = torch.cat([torch.full((q,), -1), torch.arange(k).repeat_interleave(m)])
    seen = torch.ones(len(sequence), len(sequence), dtype=torch.bool) if is_full else may_attend(sequence)
    attends = torch.where(seen, EARLIER, HIDDEN)
    if prefix:
        attends[:, (sequence >= 0) & (sequence < prefix)] = PREFIX
    attends[sequence[:, None] == sequence[None]] = OWN
    return Geometry(
        rearrange(positions.numpy(), "(r c) -> r c", r=config.grid[0]),
        attends.numpy().astype(np.uint8),
        prefix,
        config.steps(0).number if config.mask_ratio is not None else 0,
    )


def draw_order(
    preset_or_config: str | ModelConfig | RunConfig, path: str | Path, prefix: int | None = None
) -> Path:
    """Draw the order of a model's blocks and its attention mask as a PNG, and return its path.

    `prefix` is the number of blocks along the order that all patches may attend to; None: half of them if the
    model is trained with a prefix, else none.
    """
    config = preset_or_config
    if isinstance(config, str):
        config = model_config(config)
    config = config.model if isinstance(config, RunConfig) else config
    shown = geometry(config, prefix)
    rows, columns = shown.positions.shape
    grid_high = min(SIDE_IN, SIDE_IN * rows / columns)
    grid_wide = grid_high * columns / rows
    width_in = 0.3 + grid_wide + 0.75 + SIDE_IN + 0.3
    caption = wrapped(_caption(config, shown), width_in - 0.1, 8.5)
    caption_in = TOP_IN + SIDE_IN + 0.52
    figure = Figure(figsize=(width_in, caption_in + 0.165 * (caption.count("\n") + 1) + 0.15))
    left = 0.3
    _draw_grid(axes_at(figure, left, TOP_IN + (SIDE_IN - grid_high) / 2, grid_wide, grid_high), config, shown)
    right = left + grid_wide + 0.75
    _draw_mask(axes_at(figure, right, TOP_IN, SIDE_IN, SIDE_IN), config, shown)
    size = "{}x{}".format(*pair(config.image_size))
    blocks = "{}x{}".format(*pair(config.block_size))
    title = f"{rows}x{columns} patches in {counted(config.num_blocks, 'block')} of {blocks}"
    if config.patches_per_block == 1:
        title = f"{rows}x{columns} patches, each a block"
    text_at(figure, 0.2, 0.16, title, size=13, weight="bold", va="top")
    words = f"an image of {size} px, patches of {config.patch_size} px; order {config.order}"
    text_at(figure, 0.2, 0.43, words, size=8.5, color=MUTED, va="top")
    unit = "patches" if config.patches_per_block == 1 else "blocks"
    names = {HIDDEN: "not seen", PREFIX: "prefix", OWN: "itself" if unit == "patches" else "own block"}
    names[EARLIER] = f"{'other' if _is_full(shown) else 'earlier'} {unit}"
    x, y = right, TOP_IN + SIDE_IN + 0.24
    for kind in np.unique(shown.attends).tolist():
        axes = axes_at(figure, x, y, 0.12, 0.12)
        axes.set(xticks=[], yticks=[], facecolor=COLOURS[kind])
        axes.spines[:].set(linewidth=0.5, color=MUTED)
        text_at(figure, x + 0.17, y + 0.06, names[kind], size=8, va="center")
        x += 0.31 + 0.068 * len(names[kind])
    text_at(figure, 0.2, caption_in, caption, size=8.5, color=MUTED, va="top", linespacing=1.25)
    save_png(figure, Path(path), dpis=(130, 110, 100, 90), max_bytes=60_000)
    return Path(path)


def _is_full(shown: Geometry) -> bool:
    return not (shown.attends == HIDDEN).any()


def _draw_grid(axes: Axes, config: ModelConfig, shown: Geometry) -> None:
    """The patches, coloured by the place of their block, from light to dark."""
    rows, columns = shown.positions.shape
    block, k = pair(config.block_size), config.num_blocks
    shades = colormaps["Blues"](np.linspace(0.08, 0.55, k))[:, :3]  # so light that words can be read
    shades[: shown.prefix] = to_rgb(COLOURS[PREFIX])
    shades[k - shown.masked :] = to_rgb(GREY)
    picture = shades[shown.positions]
    axes.imshow(picture, interpolation="nearest", aspect="auto", extent=(0, columns, rows, 0))
    for draw, patches, side in ((axes.axhline, rows, block[0]), (axes.axvline, columns, block[1])):
        for at in range(1, patches):
            is_edge = at % side == 0
            draw(at, color=INK if is_edge else "white", linewidth=1.1 if is_edge else 0.4)
    axes.set(xticks=[], yticks=[], xlim=(0, columns), ylim=(rows, 0))
    axes.spines[:].set(linewidth=1.1, color=INK)
    # The middle of each block, (x, y) in patches, along the order.
    places = [np.argwhere(shown.positions == number).mean(0)[::-1] + 0.5 for number in range(k)]
    size_pt = 72 * axes.bbox.height / axes.figure.dpi / rows * min(block) * 0.34
    if size_pt >= 4.5:
        for number, (x, y) in enumerate(places):
            # Over the lines between patches, which may run through the middle of a block.
            back = {"facecolor": shades[number], "edgecolor": "none", "pad": 1}
            size = min(size_pt, 13)
            axes.text(x, y, str(number), ha="center", va="center", size=size, color=INK, bbox=back, zorder=3)
    arrow = {
        "arrowstyle": "-|>",
        "mutation_scale": 7,
        "linewidth": 0.8,
        "color": ARROW,
        "shrinkA": 11,
        "shrinkB": 11,
    }
    for start, end in pairwise(places if k <= FEW else ()):
        axes.annotate("", end, start, arrowprops=arrow)


def _draw_mask(axes: Axes, config: ModelConfig, shown: Geometry) -> None:
    colours = ListedColormap(COLOURS)
    n = len(shown.attends)
    axes.imshow(
        shown.attends, cmap=colours, vmin=0, vmax=PREFIX, interpolation="nearest", extent=(0, n, n, 0)
    )
    m, q = config.patches_per_block, int(config.class_token)
    if config.num_blocks <= FEW:
        for at in range(q, n, m):
            axes.axhline(at, color="white", linewidth=0.6)
            axes.axvline(at, color="white", linewidth=0.6)
    ticks = range(config.num_blocks) if config.num_blocks <= FEW else ()
    axes.set_xticks([q + (number + 0.5) * m for number in ticks], list(map(str, ticks)))
    names = ["class"] * q + [str(number) for number in ticks]
    axes.set_yticks([0.5] * q + [q + (number + 0.5) * m for number in ticks], names)
    axes.tick_params(labelsize=7, length=0, colors=MUTED, labeltop=True, labelbottom=False)
    axes.spines[:].set(linewidth=0.6, color=MUTED)
    axes.set_ylabel("who attends, along the sequence", size=8, color=INK)
    axes.yaxis.set_label_coords(-0.1, 0.5)
    axes.set_title("what is attended to", size=8, color=INK)


def _caption(config: ModelConfig, shown: Geometry) -> str:
    """What is seen, in plain words."""
    k, unit = config.num_blocks, "patch" if config.patches_per_block == 1 else "block"
    units = f"{unit}es" if unit == "patch" else f"{unit}s"
    said = [f"Left: the order of the {units}, from light to dark."]
    if config.order == "random":
        said[0] += f" This is the first of {k} random orders; training draws one for each step."
    elif config.order == "per_image":
        said[0] += " This is one random order; training draws another for each image and visit."
    if shown.masked:
        said.append(
            f"The last {shown.masked} of {k} {units} (grey) are masked, and predicted from the others. All "
            "patches attend to all."
        )
    elif _is_full(shown):
        said.append(
            "All patches attend to all, so the model would see what it predicts: it cannot be trained."
        )
    else:
        own = "itself and all earlier patches" if unit == "patch" else "its own block and all earlier blocks"
        said.append(f"Right: a patch (row) attends to {own} (columns).")
        if shown.prefix:
            first = f"first {counted(shown.prefix, unit, units)}" if shown.prefix > 1 else f"first {unit}"
            more = f"All patches attend to the {first}, the prefix (yellow)."
            if config.prefix:
                more += " In training its length is drawn for each image."
            said.append(more)
        first = shown.prefix if shown.prefix > 1 else "one"
        said.append(
            f"All attend to the class token, which sees itself alone; the first {unit} is predicted from it."
            if config.class_token
            else f"Each {unit} but the first {first} is predicted from the {units} before it."
        )
    if config.predictor_attention != "native":
        said.append(f"The predictor attends under a mask of its own: {config.predictor_attention}.")
    if config.feature_attention == "full" and not _is_full(shown):
        said.append("This is the mask of training; features are computed without a mask.")
    return " ".join(said)
