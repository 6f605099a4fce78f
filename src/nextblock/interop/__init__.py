"""Models from anywhere: `load` tells a file's format by its content."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any

import torch

from nextblock.checkpoint import (
    MODEL_FILE,
    CheckpointError,
    InitReport,
    initialize_from,
    is_safetensors,
    latest_checkpoint,
    read_model,
)
from nextblock.interop.xtra import is_xtra, read_xtra
from nextblock.models import NextBlockModel
from nextblock.models.classifier import ImageClassifier
from nextblock.presets import model_config

__all__ = ["create_model", "initialize", "load", "load_model"]

log = logging.getLogger(__name__)


def create_model(name: str, **overrides: Any) -> NextBlockModel:
    """A model of a size ("xtra-b16") or a preset, with any `ModelConfig` field changed.

    Its weights are fresh, drawn from torch's global generator; with `init=`, those of another model.
    """
    model = NextBlockModel(model_config(name, **overrides))
    if model.config.init is not None:
        initialize(model, model.config.init)
    return model


def initialize(model: NextBlockModel, src: str | Path) -> InitReport:
    """Give a model the weights of what `load_model` reads from `src`, and log what became of each."""
    report = initialize_from(model, load_model(src), str(src))
    log.info("weights of %s: %d tensors loaded", report.origin, len(report.loaded))
    for what, names in (("resampled", report.resampled), ("fresh", report.fresh), ("unused", report.unused)):
        if names:
            log.info("  %s: %s", what, ", ".join(names))
    return report


def load(src: str | Path, *, num_heads: int | None = None) -> NextBlockModel | ImageClassifier:
    """Build the model or classifier that a run directory, a checkpoint, a probe's head or a file holds.

    Understood: what this package writes, and official XTRA files (Lightning `.ckpt`, DeepSpeed model states;
    models and classifiers). `num_heads` is needed where a foreign file does not tell. On the CPU, in fp32
    and evaluation mode.
    """
    path = Path(src)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a run directory, a checkpoint or a weight file")
    if path.is_dir():
        return read_model(_model_file(path))
    if is_safetensors(path):
        return read_model(path)
    content = _unpickle(path)
    if isinstance(content, dict) and is_xtra(content):
        return read_xtra(content, str(path), num_heads=num_heads)
    held = ", ".join(map(str, list(content)[:5])) if isinstance(content, dict) else type(content).__name__
    raise CheckpointError(
        f"{path} is in no known format (it holds: {held}); known: a run, a checkpoint, official XTRA"
    )


def load_model(src: str | Path, *, num_heads: int | None = None) -> NextBlockModel:
    """Load what can encode and perhaps predict: of a classifier, its encoder."""
    loaded = load(src, num_heads=num_heads)
    return loaded.encoder_model if isinstance(loaded, ImageClassifier) else loaded


def _model_file(directory: Path) -> Path:
    """The model file in a checkpoint, or in the latest checkpoint of a run."""
    if (directory / MODEL_FILE).is_file():
        return directory / MODEL_FILE
    latest = latest_checkpoint(directory / "checkpoints")
    if latest is not None:
        return latest / MODEL_FILE
    found = ", ".join(sorted(p.name for p in directory.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{directory} holds no model: looked for {MODEL_FILE} and checkpoints/step_*/{MODEL_FILE}, "
        f"found {found}"
    )


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
