"""Official XTRA files, in and out: Lightning `.ckpt`, and DeepSpeed `mp_rank_00_model_states.pt` in.

Only names, shapes and settings are read. Sizes come from the tensors, the rest from the file's
`hyper_parameters`. What is written is a Lightning-like `.ckpt` with the weights and those settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextblock.atomic import write_aside
from nextblock.checkpoint import CheckpointError, load_strictly
from nextblock.config import ModelConfig, Size, pair
from nextblock.interop.files import beside_weights, make_parent, refuse_directory, unwrapped
from nextblock.interop.names import (
    NameTable,
    count_numbered,
    log_left_out,
    needed,
    on_cpu,
    patch_shape,
    ratio_of,
    refuse_differences,
    require_heads,
)
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier

__all__ = ["is_xtra", "read_xtra", "write_xtra"]

ARCHITECTURES = {
    "vit_tiny": (192, 12, 3, 768),
    "vit_small": (384, 12, 6, 1536),
    "vit_base": (768, 12, 12, 3072),
    "vit_large": (1024, 24, 16, 4096),
    "vit_huge": (1280, 32, 16, 5120),
    "vit_giant": (1408, 40, 16, 6144),
}
"""The encoders that the official code names: width, depth, attention heads, hidden width of the MLPs."""
NUM_HEADS_OF_SIZE = {(width, depth): heads for width, depth, heads, _ in ARCHITECTURES.values()}
"""Attention heads by the official (width, depth)."""

ENCODER_NAMES = NameTable("XTRA", (("enc.{rest}", "encoder.{rest}"),))
PREDICTOR_NAMES = NameTable(
    "XTRA",
    (
        ("proj.mlp.{i}.{rest}", "predictor.projection.{i}.{rest}"),
        ("predictor.pos_embed", "predictor.pos_embed"),
        ("predictor.blocks.{rest}", "predictor.blocks.{rest}"),
        ("predictor.norm.{rest}", "predictor.norm.{rest}"),
        ("aim_proj.{d}.mlp.{i}.{rest}", "predictor.block_mlps.{d}.{i}.{rest}"),
    ),
)
ATTENTIVE_NAMES = NameTable(
    "XTRA",
    (
        ("classifier.cls_token", "head.query"),
        ("classifier.k.{rest}", "head.key.{rest}"),
        ("classifier.v.{rest}", "head.value.{rest}"),
        ("classifier.linear.{rest}", "head.linear.{rest}"),
        ("classifier.bn.{rest}", "head.norm.{rest}"),
    ),
)
LINEAR_NAMES = NameTable(
    "XTRA",
    (
        ("classifier.0.{rest}", "head.norm.{rest}"),
        ("classifier.1.{rest}", "head.linear.{rest}"),
    ),
)
BARE_LINEAR_NAMES = NameTable(
    "XTRA",
    (
        ("classifier.weight", "head.linear.weight"),
        ("classifier.bias", "head.linear.bias"),
    ),
)
"""A linear classifier without batch norm."""


def is_xtra(content: Any) -> bool:
    """Whether a file's content has the layout of an official XTRA checkpoint."""
    weights = unwrapped(content)
    return "enc.pos_embed" in weights and "enc.patch_embed.proj.weight" in weights


# ------------------------------------------------------------------------------------------------------ in


def read_xtra(
    content: Mapping[str, Any], origin: str, *, num_heads: int | None = None
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier that an official file holds.

    `num_heads` of the encoder comes from the argument, the file's settings or architecture name, or the table
    of official sizes; where none tells, the file is refused, as a wrong number changes features without an
    error.
    """
    weights, settings = unwrapped(content), _settings(content, origin)
    is_classifier = any(name.startswith("classifier.") for name in weights)
    with_predictor = any(name.startswith("predictor.") for name in weights)
    config = _model_config(weights, settings, origin, num_heads=num_heads, with_predictor=with_predictor)
    if is_classifier:
        return _read_classifier(weights, settings, config, origin)
    model = NextBlockModel(config)
    load_strictly(model, (ENCODER_NAMES + PREDICTOR_NAMES).to_ours(weights, origin), origin)
    return model.eval()


def _settings(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    settings = beside_weights(content, "hyper_parameters")
    if not settings or not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{origin} holds the weights of an XTRA model without the settings it was trained by "
            "(hyper_parameters), which tell its block size and its predictor's heads; give the original "
            "checkpoint"
        )
    return dict(settings)


def _model_config(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    origin: str,
    *,
    num_heads: int | None,
    with_predictor: bool,
) -> ModelConfig:
    width, in_chans, patch_size = patch_shape(weights, "enc.patch_embed.proj.weight", origin)
    depth = count_numbered(weights, "enc.blocks.", origin)
    encoder = ModelConfig(
        image_size=_image_size(settings, weights["enc.pos_embed"].shape[1], patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=_num_heads(num_heads, settings, (width, depth), origin),
        mlp_ratio=ratio_of(needed(weights, "enc.blocks.0.mlp.fc1.weight", origin).shape[0], width),
        block_size=_block_size(settings, origin),
        predictor=None,
    )
    return replace(encoder, **_predictor_settings(weights, settings, origin)) if with_predictor else encoder


def _predictor_settings(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], origin: str
) -> dict[str, Any]:
    width = needed(weights, "predictor.pos_embed", origin).shape[-1]
    hidden = needed(weights, "predictor.blocks.0.mlp.fc1.weight", origin).shape[0]
    return {
        "predictor": "transformer",
        "projection_dim": needed(weights, "proj.mlp.0.weight", origin).shape[0],
        "predictor_dim": width,
        "predictor_depth": count_numbered(weights, "predictor.blocks.", origin),
        "predictor_heads": int(needed(settings, "predictor_num_heads", origin)),
        "predictor_mlp_ratio": ratio_of(hidden, width),
        "block_mlp_dim": needed(weights, "aim_proj.0.mlp.0.weight", origin).shape[0],
        "num_predicted_blocks": count_numbered(weights, "aim_proj.", origin),
        "norm_pixels": bool(settings.get("aim_norm_pix_loss", True)),
        "loss": "l1" if settings.get("aim_l1_loss") else "mse",
        "order": "random" if settings.get("aim_pseudo_random") else "raster",
        "order_seed": int(settings.get("seed") or 0),
    }


def _num_heads(given: int | None, settings: Mapping[str, Any], size: tuple[int, int], origin: str) -> int:
    arch = str(settings.get("enc_arch"))
    of_arch = ARCHITECTURES[arch][2] if arch in ARCHITECTURES else None
    heads = given or settings.get("enc_num_heads") or of_arch or NUM_HEADS_OF_SIZE.get(size)
    return require_heads(heads, size, origin)


def _block_size(settings: Mapping[str, Any], origin: str) -> int:
    """Patches along a block's side; 1 where the encoder is plainly causal, whatever `enc_block_size` says."""
    if settings.get("enc_is_block_causal", False):
        return int(needed(settings, "enc_block_size", origin))
    if settings.get("enc_is_causal", False):
        return 1
    raise CheckpointError(
        f"{origin} says neither enc_is_block_causal nor enc_is_causal, so its attention is not known "
        "to be XTRA's"
    )


def _image_size(settings: Mapping[str, Any], num_patches: int, patch_size: int) -> Size:
    """From the file's own settings where they fit the positions, else a square."""
    sides = [int(side) for side in settings.get("enc_img_size") or []]
    rows, columns = (sides[0], sides[-1]) if sides else (0, 0)
    if (rows // patch_size) * (columns // patch_size) == num_patches:
        return rows if rows == columns else (rows, columns)
    return math.isqrt(num_patches) * patch_size


def _read_classifier(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], config: ModelConfig, origin: str
) -> ImageClassifier:
    attentive = "classifier.cls_token" in weights
    linear_names = BARE_LINEAR_NAMES if "classifier.weight" in weights else LINEAR_NAMES
    table = (ATTENTIVE_NAMES if attentive else linear_names) + ENCODER_NAMES.under("encoder_model.")
    renamed = table.to_ours(weights, origin)
    last = int(settings.get("cls_n_last_blocks", 1))
    head = HeadConfig(
        kind="attentive" if attentive else "linear",
        num_classes=needed(renamed, "head.linear.weight", origin).shape[0],
        layers=tuple(range(config.depth - last, config.depth)),
        layer_pool="mean" if settings.get("cls_avgpool_layers", True) else "concat",
        norm_layers=bool(settings.get("cls_norm_enc_output", False)),
        num_heads=int(settings.get("attentive_pooling_num_heads", 16)),
        num_queries=renamed["head.query"].shape[1] if attentive else 1,
        batch_norm="head.norm.running_mean" in renamed,
        bias="head.linear.bias" in renamed,
    )
    classifier = ImageClassifier(NextBlockModel(config), head)
    load_strictly(classifier, renamed, origin)
    return classifier.eval()


# ----------------------------------------------------------------------------------------------------- out


def write_xtra(model: NextBlockModel | ImageClassifier, path: Path) -> None:
    """Write a model or classifier as a Lightning-like `.ckpt` in XTRA's layout, whole or not at all.

    A setting that official XTRA cannot express is refused by name. Of a classifier the encoder and the head
    are written: a predictor and class names have no place there. The official code builds its six
    architectures only; other sizes are written with their number of heads, for this package to read.
    """
    refuse_directory(path)
    if isinstance(model, ImageClassifier):
        weights, settings = _classifier_content(model)
    else:
        weights, settings = _model_content(model)
    content = {
        "epoch": 0,
        "global_step": 0,
        "pytorch-lightning_version": "2.2.0",
        "state_dict": on_cpu(weights),
        "loops": {},
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": settings,
    }
    make_parent(path)
    with write_aside(path) as aside:
        torch.save(content, aside)


def _model_content(model: NextBlockModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = model.config
    if config.predictor is None:
        refuse_differences("XTRA", _fixed_of_encoder(config), to_timm=True)
        return ENCODER_NAMES.to_official(model.state_dict()), _encoder_hyper_parameters(config)
    refuse_differences("XTRA", [*_fixed_of_encoder(config), *_fixed_of_predictor(config)])
    settings = {
        "seed": config.order_seed,
        **_encoder_hyper_parameters(config),
        **_predictor_hyper_parameters(config),
    }
    return (ENCODER_NAMES + PREDICTOR_NAMES).to_official(model.state_dict()), settings


def _fixed_of_encoder(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    """What no setting of the official encoder changes: (name, value, the official one)."""
    rows, block = pair(config.image_size)[0], pair(config.block_size)[0]
    yield "model.image_size", pair(config.image_size), (rows, rows)
    yield "model.in_chans", config.in_chans, 3
    yield "model.norm_eps", config.norm_eps, 1e-6
    yield "model.bias", config.bias, True
    yield "model.patch_norm", config.patch_norm, False
    yield "model.positions", config.positions, "learned"
    yield "model.block_size", pair(config.block_size), (block, block)
    yield "model.feature_attention", config.feature_attention, "causal"
    if config.predictor is None or config.order != "random":
        yield "model.order", config.order, "raster"


def _fixed_of_predictor(config: ModelConfig) -> Iterator[tuple[str, Any, Any]]:
    yield "model.prefix", config.prefix, False
    yield "model.predictor", config.predictor, "transformer"
    yield "model.tokenizer", config.tokenizer, None
    for name in ("projection_dim", "block_mlp_dim"):
        if getattr(config, name) is None:
            yield f"model.{name}", None, "a number"


def _encoder_hyper_parameters(config: ModelConfig) -> dict[str, Any]:
    size = (config.embed_dim, config.depth, config.num_heads, int(config.embed_dim * config.mlp_ratio))
    arch = next((name for name, known in ARCHITECTURES.items() if known == size), None)
    return {
        **({"enc_num_heads": config.num_heads} if arch is None else {"enc_arch": arch}),
        "enc_img_size": [pair(config.image_size)[0]],
        "enc_patch_size": config.patch_size,
        **_attention_hyper_parameters("enc", config),
    }


def _attention_hyper_parameters(part: str, config: ModelConfig) -> dict[str, Any]:
    block_size = pair(config.block_size)[0]
    kind = {f"{part}_is_block_causal": block_size > 1, f"{part}_block_size": block_size}
    return kind if block_size > 1 else {**kind, f"{part}_is_causal": True}


def _predictor_hyper_parameters(config: ModelConfig) -> dict[str, Any]:
    return {
        "proj_hidden_dim": config.projection_dim,
        "proj_out_dim": config.predictor_dim,
        "proj_in_bn": False,
        "proj_nlayers": 2,
        **_attention_hyper_parameters("predictor", config),
        "predictor_num_heads": config.predictor_heads,
        "predictor_depth": config.predictor_depth,
        "aim_num_tokens": config.num_predicted_blocks,
        "aim_norm_pix_loss": config.norm_pixels,
        "aim_l1_loss": config.loss == "l1",
        "aim_pseudo_random": config.order == "random",
        "aim_proj_hidden_dim": config.block_mlp_dim,
        "aim_proj_in_bn": False,
        "aim_proj_nlayers": 2,
        "aim_proj_out_bias": True,
    }


def _classifier_content(classifier: ImageClassifier) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config = replace(classifier.encoder_model.config, predictor=None)
    head = classifier.head_config
    refuse_differences("XTRA", [*_fixed_of_encoder(config), *_fixed_of_head(head, config.depth)])
    log_left_out(classifier)
    attentive = head.kind == "attentive"
    linear_names = LINEAR_NAMES if head.batch_norm else BARE_LINEAR_NAMES
    table = (ATTENTIVE_NAMES if attentive else linear_names) + ENCODER_NAMES.under("encoder_model.")
    weights = {
        name: tensor
        for name, tensor in classifier.state_dict().items()
        if name.startswith(("encoder_model.encoder.", "head."))
    }
    settings = {
        **_encoder_hyper_parameters(config),
        "module": "classifier",
        "cls_mode": "linear",
        "cls_num_classes": head.num_classes,
        "cls_n_last_blocks": len(head.layers),
        "cls_avgpool_layers": head.layer_pool == "mean",
        "cls_avgpool_patchtokens": not attentive,
        "cls_norm_enc_output": head.norm_layers,
    }
    if attentive:
        settings["attentive_pooling_num_heads"] = head.num_heads
        settings["attentive_pooling_num_queries"] = head.num_queries
    else:
        settings["cls_out_bn"] = head.batch_norm
    return table.to_official(weights), settings


def _fixed_of_head(head: HeadConfig, depth: int) -> Iterator[tuple[str, Any, Any]]:
    yield "the head's layers", head.layers, tuple(range(depth - len(head.layers), depth))
    yield "the head's bias", head.bias, True
    if head.kind == "attentive":
        yield "the head's batch_norm", head.batch_norm, True
    if head.attention == "full":
        yield "the head's attention", head.attention, "causal"
