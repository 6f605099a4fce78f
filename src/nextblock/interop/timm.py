"""Reading and writing timm's format: a directory of config.json and model.safetensors, or a weight file.

An encoder under full attention with timm's epsilon, or with a class token, rotary positions, normed queries
or LayerScale, is written as one of timm's own architectures with all arguments given. Any other is written as
`nextblock_vit` (see `timm_models`). Both config.json and the weight file's metadata contain our settings, so
either is enough to rebuild the same encoder.
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

from nextblock.atomic import write_aside
from nextblock.checkpoint import (
    RECORDED_DATA,
    CheckpointError,
    MissingSettingError,
    is_safetensors,
    load_strictly,
    read_metadata,
    write_safetensors,
)
from nextblock.config import Attention, DataConfig, ModelConfig, Size, pair
from nextblock.interop.cards import CARD_FILE, UNSPECIFIED, Provenance, model_card
from nextblock.interop.files import MAIN_FILES, LoadOptions, make_parent, read_content, read_json, unwrapped
from nextblock.interop.hub import HubError
from nextblock.interop.names import count_numbered, needed, only_tensors, patch_shape, ratio_of, unknown_heads
from nextblock.interop.timm_models import TIMM_EPS, NextBlockViT, as_timm_has, timm_architecture
from nextblock.interop.xtra import NUM_HEADS_OF_SIZE
from nextblock.model_config import nearest_sizes
from nextblock.models import EncoderModel, NextBlockModel, TimmEncoder
from nextblock.models.vit import positions_on
from nextblock.settings import from_dict, require, to_dict

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


# ---------------------------------------------------------------------------------------------------- writing


def write_timm(
    model: EncoderModel,
    directory: Path,
    *,
    data: DataConfig,
    provenance: Provenance,
    image_size: Size | None = None,
    attention: Attention = "native",
    address: str | None = None,
) -> None:
    """Write an encoder as a directory that `timm.create_model("local-dir:DIRECTORY")` opens.

    `data` has its crop and normalisation. `image_size` and `attention` write one of our encoders at that size
    and with that mask, with the positions that `encode` would use. The predictor is left out. `address` is
    the address for the card, in timm's form ("hf-hub:USER/NAME").
    """
    if isinstance(model, NextBlockModel):
        whole, model = model, encoder_at(model, image_size, attention)
        data = data_at(data, whole.config, model.config)
    config = model.config
    size = pair(config.image_size)
    # timm stores a fraction of the image instead of a size, and rounds down to whole pixels. If that loses a
    # pixel, half a pixel more in the divisor gives the right size.
    resize_px = data.resize_px(config.image_size)
    crop_pct = min(size) / resize_px
    if math.floor(min(size) / crop_pct) != resize_px:
        crop_pct = min(size) / (resize_px + 0.5)
    pretrained_cfg = {
        "num_classes": 0,
        "input_size": [config.in_chans, *size],
        "fixed_input_size": True,
        "pool_size": None,
        "interpolation": "bicubic",
        "crop_pct": crop_pct,
        "crop_mode": data.val_crop,
        "mean": list(data.mean),
        "std": list(data.std),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        **({"license": provenance.license} if provenance.license != UNSPECIFIED else {}),
    }
    # timm builds from its arguments in config.json. They lack some of our settings, so we build from
    # "nextblock". It is in both files, as one may be copied without the other.
    described: dict[str, Any] = {"num_classes": 0, "num_features": config.embed_dim}
    metadata = {"format": "pt", "data": json.dumps({name: getattr(data, name) for name in RECORDED_DATA})}
    weights = model.encoder.state_dict()
    if isinstance(config, ModelConfig):
        scaled = config.qk_scale is not None
        require(not scaled, "timm does not support model.qk_scale; write to nextblock or onnx")
        architecture, arguments = timm_architecture(config)
        weights = as_timm_has(weights, config)
        own = {"format_version": FORMAT_VERSION, "model": to_dict(config)}
        described |= {"global_pool": "avg", "nextblock": own}
        metadata["nextblock"] = json.dumps(own)
    else:
        architecture, arguments = config.architecture.partition(".")[0], dict(config.arguments)
        settings: Any = model.encoder.pretrained_cfg
        pretrained_cfg |= {n: settings.get(n) for n in ("fixed_input_size", "first_conv", "classifier")}
    described |= {"architecture": architecture, "model_args": arguments, "pretrained_cfg": pretrained_cfg}
    make_parent(directory)
    card = _card(model, architecture, address or f"local-dir:{directory.name}", data, provenance)
    with write_aside(directory) as aside:
        aside.mkdir()
        (aside / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_safetensors(aside / MAIN_FILES[0], weights, metadata)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def _card(
    model: EncoderModel, architecture: str, address: str, data: DataConfig, provenance: Provenance
) -> str:
    place = address.partition(":")[2]
    register, notes = "", []
    if isinstance(model, TimmEncoder):
        notes.append(f"Commands of nextblock accept it as `--model timm:{address}`.")
    else:
        notes.append(f'`transformers.AutoModel.from_pretrained("{place}")` and `nextblock.load` open it too.')
        if architecture == "nextblock_vit":
            register = "import nextblock.interop.timm_models  # registers nextblock_vit\n"
            notes.append(
                "timm and transformers need the second line above (`pip install nextblock`), which registers "
                "`nextblock_vit` with its block mask and its epsilon."
            )
        if model.config.norm_eps < TIMM_EPS and architecture != "nextblock_vit":
            notes.append(
                "timm's norms have a larger epsilon than this encoder's. Its tokens are therefore scaled by "
                "a power of two up to the last norm. This changes the outputs of single layers, and fp16 may "
                "overflow."
            )
        elif model.config.positions == "sincos":
            notes.append(
                "At another `img_size=` timm resamples the fixed positions instead of recomputing them: "
                "convert again with `--image_size`."
            )
    opening = (
        f'import timm\n{register}model = timm.create_model("{address}", pretrained=True).eval()\n'
        "features = model.forward_features(images)  # (b n d), model(images) pools them"
    )
    return model_card(
        model.config,
        title=place.rpartition("/")[2],
        library="timm",
        data=data,
        provenance=provenance,
        opening=opening,
        notes=notes,
    )


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


# ---------------------------------------------------------------------------------------------------- reading


def is_timm_directory(path: Path) -> bool:
    """Whether a directory's config.json names a timm architecture."""
    return path.is_dir() and bool(described_at(path))


def is_timm_weights(weights: Mapping[str, Any]) -> bool:
    """Whether a file's content is the bare state dict of a timm VisionTransformer."""
    return "patch_embed.proj.weight" in weights and "blocks.0.attn.qkv.weight" in weights


def read_timm(
    path: Path, options: LoadOptions | None = None, weights: Mapping[str, Tensor] | None = None
) -> NextBlockModel:
    """Build the encoder of a timm directory or weight file.

    `weights` are the file's, if already read. Without metadata and config.json, it is a timm ViT under full
    attention. `options.drop_prefix_tokens` drops class and register tokens with their positions, and logs
    them: fine for initialisation, but the features differ.
    """
    origin, file, options = str(path), _weight_file(path), options or LoadOptions()
    drop = options.drop_prefix_tokens
    if file is None:
        names = ", ".join(MAIN_FILES)
        raise CheckpointError(f"{path} holds no weights beside its config.json: looked for {names}; add one")
    config, described = own_config(path), described_at(path)
    weights = only_tensors(unwrapped(read_content(file)) if weights is None else weights, origin)
    if config is not None:
        return _encoder(config, as_timm_has(weights, config, back=True), origin)
    if not described:
        log.warning("%s: no mask recorded; loaded as a timm ViT with full attention", origin)
        return read_timm_weights(weights, origin, num_heads=options.num_heads, drop_prefix_tokens=drop)
    directory = path if path.is_dir() else path.parent
    # Without our settings, timm builds what config.json describes. timm would load matching weights and leave
    # the rest random, so weights are not loaded by timm.
    with building(f"what {directory / 'config.json'} describes", "compare it with timm's, or upgrade timm"):
        vit = timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=0)
    # They are loaded strictly here, without the head, so the number of classes does not matter.
    load_strictly(vit, {name: w for name, w in weights.items() if not name.startswith("head.")}, origin)
    return from_timm(vit, origin, drop_prefix_tokens=drop)


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
    kinds = {"architecture": str, "model_args": dict, "pretrained_cfg": dict, "nextblock": dict}
    for name, kind in kinds.items():
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
    return read_timm_weights(vit.state_dict(), origin, like=vit, drop_prefix_tokens=drop_prefix_tokens)


def read_timm_weights(
    weights: Mapping[str, Tensor],
    origin: str,
    *,
    num_heads: int | None = None,
    like: Any = None,
    drop_prefix_tokens: bool = False,
) -> NextBlockModel:
    """Build the encoder of a timm ViT's state dict, under full attention.

    `like` is the timm ViT, which provides what the tensors do not show.
    """
    width, in_chans, patch_size = patch_shape(weights, "patch_embed.proj.weight", origin)
    depth = count_numbered(weights, "blocks.", origin)
    # Head, pooling, class and register tokens are not part of the encoder.
    kept = {n: w for n, w in weights.items() if n not in PREFIX_TOKENS and not n.startswith(HEADS)}
    places = needed(kept, "pos_embed", origin).shape[1]

    # Class and register tokens come first, and so do their positions, if they have any. Without `like`, a
    # number of positions that is not a square shows that they have.
    tokens = [name for name in PREFIX_TOKENS if name in weights]
    count = sum(weights[name].shape[1] for name in tokens)
    have_places = math.isqrt(places) ** 2 != places if like is None else not like.no_embed_class
    if tokens and not drop_prefix_tokens:
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

    # Without `like`, assume timm's plain ViT: a square image, GELU, one epsilon. Only heads must be given.
    if like is None:
        needed(kept, "norm.weight", origin)
        heads = num_heads or NUM_HEADS_OF_SIZE.get((width, depth))
        if heads is None:
            raise MissingSettingError(num_heads=unknown_heads((width, depth), origin))
        patches = kept["pos_embed"].shape[1]
        rows = columns = math.isqrt(patches) * patch_size
        eps = TIMM_EPS
        if rows * columns != patches * patch_size**2:
            raise CheckpointError(
                f"{origin} has {patches} patches, which are no square grid; put timm's config.json beside it"
            )
    else:
        # timm's module provides what its tensors do not show. `_encoder` verifies that all norms have one
        # epsilon.
        heads, (rows, columns) = like.blocks[0].attn.num_heads, like.patch_embed.img_size
        eps = getattr(like.blocks[0].norm1, "eps", TIMM_EPS)

    # LayerScale multiplies the outputs of attention and MLP. That equals scaling the rows of their last
    # layer, including its bias: gamma * (W x + b) = (gamma W) x + gamma b.
    for name in [name for name in kept if name.endswith(tuple(SCALED_MAPS))]:
        last_map = name[:-10] + SCALED_MAPS[name[-10:]]
        if kept[name].shape == (width,) and f"{last_map}.weight" in kept:  # else `_encoder` refuses the name
            gamma = kept.pop(name)
            kept[f"{last_map}.weight"] = gamma[:, None] * kept[f"{last_map}.weight"]
            if f"{last_map}.bias" in kept:
                kept[f"{last_map}.bias"] = gamma * kept[f"{last_map}.bias"]

    # Our encoder has biases in all kinds of linear layers or in none. A kind without biases gets zeros, which
    # is exact. If only some of a kind are missing, the file is damaged, and `_encoder` lists them.
    biases = {kind: [f"blocks.{i}.{kind}.bias" for i in range(depth)] for kind in MAPS}
    without = [kind for kind, names in biases.items() if not any(name in kept for name in names)]
    for kind in without if len(without) < len(MAPS) else []:
        for name in biases[kind]:
            weight = kept.get(f"{name[:-5]}.weight")
            kept |= {} if weight is None else {name: weight.new_zeros(len(weight))}

    try:
        config = ModelConfig(
            image_size=rows if rows == columns else (rows, columns),
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=width,
            depth=depth,
            num_heads=heads,
            mlp_ratio=ratio_of(len(kept.get("blocks.0.mlp.fc1.weight", range(4 * width))), width),
            norm_eps=eps,
            bias=len(without) < len(MAPS),
            patch_norm="patch_embed.norm.weight" in kept,
            block_size=1,
            predictor=None,
            feature_attention="full",
        )
    except ValueError as error:
        raise CheckpointError(f"{origin} is no encoder of this kind: {error}") from error
    return _encoder(config, kept, origin, like)


def _encoder(
    config: ModelConfig, weights: Mapping[str, Tensor], origin: str, like: nn.Module | None = None
) -> NextBlockModel:
    """Build a model without a predictor from weights; `like` must consist of the same modules."""
    # On the meta device nothing is drawn or allocated; the file's tensors become the parameters.
    with torch.device("meta"):
        model = NextBlockModel(config)
    if like is not None:
        # Names and shapes do not show everything: another activation, epsilon or order of norms has the same
        # weights. So compare the class and arguments of every module.
        theirs, ours = _modules(like), _modules(model.encoder)
        unlike = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
        if unlike:
            named = (f"{n} is {theirs.get(n)}, here {ours.get(n)}" for n in sorted(unlike)[:3])
            raise CheckpointError(
                f"{origin} is no encoder of this kind: {'; '.join(named)}. Evaluation commands "
                "accept any timm transformer unchanged, as --model timm:NAME"
            )
    load_strictly(model.encoder, weights, origin)
    return model.eval()


def _modules(vit: nn.Module) -> dict[str, str]:
    """Class and arguments of every module that has an effect, ignoring biases: a missing one is zero."""
    return {
        # Our `Layer` is timm's `Block` except for drop path, which has no effect here.
        name: re.sub(r", bias=\w+", "", f"{type(module).__name__}({module.extra_repr()})").replace(
            "Layer()", "Block()"
        )
        for name, module in vit.named_modules()
        if name and not any(part in name for part in WITHOUT_EFFECT)
    }
