"""AIM's layouts, out: `backbone.pth` and `head.pth`, or a whole model in one safetensors file; see `aim`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

from nextblock.atomic import write_aside
from nextblock.checkpoint import CheckpointError
from nextblock.config import ModelConfig, pair
from nextblock.interop.aim import (
    CLASSIFIER_NAMES,
    INFERENCE_EPS,
    OUTPUT_MAP,
    PREDICTOR_NAMES,
    TRUNK_NAMES,
    with_positions,
)
from nextblock.interop.files import make_parent, refuse_directory
from nextblock.interop.names import log_left_out, on_cpu, refuse_differences
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier

__all__ = ["write_aim"]


def write_aim(model: NextBlockModel | ImageClassifier, path: Path) -> None:
    """Write a model in Apple's layouts, whole or not at all; what AIM cannot express is refused by name.

    An encoder or a classifier becomes a directory with `backbone.pth` and, of a classifier, `head.pth`
    (inference layout); a model with its predictor one safetensors file (training layout). The files tell
    neither attention heads nor the layers of a head nor, in the training layout, the norms' epsilon, which
    is a setting there. A classifier's predictor and class names have no place.
    """
    if isinstance(model, NextBlockModel) and model.config.predictor is not None:
        _write_whole_model(model, path)
        return
    parts = _classifier_parts(model) if isinstance(model, ImageClassifier) else _encoder_parts(model)
    if path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= parts.keys()):
        raise CheckpointError(
            f"{path} is in the way: {' and '.join(parts)} go into a directory of their own; name another"
        )
    make_parent(path)
    with write_aside(path) as aside:
        aside.mkdir()
        for name, weights in parts.items():
            torch.save(on_cpu(weights), aside / name)


def _encoder_parts(model: NextBlockModel) -> dict[str, dict[str, Tensor]]:
    refuse_differences("AIM", [*_fixed_of_encoder(model.config), _fixed_eps(model.config)], to_timm=True)
    return {"backbone.pth": _backbone(model)}


def _classifier_parts(classifier: ImageClassifier) -> dict[str, dict[str, Tensor]]:
    config, head = classifier.encoder_model.config, classifier.head_config
    refuse_differences("AIM", [*_fixed_of_encoder(config), _fixed_eps(config), *_fixed_of_head(head, config)])
    log_left_out(classifier)
    in_head = {f"head.{name}": tensor for name, tensor in classifier.head.state_dict().items()}
    return {
        "backbone.pth": _backbone(classifier.encoder_model),
        "head.pth": CLASSIFIER_NAMES.to_official(in_head),
    }


def _backbone(model: NextBlockModel) -> dict[str, Tensor]:
    """The encoder alone, in the inference layout: positions are not stored."""
    in_encoder = {f"encoder.{name}": tensor for name, tensor in model.encoder.state_dict().items()}
    with_positions(in_encoder, replace(model.config, predictor=None), "this model")
    del in_encoder["encoder.pos_embed"]
    return TRUNK_NAMES.to_official(in_encoder)


def _write_whole_model(model: NextBlockModel, path: Path) -> None:
    config = model.config
    refuse_differences("AIM", [*_fixed_of_encoder(config), *_fixed_of_predictor(config)])
    refuse_directory(path)
    weights = with_positions(model.state_dict(), config, "this model")
    order = "(c h w) ... -> (h w c) ..."
    for name in OUTPUT_MAP:
        weights[name] = rearrange(weights[name], order, h=config.patch_size, w=config.patch_size)
    official = _split((TRUNK_NAMES + PREDICTOR_NAMES).to_official(weights))
    make_parent(path)
    with write_aside(path) as aside:
        save_file(on_cpu(official), aside)


def _split(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The joint map to queries, keys and values as three, as in the training layout."""
    split = {}
    for name, tensor in weights.items():
        if ".attn.qkv." not in name:
            split[name] = tensor
            continue
        for part, rows in zip("qkv", tensor.chunk(3), strict=True):
            split[name.replace(".qkv.", f".{part}_proj.")] = rows
    return split


def _fixed_of_encoder(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """What is the same in every AIM encoder: (name, value, AIM's)."""
    yield "model.bias", config.bias, False
    yield "model.patch_norm", config.patch_norm, True
    yield "model.positions", config.positions, "sincos"
    yield "model.block_size", pair(config.block_size), (1, 1)
    yield "model.order", config.order, "raster"
    yield "model.feature_attention", config.feature_attention, "full"


def _fixed_eps(config: ModelConfig) -> tuple[str, Any, Any]:
    return "model.norm_eps", config.norm_eps, INFERENCE_EPS


def _fixed_of_predictor(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    yield "model.prefix", config.prefix, True
    yield "model.predictor", config.predictor, "mlp"
    yield "model.projection_dim", config.projection_dim, None
    yield "model.predictor_extra_norm", config.predictor_extra_norm, True
    yield "model.block_mlp_dim", config.block_mlp_dim, None
    yield "model.num_predicted_blocks", config.num_predicted_blocks, 1
    yield "model.norm_pixels", config.norm_pixels, True
    yield "model.loss", config.loss, "mse"
    yield "model.tokenizer", config.tokenizer, None


def _fixed_of_head(head: HeadConfig, config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    yield "the head's kind", head.kind, "attentive"
    yield "the head's layer_pool", head.layer_pool, "mean"
    yield "the head's norm_layers", head.norm_layers, False
    yield "the head's num_heads", head.num_heads, config.num_heads
    yield "the head's num_queries", head.num_queries, 1
    yield "the head's batch_norm", head.batch_norm, True
    yield "the head's bias", head.bias, False
    if head.attention == "causal":
        yield "the head's attention", head.attention, "full"
