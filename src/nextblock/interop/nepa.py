"""Official NEPA files in the layout of transformers: config.json and model.safetensors or pytorch_model.bin.

Sizes come from the tensors, everything else from config.json. Its number of heads and `qk_norm` are required,
as tensors do not show them. Any other absent setting has its official default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nextblock.checkpoint import CheckpointError, build_model
from nextblock.config import DataConfig, ModelConfig
from nextblock.interop.files import unwrapped
from nextblock.interop.names import (
    count_numbered,
    fused,
    needed,
    only_tensors,
    patch_shape,
    ratio_of,
    renamed,
    shape_of,
)
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.models.vit import ROPE_BASE

MODEL_TYPE = "vit_nepa"
_LAYER = r"encoder\.layer\.(\d+)\."
_BLOCK = r"encoder.blocks.\1."
# Official names after an optional "vit_nepa.", and ours.
NAMES = {
    rf"(?:{MODEL_TYPE}\.)?{theirs}": ours
    for theirs, ours in {
        r"embeddings\.cls_token$": "encoder.cls_token",
        r"embeddings\.patch_embeddings\.projection\.": "encoder.patch_embed.proj.",
        rf"{_LAYER}layernorm_before\.": f"{_BLOCK}norm1.",
        rf"{_LAYER}layernorm_after\.": f"{_BLOCK}norm2.",
        rf"{_LAYER}attention\.attention\.(qkv\.|[qk]_norm\.)": rf"{_BLOCK}attn.\2",
        rf"{_LAYER}attention\.output\.dense\.": f"{_BLOCK}attn.proj.",
        rf"{_LAYER}layer_scale\.lambda1$": f"{_BLOCK}gamma_1",
        rf"{_LAYER}output\.layer_scale\.lambda1$": f"{_BLOCK}gamma_2",
        rf"{_LAYER}intermediate\.up_proj\.": f"{_BLOCK}mlp.fc1.",
        rf"{_LAYER}output\.dense\.": f"{_BLOCK}mlp.fc2.",
        r"layernorm\.": "encoder.norm.",
    }.items()
} | {r"fc_norm\.": "head.norm.", r"classifier\.": "head.linear."}
# Settings of which only this value is supported; absent means the same.
FIXED = {
    "model_type": MODEL_TYPE,
    "hidden_act": "gelu",
    "rope_theta": ROPE_BASE,
    "qkv_bias": True,
    "use_gated_mlp": False,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
}


def is_nepa(content: Any) -> bool:
    """Whether a file's content has the layout of an official NEPA model."""
    return any(name.endswith("encoder.layer.0.intermediate.up_proj.weight") for name in unwrapped(content))


def nepa_data(settings: Mapping[str, Any]) -> DataConfig | None:
    """Crop and normalisation of NEPA's images; None if these are not the settings of a NEPA model."""
    if settings.get("model_type") != MODEL_TYPE:
        return None
    half = (0.5,) * int(settings.get("num_channels", 3))
    # The resize of official evaluation is not known; 8/7 of the image size is common.
    resize_px = round(int(settings.get("image_size", 224)) * 8 / 7)
    return DataConfig(mean=half, std=half, channels=len(half), val_resize_px=resize_px)


def read_nepa(
    content: Mapping[str, Any], settings: Mapping[str, Any], origin: str
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier of an official file; `settings` is its config.json."""
    weights = only_tensors(unwrapped(content), origin)
    if not settings:
        raise CheckpointError(
            f"{origin} is a NEPA model without its config.json, which records its attention heads and norms; "
            "put the original one beside it"
        )
    is_classifier = any(name.startswith("classifier.") for name in weights)
    wrong = [
        f"{name} is {settings[name]!r}, only {value!r} is known"
        for name, value in FIXED.items()
        if settings.get(name, value) != value
    ]
    if any(".intermediate.gate_proj." in name for name in weights):
        wrong.append("a gated MLP (gate_proj)")
    is_affine = bool(settings.get("qk_norm_affine", False))
    if is_affine and settings.get("qk_norm_bias"):
        wrong.append("qk_norm_bias is True, only False is known")
    if is_classifier and "fc_norm.weight" not in weights:
        wrong.append("a classifier of the last token (no fc_norm)")
    if wrong:
        raise CheckpointError(
            f"{origin} is a NEPA model of a kind that is not implemented: {'; '.join(wrong)}"
        )
    kept = {}
    for name, tensor in weights.items():
        plain = name.removeprefix(f"{MODEL_TYPE}.")
        if plain == "rope_embeddings.inv_freq":
            # 1 / 100^(i / quarter) is computed, not loaded, so other frequencies would be another function.
            places = torch.arange(len(tensor), dtype=torch.float32) / len(tensor)
            if not torch.allclose(tensor.float(), ROPE_BASE**-places, rtol=1e-2):  # it may be in bf16
                raise CheckpointError(f"{origin} has rotary frequencies of another kind ({name})")
        elif plain != "embeddings.mask_token":  # unused, as NEPA masks nothing
            kept[name] = tensor
    ours = renamed(fused(kept, ("query", "key", "value"), origin), NAMES, "NEPA", origin)
    width, in_chans, patch_size = patch_shape(ours, "encoder.patch_embed.proj.weight", origin)
    hidden = shape_of(ours, "encoder.blocks.0.mlp.fc1.weight", 2, origin)[0]
    qk_norm = None
    if needed(settings, "qk_norm", origin):
        qk_norm = "scale" if is_affine else "plain"
    is_causal = bool(settings.get("is_causal", True)) and not is_classifier
    config = ModelConfig(
        image_size=int(needed(settings, "image_size", origin)),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=count_numbered(ours, "encoder.blocks.", origin),
        num_heads=int(needed(settings, "num_attention_heads", origin)),
        mlp_ratio=ratio_of(hidden, width),
        norm_eps=float(settings.get("layer_norm_eps", 1e-12)),
        positions="rope",
        rope_rescale=float(settings.get("pos_embed_rescale") or 1.0),
        class_token=True,
        qk_norm=qk_norm,
        # In classifiers it is folded into the preceding layers.
        layer_scale=float(settings.get("layerscale_value") or 1e-5) if _has(ours, "gamma_1") else None,
        weight_init="trunc_normal_all",
        block_size=1,
        # Causal in pre-training; fine-tuned and probed with full attention.
        feature_attention="full",
        predictor="identity" if is_causal else None,
        target="embedding" if is_causal else "pixels",
    )
    if not is_classifier:
        return build_model(config, ours, origin)
    head = HeadConfig(
        kind="linear",
        num_classes=shape_of(ours, "head.linear.weight", 2, origin)[0],
        layers=(config.depth - 1,),
        norm_layers=True,
        batch_norm=False,
        pooled_norm=config.norm_eps,
    )
    ours = {name if name.startswith("head.") else f"encoder_model.{name}": w for name, w in ours.items()}
    return build_model(config, ours, origin, head)


def _has(weights: Mapping[str, Tensor], ending: str) -> bool:
    return any(name.endswith(ending) for name in weights)
