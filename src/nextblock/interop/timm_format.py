"""timm's format, out and in: a directory of config.json and model.safetensors, and timm models by name.

Out, an encoder under full attention with timm's epsilon is one of timm's own architectures with every
argument given; any other is `nextblock_vit` (see `timm_models`). The settings stand in config.json under
"nextblock" as well, so that the same encoder comes back.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from nextblock.atomic import write_aside
from nextblock.checkpoint import RECORDED_DATA, CheckpointError, build_model, write_safetensors
from nextblock.config import Attention, DataConfig, ModelConfig, Size, pair
from nextblock.interop.cards import CARD_FILE, UNSPECIFIED, Provenance, model_card
from nextblock.interop.files import MAIN_FILES, make_parent, read_content, read_json, unwrapped
from nextblock.interop.timm_models import model_args
from nextblock.interop.timm_spec import TIMM_SPEC, parse_timm_spec, timm_model
from nextblock.interop.timm_weights import TIMM_EPS, from_timm, is_timm_weights, read_timm_weights
from nextblock.models import EncoderModel, NextBlockModel, TimmEncoder
from nextblock.models.encoder import positions_on, vit_arguments
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import from_dict, to_dict

__all__ = [
    "TIMM_SPEC",
    "data_at",
    "encoder_at",
    "is_timm_directory",
    "is_timm_weights",
    "read_timm",
    "read_timm_data",
    "read_timm_weights",
    "timm_provenance",
    "write_timm",
]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Of what stands under "nextblock" in config.json."""
CONFIG_FILE = "config.json"
STOCK = "vit_base_patch16_224"
"""The timm architecture that stands for all whose arguments are given in full."""


# ---------------------------------------------------------------------------------------------------- writing


def write_timm(
    model: EncoderModel,
    directory: Path,
    *,
    data: DataConfig,
    provenance: Provenance,
    image_size: Size | None = None,
    address: str | None = None,
) -> None:
    """Write an encoder as a directory that `timm.create_model("local-dir:DIRECTORY")` opens.

    `data` says how its images are cut and normalised. `image_size` other than the model's own writes the
    encoder, if it is one of ours, at that size, with the positions that `encode` would use there. The
    predictor is left out. `address` is where the card says that it lies, as timm writes it
    ("hf-hub:USER/NAME").
    """
    if isinstance(model, NextBlockModel):
        whole, model = model, encoder_at(model, image_size)
        data = data_at(data, whole.config, model.config)
        described = _description(model.config, data, provenance)
    else:
        described = _description_of_timms(model, data, provenance)
    metadata = {
        "format": "pt",
        "data": json.dumps({name: getattr(data, name) for name in RECORDED_DATA}),
    }
    make_parent(directory)
    with write_aside(directory) as aside:
        aside.mkdir()
        (aside / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        write_safetensors(aside / MAIN_FILES[0], model.encoder.state_dict(), metadata)
        card = _card(model.config, address or f"local-dir:{directory.name}", data, provenance)
        (aside / CARD_FILE).write_text(card, encoding="utf-8")


def _is_stock(config: ModelConfig) -> bool:
    """Whether timm's own architecture can be this encoder."""
    return config.feature_attention == "full" and config.norm_eps == TIMM_EPS


def _description(config: ModelConfig, data: DataConfig, provenance: Provenance) -> dict[str, Any]:
    """What stands in config.json."""
    stock = _is_stock(config)
    return {
        "architecture": STOCK if stock else "nextblock_vit",
        "num_classes": 0,
        "num_features": config.embed_dim,
        "global_pool": "avg",
        "model_args": _stock_args(config) if stock else model_args(config),
        "pretrained_cfg": _pretrained_cfg(config, data, provenance),
        "nextblock": {"format_version": FORMAT_VERSION, "model": to_dict(config)},
    }


def _description_of_timms(model: TimmEncoder, data: DataConfig, provenance: Provenance) -> dict[str, Any]:
    """What stands in config.json of an encoder that was timm's from the beginning."""
    config = model.config
    settings: Any = model.encoder.pretrained_cfg
    usual = {name: settings.get(name) for name in ("fixed_input_size", "first_conv", "classifier")}
    return {
        "architecture": config.architecture.partition(".")[0],
        "num_classes": 0,
        "num_features": config.embed_dim,
        "model_args": dict(config.arguments),
        "pretrained_cfg": {**_pretrained_cfg(config, data, provenance), **usual},
    }


def encoder_at(
    model: NextBlockModel, image_size: Size | None = None, attention: Attention = "native"
) -> NextBlockModel:
    """The encoder alone, at another image size if one is given: with the positions that it has there.

    With `attention` other than "native", that is what its features are made for.
    """
    config = replace(model.config, predictor=None, tokenizer=None, init=None)
    if attention != "native":
        config = replace(config, feature_attention=attention)
    if image_size is not None and pair(image_size) != pair(config.image_size):
        block_size = config.block_size if config.feature_attention == "causal" else 1
        config = replace(config, image_size=image_size, block_size=block_size)
    with torch.random.fork_rng(devices=[]):  # its fresh weights are overwritten at once
        other = NextBlockModel(config)
    weights = {name: tensor.detach().cpu() for name, tensor in model.encoder.state_dict().items()}
    weights["pos_embed"] = positions_on(config.grid, weights["pos_embed"], model.config)
    other.encoder.load_state_dict(weights)
    return other.eval()


def data_at(data: DataConfig, old: ModelConfig, new: ModelConfig) -> DataConfig:
    """The same share of the picture at another image size."""
    sizes = [max(pair(config.image_size)) for config in (old, new)]
    return replace(data, val_resize_px=round(data.val_resize_px * sizes[1] / sizes[0]))


def _stock_args(config: ModelConfig) -> dict[str, Any]:
    """Timm's own arguments; num_classes is not among them, as transformers gives it a second time."""
    norms = ("norm_layer", "embed_norm_layer")  # classes cannot be written; timm's own are the same
    arguments = {name: value for name, value in vit_arguments(config).items() if name not in norms}
    return {
        **arguments,
        "img_size": list(pair(config.image_size)),
        "global_pool": "avg",
        "fc_norm": False,
        **({"embed_norm_layer": "layernorm"} if config.patch_norm else {}),
    }


def _pretrained_cfg(
    config: ModelConfig | TimmConfig, data: DataConfig, provenance: Provenance
) -> dict[str, Any]:
    size = pair(config.image_size)
    crop_pct = min(size) / data.val_resize_px
    if math.floor(min(size) / crop_pct) != data.val_resize_px:  # timm rounds down
        crop_pct = min(size) / (data.val_resize_px + 0.5)
    return {
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


def _card(config: ModelConfig | TimmConfig, address: str, data: DataConfig, provenance: Provenance) -> str:
    place = address.partition(":")[2]
    registers = not isinstance(config, TimmConfig) and not _is_stock(config)
    opening = [
        "import timm",
        *(["import nextblock.interop.timm_models  # registers nextblock_vit"] if registers else []),
        f'model = timm.create_model("{address}", pretrained=True).eval()',
        "features = model.forward_features(images)  # (b n d), model(images) pools them",
    ]
    return model_card(
        config,
        title=place.rpartition("/")[2],
        library="timm",
        data=data,
        provenance=provenance,
        opening="\n".join(opening),
        notes=[f"Commands of nextblock take it as `--model timm:{address}`."]
        if isinstance(config, TimmConfig)
        else _notes(config, place),
    )


def _notes(config: ModelConfig, place: str) -> list[str]:
    """What the reader of the card of an encoder of ours must know."""
    stock = _is_stock(config)
    notes = [
        f'transformers opens the same files: `AutoModel.from_pretrained("{place}")`'
        + ("." if stock else ", after the same import."),
        "`nextblock.load` gives back the same encoder.",
    ]
    if not stock:
        notes.append(
            "The architecture `nextblock_vit` brings a block mask or an epsilon that timm's own models do "
            "not have. Without nextblock and the second line above timm says `Unknown model "
            "(nextblock_vit)`."
        )
    if config.positions == "sincos" and stock:
        notes.append(
            "At another image size (`img_size=`) timm resamples the fixed positions, which is another "
            "function than this model's, whose positions are computed anew: convert again with "
            "`--image_size`."
        )
    return notes


# ---------------------------------------------------------------------------------------------------- reading


def is_timm_directory(path: Path) -> bool:
    """Whether a directory's config.json names a timm architecture."""
    return "architecture" in _described(path)


def read_timm(src: str | Path, *, drop_prefix_tokens: bool = False) -> NextBlockModel:
    """Build the encoder that a timm directory holds, or a spec names: "timm:NAME[,pretrained=false]".

    Class and register tokens are refused; with `drop_prefix_tokens` they and their positions are left out,
    and listed: good to start from, but not the features of the original.
    """
    if str(src).startswith(TIMM_SPEC):
        return from_timm(timm_model(str(src)), None, str(src), drop_prefix_tokens=drop_prefix_tokens)
    directory = Path(src)
    described = _described(directory)
    weights = _weights_in(directory)
    own = described.get("nextblock")
    if own is not None:
        return _own_encoder(own, weights, str(directory))
    try:
        vit = timm.create_model(f"local-dir:{directory}", pretrained=False, num_classes=0)
    except (RuntimeError, TypeError, AssertionError, KeyError) as error:
        raise CheckpointError(
            f"timm cannot build what {directory / CONFIG_FILE} describes ({error}); compare its architecture "
            "and model_args with those of timm, or upgrade timm"
        ) from error
    return from_timm(vit, weights, str(directory), drop_prefix_tokens=drop_prefix_tokens)


def read_timm_data(src: str | Path) -> DataConfig | None:
    """How images are cut and normalised for a timm directory or spec; None where it does not tell."""
    if str(src).startswith(TIMM_SPEC):
        cfg = timm.get_pretrained_cfg(_name(str(src)))
        told = {} if cfg is None else cfg.to_dict()
        size = parse_timm_spec(str(src)).arguments.get("img_size")
        told |= {} if size is None else {"input_size": (3, size, size)}
    else:
        described = _described(Path(src))
        told = {**described, **described.get("pretrained_cfg", {})}
    if not {"mean", "std", "crop_pct", "input_size"} <= told.keys():
        return None
    resize_px = math.floor(min(told["input_size"][1:]) / told["crop_pct"])
    return DataConfig(
        mean=tuple(told["mean"]),
        std=tuple(told["std"]),
        val_resize_px=resize_px,
        val_crop=told.get("crop_mode") or "center",
    )


def timm_provenance(src: str | Path) -> Provenance:
    """The licence that timm's settings of a directory or spec name."""
    if str(src).startswith(TIMM_SPEC):
        cfg = timm.get_pretrained_cfg(_name(str(src)))
        told = {} if cfg is None else cfg.to_dict()
        return Provenance(origin=f"timm's {_name(str(src))}", license=told.get("license") or UNSPECIFIED)
    described = _described(Path(src))
    license_text = described.get("pretrained_cfg", {}).get("license") or UNSPECIFIED
    return Provenance(origin=f"{src}, a timm directory", license=license_text)


def _name(spec: str) -> str:
    return parse_timm_spec(spec).name


def _described(directory: Path) -> dict[str, Any]:
    return read_json(directory / CONFIG_FILE)


def _weights_in(directory: Path) -> dict[str, Tensor]:
    file = next((directory / name for name in MAIN_FILES if (directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{directory} holds no weights beside its config.json: looked for {', '.join(MAIN_FILES)}; put "
            "them there"
        )
    return dict(unwrapped(read_content(file)))


def _own_encoder(own: Any, weights: Mapping[str, Tensor], origin: str) -> NextBlockModel:
    if not isinstance(own, Mapping) or not {"format_version", "model"} <= own.keys():
        raise CheckpointError(
            f'what config.json in {origin} has under "nextblock" lacks format_version or model; take the '
            "file as it was written"
        )
    if int(own["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{origin} has format version {own['format_version']}, this release reads up to "
            f"{FORMAT_VERSION}; upgrade nextblock"
        )
    config = from_dict(ModelConfig, own["model"])
    named = {f"encoder.{name}": tensor for name, tensor in weights.items()}
    return build_model(lambda: NextBlockModel(config), config, named, origin)
