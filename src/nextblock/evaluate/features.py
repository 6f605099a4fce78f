"""Functions from normalised images to features: an encoder's, pooled for heads, or those of baselines.

One pass through the encoder serves all heads. The module also opens models, classifiers and their data.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
import yaml
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from nextblock.checkpoint import MODEL_FILE
from nextblock.config import Attention, DataConfig, ModelConfig, RunConfig
from nextblock.errors import UsageError
from nextblock.evaluate.probe.settings import HeadName
from nextblock.evaluate.settings import EvalSettings, FeatureSettings
from nextblock.evaluate.table import Extract
from nextblock.interop import open_encoder
from nextblock.interop.load import official_data, recorded_data
from nextblock.interop.timm_spec import TIMM_SPEC
from nextblock.models import EncoderModel, NextBlockModel, TimmEncoder
from nextblock.models.heads import FeatureConfig, ImageClassifier, pool_features
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import from_dict, require
from nextblock.train.runtime import autocast

log = logging.getLogger(__name__)

# -------------------------------------------------------------------------------------- images to features


@functools.lru_cache  # so that a note on layers comes once, not once for each head
def layer_choices(word: str, depth: int, best: tuple[int, ...] | None = None) -> tuple[tuple[int, ...], ...]:
    """Resolve a word to layers, counted from 0; only "each" gives several choices.

    A bare number n means the last n layers, or all if there are fewer. `best` are the layers for "best".
    Raises `UsageError` for layers that the encoder lacks.
    """
    if word == "each":
        return tuple((layer,) for layer in range(depth))
    if word == "best":
        assert best is not None, "callers accept `best` only if they know the layers"
        return (best,)
    if word.startswith("layer") or "+" in word:
        chosen = sorted(int(number) for number in word.removeprefix("layer").split("+"))
        if chosen[-1] >= depth or len(set(chosen)) < len(chosen):
            raise UsageError(
                f"layers is {word}, but the encoder has {depth} layers; name each once, among 0 to "
                f"{depth - 1}"
            )
        return (tuple(chosen),)
    count = int(word.removeprefix("last") or 1)
    if count > depth:
        log.info("the encoder has %d layers: using all of them, not %d", depth, count)
    return (tuple(range(max(0, depth - count), depth)),)


def pooled(settings: FeatureSettings, depth: int) -> FeatureConfig:
    """Features with one vector per image, from the settings and the encoder's depth."""
    (layers,) = layer_choices(settings.layers, depth)
    return FeatureConfig(
        layers=layers, norm_layers=True, tokens=settings.tokens, attention=settings.attention
    )


def encoder_extract(
    model: EncoderModel,
    wanted: Sequence[FeatureConfig],
    *,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    chunk: int = 128,
) -> Extract:
    """Make an extract of the `wanted` features of a model, with one pass per kind of attention.

    Put the model in evaluation mode first. The encoder sees `chunk` images at a time, so that all layers of a
    large batch are never in memory together.
    """
    kinds: list[Attention] = sorted({spec.attention for spec in wanted})

    def extract(images: Float[Tensor, "b c h w"]) -> tuple[Tensor, ...]:
        parts = []
        for some in images.split(chunk):
            with autocast(images.device, precision):
                encoded = {kind: model.encode(some, attention=kind) for kind in kinds}
                norm = model.final_norm
                parts.append([pool_features(encoded[one.attention], one, norm).float() for one in wanted])
        return tuple(torch.cat(of_one) for of_one in zip(*parts, strict=True))

    return extract


def attention_maps(
    classifier: ImageClassifier, images: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b q rows columns"]:
    """Compute how an attentive or ep head weighs the patches of normalised images, one map per query or head.

    Each map sums to 1. It covers only patches, even if the head also sees the class token.
    """
    config = replace(classifier.head_config, tokens="patches")
    with torch.no_grad():
        encoded = classifier.encoder_model.encode(images, attention=config.attention)
        features = pool_features(encoded, config, classifier.encoder_model.final_norm)
        weights = classifier.head.attention(features)  # type: ignore[operator]
    rows, _ = patch_grid(weights.shape[-1], images.shape[-2:])
    return rearrange(weights, "b q (rows columns) -> b q rows columns", rows=rows)


def patch_grid(patches: int, image_size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a grid of square patches that fills an image of (height, width)."""
    rows = round((patches * image_size[0] / image_size[1]) ** 0.5)
    return rows, patches // rows


SMALL_PX = 16


def small_pixels_extract(images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b p"]]:
    """Resize images to 16 x 16 px and flatten them; small enough for a million images."""
    return (rearrange(adaptive_avg_pool2d(images.float(), SMALL_PX), "b c h w -> b (c h w)"),)


def histogram_extract(data: DataConfig) -> Extract:
    """Make an extract of colour histograms: 4 levels per channel jointly, and 32 levels of each channel.

    Features are square roots of shares, so that a dot product is the Bhattacharyya coefficient, the overlap
    of two histograms. The joint histogram uses the first three channels.
    """
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (data.mean, data.std))

    def extract(images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b p"]]:
        levels = (images.float() * std.to(images.device) + mean.to(images.device)).clamp(0, 1 - 1e-6)
        levels = rearrange(levels, "b c h w -> c b (h w)")
        joint = sum((level * 4).long() * 4**c for c, level in enumerate(levels[:3]))
        numbers = [(joint, 4 ** min(3, data.channels)), *(((level * 32).long(), 32) for level in levels)]
        # Counted in place: a one-hot of every pixel would take gigabytes.
        counts = [
            images.new_zeros(len(images), bins, dtype=torch.float32).scatter_add_(
                1, pixels, torch.ones_like(levels[0])
            )
            for pixels, bins in numbers
        ]
        return ((torch.cat(counts, 1) / levels.shape[-1]).sqrt(),)

    return extract


# ------------------------------------------------------------------------------------------ what they need


def untrained(model: EncoderModel, seed: int) -> EncoderModel:
    """Make the same network with weights drawn from `seed`: frozen, in evaluation mode, same device."""
    with seeded(seed):
        if isinstance(model, TimmEncoder):
            fresh = TimmEncoder.fresh(model.config)
        else:
            fresh = NextBlockModel(replace(model.config, init=None))
    return fresh.to(next(model.parameters()).device).eval().requires_grad_(requires_grad=False)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global CPU generator for a block, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


def open_model(
    config: EvalSettings, classifier: ImageClassifier | None = None
) -> tuple[EncoderModel, DataConfig]:
    """Open the model of a config, or take the classifier's, with the settings of its images."""
    spec = classifier_directory(config.model)
    model = classifier.encoder_model if classifier else open_encoder(spec, num_heads=config.num_heads)
    data = evaluation_data(spec, model.config, workers=config.workers)
    if config.max_bad_fraction is not None:
        data = replace(data, max_bad_fraction=config.max_bad_fraction)
    return model, data


def check_one_head(spec: str, setting: str) -> None:
    """Raise `UsageError` for the directory of a probe, which contains several classifiers."""
    place = Path(spec).expanduser()
    probed = [str(place / name) for name in get_args(HeadName) if (place / name / MODEL_FILE).is_file()]
    require(not probed, f"{place} holds the heads of a probe; give --{setting} {' or '.join(probed)}")


def classifier_directory(spec: str) -> str:
    """The classifier in the directory of a fine-tuning; any other spec is returned unchanged."""
    tuned = Path(spec).expanduser() / "classifier"
    return str(tuned) if (tuned / MODEL_FILE).is_file() else spec


def evaluation_data(
    model_spec: str, config: ModelConfig | TimmConfig, *, workers: int | None = None
) -> DataConfig:
    """How to crop and normalise images for a model: as recorded in its run or file, else the official way.

    `workers` overrides the run's.
    """
    data = _recorded_data(model_spec, config)
    return data if workers is None else replace(data, workers=workers)


def _recorded_data(model_spec: str, config: ModelConfig | TimmConfig) -> DataConfig:
    path = Path(model_spec).absolute()
    # The run directory of a checkpoint, or of the model file in one.
    checkpoint = path.parent if path.name == MODEL_FILE else path
    is_of_run = checkpoint.parent.name == "checkpoints" and checkpoint.name.startswith("step_")
    settings = (checkpoint.parents[1] if is_of_run else path) / "config.yaml"
    if settings.is_file():
        run = from_dict(RunConfig, yaml.safe_load(settings.read_text(encoding="utf-8")))
        return replace(run.data, train=None, val=None)
    if model_spec.startswith(TIMM_SPEC) and isinstance(config, TimmConfig):
        recorded = None
        if config.mean is not None and config.std is not None and config.crop_pct is not None:
            recorded = DataConfig(
                mean=config.mean,
                std=config.std,
                val_resize_px=math.floor(min(config.image_size) / config.crop_pct),
                val_crop=config.crop_mode,
                channels=config.in_chans,
            )
    else:
        recorded = recorded_data(model_spec)
    if recorded is not None:
        return replace(recorded, channels=config.in_chans)  # timm's files do not record the channels
    official = official_data(config.image_size, config.in_chans)
    words = "%s has no preprocessing metadata; resizing the shorter side to %d px"
    log.info(words, model_spec, official.val_resize_px)
    return official
