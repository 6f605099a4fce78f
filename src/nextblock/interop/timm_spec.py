"""timm models by name: "timm:NAME" with options after commas, and timm's settings for their images.

`pretrained=false` leaves the weights fresh. `checkpoint=FILE` reads them from a file, for machines without a
network. `img_size=N` and `in_chans=N` build the architecture for other images and resample its positions.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import nn

from nextblock.checkpoint import CheckpointError, is_safetensors, read_data, refuse_non_finite
from nextblock.config import DataConfig, pair
from nextblock.errors import UsageError
from nextblock.interop.hub import hub_errors
from nextblock.interop.timm import building, described_at, own_config
from nextblock.models import TimmEncoder
from nextblock.settings import nearest_name, require

log = logging.getLogger(__name__)

TIMM_SPEC = "timm:"
# Prefixes of names that belong to a head or to pre-training, which are not used.
BESIDE = re.compile(r"[^.]*head|decoder_|attn_pool|mask_token|pre_logits")


class TimmSpec(NamedTuple):
    """Parts of "timm:NAME[,option=value ...]"."""

    name: str
    pretrained: bool
    checkpoint: Path | None
    arguments: dict[str, int]
    """img_size and in_chans, if given: build for other images and resample positions."""


def parse_timm_spec(spec: str) -> TimmSpec:
    """Parse "timm:NAME[,option=value ...]"; `ValueError` for an unknown option."""
    name, *options = spec.removeprefix(TIMM_SPEC).split(",")
    pretrained, checkpoint, arguments = True, None, {}
    for option in options:
        key, _, value = option.partition("=")
        if key == "pretrained" and value in ("true", "false"):
            pretrained = value == "true"
        elif key == "checkpoint" and value:
            checkpoint = Path(value)
        elif key in ("img_size", "in_chans") and value.isdecimal() and int(value) > 0:
            arguments[key] = int(value)
        else:
            known = "pretrained=false, checkpoint=FILE, img_size=N, in_chans=N"
            raise UsageError(f"{spec}: cannot read {option!r}; options of timm:NAME are {known}")
    if checkpoint is not None and not checkpoint.is_file():
        raise CheckpointError(f"{spec}: {checkpoint} is no file; give the path of the weights")
    return TimmSpec(name, pretrained, checkpoint, arguments)


def timm_model(spec: str) -> nn.Module:
    """Build the timm model of a spec, without its classifier; raises `CheckpointError` if that fails.

    Refuses missing and unexpected weights, except in heads.
    """
    name, pretrained, checkpoint, options = parse_timm_spec(spec)
    kind, _, place = name.rpartition(":")  # hf-hub:USER/NAME and local-dir:PATH are timm's as well
    if not kind and not timm.is_model(name):
        raise UsageError(f"timm has no model {name!r}; {nearest_name(name, timm.list_models())}")
    arguments: dict[str, Any] = dict(options)
    if kind == "local-dir":
        own_config(Path(place))  # refuses settings that contradict each other
    if checkpoint is not None:
        # The overlay makes timm read this file instead of the hub's, and adapt it to `img_size` and
        # `in_chans` in the same way.
        arguments["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
        # Only timm's own weights: an encoder of ours may have a mask, which no shape shows.
        is_own = own_config(checkpoint) is not None
        require(not is_own, f"{spec}: nextblock wrote {checkpoint}; give the file alone: --model FILE")
    has_weights = pretrained or checkpoint is not None
    create = partial(timm.create_model, name, pretrained=has_weights, **arguments)
    # hub_errors treats every OSError as the hub's, so use it only if the hub is contacted.
    is_local = kind == "local-dir" or checkpoint is not None
    copy = f"a copy: timm:local-dir:DIR or {spec},checkpoint=FILE, or leave it fresh: {spec},pretrained=false"
    asking = nullcontext() if is_local else hub_errors(spec, instead=copy)
    with building(spec, "give whole weights of this architecture, under timm's names"), asking:
        model = _whole_model(create, spec) if has_weights else create(num_classes=0)
    if has_weights:
        refuse_non_finite(model.state_dict(), spec, "take other weights")
    return model


def _whole_model(create: partial[nn.Module], spec: str) -> nn.Module:
    """Build a pretrained timm model without its head; all other weights must come from the file."""
    try:
        # timm loads strictly only with the file's number of classes, so the head is removed afterwards.
        model: Any = create()
        model.reset_classifier(0)
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        # torch lists every tensor that is missing, unexpected or of another shape. If all belong to heads or
        # to pre-training, the rest fits and can be loaded without strict checks.
        names = [a or b for a, b in re.findall(r'"([^"\s]+)"|size mismatch for (\S+):', str(error))]
        wrong = [name for name in names if not BESIDE.match(name)]
        if wrong or not names:
            more = f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""
            raise CheckpointError(
                f"the weights of {spec} do not fit that model: {', '.join(wrong[:6]) or error}{more} "
                "(missing, unexpected or of another shape); give this architecture's weights, in timm's names"
            ) from error
        model = create(num_classes=0)
    # If timm cannot adapt the first layer to `in_chans`, it silently leaves that layer fresh.
    first = model.pretrained_cfg.get("first_conv")
    if "in_chans" in create.keywords and not isinstance(model.get_submodule(first or ""), nn.Conv2d):
        raise CheckpointError(f"{spec}: weights of {first} fit no other number of channels; omit in_chans")
    return model


def open_timm_encoder(spec: str) -> TimmEncoder:
    """Open any timm transformer unchanged, on the CPU in fp32 and evaluation mode."""
    name, _, _, arguments = parse_timm_spec(spec)
    built = timm_model(spec)
    # If the spec names a place (local-dir:, hf-hub:), record timm's name, to rebuild it without that place.
    settings: Any = built.pretrained_cfg
    try:
        model = TimmEncoder(built, str(settings["architecture"]) if ":" in name else name, arguments)
    except ValueError as error:
        raise CheckpointError(f"{spec}: {error}") from error
    if ":" in name:
        # Saved heads rebuild the network from its architecture's name. But a config.json (local-dir: or
        # hf-hub:) may change an architecture's tensors. Then nothing saved with it could be opened again.
        with building(model.config.architecture, "give an architecture that timm knows by name"):
            fresh = TimmEncoder.fresh(model.config)
        ours, again = ({n: t.shape for n, t in one.state_dict().items()} for one in (model, fresh))
        different = sorted(n for n in ours.keys() | again.keys() if ours.get(n) != again.get(n))
        if different:
            raise CheckpointError(
                f"{spec}: {len(different)} of its tensors ({', '.join(different[:3])}) are not as timm "
                f"builds {model.config.architecture}; give an architecture that timm knows by name"
            )
    if model.config.interpolation != "bicubic":
        log.info("%s: timm resizes its images by %s, nextblock by bicubic", spec, model.config.interpolation)
    if getattr(model.encoder, "attn_pool", None) is not None:
        log.info("%s: its attention pooling is not used; features are pooled as for other encoders", spec)
    return model.eval()


def timm_settings(src: str | Path) -> dict[str, Any]:
    """Settings in timm of a spec, directory or weight file; {} if unknown."""
    if not str(src).startswith(TIMM_SPEC):
        described = described_at(Path(src))
        return {**described, **described.get("pretrained_cfg", {})}
    spec = parse_timm_spec(str(src))
    cfg = timm.get_pretrained_cfg(spec.name)
    settings = {} if cfg is None else cfg.to_dict()
    if "img_size" in spec.arguments:
        settings["input_size"] = (3, *pair(spec.arguments["img_size"]))
    return settings


def read_timm_data(src: str | Path) -> DataConfig | None:
    """Crop and normalisation for a spec, directory or weight file; None if none are recorded."""
    settings = timm_settings(src)
    if not {"mean", "std", "crop_pct", "input_size"} <= settings.keys():
        is_file = Path(src).is_file() and is_safetensors(Path(src))
        return read_data(Path(src)) if is_file else None
    try:
        return DataConfig(
            mean=tuple(settings["mean"]),
            std=tuple(settings["std"]),
            # timm resizes to the crop's side divided by crop_pct, rounded down.
            val_resize_px=math.floor(min(settings["input_size"][1:]) / settings["crop_pct"]),
            val_crop=settings.get("crop_mode") or "center",
        )
    except (TypeError, ValueError, ArithmeticError) as error:
        why = f"has a damaged mean, std, crop or input_size ({error})"
        raise CheckpointError(f"the config.json of {src} {why}; take the original file") from error
