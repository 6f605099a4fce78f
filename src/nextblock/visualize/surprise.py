"""The images that a model predicts worst and best, each above the losses of its blocks as a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, UInt8
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import Tensor

from nextblock.config import ModelConfig
from nextblock.logs import counted
from nextblock.targets import make_targets
from nextblock.visualize.figure import MUTED, axes_at, save_png, text_at, wrapped
from nextblock.visualize.sheet import (
    ERROR_COLOURS,
    MAX_PICTURE_BYTES,
    channel_words,
    draw_cell,
    drawn_channels,
    hatch,
    shortened,
    side_by_side,
)

COLUMNS = 8
QUANTILES = (0.01, 0.99)
"""Of the losses of all blocks: the ends of the colour scale."""
LEFT_IN, GAP_IN, BAR_IN = 0.75, 0.12, 0.75


def heat_maps(
    losses: Float[np.ndarray, "m k"], config: ModelConfig, scale: Normalize
) -> Float[Tensor, "m 3 h w"]:
    """Every block in the colour of its loss, at the size of the image; NaN is hatched."""
    colours = torch.from_numpy(ERROR_COLOURS(scale(losses))).float()[..., :3]
    (rows, columns), (height, width) = config.block_grid, config.block_px
    pattern = "m (r q) c -> m c (r h) (q w)"
    maps = repeat(colours, pattern, r=rows, q=columns, h=height, w=width)
    known = torch.from_numpy(~np.isnan(losses))[..., None]
    return torch.where(repeat(known, pattern, r=rows, q=columns, h=height, w=width), maps, hatch(config))


def draw_surprise(
    path: Path,
    config: ModelConfig,
    images: UInt8[Tensor, "m c h w"],
    losses: Float[np.ndarray, "m k"],
    rows: Sequence[Mapping[str, Any]],
    all_losses: Float[np.ndarray, "n k"],
    score: str,
) -> None:
    """Draw images and heat maps as a PNG of at most `MAX_PICTURE_BYTES`, by the "group" of their rows.

    Colours span nearly all of `all_losses`, those of the whole set. `score` is what ranks the rows.
    """
    low, high = np.nanquantile(all_losses, QUANTILES).tolist()
    scale = Normalize(low, max(high, low + 1e-6), clip=True)
    pictures = side_by_side(images[:, : drawn_channels(images.shape[1])])
    maps = heat_maps(losses, config, scale)
    groups = [[i for i, row in enumerate(rows) if row["group"] == group] for group in ("highest", "lowest")]
    columns = min(COLUMNS, max(map(len, groups)))
    height_px, width_px = pictures.shape[-2:]
    width_in = min(2.0, max(1.15, 9.2 / columns), max(0.8, 2.4 * width_px / height_px))
    # Of tiled channels a heat map has the size of one panel, in a cell as wide as all of them.
    cells_in = [width_in * height_px / width_px, width_in * maps.shape[-2] / maps.shape[-1]]
    # Above the cells name and class, below them the two scores.
    above_in = 0.3 if all(row["class"] is None for row in rows) else 0.43
    band_in = above_in + sum(cells_in) + 0.07 + 0.45
    across_in = LEFT_IN + columns * (width_in + GAP_IN) + BAR_IN
    sentences = [
        f"Score: the {score} loss of an image's blocks.",
        *make_targets(config).words[:1],
        f"Colours: from the 1st to the 99th percentile of the losses of all blocks of "
        f"{counted(len(all_losses), 'image')}, {low:.2g} to {high:.2g}.",
    ]
    if np.isnan(losses).any():
        sentences.append("Hatched blocks are not predicted.")
    sentences += channel_words(config.in_chans)
    caption = wrapped(" ".join(sentences), across_in - 0.4, 8)
    bands = [group[at : at + columns] for group in groups for at in range(0, len(group), columns)]
    top_in = 0.55
    figure = Figure(figsize=(across_in, top_in + band_in * len(bands) + 0.16 * (caption.count("\n") + 2)))
    text_at(figure, 0.2, 0.2, "Surprise: how badly blocks are predicted", size=13, weight="bold", va="top")
    for number, band in enumerate(bands):
        y = top_in + number * band_in + above_in
        words = f"{rows[band[0]]['group']}\nscores"
        text_at(figure, LEFT_IN - 0.1, y + cells_in[0] / 2, words, size=8.5, ha="right", va="center")
        below = y + cells_in[0] + 0.07
        words = "loss of\nblocks"
        text_at(figure, LEFT_IN - 0.1, below + cells_in[1] / 2, words, size=8.5, ha="right", va="center")
        for column, image in enumerate(band):
            x, row = LEFT_IN + column * (width_in + GAP_IN), rows[image]
            draw_cell(axes_at(figure, x, y, width_in, cells_in[0]), pictures[image], config)
            draw_cell(axes_at(figure, x, below, width_in, cells_in[1]), maps[image], config)
            middle, letters = x + width_in / 2, int(width_in * 72 / (7.5 * 0.62))
            name = "\n".join(
                shortened(row[key], letters) for key in ("name", "class") if row[key] is not None
            )
            text_at(figure, middle, y - 0.05, name, size=7.5, ha="center", va="bottom", color=MUTED)
            words = f"mean {row['mean_loss']:.3f}\nlargest {row['largest_loss']:.3f}"
            text_at(figure, middle, below + cells_in[1] + 0.06, words, size=8, ha="center", va="top")
        if number == 0:
            axes = axes_at(figure, LEFT_IN + columns * (width_in + GAP_IN), below, 0.09, cells_in[1])
            bar = figure.colorbar(ScalarMappable(scale, cmap=ERROR_COLOURS), cax=axes, format="%.2g")
            bar.set_ticks([low, (low + high) / 2, high])
            bar.outline.set_visible(False)  # type: ignore[operator]
            axes.tick_params(labelsize=7, length=2, width=0.5, color=MUTED, labelcolor=MUTED)
    y = top_in + band_in * len(bands) + 0.05
    text_at(figure, 0.2, y, caption, size=8, color=MUTED, va="top")
    save_png(figure, path, dpis=(200, 150, 110, 80, 60), max_bytes=MAX_PICTURE_BYTES)
