"""Official XTRA files: Lightning `.ckpt` and DeepSpeed `mp_rank_00_model_states.pt`, models and classifiers.

Only names, shapes and settings are read. Sizes come from the tensors, the rest from the file's
`hyper_parameters`: flattened names, in which a setting that is absent or null has the official default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextblock.checkpoint import CheckpointError, build_model
from nextblock.config import ModelConfig, Size, pair
from nextblock.interop.files import beside_weights, unwrapped
from nextblock.interop.names import (
    count_numbered,
    only_tensors,
    patch_shape,
    ratio_of,
    renamed,
    require_heads,
    shape_of,
)
from nextblock.interop.options import LoadOptions
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier

__all__ = ["NUM_HEADS_OF_SIZE", "is_xtra", "read_xtra"]

NUM_HEADS_OF_ARCH = {
    "vit_tiny": 3,
    "vit_small": 6,
    "vit_base": 12,
    "vit_large": 16,
    "vit_huge": 16,
    "vit_giant": 16,
}
NUM_HEADS_OF_SIZE = {
    (192, 12): 3,
    (384, 12): 6,
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 32): 16,
    (1408, 40): 16,
}
"""Attention heads by the official (width, depth)."""
DEFAULT_HEADS = 12
"""Of a predictor and of an attentive head whose settings name none."""

ENCODER_NAMES = (("enc.{rest}", "encoder.{rest}"),)
PREDICTOR_NAMES = (
    ("proj.mlp.{i}.{rest}", "predictor.projection.{i}.{rest}"),
    ("predictor.pos_embed", "predictor.pos_embed"),
    ("predictor.blocks.{rest}", "predictor.blocks.{rest}"),
    ("predictor.norm.{rest}", "predictor.norm.{rest}"),
    ("aim_proj.{d}.mlp.{i}.{rest}", "predictor.block_mlps.{d}.{i}.{rest}"),
)
CLASSIFIER_NAMES = (
    ("enc.{rest}", "encoder_model.encoder.{rest}"),
    ("classifier.cls_token", "head.query"),
    ("classifier.k.{rest}", "head.key.{rest}"),
    ("classifier.v.{rest}", "head.value.{rest}"),
    ("classifier.linear.{rest}", "head.linear.{rest}"),
    ("classifier.bn.{rest}", "head.norm.{rest}"),
    ("classifier.0.{rest}", "head.norm.{rest}"),
    ("classifier.1.{rest}", "head.linear.{rest}"),
    ("classifier.weight", "head.linear.weight"),
    ("classifier.bias", "head.linear.bias"),
)

FIXED = {
    "enc_use_out_norm": True,
    "predictor_use_out_norm": True,
    "proj_nlayers": 2,
    "proj_in_bn": False,
    "proj_out_bn": False,
    "proj_out_bias": False,
    "aim_proj_nlayers": 2,
    "aim_proj_in_bn": False,
    "aim_proj_out_bn": False,
    "attentive_pooling_qkv_bias": False,
}
"""Settings that change the function and that have one value here; absent means that value."""


def is_xtra(content: Any) -> bool:
    """Whether a file's content has the layout of an official XTRA checkpoint."""
    weights = unwrapped(content)
    return "enc.pos_embed" in weights and "enc.patch_embed.proj.weight" in weights


def read_xtra(
    content: Mapping[str, Any], origin: str, options: LoadOptions
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier that an official file holds.

    The number of attention heads comes from the caller, the file's settings or architecture name, or the
    table of official sizes; else the file is refused, as a wrong number changes features without an error.
    """
    weights, settings = only_tensors(unwrapped(content), origin), _settings(content, origin)
    is_classifier = any(name.startswith("classifier.") for name in weights)
    with_predictor = not is_classifier and any(name.startswith("predictor.") for name in weights)
    _refuse_unknown(settings, origin, is_classifier=is_classifier, with_predictor=with_predictor)
    config = _encoder_config(weights, settings, origin, options.num_heads)
    if is_classifier:
        return _classifier(weights, settings, config, origin)
    if with_predictor:
        config = replace(config, **_predictor_settings(weights, settings, config, origin))
    ours = renamed(weights, ENCODER_NAMES + PREDICTOR_NAMES, "XTRA", origin)
    return build_model(lambda: NextBlockModel(config), config, ours, origin)


def _settings(content: Mapping[str, Any], origin: str) -> dict[str, Any]:
    settings = beside_weights(content, "hyper_parameters")
    if not settings or not isinstance(settings, Mapping):
        raise CheckpointError(
            f"{origin} holds the weights of an XTRA model without the settings it was trained by "
            "(hyper_parameters), which tell its block size and its predictor's heads; give the original "
            "checkpoint"
        )
    return {name: value for name, value in settings.items() if value is not None}


def _refuse_unknown(
    settings: Mapping[str, Any], origin: str, *, is_classifier: bool, with_predictor: bool
) -> None:
    parts = [
        "enc_",
        *(["attentive_"] if is_classifier else []),
        *(["proj_", "predictor_", "aim_"] * with_predictor),
    ]
    wrong = [
        f"{name} is {settings[name]!r}, only {value!r} is known"
        for name, value in FIXED.items()
        if name.startswith(tuple(parts)) and settings.get(name, value) != value
    ]
    if with_predictor and _qk_scale(settings, "predictor") != _qk_scale(settings, "enc"):
        wrong.append("predictor_qk_scale is not enc_qk_scale")
    if with_predictor and not (settings.get("enc_is_block_causal") or settings.get("enc_is_causal")):
        wrong.append(
            "a predictor on an encoder without a mask (neither enc_is_block_causal nor enc_is_causal)"
        )
    if wrong:
        raise CheckpointError(
            f"{origin} is an XTRA model of a kind that is not implemented: {'; '.join(wrong)}"
        )


def _qk_scale(settings: Mapping[str, Any], part: str) -> float | None:
    # Official attention is torch's fused one, which ignores qk_scale, unless fused_attn is off.
    scale = settings.get(f"{part}_qk_scale")
    return float(scale) if scale and not settings.get(f"{part}_fused_attn", True) else None


def _mask(settings: Mapping[str, Any], part: str) -> int | None:
    """Block size of the mask of "enc" or "predictor": 1 if plainly causal, None if there is no mask.

    A block size counts only if the mask is block-causal.
    """
    if settings.get(f"{part}_is_block_causal"):
        return int(settings.get(f"{part}_block_size", 1))
    return 1 if settings.get(f"{part}_is_causal") else None


def _encoder_config(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], origin: str, num_heads: int | None
) -> ModelConfig:
    width, in_chans, patch_size = patch_shape(weights, "enc.patch_embed.proj.weight", origin)
    depth = count_numbered(weights, "enc.blocks.", origin)
    of_arch = NUM_HEADS_OF_ARCH.get(str(settings.get("enc_arch")))
    heads = num_heads or settings.get("enc_num_heads") or of_arch or NUM_HEADS_OF_SIZE.get((width, depth))
    block_size = _mask(settings, "enc")
    return ModelConfig(
        image_size=_image_size(settings, shape_of(weights, "enc.pos_embed", 3, origin)[1], patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=require_heads(heads, (width, depth), origin),
        mlp_ratio=ratio_of(shape_of(weights, "enc.blocks.0.mlp.fc1.weight", 2, origin)[0], width),
        block_size=block_size or 1,
        feature_attention="full" if block_size is None else "causal",
        qk_scale=_qk_scale(settings, "enc"),
        resample_antialias=False,
        predictor=None,
    )


def _predictor_settings(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], config: ModelConfig, origin: str
) -> dict[str, Any]:
    width = shape_of(weights, "predictor.pos_embed", 3, origin)[-1]
    hidden = shape_of(weights, "predictor.blocks.0.mlp.fc1.weight", 2, origin)[0]
    mask = _mask(settings, "predictor")
    attention: dict[str, Any] = {}
    if mask != pair(config.block_size)[0]:
        attention["predictor_attention"] = {None: "full", 1: "causal"}.get(mask, "block_causal")
        attention["predictor_block_size"] = (
            mask if attention["predictor_attention"] == "block_causal" else None
        )
        if settings.get("aim_pseudo_random"):
            raise CheckpointError(
                f"{origin} is an XTRA model of a kind that is not implemented: a predictor with a mask of "
                "its own (predictor_is_block_causal, predictor_block_size) under aim_pseudo_random"
            )
    return {
        **attention,
        "predictor": "transformer",
        "projection_dim": shape_of(weights, "proj.mlp.0.weight", 2, origin)[0],
        "predictor_dim": width,
        "predictor_depth": count_numbered(weights, "predictor.blocks.", origin),
        "predictor_heads": int(settings.get("predictor_num_heads", DEFAULT_HEADS)),
        "predictor_mlp_ratio": ratio_of(hidden, width),
        "block_mlp_dim": shape_of(weights, "aim_proj.0.mlp.0.weight", 2, origin)[0],
        "num_predicted_blocks": count_numbered(weights, "aim_proj.", origin),
        "norm_pixels": bool(settings.get("aim_norm_pix_loss", False)),
        "loss": "l1" if settings.get("aim_l1_loss") else "mse",
        "order": "random" if settings.get("aim_pseudo_random") else "raster",
        "order_seed": int(settings.get("seed", 0)),
    }


def _image_size(settings: Mapping[str, Any], num_patches: int, patch_size: int) -> Size:
    """From the file's own settings if they fit the positions, else a square."""
    given = settings.get("enc_img_size") or []
    sides = [int(side) for side in (given if isinstance(given, list | tuple) else [given])]
    rows, columns = (sides[0], sides[-1]) if sides else (0, 0)
    if (rows // patch_size) * (columns // patch_size) == num_patches:
        return rows if rows == columns else (rows, columns)
    return math.isqrt(num_patches) * patch_size


def _classifier(
    weights: Mapping[str, Tensor], settings: Mapping[str, Any], config: ModelConfig, origin: str
) -> ImageClassifier:
    attentive = "classifier.cls_token" in weights
    ours = renamed(weights, CLASSIFIER_NAMES, "XTRA", origin)
    if not attentive and not settings.get("cls_avgpool_patchtokens"):
        raise CheckpointError(
            f"{origin} is an XTRA classifier of a kind that is not implemented: cls_avgpool_patchtokens "
            "is not set, so that a linear head answers for every patch"
        )
    last = int(settings.get("cls_n_last_blocks", 1))
    head = HeadConfig(
        kind="attentive" if attentive else "linear",
        num_classes=shape_of(ours, "head.linear.weight", 2, origin)[0],
        layers=tuple(range(config.depth - last, config.depth)),
        layer_pool="mean" if settings.get("cls_avgpool_layers") or last == 1 else "concat",
        norm_layers=bool(settings.get("cls_norm_enc_output")),
        num_heads=int(settings.get("attentive_pooling_num_heads", DEFAULT_HEADS)),
        num_queries=shape_of(ours, "head.query", 3, origin)[1] if attentive else 1,
        batch_norm="head.norm.running_mean" in ours,
        bias="head.linear.bias" in ours,
    )
    scale = settings.get("attentive_pooling_qk_scale")
    if attentive and scale:
        # Our head divides scores by the root of a head's width; the keys take what is left of the scale.
        key = ours["head.key.weight"].float()
        ours["head.key.weight"] = key * (float(scale) * math.sqrt(key.shape[0] / head.num_heads))
    return build_model(
        lambda: ImageClassifier(NextBlockModel(config), head), config, ours, origin, prefix="encoder_model."
    )
