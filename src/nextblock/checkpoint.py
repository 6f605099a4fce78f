"""Writing and reading models and training states: whole or not at all.

A model file is safetensors; its metadata holds `format` ("nextblock"), `format_version`, `kind` ("model",
"classifier" or "timm classifier") and `config` (JSON), so the file alone is enough to build the network; and,
where it is known, `data` (JSON): mean, deviation, resize and crop of its images. A checkpoint is a directory
`step_00001234` with `model.safetensors` (encoder and predictor), `state.pt` (optimizer, scaler, step) and
their `checksums.json`, written aside, flushed to disk and renamed.

The promise of `format_version`: every later release reads what an earlier one wrote. A file of a newer
version than this one knows is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextblock.atomic import remove, write_aside
from nextblock.config import DataConfig, ModelConfig
from nextblock.models import NextBlockModel, TimmEncoder
from nextblock.models.classifier import AnyClassifier, Classifier, ImageClassifier, TimmClassifier
from nextblock.models.heads import HeadConfig
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import from_dict, to_dict

__all__ = [
    "FORMAT_VERSION",
    "CheckpointError",
    "MissingSettingError",
    "UnknownFormatError",
    "is_safetensors",
    "latest_checkpoint",
    "load_state",
    "load_strictly",
    "prune_checkpoints",
    "read_data",
    "read_metadata",
    "read_model",
    "save_checkpoint",
    "save_classifier",
    "save_model",
    "set_damaged_aside",
]

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
STATE_FILE = "state.pt"
CHECKSUMS_FILE = "checksums.json"
RECORDED_DATA = ("mean", "std", "val_resize_px", "val_crop")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says why and what to do."""


class UnknownFormatError(CheckpointError):
    """A file can be read, but holds no model that is known."""


class MissingSettingError(CheckpointError, ValueError):
    """A foreign file does not tell a setting without which its model cannot be built: the caller has to."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


# --------------------------------------------------------------------------------------------- model files


def save_model(path: Path, model: NextBlockModel | AnyClassifier, *, data: DataConfig | None = None) -> None:
    """Write a model or classifier as one safetensors file that `nextblock.load` reads.

    With `data`, the file says how its images are normalised and cut.
    """
    if isinstance(model, Classifier):
        kind = "timm classifier" if isinstance(model, TimmClassifier) else "classifier"
        settings = {
            "model": to_dict(model.encoder_model.config),
            "head": to_dict(model.head_config),
            "class_names": None if model.class_names is None else list(model.class_names),
        }
    else:
        kind, settings = "model", to_dict(model.config)
    metadata = {
        "format": "nextblock",
        "format_version": str(FORMAT_VERSION),
        "kind": kind,
        "config": json.dumps(settings),
    }
    if data is not None:
        metadata["data"] = json.dumps({name: getattr(data, name) for name in RECORDED_DATA})
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, path, metadata=metadata)


def save_classifier(directory: Path, classifier: AnyClassifier, *, data: DataConfig | None = None) -> None:
    """Write a classifier as `directory/model.safetensors`; the directory appears whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, classifier, data=data)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the header's length, then a JSON object."""
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{"


def read_model(path: Path) -> NextBlockModel | AnyClassifier:
    """Build the network that a model file describes, with its weights, on the CPU in fp32."""
    metadata = read_metadata(path)
    if metadata.get("format") != "nextblock":
        raise CheckpointError(f"{path} is safetensors, but was not written by nextblock")
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {metadata['format_version']}, this release reads up to "
            f"{FORMAT_VERSION}; upgrade nextblock"
        )
    settings = json.loads(metadata["config"])
    if metadata["kind"] == "classifier":
        encoder_model = NextBlockModel(from_dict(ModelConfig, settings["model"]))
        head_config = from_dict(HeadConfig, settings["head"])
        model = ImageClassifier(encoder_model, head_config, settings["class_names"])
    elif metadata["kind"] == "timm classifier":
        settings["model"].pop("prefix_tokens", None)  # told by files from before 0.1.0
        timm_encoder = TimmEncoder.fresh(from_dict(TimmConfig, settings["model"]))
        head_config = from_dict(HeadConfig, settings["head"])
        model = TimmClassifier(timm_encoder, head_config, settings["class_names"])
    else:
        model = NextBlockModel(from_dict(ModelConfig, settings))
        data = read_data(path)
        if data is not None:
            model.image_stats = (data.mean, data.std)
    load_strictly(model, load_file(path), str(path))
    return model.eval()


def read_data(path: Path) -> DataConfig | None:
    """How a model file says that its images are normalised and cut; None where it is silent."""
    recorded = read_metadata(path).get("data")
    return None if recorded is None else from_dict(DataConfig, json.loads(recorded))


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as safetensors: {error}; the file is not complete"
        ) from error


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load all weights by name, cast to fp32; refuse, by name, what is missing, unexpected or misshapen."""
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in own]
    problems += [
        f"shape of {name}: {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
        for name in own
        if name in weights and weights[name].shape != own[name].shape
    ]
    if problems:
        shown = "\n  ".join(
            problems[:10] + ([f"and {len(problems) - 10} more"] if len(problems) > 10 else [])
        )
        raise CheckpointError(f"the weights of {origin} do not fit the model:\n  {shown}")
    model.load_state_dict(
        {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}, strict=True
    )


# --------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(
    directory: Path,
    model: NextBlockModel,
    state: Mapping[str, Any],
    step: int,
    *,
    data: DataConfig | None = None,
) -> Path:
    """Write `directory/step_XXXXXXXX`; `state` holds tensors, numbers, strings, lists and dicts only."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / f"step_{step:08d}"
    with write_aside(target) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, model, data=data)
        torch.save(dict(state), aside / STATE_FILE)
        sums = {name: _checksum(aside / name) for name in (MODEL_FILE, STATE_FILE)}
        (aside / CHECKSUMS_FILE).write_text(json.dumps(sums, indent=1))
    return target


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step whose model has its right size, or None.

    What is half written has another name and is not seen. `set_damaged_aside` looks at every byte.
    """
    for path in reversed(_checkpoints(directory)):
        damage = _damage(path, model_size_only=True)
        if damage is None:
            return path
        log.warning("%s; using the checkpoint before it", damage)
    return None


def set_damaged_aside(directory: Path) -> None:
    """Rename checkpoints later than the last undamaged one, from which a run can resume, and say so.

    Raises `CheckpointError` if all are damaged.
    """
    damaged = []
    for path in reversed(_checkpoints(directory)):
        damage = _damage(path)
        if damage is None:
            break
        damaged.append((path, damage))
    else:
        if damaged:
            raise CheckpointError(
                f"all checkpoints in {directory} are damaged: {damaged[0][1]}; restore one, or begin anew "
                "with --overwrite"
            )
    for path, damage in damaged:
        aside = path.with_name(f"damaged_{path.name}")
        log.warning("%s; resuming from the checkpoint before it; renamed to %s", damage, aside.name)
        remove(aside)
        path.rename(aside)


def prune_checkpoints(directory: Path, keep: int, keep_for_good: Callable[[int], bool]) -> None:
    """Remove what a kill left half written, and all but the latest `keep` and those kept for good."""
    for half_written in directory.glob(".writing-*"):
        remove(half_written)
    for path in _checkpoints(directory)[:-keep]:
        if not keep_for_good(_step(path)):
            shutil.rmtree(path)


def load_state(checkpoint: Path) -> dict[str, Any]:
    """Read a checkpoint's training state, on the CPU."""
    try:
        return torch.load(checkpoint / STATE_FILE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, LookupError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{checkpoint / STATE_FILE} cannot be read ({type(error).__name__}); "
            f"remove {checkpoint} to go on from the one before"
        ) from error


def _checkpoints(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(r"step_\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _checksum(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _damage(checkpoint: Path, *, model_size_only: bool = False) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is, as far as its checksums tell."""
    sums_file = checkpoint / CHECKSUMS_FILE
    try:
        sums = json.loads(sums_file.read_text()) if sums_file.is_file() else {}
        for name in (MODEL_FILE,) if model_size_only else (MODEL_FILE, STATE_FILE):
            size = (checkpoint / name).stat().st_size
            if name not in sums:  # written before there were checksums
                continue
            if size != sums[name]["bytes"]:
                return f"{checkpoint / name} has {size} bytes instead of {sums[name]['bytes']}"
            if not model_size_only and _checksum(checkpoint / name) != sums[name]:
                return f"{checkpoint / name} is damaged: its checksum is another"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"{checkpoint} is damaged: {error}"
    return None
