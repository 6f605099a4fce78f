"""Official NEPA files in the layout of transformers: config.json and model.safetensors or pytorch_model.bin.

Sizes come from the tensors, everything else from config.json. Its number of heads and `qk_norm` are required,
as tensors do not show them. Any other absent setting has its official default.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nextblock.checkpoint import CheckpointError
from nextblock.config import DataConfig, ModelConfig
from nextblock.interop.files import LoadOptions
from nextblock.interop.names import build, encoder_sizes, fused, needed, refuse, renamed, shape_of, unlike
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.models.vit import ROPE_BASE

MODEL_TYPE = "vit_nepa"
_LAYER = r"encoder\.layer\.(\d+)\."
_BLOCK = r"encoder.blocks.\1."
# Official names without "vit_nepa.", and ours.
NAMES = {
    r"embeddings\.cls_token$": "encoder.cls_token",
    r"embeddings\.patch_embeddings\.projection\.": "encoder.patch_embed.proj.",
    rf"{_LAYER}layernorm_before\.": f"{_BLOCK}norm1.",
    rf"{_LAYER}layernorm_after\.": f"{_BLOCK}norm2.",
    rf"{_LAYER}attention\.attention\.": f"{_BLOCK}attn.",
    rf"{_LAYER}attention\.output\.dense\.": f"{_BLOCK}attn.proj.",
    rf"{_LAYER}layer_scale\.lambda1$": f"{_BLOCK}gamma_1",
    rf"{_LAYER}output\.layer_scale\.lambda1$": f"{_BLOCK}gamma_2",
    rf"{_LAYER}intermediate\.up_proj\.": f"{_BLOCK}mlp.fc1.",
    rf"{_LAYER}output\.dense\.": f"{_BLOCK}mlp.fc2.",
    r"layernorm\.": "encoder.norm.",
    r"fc_norm\.": "head.norm.",
    r"classifier\.": "head.linear.",
}
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


def is_nepa(weights: Mapping[str, Any]) -> bool:
    """Whether weights have the names of an official NEPA model."""
    return any(name.endswith("encoder.layer.0.intermediate.up_proj.weight") for name in weights)


def nepa_data(settings: Mapping[str, Any]) -> DataConfig | None:
    """Crop and normalisation of NEPA's images; None if these are not the settings of a NEPA model."""
    if settings.get("model_type") != MODEL_TYPE:
        return None
    half = (0.5,) * int(settings.get("num_channels", 3))
    # The resize of official evaluation is not known; 8/7 of the image size is common.
    resize_px = round(int(settings.get("image_size", 224)) * 8 / 7)
    return DataConfig(mean=half, std=half, channels=len(half), val_resize_px=resize_px)


def read_nepa(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    origin: str,
    options: LoadOptions,  # noqa: ARG001 - config.json records everything
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier of an official file; `settings` is its config.json."""
    if not settings:
        raise CheckpointError(
            f"{origin} is a NEPA model without its config.json, which records its attention heads and norms; "
            "put the original one beside it"
        )
    plain = {name.removeprefix(f"{MODEL_TYPE}."): weight for name, weight in weights.items()}
    is_classifier = any(name.startswith("classifier.") for name in plain)
    is_affine = bool(settings.get("qk_norm_affine", False))
    wrong = unlike(settings, FIXED | ({"qk_norm_bias": False} if is_affine else {}))
    if len(plain) < len(weights):
        wrong.append(f"some tensors are there with and without the prefix {MODEL_TYPE}")
    if any(".intermediate.gate_proj." in name for name in plain):
        wrong.append("a gated MLP (gate_proj)")
    if is_classifier and "fc_norm.weight" not in plain:
        wrong.append("a classifier of the last token (no fc_norm)")
    plain.pop("embeddings.mask_token", None)  # unused, as NEPA masks nothing
    frequencies = plain.pop("rope_embeddings.inv_freq", None)
    if frequencies is not None:
        # 1 / 100^(i / quarter) is computed, not loaded, so other frequencies would be another function.
        places = torch.arange(len(frequencies), dtype=torch.float32) / len(frequencies)
        if not torch.allclose(frequencies.float(), ROPE_BASE**-places, rtol=1e-2):  # it may be in bf16
            wrong.append("rotary frequencies of another kind (rope_embeddings.inv_freq)")
    refuse(wrong, "a NEPA", origin)
    ours = fused(renamed(plain, NAMES, "NEPA", origin), ("query", "key", "value"), origin)
    has_qk_norm = needed(settings, "qk_norm", origin)
    has_layer_scale = any(name.endswith("gamma_1") for name in ours)
    is_causal = bool(settings.get("is_causal", True)) and not is_classifier
    config = ModelConfig(
        **encoder_sizes(ours, origin),
        image_size=int(needed(settings, "image_size", origin)),
        num_heads=int(needed(settings, "num_attention_heads", origin)),
        norm_eps=float(settings.get("layer_norm_eps", 1e-12)),
        positions="rope",
        rope_rescale=float(settings.get("pos_embed_rescale") or 1.0),
        class_token=True,
        qk_norm=None if not has_qk_norm else "scale" if is_affine else "plain",
        # In classifiers it is folded into the preceding layers.
        layer_scale=float(settings.get("layerscale_value") or 1e-5) if has_layer_scale else None,
        weight_init="trunc_normal_all",
        block_size=1,
        # Causal in pre-training; fine-tuned and probed with full attention.
        feature_attention="full",
        predictor="identity" if is_causal else None,
        target="embedding" if is_causal else "pixels",
    )
    head = None
    if is_classifier:
        head = HeadConfig(
            kind="linear",
            num_classes=shape_of(ours, "head.linear.weight", 2, origin)[0],
            layers=(config.depth - 1,),
            norm_layers=True,
            batch_norm=False,
            pooled_norm=config.norm_eps,
        )
    return build(config, ours, origin, head)
