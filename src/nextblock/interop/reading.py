"""Models from anywhere: a file's format is told by its content, a directory's by what lies in it.

RUN, a checkpoint, a probe's head, MODEL.safetensors     what this package writes
*.ckpt, mp_rank_00_model_states.pt                       official XTRA: models and classifiers
backbone.pth and head.pth, AIM's training layout         official AIM
DIR with a timm config.json, a ViT's state dict          timm
hf:USER/NAME, timm:NAME                                  any of these from the hub, or by timm's name

Pickles are read without running what they hold.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file

from nextblock.checkpoint import (
    MODEL_FILE,
    CheckpointError,
    UnknownFormatError,
    is_safetensors,
    latest_checkpoint,
    read_metadata,
    read_model,
)
from nextblock.config import Size
from nextblock.interop.aim import hub_settings, is_aim, is_aim_head, read_aim
from nextblock.interop.hub import fetch, is_hub_spec
from nextblock.interop.timm_format import TIMM_SPEC, is_timm_directory, read_timm
from nextblock.interop.timm_weights import is_timm_weights, read_timm_weights
from nextblock.interop.xtra import is_xtra, read_xtra
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier

__all__ = ["Found", "Told", "own_file", "read", "read_content"]

AIM_FILES = ("backbone.pth", "head.pth")
"""A classifier in Apple's layout, as `convert` writes it."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
KNOWN = "a run, a checkpoint, official XTRA and AIM files, timm directories and ViTs, hf:USER/NAME, timm:NAME"


class Found(NamedTuple):
    """A model, and the words for the format it was found in."""

    model: NextBlockModel | ImageClassifier
    format: str


@dataclass(frozen=True, kw_only=True)
class Told:
    """What the caller says of a file that does not say it; None: nothing."""

    head: str | Path | None = None
    """The head of an AIM classifier, which lies in a file of its own."""
    num_heads: int | None = None
    probe_layers: Literal["last", "best"] | Sequence[int] | None = None
    """Layers that an AIM head averages, counted from 0."""
    image_size: Size | None = None
    """AIM's inference layout: the size that positions are stored for; they fit any other as well."""
    norm_eps: float | None = None
    """AIM: epsilon of the LayerNorms; 1e-6 in the inference layout, 1e-5 in that of the training code."""
    to_start_from: bool = False
    """Weights to start from: a timm ViT may lose its class token."""


def read(src: str | Path, told: Told) -> Found:
    """Build what `src` holds, on the CPU, in fp32 and evaluation mode; `CheckpointError` says why not."""
    found = _read(src, told)
    model = found.model.encoder_model if isinstance(found.model, ImageClassifier) else found.model
    if told.num_heads is not None and told.num_heads != model.config.num_heads:
        raise ValueError(
            f"{src} has {model.config.num_heads} attention heads, as it tells itself, and not "
            f"{told.num_heads}; leave num_heads out"
        )
    return found


def _read(src: str | Path, told: Told) -> Found:
    if str(src).startswith(TIMM_SPEC):
        _refuse_unused(told, "head", "probe_layers", where=str(src))
        return Found(read_timm(src, drop_prefix_tokens=told.to_start_from), "timm model")
    path = fetch(str(src)) if is_hub_spec(src) else Path(src)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; known: {KNOWN}")
    return _read_directory(path, str(src), told) if path.is_dir() else _read_file(path, str(src), told)


def read_content(path: Path) -> Any:
    """What a file holds: the tensors of safetensors by name, or a pickle of tensors and plain values."""
    return load_file(path) if is_safetensors(path) else _unpickle(path)


def _read_directory(path: Path, origin: str, told: Told) -> Found:
    if is_timm_directory(path):
        _refuse_unused(told, "head", "probe_layers", where=origin)
        return Found(read_timm(path, drop_prefix_tokens=told.to_start_from), "timm directory")
    own = own_file(path)
    if own is not None:
        _refuse_unused(told, "head", "probe_layers", where=origin)
        return Found(read_model(own), "nextblock")
    files = sorted(file for file in path.iterdir() if file.suffix in WEIGHT_SUFFIXES)
    if [file.name for file in files] == list(AIM_FILES):
        told = replace(told, head=told.head or files[1])
        return _read_file(files[0], origin, told, settings=_settings_beside(path))
    if len(files) == 1:
        return _read_file(files[0], origin, told, settings=_settings_beside(path))
    found = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
    if len(files) > 1:
        raise CheckpointError(f"{origin} holds several weight files ({found}); name one of them")
    raise CheckpointError(
        f"{path} holds no model: looked for {MODEL_FILE}, checkpoints/step_*/{MODEL_FILE}, a timm "
        f"config.json and {', '.join('*' + suffix for suffix in WEIGHT_SUFFIXES)}, found {found}"
    )


def own_file(path: Path) -> Path | None:
    """The model file in this package's own format that a file, a checkpoint or a run means, if one does."""
    if not path.is_file():
        latest = None if (path / MODEL_FILE).is_file() else latest_checkpoint(path / "checkpoints")
        path = (latest or path) / MODEL_FILE
    return path if path.is_file() and _is_own(path) else None


def _is_own(path: Path) -> bool:
    return is_safetensors(path) and read_metadata(path).get("format") == "nextblock"


def _read_file(path: Path, origin: str, told: Told, settings: Mapping[str, Any] | None = None) -> Found:
    if _is_own(path):
        _refuse_unused(told, "head", "probe_layers", where=origin)
        return Found(read_model(path), "nextblock")
    content = read_content(path)
    if isinstance(content, Mapping):
        if is_xtra(content):
            _refuse_unused(told, "head", "probe_layers", where=origin)
            return Found(read_xtra(content, origin, num_heads=told.num_heads), "official XTRA")
        if is_aim_head(content):
            raise UnknownFormatError(
                f"{origin} is the head of an AIM classifier alone; load its backbone, with head= this file"
            )
        if is_aim(content):
            return _read_aim(content, origin, told, settings or {})
        weights = _bare(content)
        if is_timm_weights(weights):
            _refuse_unused(told, "head", "probe_layers", where=origin)
            model = read_timm_weights(
                weights, origin, num_heads=told.num_heads, drop_prefix_tokens=told.to_start_from
            )
            return Found(model, "timm state dict")
    held = ", ".join(map(str, list(content)[:5])) if isinstance(content, Mapping) else type(content).__name__
    raise UnknownFormatError(f"{origin} is in no known format (it holds: {held}); known: {KNOWN}")


def _read_aim(content: Mapping[str, Any], origin: str, told: Told, settings: Mapping[str, Any]) -> Found:
    """AIM's files; `settings` are those of a config.json beside them, and what the caller says goes first."""
    given = {
        "num_heads": told.num_heads,
        "probe_layers": told.probe_layers,
        "image_size": told.image_size,
        "norm_eps": told.norm_eps,
    }
    beside = hub_settings(settings) if settings else {}
    head = None if told.head is None else read_content(Path(told.head))
    if head is not None and not is_aim_head(head):
        raise CheckpointError(f"{told.head} is no head of an AIM classifier; give Apple's head file")
    model = read_aim(
        content,
        origin,
        head=head,
        **{**beside, **{name: value for name, value in given.items() if value is not None}},
    )
    return Found(model, "official AIM")


def _settings_beside(directory: Path) -> dict[str, Any]:
    file = directory / "config.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _bare(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """A state dict without the wrapper that training scripts save it in."""
    for wrapper in ("state_dict", "model"):
        if isinstance(content.get(wrapper), Mapping):
            return content[wrapper]
    return content


def _refuse_unused(told: Told, *names: str, where: str) -> None:
    """Refuse what the caller says of a file that tells it itself, or has no use for it."""
    for name in names:
        if getattr(told, name) is not None:
            raise ValueError(f"{where} has no use for {name}={getattr(told, name)!r}; leave it out")


def _unpickle(path: Path) -> Any:
    """Read a pickle of tensors and plain values; one that would run code is refused."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        if forbidden is not None:
            raise CheckpointError(
                f"{path} is a pickle with more than tensors and plain values ({forbidden[1]}), and reading "
                "it could run code. If its origin is trusted, save its state_dict alone, elsewhere"
            ) from error
        raise CheckpointError(
            f"{path} cannot be read as a weight file: it is of another kind, or not complete; "
            f"compare its size with the original's ({type(error).__name__}: {_reason(str(error))})"
        ) from error


def _reason(message: str) -> str:
    """What torch says of a file, without the advice around it."""
    return message.split("WeightsUnpickler error:")[-1].strip().split("\n")[0]
