"""Models of timm by name: "timm:NAME", with options after commas.

`pretrained=false` leaves the weights fresh, the same ones each time, `checkpoint=FILE` takes them from a
file, where there is no network, and `img_size=N` and `in_chans=N` build the same architecture for other
images, its positions resampled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from torch import nn

from nextblock.checkpoint import CheckpointError
from nextblock.interop.hub import hub_errors
from nextblock.models.timm_encoder import TimmEncoder
from nextblock.settings import nearest_name

__all__ = ["TIMM_SPEC", "TimmSpec", "open_timm_encoder", "parse_timm_spec", "timm_model"]

TIMM_SPEC = "timm:"
FRESH_SEED = 0
"""Of weights that are left fresh, so that they are the same in every process."""
OPTIONS = "pretrained=false, checkpoint=FILE, img_size=N, in_chans=N"


class TimmSpec(NamedTuple):
    """What a spec says."""

    name: str
    pretrained: bool
    checkpoint: Path | None
    arguments: dict[str, int]
    """img_size and in_chans, where given."""


def parse_timm_spec(spec: str) -> TimmSpec:
    """Take "timm:NAME[,option=value ...]" apart; `ValueError` says which option is not known."""
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
            raise ValueError(f"{spec}: cannot read {option!r}; options of timm:NAME are {OPTIONS}")
    if checkpoint is not None and not checkpoint.is_file():
        raise CheckpointError(f"{spec}: {checkpoint} is no file; give the path of the weights")
    return TimmSpec(name, pretrained, checkpoint, arguments)


def timm_model(spec: str) -> nn.Module:
    """Build the timm model of a spec, without its classifier; `CheckpointError` says why that cannot be."""
    name, pretrained, checkpoint, told = parse_timm_spec(spec)
    if ":" not in name and not timm.is_model(name):  # hf-hub:USER/NAME and local-dir:PATH are timm's as well
        raise ValueError(f"timm has no model {name!r}; {nearest_name(name, timm.list_models())}")
    arguments: dict[str, Any] = dict(told)
    if checkpoint is not None:
        arguments["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
    with hub_errors(spec), torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(FRESH_SEED)
        try:
            return timm.create_model(
                name, pretrained=pretrained or checkpoint is not None, num_classes=0, **arguments
            )
        except (RuntimeError, TypeError, KeyError, AssertionError, EOFError, SafetensorError) as error:
            raise CheckpointError(f"timm cannot give {spec}: {' '.join(str(error).split())}") from error


def open_timm_encoder(spec: str) -> TimmEncoder:
    """Any transformer of timm, as it is there, on the CPU in fp32 and evaluation mode."""
    told = parse_timm_spec(spec)
    built = timm_model(spec)
    # timm's own name where the spec gives a place of it, so that it can be built again without that place
    settings: Any = built.pretrained_cfg
    architecture = told.name if ":" not in told.name else str(settings["architecture"])
    try:
        model = TimmEncoder(built, architecture, told.arguments)
    except ValueError as error:
        raise CheckpointError(f"{spec}: {error}") from error
    if ":" in told.name:
        _refuse_unlike(spec, model)
    return model.eval()


def _refuse_unlike(spec: str, model: TimmEncoder) -> None:
    """Refuse a network that its architecture's name does not give again, as baselines and heads need it."""
    shapes, again = (
        {name: tensor.shape for name, tensor in one.state_dict().items()}
        for one in (model, TimmEncoder.fresh(model.config))
    )
    if shapes != again:
        different = sorted(
            name for name in shapes.keys() | again.keys() if shapes.get(name) != again.get(name)
        )
        raise CheckpointError(
            f"{spec}: {len(different)} of its tensors ({', '.join(different[:3])}) are not as timm builds "
            f"{model.config.architecture}, so that it could not be built again; give an architecture that "
            "timm knows by name"
        )
