"""Pictures of what a model predicts: the predicted blocks put together into an image, beside the true one.

`draw_predictions` makes one contact sheet, `PredictionMonitor` one every so often while a run trains,
`predict` one of a source, with every image's loss beside what it would be without a model. All see only the
model's public calls.
"""

from __future__ import annotations

import json
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
from nextblock.models import NextBlockModel
from nextblock.settings import require
from nextblock.tables import Shown, finite
from nextblock.targets import PixelTargets, make_targets
from nextblock.train import MonitorEvent
from nextblock.visualize.sheet import Look, draw_sheet, hatch, shown_channels

AT_ONCE = 16
"""Images that go through the model together."""

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
    predicted. If the model predicts normalised pixels (`config.norm_pixels`), a prediction says nothing of
    the block's brightness and contrast: it is un-normalised with the mean and deviation of the *true* block
    (unbiased variance, 1e-6 inside the root), taken from `images` (normalised, as the model saw them). Raw
    predictions are shown as they are. `shown` is 3 with three channels or more (the first three), else 1.
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
    # The inverse permutation: where in the order each place of the raster comes.
    in_raster_order = by_position.index_select(1, torch.argsort(order))
    pictures = _visible(unpatchify(in_raster_order, config.block_grid, config.block_px), mean, std)
    known = _predicted_pixels(config, order).to(pictures.device)
    return torch.where(known, pictures, hatch(config).to(pictures.device))


def _visible(
    images: Float[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b shown h w"]:
    """Undo the normalisation, clip to [0, 1] (NaN is black), keep one or three channels."""
    shift, scale = (torch.tensor(one, dtype=torch.float32, device=images.device) for one in (mean, std))
    pixels = images.float() * rearrange(scale, "c -> c 1 1") + rearrange(shift, "c -> c 1 1")
    return torch.nan_to_num(pixels, nan=0.0).clamp(0, 1)[:, : shown_channels(images.shape[1])]


def _predicted_pixels(config: ModelConfig, order: Int64[Tensor, " k"]) -> Bool[Tensor, "h w"]:
    """True where a pixel lies in a block that is predicted: usually everywhere but in the first."""
    _, first, count = config.steps(config.distances[0])
    predicted = torch.zeros(config.num_blocks, dtype=torch.bool)
    predicted[order[first : first + count]] = True
    pieces = predicted[None, :, None].expand(1, -1, config.block_px[0] * config.block_px[1])
    return unpatchify(pieces, config.block_grid, config.block_px)[0, 0]


# -------------------------------------------------------------------------------- pictures


def _look(
    model: NextBlockModel,
    images: Float[Tensor, "b c h w"],
    mean: Sequence[float],
    std: Sequence[float],
    block_order: Int64[Tensor, " k"] | None = None,
) -> Look:
    """Predict every next block once, without gradients or drop path; the model's mode stays as it was."""
    config = replace(model.config, image_size=(images.shape[2], images.shape[3]))
    require(
        len(mean) == len(std) == config.in_chans,
        f"the model's images have {config.in_chans} channels, but the mean has {len(mean)} and the deviation "
        f"{len(std)}; give data.mean and data.std with one number a channel",
    )
    if block_order is None:  # the order that a model takes when it is given none
        block_order = block_orders(config.order, config.block_grid, config.order_seed)[0]
    check_order(block_order.cpu(), config.num_blocks)
    on_device, was_training = block_order.to(images.device), model.training
    model.eval()
    config.check_predicts()
    assert model.targets is not None, "it predicts"
    parts = []
    try:
        with torch.no_grad():
            # What the layers make of all images at once may not fit into memory; what they predict does.
            for some in images.split(AT_ONCE):
                out = model(some, block_order=on_device)
                targets = model.targets_of(some, on_device)
                parts.append((out.block_loss, out.predictions.float().cpu(), out.targets.cpu(), targets))
            block_loss, predictions, wanted, targets = (torch.cat(kind) for kind in zip(*parts, strict=True))
            # Of all images together: how frequent a token is depends on them.
            references = model.targets.reference_losses(targets)
    finally:
        model.train(was_training)
    images, order = images.float().cpu(), block_order.cpu()
    drawn = model.targets.to_pixels(predictions, wanted, _predicted_blocks(images, config, order))
    return Look(
        config=config,
        is_raster=order.tolist() == list(range(len(order))),
        originals=_visible(images, mean, std),
        pictures=_joined(drawn, config, order, mean, std),
        predicted=_predicted_pixels(config, order),
        losses=block_loss.float().mean(1).cpu(),
        baselines={name: losses.cpu() for name, losses in references.items()},
    )


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

    `images` are normalised and on the model's device; `mean` and `std` bring them back to [0, 1]. Without
    `block_order` it is the model's own (of a random set, the first).
    """
    require(
        titles is None or len(titles) == len(images),
        f"{len(titles or ())} titles for {len(images)} images; give one a title each, or none",
    )
    draw_sheet(_look(model, images, mean, std, block_order), path, titles)


class PredictionMonitor:
    """Draws the same images at each call, RUN/pictures/step_00001000.png, and logs their mean loss."""

    def __init__(
        self, images: UInt8[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float], every: str
    ) -> None:
        self.images, self.mean, self.std, self.every = images, tuple(mean), tuple(std), every

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Draw the images as they are predicted at this step."""
        images = normalize(self.images.to(event.device), self.mean, self.std)
        look = _look(model, images, self.mean, self.std)
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
class PredictResult(Shown):
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
    model, config = model.to(device), model.config
    look = _look(model, normalize(images.to(device), data.mean, data.std), data.mean, data.std)
    kinds = {kind: losses.tolist() for kind, losses in look.baselines.items()}
    rows = tuple(
        ImageLoss(name=name, loss=loss, baselines={kind: losses[i] for kind, losses in kinds.items()})
        for i, (name, loss) in enumerate(zip(names, look.losses.tolist(), strict=True))
    )
    result = PredictResult(picture=out_dir / "predictions.png", rows=rows, bad=bad)
    draw_sheet(look, result.picture, names)
    content = {
        "mean_loss": result.mean_loss,
        **make_targets(config).facts,
        "images": [row.as_dict() for row in rows],
        "bad": [{"name": sample.name, "reason": sample.reason} for sample in bad],
    }
    with write_aside(out_dir / "predictions.json") as aside:
        aside.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return result


def some_images(
    source: Source, data: DataConfig, image_size: Size, count: int
) -> tuple[UInt8[Tensor, "b c h w"], list[str], tuple[BadSample, ...]]:
    """Up to `count` images evenly spaced over a source, their names, and those that cannot be read."""
    require(count >= 1, f"num_images is {count}; draw at least 1")
    # One from the middle of each of as many equal parts.
    parts = min(len(source), count)
    indices = (2 * np.arange(parts, dtype=np.int64) + 1) * len(source) // (2 * parts)
    batches = list(eval_batches(source, data, image_size, count, indices))
    bad = tuple(sample for batch in batches for sample in batch.bad)
    images = torch.cat([batch.images for batch in batches])
    reasons = "; ".join(f"{sample.name}: {sample.reason}" for sample in bad[:3])
    require(len(images) > 0, f"none of the {len(bad)} chosen images of {source.spec} can be read ({reasons})")
    names = [source.name(int(sample)) for batch in batches for sample in batch.samples]
    return images, names, bad
