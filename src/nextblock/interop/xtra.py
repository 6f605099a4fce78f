"""Official XTRA files: Lightning `.ckpt` and DeepSpeed `mp_rank_00_model_states.pt`, models and classifiers.

Only names, shapes and settings are read. Sizes come from the tensors, the rest from the file's
`hyper_parameters`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from nextblock.checkpoint import CheckpointError, load_strictly
from nextblock.config import ModelConfig, Size
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier
from nextblock.models.heads import HeadConfig

__all__ = ["is_xtra", "read_xtra"]

NUM_HEADS_OF_ARCH = {"tiny": 3, "small": 6, "base": 12, "large": 16, "huge": 16, "giant": 16}
"""Attention heads of the architectures that the official code names `vit_tiny` and so on."""
NUM_HEADS_OF_SIZE = {
    (192, 12): 3,
    (384, 12): 6,
    (768, 12): 12,
    (1024, 24): 16,
    (1280, 32): 16,
    (1408, 40): 16,
}
"""Attention heads by the official (width, depth)."""

NAMES = (
    (r"enc\.(.+)", r"encoder.\1"),
    (r"proj\.mlp\.(\d+)\.(.+)", r"predictor.projection.\1.\2"),
    (r"predictor\.(.+)", r"predictor.\1"),
    (r"aim_proj\.(\d+)\.mlp\.(\d+)\.(.+)", r"predictor.block_mlps.\1.\2.\3"),
)
"""Official name -> ours, for models; the first pattern that matches the whole name holds."""

ATTENTIVE_NAMES = (
    (r"classifier\.cls_token", r"head.query"),
    (r"classifier\.k\.(.+)", r"head.key.\1"),
    (r"classifier\.v\.(.+)", r"head.value.\1"),
    (r"classifier\.linear\.(.+)", r"head.linear.\1"),
    (r"classifier\.bn\.(.+)", r"head.norm.\1"),
    (r"enc\.(.+)", r"encoder_model.encoder.\1"),
)
LINEAR_NAMES = (
    (r"classifier\.(?:\d+\.)?((?:running_|num_batches).+)", r"head.norm.\1"),
    (r"classifier\.(?:\d+\.)?((?:weight|bias))", r"head.linear.\1"),
    (r"enc\.(.+)", r"encoder_model.encoder.\1"),
)


def is_xtra(content: Mapping[str, Any]) -> bool:
    """Whether an unpickled file has the layout of an official XTRA checkpoint."""
    weights = _weights(content)
    return "enc.pos_embed" in weights and "enc.patch_embed.proj.weight" in weights


def read_xtra(
    content: Mapping[str, Any], origin: str, *, num_heads: int | None = None
) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier that an official file holds.

    `num_heads` of the encoder comes from the argument, the file's architecture name, or the table of official
    sizes; where none tells, the file is refused, as a wrong number changes features without an error.
    """
    weights, settings = _weights(content), dict(content.get("hyper_parameters") or {})
    is_classifier = any(name.startswith("classifier.") for name in weights)
    with_predictor = any(name.startswith("predictor.") for name in weights)
    try:
        config = _model_config(weights, settings, origin, num_heads=num_heads, with_predictor=with_predictor)
    except KeyError as error:
        raise CheckpointError(f"{origin} lacks {error}, without which the model cannot be built") from error
    if is_classifier:
        return _read_classifier(weights, settings, config, origin)
    model = NextBlockModel(config)
    load_strictly(model, _renamed(weights, NAMES, origin), origin)
    return model.eval()


def _weights(content: Mapping[str, Any]) -> Mapping[str, Tensor]:
    weights = content.get("state_dict", content.get("module"))
    return weights if isinstance(weights, Mapping) else {}


def _renamed(
    weights: Mapping[str, Tensor], names: tuple[tuple[str, str], ...], origin: str
) -> dict[str, Tensor]:
    renamed = {}
    for name, tensor in weights.items():
        match = next(((p, r) for p, r in names if re.fullmatch(p, name)), None)
        if match is None:
            raise CheckpointError(f"{origin} holds {name!r}, which is no part of an XTRA model")
        renamed[re.sub(*match, name)] = tensor
    return renamed


def _model_config(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    origin: str,
    *,
    num_heads: int | None,
    with_predictor: bool,
) -> ModelConfig:
    width, in_chans, patch_size, _ = weights["enc.patch_embed.proj.weight"].shape
    depth = _count(weights, r"enc\.blocks\.(\d+)\..*")
    encoder = ModelConfig(
        image_size=_image_size(settings, weights["enc.pos_embed"].shape[1], patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=_num_heads(num_heads, settings, (width, depth), origin),
        mlp_ratio=weights["enc.blocks.0.mlp.fc1.weight"].shape[0] / width,
        block_size=_block_size(settings, origin),
        predictor=None,
    )
    return replace(encoder, **_predictor_settings(weights, settings)) if with_predictor else encoder


def _predictor_settings(weights: Mapping[str, Tensor], settings: Mapping[str, Any]) -> dict[str, Any]:
    width = weights["predictor.pos_embed"].shape[-1]
    return {
        "predictor": "transformer",
        "projection_dim": weights["proj.mlp.0.weight"].shape[0],
        "predictor_dim": width,
        "predictor_depth": _count(weights, r"predictor\.blocks\.(\d+)\..*"),
        "predictor_heads": int(settings["predictor_num_heads"]),
        "predictor_mlp_ratio": weights["predictor.blocks.0.mlp.fc1.weight"].shape[0] / width,
        "block_mlp_dim": weights["aim_proj.0.mlp.0.weight"].shape[0],
        "num_predicted_blocks": _count(weights, r"aim_proj\.(\d+)\..*"),
        "norm_pixels": bool(settings.get("aim_norm_pix_loss", True)),
    }


def _count(weights: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max(int(match[1]) for name in weights if (match := re.fullmatch(pattern, name)))


def _num_heads(given: int | None, settings: Mapping[str, Any], size: tuple[int, int], origin: str) -> int:
    arch = str(settings.get("enc_arch", "")).removeprefix("vit_")
    heads = given or NUM_HEADS_OF_ARCH.get(arch) or NUM_HEADS_OF_SIZE.get(size)
    if heads is None:
        raise CheckpointError(
            f"{origin} does not tell how many attention heads its encoder has ({size[0]} wide, {size[1]} "
            "layers): give it as num_heads="
        )
    return heads


def _block_size(settings: Mapping[str, Any], origin: str) -> int:
    """Patches along a block's side; 1 where the encoder is plainly causal, whatever `enc_block_size` says."""
    if settings.get("enc_is_block_causal", False):
        return int(settings["enc_block_size"])
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
    names = ATTENTIVE_NAMES if attentive else LINEAR_NAMES
    renamed = _renamed(weights, names, origin)
    last = int(settings.get("cls_n_last_blocks", 1))
    head = HeadConfig(
        kind="attentive" if attentive else "linear",
        num_classes=renamed["head.linear.weight"].shape[0],
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
