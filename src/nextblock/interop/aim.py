"""Official AIM files (v1), in the two layouts that Apple's code has; `aim_out` writes them.

    inference   backbone `.pth` and head `.pth`, or both in one file, as on the Hugging Face hub: fused qkv,
                positions computed and not stored, LayerNorm eps 1e-6
    training    the whole model with its prediction head: separate q, k and v, stored positions, pixels of a
                patch in (row, column, channel) order, LayerNorm eps 1e-5

Neither says how many attention heads there are, nor which layers a classifier averages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nextblock.checkpoint import CheckpointError, MissingSettingError, load_strictly
from nextblock.config import ModelConfig, Size, pair
from nextblock.interop.files import unwrapped
from nextblock.interop.names import (
    NameTable,
    count_numbered,
    needed,
    patch_shape,
    ratio_of,
    require_heads,
)
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier, last_layers
from nextblock.models.vit import sincos_positions
from nextblock.presets import SIZES

__all__ = ["hub_settings", "is_aim", "is_aim_head", "read_aim", "stores_positions", "with_positions"]

NUM_HEADS_OF_SIZE = {(1536, 24): 12, (2048, 24): 16, (3072, 24): 24, (4096, 32): 32}
"""Attention heads by the official (width, depth)."""
BEST_LAYERS_OF_SIZE = {
    (1536, 24): tuple(range(14, 20)),
    (2048, 24): tuple(range(12, 18)),
    (3072, 24): tuple(range(12, 18)),
    (4096, 32): tuple(range(14, 20)),
}
"""Layers, counted from 0, that Apple's "best" heads average, by the official (width, depth)."""
PROBED_LAYERS = 6
"""How many of the last layers Apple's "last" heads average."""
IMAGE_SIZE_PX = 224
INFERENCE_EPS, TRAINING_EPS = 1e-6, 1e-5
POSITION_TOLERANCE = 1e-4

LIST_OF_PREPROCESSORS = ("preprocessor.blocks.0.", "preprocessor.")
"""The training code's recipe makes the patches in the first of several preprocessors."""

TRUNK_NAMES = NameTable(
    "AIM",
    (
        ("preprocessor.pos_embed", "encoder.pos_embed"),
        ("preprocessor.patchifier.proj.{rest}", "encoder.patch_embed.proj.{rest}"),
        ("preprocessor.patchifier.norm.{rest}", "encoder.patch_embed.norm.{rest}"),
        ("trunk.blocks.{i}.norm_1.{rest}", "encoder.blocks.{i}.norm1.{rest}"),
        ("trunk.blocks.{i}.attn.qkv.{rest}", "encoder.blocks.{i}.attn.qkv.{rest}"),
        ("trunk.blocks.{i}.attn.proj.{rest}", "encoder.blocks.{i}.attn.proj.{rest}"),
        ("trunk.blocks.{i}.norm_2.{rest}", "encoder.blocks.{i}.norm2.{rest}"),
        ("trunk.blocks.{i}.mlp.{rest}", "encoder.blocks.{i}.mlp.{rest}"),
        ("trunk.post_trunk_norm.{rest}", "encoder.norm.{rest}"),
    ),
)
CLASSIFIER_NAMES = NameTable(
    "AIM",
    (
        ("head.cls_token", "head.query"),
        ("head.k.{rest}", "head.key.{rest}"),
        ("head.v.{rest}", "head.value.{rest}"),
        ("head.linear.{rest}", "head.linear.{rest}"),
        ("head.bn.{rest}", "head.norm.{rest}"),
    ),
)
PREDICTOR_NAMES = NameTable(
    "AIM",
    (
        ("head.decoder_projection.{rest}", "predictor.projection.{rest}"),
        ("head.decoder_pos_embed", "predictor.pos_embed"),
        ("head.decoder_blocks.{i}.norm_1.{rest}", "predictor.blocks.{i}.norm1.{rest}"),
        ("head.decoder_blocks.{i}.norm_2.{rest}", "predictor.blocks.{i}.norm2.{rest}"),
        ("head.decoder_blocks.{i}.mlp.{rest}", "predictor.blocks.{i}.mlp.{rest}"),
        ("head.decoder_norm.{rest}", "predictor.norm.{rest}"),
        ("head.decoder_pred.{rest}", "predictor.block_mlps.0.{rest}"),
    ),
)
OUTPUT_MAP = ("predictor.block_mlps.0.weight", "predictor.block_mlps.0.bias")
"""Our names of what makes pixels: a row, or a number, for each."""

ProbeLayers = Literal["last", "best"] | Sequence[int]


def is_aim(content: Any) -> bool:
    """Whether a file's content has an AIM trunk (v1, or v2)."""
    names = _weights(content)
    return any(name.startswith("trunk.blocks.") for name in names) or _is_aim_v2(names)


def is_aim_head(content: Any) -> bool:
    """Whether a file holds the head of an AIM classifier, and nothing else."""
    names = _weights(content)
    return "head.cls_token" in names and all(name.startswith("head.") for name in names)


def stores_positions(content: Any) -> bool:
    """Whether a file holds the positions of its patches, which tell the size of its images."""
    return "preprocessor.pos_embed" in _weights(content)


def hub_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `read_aim` that a `config.json` tells, which Apple's files on the hub have beside them.

    Where it does not name the layers that the head averages, they are the last six.
    """
    layers, size = config.get("probe_layers", PROBED_LAYERS), config.get("img_size")
    if isinstance(layers, int):
        layers = last_layers(layers, config["num_blocks"]) if "num_blocks" in config else None
    return {
        "num_heads": config.get("num_heads"),
        "probe_layers": None if layers is None else tuple(layers),
        "image_size": tuple(size) if isinstance(size, list) else size,
    }


# ------------------------------------------------------------------------------------------------------ in


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the caller says of a file that does not say it."""

    num_heads: int | None
    image_size: Size | None
    norm_eps: float | None


def read_aim(
    content: Mapping[str, Any],
    origin: str,
    *,
    head: Mapping[str, Any] | None = None,
    num_heads: int | None = None,
    probe_layers: ProbeLayers | None = None,
    image_size: Size | None = None,
    norm_eps: float | None = None,
) -> NextBlockModel | ImageClassifier:
    """Build what official files hold: an encoder, a classifier (a backbone and its `head`), or a whole model.

    `num_heads` comes from the argument or the table of official sizes. `probe_layers` are the layers that a
    classifier averages, counted from 0, or Apple's "last" or "best" of an official size. `image_size` in
    pixels comes from stored positions, which fit one grid only, else it is 224; positions are computed for
    any other size at run time. `norm_eps` is that of the layout. What remains untold, and files of another
    architecture, are refused.
    """
    weights = _weights(content)
    if head is not None:
        weights = _joined(weights, _weights(head), origin)
    _refuse_other_architectures(weights, origin)
    told = _Told(num_heads=num_heads, image_size=image_size, norm_eps=norm_eps)
    config = _model_config(weights, told, origin)
    weights = _fused(weights, origin)
    if "head.cls_token" in weights:
        return _classifier(weights, config, probe_layers, origin)
    return _model(weights, config, origin)


def _weights(content: Any) -> Mapping[str, Tensor]:
    """The weights of a file, out of its wrappers, under their plain names."""
    listed, plain = LIST_OF_PREPROCESSORS
    return {
        plain + name.removeprefix(listed) if name.startswith(listed) else name: value
        for name, value in unwrapped(content).items()
    }


def _joined(backbone: Mapping[str, Tensor], head: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    if not is_aim_head(head):
        held = ", ".join(list(head)[:5]) or "nothing known"
        raise CheckpointError(
            f"the head given with {origin} is not that of an AIM classifier (it holds: {held}); give the "
            "file with head.cls_token, head.k.weight and so on"
        )
    twice = sorted(backbone.keys() & head.keys())
    if twice:
        raise CheckpointError(f"{origin} has a head of its own ({twice[0]}); give it without head=")
    return {**backbone, **head}


def _is_aim_v2(names: Mapping[str, Any]) -> bool:
    """AIMv2 in Apple's names (RMSNorm has no bias, SwiGLU a third map) or in those of transformers."""
    swiglu = "trunk.blocks.0.mlp.fc3.weight" in names
    norms = [name for name in names if name.startswith("trunk.") and ".norm_1." in name]
    rms_norm = bool(norms) and all(name.endswith(".weight") for name in norms)
    elsewhere = (name.endswith("encoder.layers.0.rms_norm1.weight") for name in names)
    with_text = (name.startswith("image_encoder.trunk.") for name in names)
    return swiglu or rms_norm or any(elsewhere) or any(with_text)


def _refuse_other_architectures(weights: Mapping[str, Tensor], origin: str) -> None:
    if is_aim_head(weights):
        raise CheckpointError(
            f"{origin} is the head of an AIM classifier alone; load the backbone's file, with this as head= "
            "(--head)"
        )
    if _is_aim_v2(weights):
        raise CheckpointError(
            f"{origin} is an AIMv2 model (RMSNorm and SwiGLU), and only AIM v1 is read; "
            "transformers has AIMv2 as Aimv2Model"
        )
    if any(".lora_" in name for name in weights):
        raise CheckpointError(
            f"{origin} holds LoRA weights beside the matrices that they change; merge them where they were "
            "trained, and save the result"
        )


def _model_config(weights: Mapping[str, Tensor], told: _Told, origin: str) -> ModelConfig:
    width, in_chans, patch_size = patch_shape(weights, "preprocessor.patchifier.proj.weight", origin)
    depth = count_numbered(weights, "trunk.blocks.", origin)
    from_training = "trunk.blocks.0.attn.q_proj.weight" in weights
    encoder = ModelConfig(
        image_size=_image_size(weights, patch_size, told.image_size, origin),
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=_num_heads(told.num_heads, (width, depth), origin),
        mlp_ratio=ratio_of(needed(weights, "trunk.blocks.0.mlp.fc1.weight", origin).shape[0], width),
        norm_eps=told.norm_eps or (TRAINING_EPS if from_training else INFERENCE_EPS),
        bias=False,
        patch_norm=True,
        positions="sincos",
        weight_init="xavier_uniform",
        block_size=1,
        prefix=True,
        feature_attention="full",
        predictor=None,
    )
    with_predictor = any(name.startswith("head.decoder_") for name in weights)
    return replace(encoder, **_predictor_settings(weights, origin)) if with_predictor else encoder


def _predictor_settings(weights: Mapping[str, Tensor], origin: str) -> dict[str, Any]:
    width = needed(weights, "head.decoder_projection.weight", origin).shape[0]
    hidden = needed(weights, "head.decoder_blocks.0.mlp.fc1.weight", origin).shape[0]
    return {
        "predictor": "mlp",
        "projection_dim": None,
        "predictor_dim": width,
        "predictor_depth": count_numbered(weights, "head.decoder_blocks.", origin),
        "predictor_heads": SIZES["aim-600m"].predictor_heads,  # not used: its layers have no attention
        "predictor_mlp_ratio": ratio_of(hidden, width),
        "predictor_extra_norm": "head.decoder_blocks.0.norm_1.weight" in weights,
        "block_mlp_dim": None,
    }


def _num_heads(given: int | None, size: tuple[int, int], origin: str) -> int:
    return require_heads(given or NUM_HEADS_OF_SIZE.get(size), size, origin)


def _image_size(weights: Mapping[str, Tensor], patch_size: int, given: Size | None, origin: str) -> Size:
    """From the argument, the stored positions, or Apple's size, in that order."""
    stored = weights.get("preprocessor.pos_embed")
    if stored is not None and stored.ndim != 3:
        raise CheckpointError(f"{origin} holds positions of shape {tuple(stored.shape)}, not (1, n, d)")
    size = given or (IMAGE_SIZE_PX if stored is None else _stored_size(stored, patch_size))
    rows, columns = (length // patch_size for length in pair(size))
    fits = stored is None or rows * columns == stored.shape[1]
    if fits and not any(length % patch_size for length in pair(size)):
        return size
    held = "" if stored is None else f"{stored.shape[1]} positions of "
    why = (
        f"{origin} holds {held}{patch_size}-px patches, which do not make an image of "
        f"{pair(size)[0]}x{pair(size)[1]} px; give its size in pixels as image_size= (--image_size)"
    )
    raise MissingSettingError("image_size", why) if given is None else CheckpointError(why)


def _stored_size(stored: Float[Tensor, "1 n d"], patch_size: int) -> Size:
    """The size of the images whose positions these are: each grid has its own; else that of a square."""
    patches, width = stored.shape[1:]
    for rows in range(1, patches + 1):
        grid = (rows, patches // rows)
        if patches % rows == 0 and _are_positions(stored, sincos_positions(grid, width)):
            return rows * patch_size if rows == grid[1] else (rows * patch_size, grid[1] * patch_size)
    return math.isqrt(patches) * patch_size


def _are_positions(stored: Float[Tensor, "b n d"], computed: Float[Tensor, "1 n2 d2"]) -> bool:
    """Whether stored positions are the fixed ones, but for the rounding of their number format."""
    tolerance = max(POSITION_TOLERANCE, torch.finfo(stored.dtype).eps)
    return stored.shape == computed.shape and bool((stored.float() - computed).abs().max() <= tolerance)


def _fused(weights: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """Separate maps to queries, keys and values, joined under the names of the inference layout."""
    fused = dict(weights)
    for name in weights:
        match = re.fullmatch(r"(.+\.attn\.)q_proj\.(\w+)", name)
        if match is not None:
            names = [f"{match[1]}{part}_proj.{match[2]}" for part in "qkv"]
            fused[f"{match[1]}qkv.{match[2]}"] = torch.cat([needed(weights, one, origin) for one in names])
            for one in names:
                del fused[one]
    return fused


def _model(weights: Mapping[str, Tensor], config: ModelConfig, origin: str) -> NextBlockModel:
    model = NextBlockModel(config)
    renamed = (TRUNK_NAMES + PREDICTOR_NAMES).to_ours(weights, origin)
    order = "(h w c) ... -> (c h w) ..."
    for name in set(OUTPUT_MAP) & renamed.keys():
        renamed[name] = rearrange(renamed[name], order, h=config.patch_size, w=config.patch_size)
    load_strictly(model, with_positions(renamed, config, origin), origin)
    return model.eval()


def _classifier(
    weights: Mapping[str, Tensor], config: ModelConfig, probe_layers: ProbeLayers | None, origin: str
) -> ImageClassifier:
    trunk = {name: tensor for name, tensor in weights.items() if not name.startswith("head.")}
    encoder_model = _model(trunk, config, origin)
    in_head = {name: tensor for name, tensor in weights.items() if name.startswith("head.")}
    renamed = CLASSIFIER_NAMES.to_ours(in_head, origin)
    head = HeadConfig(
        kind="attentive",
        num_classes=needed(weights, "head.linear.weight", origin).shape[0],
        layers=_probe_layers(probe_layers, (config.embed_dim, config.depth), origin),
        num_heads=config.num_heads,
        num_queries=weights["head.cls_token"].shape[1],
        batch_norm="head.bn.running_mean" in weights,
        bias="head.linear.bias" in weights,
    )
    classifier = ImageClassifier(encoder_model, head)
    load_strictly(classifier.head, {n.removeprefix("head."): w for n, w in renamed.items()}, origin)
    return classifier.eval()


def _probe_layers(given: ProbeLayers | None, size: tuple[int, int], origin: str) -> tuple[int, ...]:
    choices = 'give probe_layers="last", "best", or the layers themselves, counted from 0 (--probe_layers)'
    if given is None:
        raise MissingSettingError(
            "probe_layers",
            f"{origin} does not tell which layers its head averages (Apple's heads for the last layers and "
            f"for the best differ by file name alone): {choices}",
        )
    if not isinstance(given, str):
        return tuple(given)
    if given == "last":
        return last_layers(PROBED_LAYERS, size[1])
    if given == "best" and size in BEST_LAYERS_OF_SIZE:
        return BEST_LAYERS_OF_SIZE[size]
    raise CheckpointError(
        f"probe_layers is {given!r}, which says nothing of an encoder {size[0]} wide with {size[1]} layers: "
        + choices
    )


def with_positions(weights: Mapping[str, Tensor], config: ModelConfig, origin: str) -> dict[str, Tensor]:
    """Fixed positions computed where none are stored, and checked where they are."""
    complete = dict(weights)
    widths = {"encoder.pos_embed": config.embed_dim}
    if config.predictor is not None:
        widths["predictor.pos_embed"] = config.predictor_dim
    for name, width in widths.items():
        computed = sincos_positions(config.grid, width)
        stored = complete.setdefault(name, computed)
        if not _are_positions(stored, computed):
            raise CheckpointError(
                f"the positions of {origin} are not AIM's sines and cosines on a grid of {config.grid[0]}x"
                f"{config.grid[1]} patches ({name}, {tuple(stored.shape)}), and AIM has no others. If the "
                "images of a file are of another shape, give image_size= (--image_size)"
            )
    return complete
