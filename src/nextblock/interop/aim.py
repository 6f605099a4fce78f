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
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from nextblock.checkpoint import CheckpointError, MissingSettingError, build_model
from nextblock.config import ModelConfig, Size, pair
from nextblock.interop.files import LoadOptions, ProbeLayers, unwrapped
from nextblock.interop.names import (
    count_numbered,
    fused,
    only_tensors,
    patch_shape,
    ratio_of,
    renamed,
    shape_of,
    unknown_heads,
)
from nextblock.models import NextBlockModel
from nextblock.models.heads import HeadConfig, ImageClassifier, last_layers
from nextblock.models.vit import sincos_positions
from nextblock.presets import SIZES

# Number of attention heads by official (width, depth).
NUM_HEADS_OF_SIZE = {(c.embed_dim, c.depth): c.num_heads for n, c in SIZES.items() if n.startswith("aim-")}
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

# The training code stores the patch embedding in the first of several preprocessors.
LISTED_PREPROCESSOR = re.compile(r"^preprocessor\.blocks\.0\.")


# Prefixes of official names, and ours. The first match wins, so special rules (norms, positions) come before
# general ones.
NAMES = {
    r"preprocessor\.pos_embed$": "encoder.pos_embed",
    r"preprocessor\.patchifier\.": "encoder.patch_embed.",
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


def is_aim(content: Any) -> bool:
    """Whether a file's content has an AIM trunk (v1 or v2)."""
    names = _weights(content)
    return any(name.startswith("trunk.blocks.") for name in names) or _is_aim_v2(names)


def is_aim_head(content: Any) -> bool:
    """Whether a file contains only the head of an AIM classifier."""
    names = _weights(content)
    return "head.cls_token" in names and all(name.startswith("head.") for name in names)


def stores_positions(content: Any) -> bool:
    """Whether a file contains position embeddings, which determine its image size."""
    return "preprocessor.pos_embed" in _weights(content)


def hub_settings(config: Mapping[str, Any], content: Any) -> dict[str, Any]:
    """Settings in the `config.json` of Apple's files on the hub, if it belongs to these weights."""
    projection = _weights(content).get("preprocessor.patchifier.proj.weight")
    width = None if projection is None else projection.shape[0]
    if not config or config.get("embed_dim", width) != width:
        return {}
    # A number means that many last layers; six is the default.
    layers, size = config.get("probe_layers", PROBED_LAYERS), config.get("img_size")
    if isinstance(layers, int):
        layers = last_layers(layers, config["num_blocks"]) if "num_blocks" in config else None
    settings = {
        "num_heads": config.get("num_heads"),
        "probe_layers": None if layers is None else tuple(layers),
        "image_size": tuple(size) if isinstance(size, list) else size,
    }
    return {name: value for name, value in settings.items() if value is not None}


def read_aim(
    content: Mapping[str, Any], origin: str, options: LoadOptions, head: Any = None
) -> NextBlockModel | ImageClassifier:
    """Build the encoder, classifier (a backbone and its `head`) or whole model in official files.

    Refuses other architectures, and missing settings that the caller does not give either.
    """
    weights = _weights(content)
    if head is not None:
        of_head = _weights(head)
        if not is_aim_head(head):
            held = ", ".join(list(of_head)[:5]) or "nothing known"
            raise CheckpointError(
                f"the head given with {origin} is not the head of an AIM classifier (it holds: {held})"
            )
        twice = sorted(weights.keys() & of_head.keys())
        if twice:
            raise CheckpointError(f"{origin} has a head of its own ({twice[0]}); give it without head=")
        weights = {**weights, **of_head}
    if _is_aim_v2(weights):
        raise CheckpointError(f"{origin} is an AIMv2 model (RMSNorm and SwiGLU), and only AIM v1 is read")
    # Loading only the plain matrices would give the model as it was before it was adapted.
    if any(".lora_" in name for name in weights):
        raise CheckpointError(
            f"{origin} holds LoRA weights; merge them where they were trained, and save the result"
        )
    weights = only_tensors(weights, origin)
    config, layers = _model_config(weights, options, origin)
    # From here on nothing is skipped: an unknown name, a missing tensor or another shape is refused, as each
    # would mean another function.
    ours = renamed(fused(weights, ("q_proj", "k_proj", "v_proj"), origin), NAMES, "AIM", origin)
    for name in set(OUTPUT_MAP) & ours.keys():
        # Official patches are flattened from (row, column, channel), ours from (channel, row, column). The
        # last layer has a row and a bias per value of a patch, so its rows are permuted accordingly.
        pixels = {"h": config.patch_size, "w": config.patch_size}
        ours[name] = rearrange(ours[name], "(h w c) ... -> (c h w) ...", **pixels)
    ours = _with_positions(ours, config, origin)
    if layers is None:
        return build_model(config, ours, origin)
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
    ours = {name if name.startswith("head.") else f"encoder_model.{name}": w for name, w in ours.items()}
    return build_model(config, ours, origin, head_config)


def _weights(content: Any) -> dict[str, Any]:
    """Weights of a file, without wrappers, under their plain names."""
    return {LISTED_PREPROCESSOR.sub("preprocessor.", name): w for name, w in unwrapped(content).items()}


def _is_aim_v2(names: Mapping[str, Any]) -> bool:
    """Whether the names are those of AIMv2, by Apple or by transformers."""
    # AIMv2's RMSNorm has no bias and its SwiGLU has a third layer. Naming the architecture tells more than
    # an error about missing and unexpected tensors.
    norms = [name for name in names if name.startswith("trunk.") and ".norm_1." in name]
    return (
        (bool(norms) and all(name.endswith(".weight") for name in norms))
        or "trunk.blocks.0.mlp.fc3.weight" in names
        or any(name.endswith("encoder.layers.0.rms_norm1.weight") for name in names)
        or any(name.startswith("image_encoder.trunk.") for name in names)
    )


def _model_config(
    weights: Mapping[str, Tensor], options: LoadOptions, origin: str
) -> tuple[ModelConfig, tuple[int, ...] | None]:
    """Settings of the model, and the layers that its head averages if it is a classifier."""
    width, in_chans, patch_size = patch_shape(weights, "preprocessor.patchifier.proj.weight", origin)
    depth = count_numbered(weights, "trunk.blocks.", origin)
    # Any divisor of the width would fit the tensors but compute something else. So the number of heads comes
    # from the caller or the official sizes and is never guessed. One error lists all missing settings.
    missing: dict[str, str] = {}
    heads = options.num_heads or NUM_HEADS_OF_SIZE.get((width, depth))
    if heads is None:
        missing["num_heads"] = unknown_heads((width, depth), origin)
    layers = None
    if "head.cls_token" in weights:
        layers = _probe_layers(options.probe_layers, (width, depth), origin)
        if layers is None:
            # Apple's heads on the last and on the best layers differ only in their file name.
            missing["probe_layers"] = f"{origin} does not record which layers its head averages: {CHOICES}"
    size = _image_size(weights, patch_size, options, origin)
    if isinstance(size, str):
        missing["image_size"] = size
    if missing:
        raise MissingSettingError(**missing)
    assert not isinstance(size, str)
    # The two layouts use different epsilons, which no tensor shows. Only the training layout has separate
    # layers for queries, keys and values.
    from_training = "trunk.blocks.0.attn.q_proj.weight" in weights
    config = ModelConfig(
        image_size=size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=heads or 1,
        mlp_ratio=ratio_of(shape_of(weights, "trunk.blocks.0.mlp.fc1.weight", 2, origin)[0], width),
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
    # With the prediction head the file contains a whole model. Its layers are MLPs on single patches, so the
    # first layer's tensors give all sizes, and no number of heads is needed.
    if not any(name.startswith("head.decoder_") for name in weights):
        return config, layers
    width = shape_of(weights, "head.decoder_projection.weight", 2, origin)[0]
    hidden = shape_of(weights, "head.decoder_blocks.0.mlp.fc1.weight", 2, origin)[0]
    config = replace(
        config,
        predictor="mlp",
        projection_dim=None,
        predictor_dim=width,
        predictor_depth=count_numbered(weights, "head.decoder_blocks.", origin),
        predictor_heads=SIZES["aim-600m"].predictor_heads,  # not used
        predictor_mlp_ratio=ratio_of(hidden, width),
        predictor_extra_norm="head.decoder_blocks.0.norm_1.weight" in weights,
        block_mlp_dim=None,
    )
    return config, layers


def _image_size(
    weights: Mapping[str, Tensor], patch_size: int, options: LoadOptions, origin: str
) -> Size | str:
    """Image size from the caller, stored positions, fallback or Apple's default; else the reason as text."""
    stored, given = weights.get("preprocessor.pos_embed"), options.image_size
    places = None if stored is None else shape_of(weights, "preprocessor.pos_embed", 3, origin)[1]
    if given is not None:
        sizes = [given]
    elif stored is not None:
        sizes = [_stored_size(stored, patch_size)]
    else:
        sizes = [options.fallback.get("image_size", IMAGE_SIZE_PX), IMAGE_SIZE_PX]
    rows = columns = 0
    for size in sizes:
        rows, columns = pair(size)
        fits = places in (None, (rows // patch_size) * (columns // patch_size))
        if fits and rows % patch_size == columns % patch_size == 0:
            return size
    held = "" if places is None else f"{places} positions of "
    why = f"{held}{patch_size}-px patches, which do not make an image of {rows}x{columns} px"
    why = f"{origin} has {why}; give its size in pixels as image_size= (--image_size)"
    if given is not None:
        raise CheckpointError(why)
    return why


def _stored_size(stored: Float[Tensor, "1 n d"], patch_size: int) -> Size:
    """Image size that belongs to stored positions; a square if no grid reproduces them."""
    # The number of patches does not determine the grid (16 may be 4x4 or 2x8), but sines and cosines of row
    # and column do. So try every grid of this size.
    patches, width = stored.shape[1:]
    for rows in range(1, patches + 1):
        grid = (rows, patches // rows)
        if patches % rows == 0 and _are_positions(stored, sincos_positions(grid, width)):
            return rows * patch_size if rows == grid[1] else (rows * patch_size, grid[1] * patch_size)
    return math.isqrt(patches) * patch_size


def _are_positions(stored: Float[Tensor, "b n d"], computed: Float[Tensor, "1 n2 d2"]) -> bool:
    """Whether stored positions equal the computed ones up to rounding."""
    # Half precision rounds sines by more than the tolerance, so use its epsilon instead.
    tolerance = max(POSITION_TOLERANCE, torch.finfo(stored.dtype).eps)
    return stored.shape == computed.shape and bool((stored.float() - computed).abs().max() <= tolerance)


def _probe_layers(given: ProbeLayers | None, size: tuple[int, int], origin: str) -> tuple[int, ...] | None:
    if not isinstance(given, str):
        return None if given is None else tuple(given)
    if given == "last":
        return last_layers(PROBED_LAYERS, size[1])
    if size not in BEST_LAYERS_OF_SIZE:
        raise CheckpointError(
            f"probe_layers {given!r} is known for AIM's sizes only, and {origin} is {size[0]} wide with "
            f"{size[1]} layers; {CHOICES}"
        )
    return BEST_LAYERS_OF_SIZE[size]


def _with_positions(weights: Mapping[str, Tensor], config: ModelConfig, origin: str) -> dict[str, Tensor]:
    """Add fixed positions if none are stored; else check the stored ones."""
    # The inference layout stores no positions. The training layout stores fixed ones for encoder and
    # predictor: the same function of the grid at two widths.
    complete, widths = dict(weights), {"encoder.pos_embed": config.embed_dim}
    if config.predictor is not None:
        widths["predictor.pos_embed"] = config.predictor_dim
    for name, width in widths.items():
        computed = sincos_positions(config.grid, width)
        stored = complete.setdefault(name, computed)
        if not _are_positions(stored, computed):
            raise CheckpointError(
                f"the positions of {origin} are not AIM's sines and cosines on a grid of {config.grid[0]}x"
                f"{config.grid[1]} patches ({name}, {tuple(stored.shape)}); if its images have another "
                "shape, give image_size= (--image_size)"
            )
    return complete
