"""Models of timm by name: "timm:NAME", with options after commas.

`pretrained=false` leaves the weights fresh, the same ones each time, `checkpoint=FILE` takes them from a
file, where there is no network, and `img_size=N` and `in_chans=N` build the same architecture for other
images, its positions resampled.
"""

from __future__ import annotations

import logging
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import RLock, get_ident
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from nextblock.checkpoint import CheckpointError
from nextblock.interop.hub import hub_errors
from nextblock.models.timm_encoder import TimmEncoder
from nextblock.settings import nearest_name

__all__ = ["TIMM_SPEC", "TimmSpec", "open_timm_encoder", "parse_timm_spec", "timm_model"]

log = logging.getLogger(__name__)

TIMM_SPEC = "timm:"
FRESH_SEED = 0
"""Of weights that are left fresh, so that they are the same in every process."""
OPTIONS = "pretrained=false, checkpoint=FILE, img_size=N, in_chans=N"
_PATCHING = RLock()
"""Held while torch's way of loading is replaced: one thread at a time, or one would keep another's."""


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
    """Build the timm model of a spec, without its classifier; `CheckpointError` says why that cannot be.

    Weights that do not cover the whole of it, or cover more, are refused; heads do not count.
    """
    name, pretrained, checkpoint, told = parse_timm_spec(spec)
    if ":" not in name and not timm.is_model(name):  # hf-hub:USER/NAME and local-dir:PATH are timm's as well
        raise ValueError(f"timm has no model {name!r}; {nearest_name(name, timm.list_models())}")
    arguments: dict[str, Any] = dict(told)
    if checkpoint is not None:
        arguments["pretrained_cfg_overlay"] = {"file": str(checkpoint)}
    told_instead = "the path of a copy: timm:local-dir:DIR"
    if ":" not in name:
        told_instead = f"its weights, {spec},checkpoint=FILE, or leave them fresh, {spec},pretrained=false"
    with hub_errors(spec, instead=told_instead), torch.random.fork_rng(devices=[]), _whole_weights(spec):
        torch.random.default_generator.manual_seed(FRESH_SEED)
        try:
            return timm.create_model(
                name, pretrained=pretrained or checkpoint is not None, num_classes=0, **arguments
            )
        except CheckpointError:
            raise
        except (RuntimeError, TypeError, KeyError, AssertionError, EOFError, SafetensorError) as error:
            reason = textwrap.shorten(str(error), 400, placeholder=" ...")
            raise CheckpointError(f"timm cannot give {spec}: {reason}") from error


@contextmanager
def _whole_weights(spec: str) -> Iterator[None]:
    """Refuse weights that leave parts of a model fresh; built without a head, timm takes them.

    What is missing torch tells timm, which keeps it to itself: it is looked at on its way, in this thread.
    """
    thread = get_ident()
    with _PATCHING:
        plain = nn.Module.load_state_dict

        def load(
            self: nn.Module, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False
        ) -> Any:
            is_ours = get_ident() == thread
            found = plain(self, state_dict, strict=strict and not is_ours, assign=assign)
            if is_ours:
                _check_keys(spec, found.missing_keys, found.unexpected_keys)
            return found

        nn.Module.load_state_dict = load
        try:
            yield
        finally:
            nn.Module.load_state_dict = plain


def _check_keys(spec: str, missing: Sequence[str], unexpected: Sequence[str]) -> None:
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if (names := [key for key in keys if not _is_beside(key)])
    ]
    if problems:
        raise CheckpointError(
            f"the weights of {spec} do not fit that model: {', '.join(problems)}; give weights of this "
            "architecture, under timm's names"
        )


def _is_beside(key: str) -> bool:
    """Whether a tensor belongs to a head or to pre-training, and not to the layers that are given out."""
    part = key.partition(".")[0]
    return "head" in part or part.startswith("decoder_") or part in ("attn_pool", "mask_token", "pre_logits")


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
    otherwise = _done_otherwise(model)
    if otherwise:
        log.info("%s: %s", spec, "; ".join(otherwise))
    return model.eval()


def _done_otherwise(model: TimmEncoder) -> list[str]:
    """What timm would do with this network, and evaluation does in another way."""
    told = []
    if model.config.interpolation != "bicubic":
        told.append(f"timm resizes its images by {model.config.interpolation}, here it is done by bicubic")
    if getattr(model.encoder, "attn_pool", None) is not None:
        told.append("its attention pooling is not used, features are pooled as for any other encoder")
    return told


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
