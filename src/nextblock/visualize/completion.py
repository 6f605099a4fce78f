"""Pictures of what a model completes: of every image the original, the given blocks and the completion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from matplotlib.figure import Figure
from torch import Tensor

from nextblock.atomic import write_aside
from nextblock.blocks import patchify, unpatchify
from nextblock.config import DataConfig, ModelConfig
from nextblock.data import Source, normalize
from nextblock.logs import counted
from nextblock.models import NextBlockModel
from nextblock.models.completion import complete
from nextblock.tables import finite
from nextblock.visualize.figure import MUTED, axes_at, save_png, text_at, wrapped
from nextblock.visualize.predictions import AT_ONCE, ImageLoss, PredictResult, some_images
from nextblock.visualize.sheet import (
    MAX_PICTURE_BYTES,
    channel_words,
    draw_cell,
    drawn_channels,
    hatch,
    shortened,
    side_by_side,
)

FILL_WORDS = {
    "given_mean": "filling with the given mean",
    "nearest_given": "filling with the nearest block's mean",
}
"""How hidden blocks are filled without a model: by mean colours of all given pixels, or the nearest block."""


def draw_completions(
    model: NextBlockModel,
    source: Source,
    data: DataConfig,
    out_dir: Path,
    given: Bool[Tensor, " k"],
    order: Int64[Tensor, " k"] | None = None,
    *,
    num_images: int = 8,
    device: torch.device,
) -> PredictResult:
    """Complete images of a source; draw OUT/completions.png, write their errors to OUT/completions.json.

    The images are those that `predict` takes. Losses are mean squared errors of the hidden pixels, which are
    clipped to [0, 1]; the alternatives are named in `FILL_WORDS`. The model is moved to `device`.
    """
    images, names, bad = some_images(source, data, model.config.image_size, num_images)
    model, config = model.to(device), model.config
    parts = [
        complete(model, normalize(some.to(device), data.mean, data.std), given, order=order)
        for some in images.split(AT_ONCE)
    ]
    completed = torch.cat([part.images.cpu() for part in parts])
    mean, std = (torch.tensor(one)[:, None, None] for one in (data.mean, data.std))
    originals, completed = images / 255, torch.nan_to_num(completed * std + mean).clamp(0, 1)
    hidden = unpatchify(
        (~given)[None, :, None].expand(1, -1, config.block_px[0] * config.block_px[1]),
        config.block_grid,
        config.block_px,
    )[0, 0]

    def error(filled: Float[Tensor, "b c h w"]) -> list[float]:
        return (filled - originals).square()[..., hidden].mean((1, 2)).tolist()

    fills = {name: error(filled) for name, filled in _fillings(originals, given, hidden, config).items()}
    rows = tuple(
        ImageLoss(name=name, loss=loss, baselines={fill: losses[i] for fill, losses in fills.items()})
        for i, (name, loss) in enumerate(zip(names, error(completed), strict=True))
    )
    result = PredictResult(picture=out_dir / "completions.png", rows=rows, bad=bad)
    panels = {
        "original": originals,
        "given": torch.where(hidden, hatch(config), originals),
        "completion": completed,
    }
    shown = drawn_channels(config.in_chans)
    panels = {name: side_by_side(pictures[:, :shown]) for name, pictures in panels.items()}
    _draw(panels, result, _caption(config, parts[0].given, is_own=order is None), config)
    content = {
        "mean_loss": result.mean_loss,
        "loss_function": "mse of hidden pixels from 0 to 1",
        "given": given.nonzero().flatten().tolist(),
        "order": parts[0].order.tolist(),
        "images": [row.as_dict() for row in rows],
        "bad": [{"name": sample.name, "reason": sample.reason} for sample in bad],
    }
    with write_aside(out_dir / "completions.json") as aside:
        aside.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return result


def _fillings(
    images: Float[Tensor, "b c h w"],
    given: Bool[Tensor, " k"],
    hidden: Bool[Tensor, "h w"],
    config: ModelConfig,
) -> dict[str, Float[Tensor, "b c h w"]]:
    """The images with hidden blocks filled in simple ways; none if no block is given."""
    if not given.any():
        return {}
    colour = images[..., ~hidden].mean(-1)[..., None, None]
    # Of every block the nearest given one, by their centres in pixels.
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
    first = f"{given} of {counted(config.num_blocks, 'block')} are given; the others are hatched."
    if config.mask_ratio is not None:
        sentences = [first, "The model predicts them from the given ones, all at once."]
    else:
        order = "its own order" if is_own else "the order asked for"
        how = f"one after the other in {order}, each from the given blocks and its own predictions"
        sentences = [first, f"The model predicts them {how}."]
    if config.norm_pixels:
        sentences.append("It predicts neither brightness nor contrast; they continue the neighbours'.")
    return " ".join([*sentences, *channel_words(config.in_chans)])


def _draw(
    panels: Mapping[str, Float[Tensor, "b c h w"]], result: PredictResult, caption: str, config: ModelConfig
) -> None:
    """The sheet, laid out in inches like that of predictions: a column for each image, up to eight a band."""
    count, (height_px, width_px) = len(result.rows), next(iter(panels.values())).shape[-2:]
    bands = -(-count // 8)
    columns = -(-count // bands)
    width = min(2.4, max(1.15, 9.2 / columns), max(0.8, 2.6 * width_px / height_px))
    height, left, gap = width * height_px / width_px, 0.95, 0.07
    across = left + columns * (width + gap) + 0.13
    parts = [f"mean squared error {result.mean_loss:.4f}"]
    parts += [
        f"{FILL_WORDS[name]} {sum(row.baselines[name] for row in result.rows) / count:.4f}"
        for name in result.rows[0].baselines
    ]
    subtitle = wrapped("   ·   ".join(parts), across - 0.4, 8.5)
    caption = wrapped(caption, across - 0.4, 8)
    top, band = 0.86 + 0.16 * (subtitle.count("\n") + 1), len(panels) * (height + gap) + 0.56
    below = top + bands * band - 0.16
    figure = Figure(figsize=(across, below + 0.16 * (caption.count("\n") + 1) + 0.1))
    for image, row in enumerate(result.rows):
        x, y = left + image % columns * (width + gap), top + image // columns * band
        name = shortened(row.name, int(width * 72 / (7.5 * 0.62)))
        text_at(figure, x + width / 2, y - 0.05, name, size=7.5, ha="center", va="bottom", color=MUTED)
        for words, pictures in panels.items():
            draw_cell(axes_at(figure, x, y, width, height), pictures[image], config)
            if image % columns == 0:
                text_at(figure, x - 0.1, y + height / 2, words, size=8.5, ha="right", va="center")
            y += height + gap
        text_at(figure, x + width / 2, y, f"error {row.loss:.4f}", size=8.5, ha="center", va="top")
    text_at(figure, 0.2, 0.22, "Completed by the model", size=13, weight="bold", va="top")
    text_at(figure, 0.2, 0.5, subtitle, size=8.5, color=MUTED, va="top")
    text_at(figure, 0.2, below, caption, size=8, color=MUTED, va="top")
    save_png(figure, result.picture, dpis=(200, 170, 150, 130, 110, 90, 70), max_bytes=MAX_PICTURE_BYTES)
