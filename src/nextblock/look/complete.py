"""`nextblock.complete`: give a model some blocks of images, and draw how it continues."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nextblock.blocks import block_orders, patchify, unpatchify
from nextblock.config import ModelConfig
from nextblock.logs import counted
from nextblock.look.opened import LookResult, losses_result, open_look
from nextblock.look.settings import CompleteSettings
from nextblock.models import completion
from nextblock.settings import from_dict, require
from nextblock.visualize.predictions import AT_ONCE, some_images, visible
from nextblock.visualize.sheet import banded, channel_words, draw_cells, hatch, pictures_of, pixels_of_blocks

FILL_WORDS = {
    "given_mean": "filling with the given mean",
    "nearest_given": "filling with the nearest block's mean",
}
"""Two baselines that fill hidden blocks without a model."""


def complete(**settings: Any) -> LookResult:
    """Complete images as `nextblock complete` does; `settings` are the fields of `CompleteSettings`.

    Losses are mean squared errors of the hidden pixels (0 to 1): the model's, and those of `FILL_WORDS`.
    """
    asked = from_dict(CompleteSettings, settings)
    opened = open_look(asked)
    model, source, data, _ = opened
    config = model.config
    completion.check_completes(config)
    order = block_orders(asked.order or config.order, config.block_grid, config.order_seed)[0]
    given = _given_blocks(asked, config, order)
    images, names, bad = some_images(source, data, config.image_size, asked.num_images)
    parts = [
        completion.complete(model, opened.ready(some), given, order=order) for some in images.split(AT_ONCE)
    ]
    originals, hidden = images / 255, pixels_of_blocks(~given, config)
    completed = visible(torch.cat([part.images.cpu() for part in parts]), data.mean, data.std)
    filled = {"loss": completed, **_fillings(originals, given, hidden, config)}
    losses = {
        name: (pixels - originals).square()[..., hidden].mean((1, 2)).tolist()
        for name, pixels in filled.items()
    }
    words = {"loss": "mean squared error", **FILL_WORDS}
    means = [f"{words[name]} {sum(values) / len(values):.4f}" for name, values in losses.items()]
    panels = {
        "original": pictures_of(originals),
        "given": pictures_of(torch.where(hidden, hatch(config), originals)),
        "completion": pictures_of(completed),
    }
    rows, lines = banded(panels, [f"error {loss:.4f}" for loss in losses["loss"]], names)
    picture = Path(asked.out) / "completions.png"
    draw_cells(
        rows,
        picture,
        title="Completed by the model",
        subtitle="   ·   ".join(means),
        caption=_caption(config, int(given.sum()), is_own=asked.order is None),
        names=lines,
        blocks_of=config,
    )
    facts = {"given": given.nonzero().flatten().tolist(), "order": parts[0].order.tolist()}
    loss = "mse of hidden pixels from 0 to 1"
    return losses_result(picture, names, losses, bad, loss_function=loss, **facts)


def _given_blocks(
    settings: CompleteSettings, config: ModelConfig, order: Int64[Tensor, " k"]
) -> Bool[Tensor, " k"]:
    """Which blocks the settings give, in raster order."""
    k, (rows, columns) = config.num_blocks, config.block_grid
    if settings.given_blocks is not None:
        largest = max(settings.given_blocks, default=0)
        require(largest < k, f"given_blocks has {largest}, but an image's blocks are 0 to {k - 1}")
        chosen = torch.tensor(settings.given_blocks, dtype=torch.int64)
    elif settings.given is not None:
        require(settings.given < k, f"given is {settings.given} of {k} blocks; hide at least one")
        chosen = order[: settings.given]
    else:
        share = 0.5 if settings.given_rows is None else settings.given_rows
        above = int(share * rows + 1e-6)
        what = f"given_rows {share:g} gives {above} of {rows} rows of blocks"
        require(0 < above < rows, f"{what}; choose another share, or use given or given_blocks")
        chosen = torch.arange(above * columns)
    return torch.isin(torch.arange(k), chosen)


def _fillings(
    images: Float[Tensor, "b c h w"],
    given: Bool[Tensor, " k"],
    hidden: Bool[Tensor, "h w"],
    config: ModelConfig,
) -> dict[str, Float[Tensor, "b c h w"]]:
    """Fill hidden blocks without a model; empty if no block is given."""
    if not given.any():
        return {}
    colour = images[..., ~hidden].mean(-1)[..., None, None]
    # The nearest given block of every block, by the distance of their centres in pixels.
    rows, columns = config.block_grid
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    centres = (places * torch.tensor(config.block_px)).float()
    nearest = given.nonzero().flatten()[torch.cdist(centres, centres[given]).argmin(1)]
    of_blocks = patchify(images, config.block_px).unflatten(-1, (images.shape[1], -1))
    means = of_blocks.mean(-1, keepdim=True).expand_as(of_blocks)[:, nearest].flatten(2)
    near = unpatchify(means, config.block_grid, config.block_px)
    return {
        "given_mean": torch.where(hidden, colour, images),
        "nearest_given": torch.where(hidden, near, images),
    }


def _caption(config: ModelConfig, given: int, *, is_own: bool) -> str:
    how = "from the given ones, all at once"
    if config.mask_ratio is None:
        order = "its own order" if is_own else "the order asked for"
        how = f"one after the other in {order}, each from the given blocks and its own predictions"
    sentences = [f"{given} of {counted(config.num_blocks, 'block')} are given; the others are hatched."]
    sentences.append(f"The model predicts them {how}.")
    if config.norm_pixels:
        sentences.append("It predicts neither brightness nor contrast; they continue the neighbours'.")
    return " ".join([*sentences, *channel_words(config.in_chans)])
