"""Pictures of what a model predicts: the predicted blocks as an image, next to the true one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int64, UInt8
from matplotlib.colors import Normalize
from torch import Tensor

from nextblock.blocks import block_orders, patchify, unpatchify
from nextblock.config import DataConfig, ModelConfig, Size
from nextblock.data import BadSample, Source, eval_batches, normalize
from nextblock.logs import counted
from nextblock.models import NextBlockModel
from nextblock.settings import require
from nextblock.targets import make_targets
from nextblock.train import MonitorEvent
from nextblock.visualize.sheet import (
    MAX_CHANNELS,
    banded,
    channel_words,
    coloured,
    draw_cells,
    hatch,
    pictures_of,
    pixels_of_blocks,
    side_by_side,
)
from nextblock.visualize.words import BASELINE_WORDS

AT_ONCE = 16
"""Images per forward pass."""

Unpredicted = Literal["hatch", "mean"]


class Look(NamedTuple):
    """What one forward pass shows of some images, on the CPU."""

    config: ModelConfig
    originals: Float[Tensor, "b shown h w"]
    pictures: Float[Tensor, "b shown h w"]
    predicted: Bool[Tensor, "h w"]
    losses: Float[Tensor, " b"]
    baselines: dict[str, Float[Tensor, " b"]]
    """The losses without a model, by the names of `BASELINE_WORDS`."""
    zero: Float[Tensor, "b shown h w"] | None
    """As `pictures`, if the model predicted zero; None if zero does not stand for pixels."""
    distance: int
    """How many blocks ahead the predictions are."""
    unpredicted: Unpredicted
    """How to draw blocks that are not predicted."""


def predicted_blocks(config: ModelConfig, distance: int = 1) -> Int64[Tensor, " steps"]:
    """Raster numbers of the blocks that are predicted at a distance, in the model's (first) order."""
    order = block_orders(config.order, config.block_grid, config.order_seed)[0]
    _, first, count = config.steps(config.distances[distance - 1])
    return order[first : first + count]


def joined(
    blocks: Float[Tensor, "b steps p"],
    places: Int64[Tensor, " steps"],
    config: ModelConfig,
    mean: Sequence[float],
    std: Sequence[float],
    background: Float[Tensor, "*b h w"],
) -> Float[Tensor, "b shown h w"]:
    """Put blocks at their places (raster numbers) on a background, as images in [0, 1]."""
    whole = blocks.new_zeros(len(blocks), config.num_blocks, blocks.shape[2])
    whole[:, places] = blocks
    pictures = visible(unpatchify(whole, config.block_grid, config.block_px), mean, std)[:, :MAX_CHANNELS]
    is_known = torch.zeros(config.num_blocks, dtype=torch.bool)
    is_known[places] = True
    return torch.where(pixels_of_blocks(is_known, config), pictures, background)


def visible(
    images: Float[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b c h w"]:
    """Undo the normalisation, clip to [0, 1]; NaN is black."""
    shift, scale = (torch.tensor(one, dtype=torch.float32, device=images.device) for one in (mean, std))
    pixels = images.float() * rearrange(scale, "c -> c 1 1") + rearrange(shift, "c -> c 1 1")
    return torch.nan_to_num(pixels, nan=0.0).clamp(0, 1)


def look_at(
    model: NextBlockModel,
    images: Float[Tensor, "b c h w"],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    distance: int = 1,
    unpredicted: Unpredicted = "hatch",
) -> Look:
    """Predict every block once, without gradients or drop path; leaves the model's mode unchanged."""
    config = replace(model.config, image_size=(images.shape[2], images.shape[3]))
    config.check_predicts()
    ahead = config.num_predicted_blocks
    require(
        distance <= ahead,
        f"distance is {distance}, but this model predicts {counted(ahead, 'block')} ahead "
        f"(model.num_predicted_blocks); give 1{f' to {ahead}' if ahead > 1 else ', or leave it out'}",
    )
    places = predicted_blocks(config, distance)
    require(
        unpredicted == "hatch" or len(places) < config.num_blocks,
        "this model predicts every block, the first from its class token; leave out unpredicted",
    )
    assert model.targets is not None, "it predicts"
    to_pixels, parts, was_training = model.targets.to_pixels, [], model.training
    order = block_orders(config.order, config.block_grid, config.order_seed)[0].to(images.device)
    model.eval()
    try:
        with torch.no_grad():
            # Activations of all images together may not fit into memory; predictions do.
            for some in images.split(AT_ONCE):
                out = model(some, block_order=order)
                part, targets = out.distances[distance - 1], model.targets_of(some, order)
                parts.append((part.block_loss, part.predictions.float().cpu(), part.targets.cpu(), targets))
            block_loss, predictions, wanted, targets = (torch.cat(kind) for kind in zip(*parts, strict=True))
            # Over all images, because token frequencies depend on them; without the blocks that cannot be
            # predicted at this distance.
            references = model.targets.reference_losses(targets[:, distance - 1 :])
    finally:
        model.train(was_training)
    images = images.float().cpu()
    true = patchify(images, config.block_px)[:, places]
    originals = visible(images, mean, std)[:, :MAX_CHANNELS]
    background = hatch(config)
    if unpredicted == "mean":  # each block in its mean colour
        height, width = config.block_px
        means = reduce(originals, "b c (r h) (q w) -> b c (r q)", "mean", h=height, w=width)
        background = pixels_of_blocks(means, config)

    def drawn(outputs: Tensor) -> Tensor:
        return joined(to_pixels(outputs, wanted, true), places, config, mean, std, background)

    return Look(
        config=config,
        originals=originals,
        pictures=drawn(predictions),
        predicted=pixels_of_blocks(torch.isin(torch.arange(config.num_blocks), places), config),
        losses=block_loss.float().mean(1).cpu(),
        baselines={name: losses.cpu() for name, losses in references.items()},
        # Zero logits or vectors are no particular token or patch, so there is nothing to draw.
        zero=drawn(torch.zeros_like(predictions)) if "zero" in references else None,
        distance=distance,
        unpredicted=unpredicted,
    )


def draw_sheet(look: Look, path: Path, names: Sequence[str] | None) -> None:
    """Draw a PNG: each image, its prediction, what predicting zero looks like, and the error."""
    kind = "Masked" if look.config.mask_ratio is not None else "Next"
    predicted = "prediction of\nmasked blocks" if kind == "Masked" else "next-block\nprediction"
    panels = {"original": look.originals, predicted: look.pictures}
    if look.zero is not None:
        panels["predicting\nzero"] = look.zero
    # The absolute error of each channel, or the mean of RGB. The scale ends below the largest errors.
    error = (look.pictures - look.originals).abs()
    error = error.mean(1, keepdim=True) if error.shape[1] == 3 else error
    largest = float(np.quantile(error[..., look.predicted].numpy(), 0.995))
    scale = Normalize(0, max(0.05, math.ceil(largest * 20) / 20), clip=True)
    colours = coloured(error.where(look.predicted, torch.nan), scale, look.config)
    colours = side_by_side(rearrange(colours, "b e c h w -> (b c) e h w"))
    pictures = {name: pictures_of(pixels) for name, pixels in panels.items()}
    pictures["absolute\nerror"] = rearrange(colours, "(b c) 1 h w -> b h w c", c=3).numpy()
    losses = [f"loss {loss:.3f}" for loss in look.losses.tolist()]
    most = 8 if look.originals.shape[1] in (1, 3) else 4
    rows, lines = banded(pictures, losses, names or [""] * len(losses), most=most)
    parts = [f"mean loss {look.losses.mean():.3f}"]
    parts += [f"{BASELINE_WORDS[name]} {losses.mean():.3f}" for name, losses in look.baselines.items()]
    draw_cells(
        rows,
        path,
        title=f"{kind}-block prediction",
        subtitle="   ·   ".join(parts),
        caption=_caption(look),
        names=lines,
        blocks_of=look.config,
        bar=(len(pictures) - 1, scale),
    )


def _caption(look: Look) -> str:
    config = look.config
    block = f"block of {config.block_px[0]} x {config.block_px[1]} px"
    shown = "hatched" if look.unpredicted == "hatch" else "in mean colour"
    skipped = config.steps(config.distances[look.distance - 1]).position
    order = "row by row" if config.order == "raster" else f"order {config.order}"
    ahead = "" if look.distance == 1 else f"{look.distance} blocks ahead, "
    if config.mask_ratio is not None:
        sentences = [f"Each masked {block} is predicted from the visible blocks, which are {shown}."]
    else:
        sentences = [f"Each {block} is predicted {ahead}from the true blocks before it ({order})."]
        if skipped:
            first = f"first {counted(skipped, 'block')}" if skipped > 1 else "first block"
            sentences.append(f"The {first} ({shown}) cannot be predicted.")
        else:
            sentences.append("The first block is predicted from a class token alone.")
    sentences += make_targets(config).words
    if look.zero is not None:
        colours = " and colours" if config.in_chans > 1 else ""
        mean = f"each true block's mean over pixels{colours}, which is given"
        what = mean if config.norm_pixels else "data.mean"
        sentences.append(f"Predicting zero shows {what}; everything else comes from the model.")
    return " ".join([*sentences, *channel_words(config.in_chans)])


class PredictionMonitor:
    """Draws the same images at each call to RUN/pictures/step_00001000.png, and logs their mean loss."""

    def __init__(
        self, images: UInt8[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float], every: str
    ) -> None:
        self.images, self.mean, self.std, self.every = images, tuple(mean), tuple(std), every

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Draw the predictions at this step."""
        images = normalize(self.images.to(event.device), self.mean, self.std)
        look = look_at(model, images, self.mean, self.std)
        with event.group.together():
            if event.group.is_main:
                path = event.run_dir / "pictures" / f"step_{event.step:08d}.png"
                draw_sheet(look, path, None)
                if event.log_image is not None:
                    event.log_image(event.step, "pictures/predictions", path)
        return {"pictures/loss": float(look.losses.mean())}


def some_images(
    source: Source, data: DataConfig, image_size: Size, count: int
) -> tuple[UInt8[Tensor, "b c h w"], list[str], tuple[BadSample, ...]]:
    """Up to `count` images evenly spaced over a source, so classes differ; their names; unreadable ones."""
    batches = list(eval_batches(source, data, image_size, count, evenly_spaced(len(source), count)))
    bad = tuple(sample for batch in batches for sample in batch.bad)
    images = torch.cat([batch.images for batch in batches])
    reasons = "; ".join(f"{sample.name}: {sample.reason}" for sample in bad[:3])
    require(len(images) > 0, f"none of the {len(bad)} chosen images of {source.spec} can be read ({reasons})")
    names = [source.name(int(sample)) for batch in batches for sample in batch.samples]
    return images, names, bad


def evenly_spaced(images: int, count: int) -> Int64[np.ndarray, " n"]:
    """Numbers of up to `count` images: the middle of each of as many equal parts."""
    parts = min(images, count)
    return (2 * np.arange(parts, dtype=np.int64) + 1) * images // (2 * parts)
