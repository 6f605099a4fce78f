"""Reading timm's format: a directory of config.json and weights, or a weight file.

Both config.json and the metadata of a weight file that `write_timm` wrote contain our settings, so either is
enough to rebuild the same encoder.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from nextblock.checkpoint import (
    CheckpointError,
    build_model,
    is_safetensors,
    load_strictly,
    read_metadata,
)
from nextblock.config import Attention, DataConfig, ModelConfig, Size, pair
from nextblock.interop.files import (
    MAIN_FILES,
    LoadOptions,
    only_tensors,
    read_content,
    read_json,
    unwrapped,
)
from nextblock.interop.hub import HubError
from nextblock.interop.names import encoder_sizes, known_heads, needed
from nextblock.interop.timm_models import TIMM_EPS, NextBlockViT, as_timm_has, timm_architecture
from nextblock.interop.xtra import NUM_HEADS_OF_SIZE
from nextblock.model_config import nearest_sizes
from nextblock.models import NextBlockModel
from nextblock.models.vit import build_encoder, positions_on
from nextblock.settings import from_dict, require

log = logging.getLogger(__name__)

# Version of the entry "nextblock" in config.json and in the weight file's metadata.
FORMAT_VERSION = 1
# Held while a timm model draws from torch's global generator, whose state is then restored.
_BUILDING = Lock()

# Names in a timm ViT. All others are as in our encoder, which is a timm ViT.
HEADS = ("head.", "attn_pool.", "fc_norm.")
PREFIX_TOKENS = ("cls_token", "reg_token")
MAPS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SCALED_MAPS = {".ls1.gamma": ".attn.proj", ".ls2.gamma": ".mlp.fc2"}
# Parts of a timm ViT that do not affect the tokens in evaluation mode, or that are folded into others.
WITHOUT_EFFECT = ("drop", "head", "attn_pool", "fc_norm", "ls1", "ls2")


# ------------------------------------------------------------------------------- directories and weight files


def is_timm_directory(path: Path) -> bool:
    """Whether a directory's config.json names a timm architecture."""
    return path.is_dir() and bool(described_at(path))


def is_timm_weights(weights: Mapping[str, Any]) -> bool:
    """Whether weights are the bare state dict of a timm VisionTransformer."""
    return "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights


def read_timm(
    path: Path, options: LoadOptions | None = None, weights: Mapping[str, Any] | None = None
) -> NextBlockModel:
    """Build the encoder of a timm directory or weight file.

    `weights` are the file's, if already read. Without metadata and config.json, it is a timm ViT under full
    attention. `options.drop_prefix_tokens` drops class and register tokens with their positions, and logs
    them: fine for initialisation, but the features differ.
    """
    origin, file, options = str(path), _weight_file(path), options or LoadOptions()
    if file is None:
        names = ", ".join(MAIN_FILES)
        raise CheckpointError(f"{path} holds no weights beside its config.json: looked for {names}; add one")
    config, described = own_config(path), described_at(path)
    weights = only_tensors(unwrapped(read_content(file)) if weights is None else weights, origin)
    if config is not None:
        return _encoder(config, as_timm_has(weights, config, back=True), origin)
    if not described:
        log.warning("%s: no mask recorded; loaded as a timm ViT with full attention", origin)
        return read_timm_weights(weights, origin, options)
    directory = path if path.is_dir() else path.parent
    # Without our settings, timm builds what config.json describes. timm would load matching weights and leave
    # the rest random, so weights are not loaded by timm.
    with building(f"what {directory / 'config.json'} describes", "compare it with timm's, or upgrade timm"):
        vit = timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=0)
    # They are loaded strictly here, without the head, so the number of classes does not matter.
    load_strictly(vit, {name: w for name, w in weights.items() if not name.startswith("head.")}, origin)
    return from_timm(vit, origin, drop_prefix_tokens=options.drop_prefix_tokens)


@contextmanager
def building(what: str, remedy: str) -> Iterator[None]:
    """Context to build a timm model: keeps torch's generator unchanged and converts timm's errors."""
    try:
        # timm draws fresh weights from torch's global generator. A fixed seed makes them equal in every
        # process. The lock keeps other threads from drawing in between, and fork_rng restores the state.
        with _BUILDING, torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(0)
            yield
    except (CheckpointError, HubError):
        raise
    except (
        RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, EOFError, OSError,
        SafetensorError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        reason = textwrap.shorten(str(error) or type(error).__name__, 400, placeholder=" ...")
        raise CheckpointError(f"timm cannot give {what}: {reason}; {remedy}") from error


def described_at(path: Path) -> dict[str, Any]:
    """Read config.json in a directory or next to a weight file; {} if it names no timm architecture."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    content = read_json(file)
    if "architecture" not in content:
        return {}
    for name, kind in (("architecture", str), ("model_args", dict), ("pretrained_cfg", dict)):
        value = content.get(name, kind())
        if not isinstance(value, kind):
            raise CheckpointError(f"{file} is damaged: {name} is a {type(value).__name__}; take the original")
    return content


def _weight_file(path: Path) -> Path | None:
    """The file itself; from a directory, its model file."""
    files = [path] if path.is_file() else [path / name for name in MAIN_FILES]
    return next((file for file in files if file.is_file()), None)


def own_config(path: Path) -> ModelConfig | None:
    """Settings that `write_timm` stored in a weight file's metadata and config.json; None without them."""
    described, file = described_at(path), _weight_file(path)
    has_metadata = file is not None and is_safetensors(file)
    recorded = read_metadata(file).get("nextblock") if has_metadata else None  # type: ignore[arg-type]
    # A weight file on its own has only metadata, a pickle only a config.json. Either is enough.
    try:
        own = described.get("nextblock") if recorded is None else json.loads(recorded)
        if own is None:
            return None
        if int(own["format_version"]) > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {own['format_version']}, this release reads up to "
                f"{FORMAT_VERSION}; upgrade nextblock"
            )
        config = from_dict(ModelConfig, own["model"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f'the settings under "nextblock" of {path} are damaged ({error}); take the original files'
        ) from error
    # timm follows architecture and model_args, we follow "nextblock". If they disagree, one would silently be
    # wrong: another attention, for example, does not change the shape of any weight.
    architecture, arguments = timm_architecture(config)
    if described and (
        described.get("nextblock") != own
        or described["architecture"] != architecture
        or any(described.get("model_args", {}).get(name) != value for name, value in arguments.items())
    ):
        raise CheckpointError(
            f"the weight file and the config.json of {path} describe different encoders: the weights are "
            f"timm's {architecture} with attention {config.feature_attention}; take both from one place"
        )
    return config


def encoder_at(
    model: NextBlockModel, image_size: Size | None = None, attention: Attention = "native"
) -> NextBlockModel:
    """Return the encoder without predictor, at another image size or with another attention if given."""
    config = model.config.encoder_alone()
    if attention != "native":
        config = replace(config, feature_attention=attention)
    if image_size is not None and pair(image_size) != pair(config.image_size):
        # The block size matters only under a mask; without one, any grid of patches is allowed.
        is_causal = config.feature_attention == "causal"
        block_size = config.block_size if is_causal else 1
        (rows, columns), unit = pair(image_size), [n * config.patch_size for n in pair(block_size)]
        near = nearest_sizes((rows, columns), (unit[0], unit[1]))
        require(
            not near,
            f"an image of {rows}x{columns} px cannot be cut into "
            f"{'blocks' if is_causal else 'patches'} of {unit[0]}x{unit[1]} px; "
            f"use image_size {near}" + ", or attention full" * is_causal,
        )
        config = replace(config, image_size=image_size, block_size=block_size)
    # Fixed positions are recomputed for the new grid and learned ones resampled, as in `encode`.
    weights = dict(model.encoder.state_dict())
    if "pos_embed" in weights:
        weights["pos_embed"] = positions_on(config.grid, weights["pos_embed"], model.config)
    return _encoder(config, weights, "the model")


def data_at(data: DataConfig, old: ModelConfig, new: ModelConfig) -> DataConfig:
    """Adapt the resize so that the crop keeps its share of the image at another image size."""
    sizes = [max(pair(config.image_size)) for config in (old, new)]
    return replace(data, val_resize_px=round(data.resize_px(old.image_size) * sizes[1] / sizes[0]))


def _encoder(config: ModelConfig, weights: Mapping[str, Tensor], origin: str) -> NextBlockModel:
    """Build a model without a predictor from weights under timm's names."""
    model = build_model(config, {f"encoder.{name}": weight for name, weight in weights.items()}, origin)
    assert isinstance(model, NextBlockModel)
    return model


# ---------------------------------------------------------------------------------- from a timm ViT to ours


def from_timm(vit: nn.Module, origin: str, *, drop_prefix_tokens: bool = False) -> NextBlockModel:
    """Convert a timm `VisionTransformer`; refuses models with parts that our encoder lacks."""
    # `type`, not `isinstance`: a subclass may use the same weights differently.
    if isinstance(vit, NextBlockViT):
        weights = {name: w for name, w in vit.state_dict().items() if not name.startswith(HEADS)}
        return _encoder(vit.block_config, weights, origin)
    kind = type(vit.blocks[0]) if type(vit) is VisionTransformer else type(vit)
    if kind is not Block:
        raise CheckpointError(
            f"{origin} is a timm {kind.__name__}; only its VisionTransformer of plain Blocks is supported"
        )
    return read_timm_weights(
        vit.state_dict(), origin, LoadOptions(drop_prefix_tokens=drop_prefix_tokens), vit
    )


def read_timm_weights(
    weights: Mapping[str, Tensor], origin: str, options: LoadOptions, like: Any = None
) -> NextBlockModel:
    """Build the encoder of a timm ViT's state dict, under full attention.

    `like` is the timm ViT, which provides what the tensors do not show.
    """
    # Head, pooling, class and register tokens are not part of the encoder.
    kept = {n: w for n, w in weights.items() if n not in PREFIX_TOKENS and not n.startswith(HEADS)}
    sizes = encoder_sizes({f"encoder.{name}": weight for name, weight in kept.items()}, origin)
    width, depth, patch_size = sizes["embed_dim"], sizes["depth"], sizes["patch_size"]

    # Class and register tokens come first, and so do their positions, if they have any. Without `like`, a
    # number of positions that is not a square shows that they have.
    places = needed(kept, "pos_embed", origin).shape[1]
    tokens = [name for name in PREFIX_TOKENS if name in weights]
    count = sum(weights[name].shape[1] for name in tokens)
    have_places = math.isqrt(places) ** 2 != places if like is None else not like.no_embed_class
    if tokens and not options.drop_prefix_tokens:
        raise CheckpointError(
            f"{origin} has tokens beside the patches ({', '.join(tokens)}), to which all patches attend: "
            "its features would be different without them. You can still use it as model.init"
        )
    if tokens and have_places:
        kept["pos_embed"] = kept["pos_embed"][:, count:]
    left_out = [name for name in weights if name not in kept]
    if left_out:
        positions_too = f", and the positions of {count} of them" if tokens and have_places else ""
        log.info("left out of %s: %s%s", origin, ", ".join(left_out), positions_too)

    if like is None:  # timm's plain ViT is assumed: a square image, GELU, one epsilon
        heads = known_heads(options.num_heads or NUM_HEADS_OF_SIZE.get((width, depth)), sizes, origin)
        patches, eps = kept["pos_embed"].shape[1], TIMM_EPS
        rows = columns = math.isqrt(patches) * patch_size
        if rows * columns != patches * patch_size**2:
            raise CheckpointError(
                f"{origin} has {patches} patches, which are no square grid; put timm's config.json beside it"
            )
    else:  # `_refuse_other_modules` verifies that all norms have one epsilon
        heads, (rows, columns) = like.blocks[0].attn.num_heads, like.patch_embed.img_size
        eps = getattr(like.blocks[0].norm1, "eps", TIMM_EPS)

    # LayerScale multiplies the outputs of attention and MLP. That equals scaling the rows of their last
    # layer, including its bias: gamma * (W x + b) = (gamma W) x + gamma b.
    for name in [name for name in kept if name.endswith(tuple(SCALED_MAPS))]:
        last_map = name[:-10] + SCALED_MAPS[name[-10:]]
        if kept[name].shape == (width,) and f"{last_map}.weight" in kept:  # else the name is refused below
            gamma = kept.pop(name)
            kept[f"{last_map}.weight"] = gamma[:, None] * kept[f"{last_map}.weight"]
            if f"{last_map}.bias" in kept:
                kept[f"{last_map}.bias"] = gamma * kept[f"{last_map}.bias"]

    # Our encoder has biases in all kinds of linear layers or in none. A kind without biases gets zeros, which
    # is exact. If only some of a kind are missing, the file is damaged, and loading lists them.
    biases = {kind: [f"blocks.{i}.{kind}.bias" for i in range(depth)] for kind in MAPS}
    without = [kind for kind, names in biases.items() if not any(name in kept for name in names)]
    for kind in without if len(without) < len(MAPS) else []:
        for name in biases[kind]:
            weight = kept.get(f"{name[:-5]}.weight")
            kept |= {} if weight is None else {name: weight.new_zeros(len(weight))}

    config = ModelConfig(
        **sizes,
        image_size=rows if rows == columns else (rows, columns),
        num_heads=heads,
        norm_eps=eps,
        bias=len(without) < len(MAPS),
        patch_norm="patch_embed.norm.weight" in kept,
        block_size=1,
        predictor=None,
        feature_attention="full",
    )
    if like is not None:
        _refuse_other_modules(like, config, origin)
    return _encoder(config, kept, origin)


def _refuse_other_modules(vit: nn.Module, config: ModelConfig, origin: str) -> None:
    """Refuse a timm ViT unless it consists of the same modules as our encoder."""
    # Names and shapes do not show everything: another activation, epsilon or order of norms has the same
    # weights. So compare the class and arguments of every module, ignoring biases: a missing one is zero.
    with torch.device("meta"):
        encoders = vit, build_encoder(config)
    theirs, ours = (
        {
            # Our `Layer` is timm's `Block` except for drop path, which has no effect here.
            name: re.sub(r", bias=\w+", "", f"{type(module).__name__}({module.extra_repr()})").replace(
                "Layer()", "Block()"
            )
            for name, module in encoder.named_modules()
            if name and not any(part in name for part in WITHOUT_EFFECT)
        }
        for encoder in encoders
    )
    unlike = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
    if unlike:
        named = "; ".join(f"{name} is {theirs.get(name)}, here {ours.get(name)}" for name in unlike[:3])
        raise CheckpointError(
            f"{origin} is no encoder of this kind: {named}. Evaluation commands accept any timm transformer "
            "unchanged, as --model timm:NAME"
        )
