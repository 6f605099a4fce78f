"""Pictures of what a model predicts: the predicted blocks put together into an image, beside the true one.

`draw_predictions` makes one contact sheet, `PredictionMonitor` one every so often while a run trains,
`predict` one of a source, with every image's loss beside what it would be without a model. All see only the
model's public calls.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn.functional import pad

from nextblock.atomic import write_aside
from nextblock.blocks import block_orders, check_order, patchify, take, unpatchify
from nextblock.config import DataConfig, ModelConfig, Size
from nextblock.data import BadSample, Source, eval_batches, normalize
from nextblock.errors import UsageError
from nextblock.models import NextBlockModel
from nextblock.targets import PixelTargets, make_targets
from nextblock.train import MonitorEvent
from nextblock.visualize.sheet import Look, draw_sheet, hatch, shown_channels

__all__ = [
    "ImageLoss",
    "PredictResult",
    "PredictionMonitor",
    "draw_predictions",
    "predict",
    "predicted_image",
]

# -------------------------------------------------------------------------------- blocks to image


def predicted_image(
    predictions: Float[Tensor, "b steps p"],
    images: Float[Tensor, "b c h w"],
    config: ModelConfig,
    order: Int64[Tensor, " k"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "b shown h w"]:
    """The image that the predicted next blocks make, grey or RGB in [0, 1]; the first block is a grey hatch.

    Row i of `predictions` is the block at position i+1 of `order`; the block at position 0 is never
    predicted. Where the model predicts normalised pixels (`config.norm_pixels`), a prediction says nothing of
    the block's brightness and contrast: it is un-normalised with the mean and deviation of the *true* block
    (unbiased variance, 1e-6 inside the root), taken from `images` (normalised, as the model saw them). Raw
    predictions are shown as they are. `shown` is 3 where there are three channels or more (the first three),
    else 1 (the first).
    """
    true = _predicted_blocks(images, config, order)
    return _joined(PixelTargets(config).to_pixels(predictions, true, true), config, order, mean, std)


def _predicted_blocks(
    images: Float[Tensor, "b c h w"], config: ModelConfig, order: Int64[Tensor, " k"]
) -> Float[Tensor, "b steps p"]:
    """The true pixels of the blocks that the first output map predicts."""
    _, first, count = config.steps(config.distances[0])
    return take(patchify(images.float(), config.block_px), order[first : first + count])


def _joined(
    blocks: Float[Tensor, "b steps p"],
    config: ModelConfig,
    order: Int64[Tensor, " k"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "b shown h w"]:
    """Predicted blocks as images; the others are a grey hatch."""
    _, first, count = config.steps(config.distances[0])
    by_position = pad(blocks, (0, 0, first, config.num_blocks - first - count))
    in_raster_order = by_position.index_select(1, torch.argsort(order))
    pictures = _visible(unpatchify(in_raster_order, config.block_grid, config.block_px), mean, std)
    known = _predicted_pixels(config, order).to(pictures.device)
    return torch.where(known, pictures, hatch(config).to(pictures.device))


def _visible(
    images: Float[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b shown h w"]:
    """Undo the normalisation, clip to [0, 1] (what is no number is black), keep one or three channels."""
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device)
    pixels = images.float() * rearrange(scale, "c -> c 1 1") + rearrange(shift, "c -> c 1 1")
    return torch.nan_to_num(pixels, nan=0.0).clamp(0, 1)[:, : shown_channels(images.shape[1])]


def _predicted_pixels(config: ModelConfig, order: Int64[Tensor, " k"]) -> Bool[Tensor, "h w"]:
    """True where a pixel lies in a block that is predicted: usually everywhere but in the first."""
    _, first, count = config.steps(config.distances[0])
    predicted = torch.zeros(config.num_blocks, dtype=torch.bool)
    predicted[order[first : first + count]] = True
    pieces = predicted[None, :, None].expand(1, -1, config.block_px[0] * config.block_px[1])
    return unpatchify(pieces, config.block_grid, config.block_px)[0, 0]


# -------------------------------------------------------------------------------- one look


def _look(
    model: NextBlockModel,
    images: Float[Tensor, "b c h w"],
    mean: Sequence[float],
    std: Sequence[float],
    block_order: Int64[Tensor, " k"] | None,
) -> Look:
    """Predict every next block once, without gradients or drop path; the model's mode stays as it was."""
    config = replace(model.config, image_size=(images.shape[2], images.shape[3]))
    _check_channels(config, mean, std)
    order = _first_order(config) if block_order is None else block_order
    check_order(order.cpu(), config.num_blocks)
    was_training = model.training
    if was_training:
        model.eval()
    try:
        with torch.no_grad():
            on_device = order.to(images.device)
            out = model(images, block_order=on_device)
            assert model.targets is not None
            references = model.targets.reference_losses(model.targets_of(images, on_device))
    finally:
        if was_training:
            model.train()
    images, order, predictions = images.float().cpu(), order.cpu(), out.predictions.float().cpu()
    true = _predicted_blocks(images, config, order)
    drawn = model.targets.to_pixels(predictions, out.targets.cpu(), true)
    return Look(
        config=config,
        is_raster=order.tolist() == list(range(len(order))),
        originals=_visible(images, mean, std),
        pictures=_joined(drawn, config, order, mean, std),
        predicted=_predicted_pixels(config, order),
        losses=out.block_loss.float().mean(1).cpu(),
        baselines={name: losses.cpu() for name, losses in references.items()},
    )


def _first_order(config: ModelConfig) -> Int64[Tensor, " k"]:
    """The order that a model takes when it is given none."""
    return block_orders(config.order, config.block_grid, config.order_seed)[0]


def _check_channels(config: ModelConfig, mean: Sequence[float], std: Sequence[float]) -> None:
    if not len(mean) == len(std) == config.in_chans:
        raise UsageError(
            f"the model's images have {config.in_chans} channels, but the mean has {len(mean)} and the "
            f"deviation {len(std)}; give data.mean and data.std with one number a channel"
        )


# -------------------------------------------------------------------------------- the sheet


def draw_predictions(
    model: NextBlockModel,
    images: Float[Tensor, "b c h w"],
    mean: Sequence[float],
    std: Sequence[float],
    path: Path,
    *,
    block_order: Int64[Tensor, " k"] | None = None,
    titles: Sequence[str] | None = None,
) -> None:
    """Draw a contact sheet, a PNG under 1.5 MB: of each image the original, its prediction and the error.

    `images` are normalised and lie on the model's device; `mean` and `std` bring them back to [0, 1]. Without
    `block_order` it is the model's own (of a random set, the first).
    """
    if titles is not None and len(titles) != len(images):
        raise UsageError(f"{len(titles)} titles for {len(images)} images; give one a title each, or none")
    draw_sheet(_look(model, images, mean, std, block_order), path, titles)


# -------------------------------------------------------------------------------- while training


class PredictionMonitor:
    """Draws the same images at each call, RUN/pictures/step_00001000.png, and logs their mean loss."""

    def __init__(
        self, images: UInt8[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float], every: str
    ) -> None:
        self.images = images
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.every = every

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Draw the images as they are predicted at this step."""
        images = normalize(self.images.to(event.device), self.mean, self.std)
        look = _look(model, images, self.mean, self.std, None)
        with event.group.together():
            if event.group.is_main:
                draw_sheet(look, event.run_dir / "pictures" / f"step_{event.step:08d}.png", None)
        return {"pictures/loss": float(look.losses.mean())}


# -------------------------------------------------------------------------------- a source


@dataclass(frozen=True, kw_only=True)
class ImageLoss:
    """How well one image's blocks were predicted, beside predictions that need no model."""

    name: str
    loss: float
    baselines: dict[str, float]
    """What it would be without a model, by the names of `BASELINE_WORDS`."""

    def as_dict(self) -> dict[str, float | str]:
        """All of it as one row."""
        return {"name": self.name, "loss": self.loss, **self.baselines}


@dataclass(frozen=True, kw_only=True)
class PredictResult:
    """What `predict` found and wrote."""

    picture: Path
    rows: tuple[ImageLoss, ...]
    bad: tuple[BadSample, ...]
    """Images that were chosen but could not be read."""

    @property
    def mean_loss(self) -> float:
        """The mean over the images."""
        return sum(row.loss for row in self.rows) / len(self.rows)


def predict(
    model: NextBlockModel,
    source: Source,
    data: DataConfig,
    out_dir: Path,
    *,
    num_images: int = 8,
    device: torch.device,
) -> PredictResult:
    """Draw how `model` predicts images of a source, OUT/predictions.png, and write their losses beside it.

    Those are in OUT/predictions.json. The images are evenly spaced over the source, so that the classes of a
    sorted one differ, and the same every time. The model is moved to `device`.
    """
    images, names, bad = some_images(source, data, model.config.image_size, num_images)
    model = model.to(device)
    look = _look(model, normalize(images.to(device), data.mean, data.std), data.mean, data.std, None)
    result = PredictResult(picture=out_dir / "predictions.png", rows=_rows(names, look), bad=bad)
    draw_sheet(look, result.picture, names)
    _write_json(result, model.config, out_dir / "predictions.json")
    return result


def some_images(
    source: Source, data: DataConfig, image_size: Size, count: int
) -> tuple[UInt8[Tensor, "b c h w"], list[str], tuple[BadSample, ...]]:
    """Up to `count` images evenly spaced over a source, their names, and those that cannot be read."""
    if count < 1:
        raise UsageError(f"num_images is {count}; draw at least 1")
    batches = list(eval_batches(source, data, image_size, count, _spread(len(source), count)))
    bad = tuple(sample for batch in batches for sample in batch.bad)
    images = torch.cat([batch.images for batch in batches])
    if len(images) == 0:
        reasons = "; ".join(f"{sample.name}: {sample.reason}" for sample in bad[:3])
        raise UsageError(f"none of the {len(bad)} chosen images of {source.spec} can be read ({reasons})")
    names = [source.name(int(sample)) for batch in batches for sample in batch.samples]
    return images, names, bad


def _spread(length: int, count: int) -> Int64[np.ndarray, " n"]:
    """Up to `count` indices, one from the middle of each of as many equal parts."""
    count = min(length, count)
    return (2 * np.arange(count, dtype=np.int64) + 1) * length // (2 * count)


def _rows(names: Sequence[str], look: Look) -> tuple[ImageLoss, ...]:
    return tuple(
        ImageLoss(
            name=name,
            loss=float(loss),
            baselines={kind: float(losses[i]) for kind, losses in look.baselines.items()},
        )
        for i, (name, loss) in enumerate(zip(names, look.losses, strict=True))
    )


def _write_json(result: PredictResult, config: ModelConfig, path: Path) -> None:
    content = {
        "mean_loss": _number(result.mean_loss),
        **make_targets(config).facts,
        "images": [{name: _number(value) for name, value in row.as_dict().items()} for row in result.rows],
        "bad": [{"name": sample.name, "reason": sample.reason} for sample in result.bad],
    }
    with write_aside(path) as aside:
        aside.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _number(value: float | str) -> float | str | None:
    """JSON has no infinity; a loss that is not finite is null."""
    return value if isinstance(value, str) or math.isfinite(value) else None
