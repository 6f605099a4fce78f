"""The images that a model predicts worst and best, each above the losses of its blocks as a heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.colors import Normalize
from torch import Tensor

from nextblock.config import ModelConfig
from nextblock.logs import counted
from nextblock.targets import make_targets
from nextblock.visualize.sheet import (
    banded,
    channel_words,
    coloured,
    draw_cells,
    pictures_of,
    pixels_of_blocks,
)

QUANTILES = (0.01, 0.99)
"""Of the losses of all blocks: the ends of the colour scale."""


def heat_maps(
    losses: Float[np.ndarray, "m k"], config: ModelConfig, scale: Normalize
) -> Float[Tensor, "m 3 h w"]:
    """Every block in the colour of its loss, at the size of the image; NaN is hatched."""
    return coloured(pixels_of_blocks(torch.from_numpy(losses), config), scale, config)


def draw_surprise(
    path: Path,
    config: ModelConfig,
    images: UInt8[Tensor, "m c h w"],
    losses: Float[np.ndarray, "m k"],
    rows: Sequence[Mapping[str, Any]],
    all_losses: Float[np.ndarray, "n k"],
    score: str,
) -> None:
    """Draw images and heat maps by the "group" of their rows, which `score` ranks.

    Colours span nearly all of `all_losses`, those of the whole set.
    """
    low, high = np.nanquantile(all_losses, QUANTILES).tolist()
    scale = Normalize(low, max(high, low + 1e-6), clip=True)
    pictures, maps = pictures_of(images), pictures_of(heat_maps(losses, config, scale))
    lines, names = [], []
    for group in dict.fromkeys(row["group"] for row in rows):
        of_group = [i for i, row in enumerate(rows) if row["group"] == group]
        some = [rows[i] for i in of_group]
        more, more_names = banded(
            {f"{group}\nscores": pictures[of_group], "loss of\nblocks": maps[of_group]},
            [f"mean {row['mean_loss']:.3f}\nlargest {row['largest_loss']:.3f}" for row in some],
            ["\n".join(filter(None, (row["name"], row["class"]))) for row in some],
        )
        lines += more
        names += more_names
    sentences = [
        f"Score: the {score} loss of an image's blocks.",
        *make_targets(config).words[:1],
        f"Colours: from the 1st to the 99th percentile of the losses of all blocks of "
        f"{counted(len(all_losses), 'image')}, {low:.2g} to {high:.2g}.",
        *["Hatched blocks are not predicted."] * bool(np.isnan(losses).any()),
        *channel_words(config.in_chans),
    ]
    title = "Surprise: how badly blocks are predicted"
    draw_cells(
        lines, path, title=title, caption=" ".join(sentences), names=names, blocks_of=config, bar=(1, scale)
    )  # fmt: skip
