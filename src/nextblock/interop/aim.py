"""Official AIM files (v1), in the two layouts of Apple's code.

    inference   backbone `.pth` and head `.pth`, or both in one file, as on the Hugging Face hub: fused qkv,
                positions computed and not stored, LayerNorm eps 1e-6
    training    the whole model with its prediction head, in one file or as a directory of
                torch.distributed.checkpoint: separate q, k and v, stored positions, pixels of a patch in
                (row, column, channel) order, LayerNorm eps 1e-5

Neither records the number of attention heads, or which layers a classifier averages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from nextblock.checkpoint import CheckpointError, MissingSettingError
from nextblock.config import ModelConfig, pair
from nextblock.interop.files import LoadOptions, ProbeLayers, only_tensors, read_content, unwrapped
from nextblock.interop.hub import fetch, is_hub_spec
from nextblock.interop.names import (
    build,
    encoder_sizes,
    fused,
    known_heads,
    layer_sizes,
    refuse,
    renamed,
    shape_of,
)
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier, last_layers
from nextblock.models.vit import sincos_positions
from nextblock.presets import heads_of_sizes

# Number of attention heads by official (width, depth).
NUM_HEADS_OF_SIZE = heads_of_sizes("aim-")
# Layers, counted from 0, that Apple's "best" heads average, by official (width, depth). They are six layers
# in the middle of the encoder; no file records them.
BEST_LAYERS_OF_SIZE = {
    (1536, 24): tuple(range(14, 20)),
    (2048, 24): tuple(range(12, 18)),
    (3072, 24): tuple(range(12, 18)),
    (4096, 32): tuple(range(14, 20)),
}
# Number of last layers that Apple's "last" heads average.
PROBED_LAYERS = 6
IMAGE_SIZE_PX = 224
INFERENCE_EPS, TRAINING_EPS = 1e-6, 1e-5
POSITION_TOLERANCE = 1e-4
CHOICES = 'give probe_layers="last", "best", or the layers themselves, counted from 0 (--probe_layers)'

# Prefixes of official names, and ours. The first match wins, so special rules (norms, positions) come before
# general ones. The training code stores the patch embedding in the first of several preprocessors.
NAMES = {
    r"preprocessor\.(?:blocks\.0\.)?pos_embed$": "encoder.pos_embed",
    r"preprocessor\.(?:blocks\.0\.)?patchifier\.": "encoder.patch_embed.",
    r"trunk\.blocks\.(\d+)\.norm_([12])\.": r"encoder.blocks.\1.norm\2.",
    r"trunk\.blocks\.": "encoder.blocks.",
    r"trunk\.post_trunk_norm\.": "encoder.norm.",
    # Head of a classifier: attention from learned queries, which are its class tokens.
    r"head\.cls_token$": "head.query",
    r"head\.k\.": "head.key.",
    r"head\.v\.": "head.value.",
    r"head\.linear\.": "head.linear.",
    r"head\.bn\.": "head.norm.",
    # The prediction head of pre-training is our predictor. It predicts the next patch.
    r"head\.decoder_projection\.": "predictor.projection.",
    r"head\.decoder_pos_embed$": "predictor.pos_embed",
    r"head\.decoder_blocks\.(\d+)\.norm_([12])\.": r"predictor.blocks.\1.norm\2.",
    r"head\.decoder_blocks\.": "predictor.blocks.",
    r"head\.decoder_norm\.": "predictor.norm.",
    r"head\.decoder_pred\.": "predictor.block_mlps.0.",
}
# Our names of the last layer, whose weight has a row, and whose bias a number, per pixel value.
OUTPUT_MAP = ("predictor.block_mlps.0.weight", "predictor.block_mlps.0.bias")


def is_aim(weights: Mapping[str, Any]) -> bool:
    """Whether weights have the names of an AIM trunk (v1 or v2)."""
    return any(name.startswith("trunk.blocks.") for name in weights)


def is_aim_head(weights: Mapping[str, Any]) -> bool:
    """Whether weights are only the head of an AIM classifier."""
    return "head.cls_token" in weights and all(name.startswith("head.") for name in weights)


def read_aim(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    origin: str,
    options: LoadOptions,
) -> NextBlockModel | ImageClassifier:
    """Build the encoder, classifier (a backbone and its head) or whole model in official files.

    `settings` is the config.json of Apple's files on the hub; {} without one. Refuses other architectures,
    and files whose settings neither the caller nor config.json gives.
    """
    if options.head is not None:
        place = fetch(str(options.head)) if is_hub_spec(options.head) else Path(options.head)
        head = unwrapped(read_content(place))
        if not is_aim_head(head):
            raise CheckpointError(f"{place} is not the head of an AIM classifier")
        twice = sorted(weights.keys() & head.keys())
        if twice:
            raise CheckpointError(f"{origin} has a head of its own ({twice[0]}); give it without head=")
        weights = {**weights, **only_tensors(head, str(place))}
    # AIMv2's RMSNorm has no bias and its SwiGLU has a third layer. Naming the architecture tells more than an
    # error about missing and unexpected tensors.
    has_biases = any(name.endswith(".norm_1.bias") for name in weights)
    is_v2 = not has_biases or "trunk.blocks.0.mlp.fc3.weight" in weights
    refuse(["AIMv2 (RMSNorm and SwiGLU); only AIM v1 is read"] * is_v2, "an AIM", origin)
    ours = renamed(weights, NAMES, "AIM", origin)
    # Only the training layout has separate layers for queries, keys and values. It uses another epsilon.
    from_training = "encoder.blocks.0.attn.q_proj.weight" in ours
    ours = fused(ours, ("q_proj", "k_proj", "v_proj"), origin)
    sizes = encoder_sizes(ours, origin)
    size, patch_size = (sizes["embed_dim"], sizes["depth"]), sizes["patch_size"]
    if (settings.get("embed_dim"), settings.get("num_blocks")) != size:
        settings = {}  # of another model

    heads = options.num_heads or settings.get("num_heads") or NUM_HEADS_OF_SIZE.get(size)
    heads = known_heads(heads, sizes, origin)
    layers = None
    if "head.query" in ours:
        # Apple's heads on the last and on the best layers differ only in their file name.
        given = settings.get("probe_layers", "last" if settings else None)
        layers = _probe_layers(given if options.probe_layers is None else options.probe_layers, size, origin)
    image_size = options.image_size or settings.get("img_size")
    if image_size is None:
        if "encoder.pos_embed" not in ours:
            raise MissingSettingError(
                image_size="Apple's; the file records none, and the encoder takes any (--image_size)"
            )
        image_size = math.isqrt(shape_of(ours, "encoder.pos_embed", 3, origin)[1]) * patch_size
    rows, columns = pair(tuple(image_size) if isinstance(image_size, list) else image_size)
    if rows % patch_size or columns % patch_size:
        raise CheckpointError(
            f"{origin} has {patch_size}-px patches, which do not make an image of {rows}x{columns} px; give "
            "its size in pixels as image_size= (--image_size)"
        )
    config = ModelConfig(
        **sizes,
        image_size=rows if rows == columns else (rows, columns),
        num_heads=heads,
        norm_eps=options.norm_eps or (TRAINING_EPS if from_training else INFERENCE_EPS),
        bias=False,
        patch_norm=True,
        positions="sincos",
        weight_init="xavier_uniform",
        block_size=1,
        # AIM predicts patch by patch under a causal mask with a bidirectional prefix. Its features use full
        # attention, as in Apple's probes.
        prefix=True,
        feature_attention="full",
        predictor=None,
    )
    # With the prediction head the file contains a whole model. Its layers are MLPs on single patches, so no
    # number of heads is needed.
    if any(name.startswith("predictor.") for name in ours):
        width, depth, mlp_ratio = layer_sizes(ours, "predictor", origin)
        config = replace(
            config,
            predictor="mlp",
            projection_dim=None,
            predictor_dim=width,
            predictor_depth=depth,
            predictor_heads=16,  # not used
            predictor_mlp_ratio=mlp_ratio,
            predictor_extra_norm="predictor.blocks.0.norm1.weight" in ours,
            block_mlp_dim=None,
        )
    for name in set(OUTPUT_MAP) & ours.keys():
        # Official patches are flattened from (row, column, channel), ours from (channel, row, column). The
        # last layer has a row and a bias per value of a patch, so its rows are permuted accordingly.
        ours[name] = rearrange(ours[name], "(h w c) ... -> (c h w) ...", h=patch_size, w=patch_size)
    _complete_positions(ours, config, origin)
    if layers is None:
        return build(config, ours, origin)
    _, queries, width = shape_of(ours, "head.query", 3, origin)
    if width != config.embed_dim:
        raise CheckpointError(
            f"the head is for an encoder of width {width}, but {origin} has width {config.embed_dim}; give "
            "the head of the same model"
        )
    head_config = HeadConfig(
        kind="attentive",
        num_classes=shape_of(ours, "head.linear.weight", 2, origin)[0],
        layers=layers,
        num_heads=config.num_heads,
        num_queries=queries,
        batch_norm="head.norm.running_mean" in ours,
        bias="head.linear.bias" in ours,
    )
    return build(config, ours, origin, head_config)


def _probe_layers(given: ProbeLayers | int | None, size: tuple[int, int], origin: str) -> tuple[int, ...]:
    """Layers that a head averages: as given, or the last ones if given by number or name."""
    if given is None:
        reason = f"{origin} does not record which layers its head averages: {CHOICES}"
        raise MissingSettingError(probe_layers=reason)
    if given == "best":
        if size not in BEST_LAYERS_OF_SIZE:
            raise CheckpointError(
                f"probe_layers 'best' is known for AIM's sizes only, and {origin} is {size[0]} wide with "
                f"{size[1]} layers; {CHOICES}"
            )
        return BEST_LAYERS_OF_SIZE[size]
    if isinstance(given, int | str):
        return last_layers(given if isinstance(given, int) else PROBED_LAYERS, size[1])
    return tuple(given)


def _complete_positions(weights: dict[str, Tensor], config: ModelConfig, origin: str) -> None:
    """Add fixed positions if none are stored; else check the stored ones."""
    # The inference layout stores no positions. The training layout stores fixed ones for encoder and
    # predictor: the same function of the grid at two widths.
    widths = {"encoder.pos_embed": config.embed_dim}
    if config.predictor is not None:
        widths["predictor.pos_embed"] = config.predictor_dim
    for name, width in widths.items():
        computed = sincos_positions(config.grid, width)
        stored = weights.setdefault(name, computed)
        # Half precision rounds sines by more than the tolerance, so use its epsilon instead.
        tolerance = max(POSITION_TOLERANCE, torch.finfo(stored.dtype).eps)
        if stored.shape != computed.shape or (stored.float() - computed).abs().max() > tolerance:
            raise CheckpointError(
                f"the positions of {origin} are not AIM's sines and cosines on a grid of {config.grid[0]}x"
                f"{config.grid[1]} patches ({name}, {tuple(stored.shape)}); if its images have another "
                "shape, give image_size= (--image_size)"
            )
