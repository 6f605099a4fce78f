"""Pictures of what a model predicts: the predicted blocks put together into an image, beside the true one.

`draw_predictions` makes one contact sheet, `PredictionMonitor` one every so often while a run trains,
`predict` one of a source, with every image's loss beside what it would be without a model, and on demand each
image by itself. All see only the model's public calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from nextblock.atomic import OUTPUT_MARK, mark_output, write_aside
from nextblock.blocks import block_orders, check_order, patchify, take, unpatchify
from nextblock.config import DataConfig, ModelConfig, Size
from nextblock.data import BadSample, Source, eval_batches, normalize
from nextblock.logs import counted
from nextblock.models import NextBlockModel
from nextblock.settings import require
from nextblock.tables import Shown, finite
from nextblock.targets import PixelTargets, make_targets
from nextblock.train import MonitorEvent
from nextblock.visualize.sheet import Look, draw_sheet, drawn_channels, hatch, panel_gap, side_by_side

AT_ONCE = 16
"""Images that go through the model together."""
IMAGES = "images"
"""Where `predict` writes each image by itself."""

Unpredicted = Literal["hatch", "mean"]

# -------------------------------------------------------------------------------- blocks to image


def predicted_image(
    predictions: Float[Tensor, "b steps p"],
    images: Float[Tensor, "b c h w"],
    config: ModelConfig,
    order: Int64[Tensor, " k"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Tensor, "b shown h w"]:
    """The image that the predicted next blocks make, in [0, 1]; the first block is a grey hatch.

    Row i of `predictions` is the block at position i+1 of `order`; the block at position 0 is never
    predicted. If the model predicts normalised pixels (`config.norm_pixels`), a prediction says nothing of
    the block's brightness and contrast: it is un-normalised with the mean and deviation of the *true* block
    (unbiased variance, 1e-6 inside the root), taken from `images` (normalised, as the model saw them). Raw
    predictions are shown as they are. `shown` are all channels, up to `sheet.MAX_CHANNELS`.
    """
    true = _predicted_blocks(images, config, order)
    return _joined(PixelTargets(config).to_pixels(predictions, true, true), config, order, mean, std)


def _predicted_blocks(
    images: Float[Tensor, "b c h w"], config: ModelConfig, order: Int64[Tensor, " k"], distance: int = 1
) -> Float[Tensor, "b steps p"]:
    """The true pixels of the blocks that are predicted so many blocks ahead."""
    _, first, count = config.steps(config.distances[distance - 1])
    return take(patchify(images.float(), config.block_px), order[first : first + count])


def _joined(
    blocks: Float[Tensor, "b steps p"],
    config: ModelConfig,
    order: Int64[Tensor, " k"],
    mean: Sequence[float],
    std: Sequence[float],
    distance: int = 1,
    others: Float[Tensor, "*b h w"] | None = None,
) -> Float[Tensor, "b shown h w"]:
    """Predicted blocks as images; what is not predicted is taken from `others`, or a grey hatch."""
    _, first, count = config.steps(config.distances[distance - 1])
    by_position = pad(blocks, (0, 0, first, config.num_blocks - first - count))
    # The inverse permutation: where in the order each place of the raster comes.
    in_raster_order = by_position.index_select(1, torch.argsort(order))
    pictures = visible(unpatchify(in_raster_order, config.block_grid, config.block_px), mean, std)
    others = hatch(config) if others is None else others
    known = _predicted_pixels(config, order, distance).to(pictures.device)
    return torch.where(known, pictures, others.to(pictures.device))


def visible(
    images: Float[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "b shown h w"]:
    """Undo the normalisation, clip to [0, 1] (NaN is black), keep the channels that are shown."""
    shift, scale = (torch.tensor(one, dtype=torch.float32, device=images.device) for one in (mean, std))
    pixels = images.float() * rearrange(scale, "c -> c 1 1") + rearrange(shift, "c -> c 1 1")
    return torch.nan_to_num(pixels, nan=0.0).clamp(0, 1)[:, : drawn_channels(images.shape[1])]


def _predicted_pixels(
    config: ModelConfig, order: Int64[Tensor, " k"], distance: int = 1
) -> Bool[Tensor, "h w"]:
    """True where a pixel lies in a block that is predicted: usually everywhere but in the first."""
    _, first, count = config.steps(config.distances[distance - 1])
    predicted = torch.zeros(config.num_blocks, dtype=torch.bool)
    predicted[order[first : first + count]] = True
    pieces = predicted[None, :, None].expand(1, -1, config.block_px[0] * config.block_px[1])
    return unpatchify(pieces, config.block_grid, config.block_px)[0, 0]


def _block_means(pictures: Float[Tensor, "b shown h w"], config: ModelConfig) -> Float[Tensor, "b shown h w"]:
    """Each block in its mean colour."""
    height, width = config.block_px
    means = reduce(pictures, "b c (r h) (q w) -> b c r q", "mean", h=height, w=width)
    return repeat(means, "b c r q -> b c (r h) (q w)", h=height, w=width)


# -------------------------------------------------------------------------------- pictures


def look_at(
    model: NextBlockModel,
    images: Float[Tensor, "b c h w"],
    mean: Sequence[float],
    std: Sequence[float],
    block_order: Int64[Tensor, " k"] | None = None,
    *,
    distance: int = 1,
    unpredicted: Unpredicted = "hatch",
) -> Look:
    """Predict every block once, without gradients or drop path; the model's mode stays as it was."""
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
    ahead = config.num_predicted_blocks
    require(
        distance <= ahead,
        f"distance is {distance}, but this model predicts {counted(ahead, 'block')} ahead "
        f"(model.num_predicted_blocks); give 1{f' to {ahead}' if ahead > 1 else ', or leave it out'}",
    )
    predicted = _predicted_pixels(config, block_order.cpu(), distance)
    require(
        unpredicted == "hatch" or not predicted.all(),
        f"unpredicted is {unpredicted}, but this model predicts every block, the first from its class token; "
        "leave it out",
    )
    assert model.targets is not None, "it predicts"
    parts = []
    try:
        with torch.no_grad():
            # What the layers make of all images at once may not fit into memory; what they predict does.
            for some in images.split(AT_ONCE):
                out = model(some, block_order=on_device)
                part, targets = out.distances[distance - 1], model.targets_of(some, on_device)
                parts.append((part.block_loss, part.predictions.float().cpu(), part.targets.cpu(), targets))
            block_loss, predictions, wanted, targets = (torch.cat(kind) for kind in zip(*parts, strict=True))
            # Of all images together: how frequent a token is depends on them. Blocks before the first that is
            # predicted at this distance count for nothing.
            references = model.targets.reference_losses(targets[:, distance - 1 :])
    finally:
        model.train(was_training)
    images, order = images.float().cpu(), block_order.cpu()
    true, originals = _predicted_blocks(images, config, order, distance), visible(images, mean, std)
    others = _block_means(originals, config) if unpredicted == "mean" else None

    def joined(outputs: Tensor) -> Tensor:
        pixels = model.targets.to_pixels(outputs, wanted, true)  # type: ignore[union-attr]
        return _joined(pixels, config, order, mean, std, distance, others)

    return Look(
        config=config,
        is_raster=order.tolist() == list(range(len(order))),
        originals=originals,
        pictures=joined(predictions),
        # Zeros for logits or vectors stand for no token and no patch in particular: nothing to draw.
        zero=joined(torch.zeros_like(predictions)) if "zero" in references else None,
        predicted=predicted,
        distance=distance,
        is_hatched=unpredicted == "hatch",
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
    draw_sheet(look_at(model, images, mean, std, block_order), path, titles)


class PredictionMonitor:
    """Draws the same images at each call, RUN/pictures/step_00001000.png, and logs their mean loss."""

    def __init__(
        self, images: UInt8[Tensor, "b c h w"], mean: Sequence[float], std: Sequence[float], every: str
    ) -> None:
        self.images, self.mean, self.std, self.every = images, tuple(mean), tuple(std), every

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Draw the images as they are predicted at this step."""
        images = normalize(self.images.to(event.device), self.mean, self.std)
        look = look_at(model, images, self.mean, self.std)
        with event.group.together():
            if event.group.is_main:
                path = event.run_dir / "pictures" / f"step_{event.step:08d}.png"
                draw_sheet(look, path, None)
                if event.log_image is not None:
                    event.log_image(event.step, "pictures/predictions", path)
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
    distance: int = 1,
    unpredicted: Unpredicted = "hatch",
    each_image: bool = False,
) -> PredictResult:
    """Draw how `model` predicts images of a source, OUT/predictions.png, and write their losses beside it.

    Those are in OUT/predictions.json. The images are evenly spaced over the source, so that the classes of a
    sorted one differ, and the same every time. With `each_image` every one is also in OUT/images, the
    original and what is predicted of it side by side. The model is moved to `device`. `UsageError` if the
    model does not predict at this distance, or every block if there is to be something `unpredicted`.
    """
    folder = out_dir / IMAGES
    require(
        not each_image or not folder.exists() or (folder / OUTPUT_MARK).is_file(),
        f"{folder} holds other files, which each_image would replace; choose another --out",
    )
    images, names, bad = some_images(source, data, model.config.image_size, num_images)
    model, config = model.to(device), model.config
    look = look_at(
        model,
        normalize(images.to(device), data.mean, data.std),
        data.mean,
        data.std,
        distance=distance,
        unpredicted=unpredicted,
    )
    kinds = {kind: losses.tolist() for kind, losses in look.baselines.items()}
    rows = tuple(
        ImageLoss(name=name, loss=loss, baselines={kind: losses[i] for kind, losses in kinds.items()})
        for i, (name, loss) in enumerate(zip(names, look.losses.tolist(), strict=True))
    )
    result = PredictResult(picture=out_dir / "predictions.png", rows=rows, bad=bad)
    draw_sheet(look, result.picture, names)
    if each_image:
        _write_each(look, names, folder)
    content = {
        "mean_loss": result.mean_loss,
        "distance": distance,
        **make_targets(config).facts,
        "images": [row.as_dict() for row in rows],
        "bad": [{"name": sample.name, "reason": sample.reason} for sample in bad],
    }
    with write_aside(out_dir / "predictions.json") as aside:
        aside.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return result


def _write_each(look: Look, names: Sequence[str], folder: Path) -> None:
    """Write each original, and at its right what is predicted, pixel for pixel; replace what is there."""
    pair = [side_by_side(pictures) for pictures in (look.originals, look.pictures)]
    gap = panel_gap(pair[0].shape[-1])
    both = torch.cat([pad(pair[0], (0, gap), value=1.0), pair[1]], dim=-1).expand(-1, 3, -1, -1)
    pixels = rearrange((both * 255).round().byte(), "b c h w -> b h w c").numpy()
    with write_aside(folder) as aside:
        aside.mkdir()
        mark_output(aside)
        for number, (name, picture) in enumerate(zip(names, pixels, strict=True), start=1):
            # Names may hold folders and whatever no file may; the number keeps two of them apart.
            plain = re.sub(r"[^\w.-]+", "_", name.removesuffix(Path(name).suffix))[-100:].strip("_.")
            Image.fromarray(picture).save(aside / f"{number:0{len(str(len(names)))}d}_{plain}.png")


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
