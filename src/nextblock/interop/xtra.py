"""Official XTRA files: Lightning `.ckpt` and DeepSpeed `mp_rank_00_model_states.pt`, models and classifiers.

Sizes come from the tensors, everything else from the file's `hyper_parameters`. These have flattened names; a
setting that is absent or null has its official default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextblock.checkpoint import CheckpointError
from nextblock.config import ModelConfig
from nextblock.interop.files import LoadOptions
from nextblock.interop.names import (
    build,
    count_numbered,
    encoder_sizes,
    known_heads,
    layer_sizes,
    refuse,
    renamed,
    shape_of,
    unlike,
)
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.presets import heads_of_sizes

# Number of attention heads by official (width, depth).
NUM_HEADS_OF_SIZE = heads_of_sizes("xtra-")
NUM_HEADS_OF_ARCH = {
    "vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16, "vit_giant": 16
}  # fmt: skip
# Default number of heads of predictors and attentive heads.
DEFAULT_HEADS = 12

# Official encoder and predictor also use timm's blocks, with q, k and v in one layer in timm's order. There
# is one pixel map per predicted distance.
NAMES = {
    r"enc\.": "encoder.",
    r"proj\.mlp\.": "predictor.projection.",
    r"predictor\.": "predictor.",
    r"aim_proj\.(\d+)\.mlp\.": r"predictor.block_mlps.\1.",
    r"classifier\.cls_token$": "head.query",
    r"classifier\.k\.": "head.key.",
    r"classifier\.v\.": "head.value.",
    # A linear head is a batch norm and a linear layer, or only the layer.
    r"classifier\.(bn|0)\.": "head.norm.",
    r"classifier\.((linear|1)\.)?(?=(weight|bias)$)": "head.linear.",
}

# Settings of which only this value is supported; absent means the same.
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


def is_xtra(weights: Mapping[str, Any]) -> bool:
    """Whether weights have the names of an official XTRA checkpoint."""
    return "enc.pos_embed" in weights and "enc.patch_embed.proj.weight" in weights


def read_xtra(
    weights: Mapping[str, Tensor], recorded: Any, origin: str, options: LoadOptions
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier of an official file; `recorded` are its hyper_parameters."""
    if not recorded or not isinstance(recorded, Mapping):
        raise CheckpointError(
            f"{origin} is an XTRA model without hyper_parameters, which hold its block size and heads; give "
            "the original checkpoint"
        )
    settings = {name: value for name, value in recorded.items() if value is not None}
    ours = renamed(weights, NAMES, "XTRA", origin)
    is_classifier = any(name.startswith("head.") for name in ours)
    with_predictor = not is_classifier and any(name.startswith("predictor.") for name in ours)
    _refuse_other_functions(settings, ours, origin, is_classifier, with_predictor)

    # The number of heads comes from the caller, the file's settings, its architecture's name or its size.
    sizes = encoder_sizes(ours, origin)
    of_arch = NUM_HEADS_OF_ARCH.get(str(settings.get("enc_arch")))
    of_size = NUM_HEADS_OF_SIZE.get((sizes["embed_dim"], sizes["depth"]))
    heads = known_heads(
        options.num_heads or settings.get("enc_num_heads") or of_arch or of_size, sizes, origin
    )

    # If training continued at another size, enc_img_size is outdated, so the stored positions decide.
    num_patches, patch_size = shape_of(ours, "encoder.pos_embed", 3, origin)[1], sizes["patch_size"]
    given = settings.get("enc_img_size") or [0]
    sides = [int(side) for side in (given if isinstance(given, list | tuple) else [given])]
    if (sides[0] // patch_size) * (sides[-1] // patch_size) != num_patches:
        sides = [math.isqrt(num_patches) * patch_size]

    block_size = _mask(settings, "enc")
    config = ModelConfig(
        **sizes,
        image_size=sides[0] if sides[0] == sides[-1] else (sides[0], sides[-1]),
        num_heads=heads,
        block_size=block_size or 1,
        feature_attention="full" if block_size is None else "causal",
        qk_scale=_qk_scale(settings, "enc"),
        # Official code always resamples positions without antialiasing.
        resample_antialias=False,
        predictor=None,
    )
    if with_predictor:
        config = replace(config, **_predictor_settings(ours, settings, origin))
    # A classifier uses its encoder under the pre-training mask.
    head = _head(ours, settings, config, origin) if is_classifier else None
    return build(config, ours, origin, head)


def _refuse_other_functions(
    settings: Mapping[str, Any],
    ours: Mapping[str, Tensor],
    origin: str,
    is_classifier: bool,
    with_predictor: bool,
) -> None:
    """Refuse settings under which the weights compute something that is not implemented."""
    # Only settings of existing parts count: a classifier still has the settings of its pre-training.
    parts = "enc_", *["attentive_"] * is_classifier, *["proj_", "predictor_", "aim_"] * with_predictor
    wrong = unlike(settings, {name: value for name, value in FIXED.items() if name.startswith(parts)})
    if with_predictor:
        # Here encoder and predictor share one scale. A predictor's own mask is defined in raster order only,
        # as the official code permutes only the encoder's mask.
        if _qk_scale(settings, "predictor") != _qk_scale(settings, "enc"):
            wrong.append("predictor_qk_scale is not enc_qk_scale")
        if _mask(settings, "enc") is None:
            wrong.append("a predictor without a mask (neither enc_is_block_causal nor enc_is_causal)")
        if settings.get("aim_pseudo_random") and _mask(settings, "predictor") != _mask(settings, "enc"):
            wrong.append("a predictor with a mask of its own under aim_pseudo_random")
    if is_classifier and "head.query" not in ours and not settings.get("cls_avgpool_patchtokens"):
        wrong.append("cls_avgpool_patchtokens is not set, so a linear head would classify every patch")
    refuse(wrong, "an XTRA", origin)


def _qk_scale(settings: Mapping[str, Any], part: str) -> float | None:
    # Official code uses torch's fused attention, which ignores qk_scale, unless fused_attn is off.
    scale = settings.get(f"{part}_qk_scale")
    return float(scale) if scale and not settings.get(f"{part}_fused_attn", True) else None


def _mask(settings: Mapping[str, Any], part: str) -> int | None:
    """Block size of the mask of "enc" or "predictor": 1 if plain causal, None if there is no mask."""
    # The block-causal mask wins over the plain one. The block size counts only for it, although official
    # files record one even if their mask does not use it.
    if settings.get(f"{part}_is_block_causal"):
        return int(settings.get(f"{part}_block_size", 1))
    return 1 if settings.get(f"{part}_is_causal") else None


def _predictor_settings(
    ours: Mapping[str, Tensor], settings: Mapping[str, Any], origin: str
) -> dict[str, Any]:
    # "native" means the encoder's mask. Any other mask is named, a block-causal one with its own size.
    mask = _mask(settings, "predictor")
    named = {None: "full", 1: "causal"}.get(mask, "block_causal")
    attention = "native" if mask == _mask(settings, "enc") else named
    width, depth, mlp_ratio = layer_sizes(ours, "predictor", origin)
    return {
        "predictor": "transformer",
        "predictor_attention": attention,
        "predictor_block_size": mask if attention == "block_causal" else None,
        "projection_dim": shape_of(ours, "predictor.projection.0.weight", 2, origin)[0],
        "predictor_dim": width,
        "predictor_depth": depth,
        "predictor_heads": int(settings.get("predictor_num_heads", DEFAULT_HEADS)),
        "predictor_mlp_ratio": mlp_ratio,
        "block_mlp_dim": shape_of(ours, "predictor.block_mlps.0.0.weight", 2, origin)[0],
        "num_predicted_blocks": count_numbered(ours, "predictor.block_mlps."),
        "norm_pixels": bool(settings.get("aim_norm_pix_loss", False)),
        "loss": "l1" if settings.get("aim_l1_loss") else "mse",
        "order": "random" if settings.get("aim_pseudo_random") else "raster",
        "order_seed": int(settings.get("seed", 0)),
    }


def _head(
    ours: dict[str, Tensor], settings: Mapping[str, Any], config: ModelConfig, origin: str
) -> HeadConfig:
    """Settings of a classifier's head; scales the keys in `ours` if the file has a scale of its own."""
    # An attentive head has a learned query, a linear head averages patches. Both use the last layers,
    # concatenated unless the settings say that they are averaged.
    attentive = "head.query" in ours
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
        # Our head divides scores by the root of its head width; the official head multiplies by this scale.
        # Scaling the keys by the ratio keeps every score the same.
        key = ours["head.key.weight"].float()
        ours["head.key.weight"] = key * (float(scale) * math.sqrt(key.shape[0] / head.num_heads))
    return head
