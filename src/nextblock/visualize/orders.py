"""The figures of the papers, drawn for any model: the order of an image's blocks, and the attention mask."""

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
from matplotlib.patches import Rectangle

from nextblock.blocks import block_orders, may_attend, patches_of_blocks
from nextblock.config import ModelConfig, RunConfig, pair
from nextblock.logs import counted
from nextblock.presets import model_config
from nextblock.settings import require
from nextblock.visualize.figure import INK, MUTED, axes_at, save_png, text_at, wrapped

HIDDEN, EARLIER, OWN, PREFIX = range(4)
"""Whether a token (row) attends to another (column), and why."""
COLOURS = ("#f3f4f6", "#8ec5ff", "#0969da", "#f2b705")
ARROW, GREY = "#bc4c00", "#c9d1d9"
FEW = 16
"""With more blocks than this, neither their path nor their borders in the mask are drawn."""
TOP_IN, SIDE_IN = 0.95, 3.6


class Geometry(NamedTuple):
    """What is drawn of a model."""

    positions: Int64[np.ndarray, "rows columns"]
    """The place of each patch's block in the order."""
    attends: UInt8[np.ndarray, "s s"]
    """How a token (row) attends to another (column): the class token, if any, then patches block by block."""
    prefix: int
    """Number of blocks that all tokens attend to."""
    masked: int
    """Number of blocks at the end of the order that are masked and predicted."""


def geometry(config: ModelConfig, prefix: int | None = None) -> Geometry:
    """The order (of several, the first) and the mask of a model in training.

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

    # The class token (-1) sees only itself and is seen by all.
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
    is_patch, is_full = config.patches_per_block == 1, not (shown.attends == HIDDEN).any()
    unit, units = ("patch", "patches") if is_patch else ("block", "blocks")
    grid_high = min(SIDE_IN, SIDE_IN * rows / columns)
    left, grid_wide = 0.3, grid_high * columns / rows
    right = left + grid_wide + 0.75
    width_in, caption_in = right + SIDE_IN + 0.3, TOP_IN + SIDE_IN + 0.52
    caption = wrapped(_caption(config, shown, unit, units, is_full=is_full), width_in - 0.1, 8.5)
    figure = Figure(figsize=(width_in, caption_in + 0.165 * (caption.count("\n") + 1) + 0.15))
    _draw_grid(axes_at(figure, left, TOP_IN + (SIDE_IN - grid_high) / 2, grid_wide, grid_high), config, shown)
    mask = axes_at(figure, right, TOP_IN, SIDE_IN, SIDE_IN)
    _draw_mask(mask, config, shown)
    blocks = f"{counted(config.num_blocks, 'block')} of {'{}x{}'.format(*pair(config.block_size))}"
    title = f"{rows}x{columns} patches{', each a block' if is_patch else f' in {blocks}'}"
    text_at(figure, 0.2, 0.16, title, size=13, weight="bold", va="top")
    size = "{}x{}".format(*pair(config.image_size))
    words = f"an image of {size} px, patches of {config.patch_size} px; order {config.order}"
    text_at(figure, 0.2, 0.43, words, size=8.5, color=MUTED, va="top")
    names = (
        "not seen",
        f"{'other' if is_full else 'earlier'} {units}",
        "itself" if is_patch else "own block",
    )
    key = [
        Rectangle((0, 0), 1, 1, facecolor=COLOURS[kind], edgecolor=MUTED, linewidth=0.5, label=name)
        for kind, name in enumerate((*names, "prefix"))
        if (shown.attends == kind).any()
    ]
    where = {"loc": "upper left", "bbox_to_anchor": (0, -0.03), "borderpad": 0, "columnspacing": 1.2}
    mask.legend(handles=key, ncols=4, fontsize=8, frameon=False, handlelength=1, **where)
    text_at(figure, 0.2, caption_in, caption, size=8.5, color=MUTED, va="top", linespacing=1.25)
    save_png(figure, Path(path), dpis=(130, 110, 100, 90), max_bytes=60_000)
    return Path(path)


def _draw_grid(axes: Axes, config: ModelConfig, shown: Geometry) -> None:
    """Draw the patches, coloured by the place of their block, from light to dark."""
    rows, columns = shown.positions.shape
    block, k = pair(config.block_size), config.num_blocks
    shades = colormaps["Blues"](np.linspace(0.08, 0.55, k))[:, :3]  # light enough for the numbers on them
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
    arrow = {"arrowstyle": "-|>", "mutation_scale": 7, "linewidth": 0.8, "color": ARROW}
    arrow |= {"shrinkA": 11, "shrinkB": 11}
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


def _caption(config: ModelConfig, shown: Geometry, unit: str, units: str, *, is_full: bool) -> str:
    sentences = [f"Left: the order of the {units}, from light to dark."]
    if config.order == "random":
        sentences.append(
            f"This is the first of {config.num_blocks} random orders; each training step draws one."
        )
    elif config.order == "per_image":
        sentences.append("This is one random order; training draws another for each image and visit.")
    if shown.masked:
        which = f"The last {shown.masked} of {config.num_blocks} {units} (grey)"
        sentences.append(f"{which} are masked and predicted from the others. All patches attend to all.")
    elif is_full:
        sentences.append(
            "All patches attend to all. Such a model cannot be trained: it sees what it predicts."
        )
    else:
        own = "itself" if unit == "patch" else "its own block"
        sentences.append(f"Right: a patch (row) attends to {own} and all earlier {units} (columns).")
        first = f"first {counted(shown.prefix, unit, units)}" if shown.prefix > 1 else f"first {unit}"
        if shown.prefix:
            sentences.append(f"All patches attend to the prefix (yellow), the {first} of the order.")
        if shown.prefix and config.prefix:
            sentences.append("In training, its length is drawn for each image.")
        if config.class_token:
            sentences.append(f"The class token sees only itself; the {first} is predicted from it.")
        else:
            sentences.append(f"The model does not predict the {first}.")
    if config.predictor_attention != "native":
        sentences.append(f"The predictor has its own mask: {config.predictor_attention}.")
    if config.feature_attention == "full" and not is_full:
        sentences.append("This is the mask of training; features are computed without a mask.")
    return " ".join(sentences)
