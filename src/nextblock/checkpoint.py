"""Model files and training states, each written whole or not at all.

A model file is safetensors; its metadata holds `format` ("nextblock"), `format_version`, `nextblock_version`,
`kind` ("model", "classifier" or "timm classifier") and `config` (JSON), so the file alone is enough to build
the network; and, if known, `data` (JSON): mean, deviation, resize and crop of its images. A checkpoint is a
directory `step_00001234` with `model.safetensors` (encoder and predictor), what a run needs to resume, and
`checksums.json`, written aside, flushed to disk and renamed.

`format_version` is a promise: every later release reads the files of earlier ones. A file with a newer
version is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextblock.atomic import make_directory, remove, write_aside
from nextblock.config import DataConfig, ModelConfig
from nextblock.errors import UsageError
from nextblock.logs import counted
from nextblock.models import NextBlockModel, TimmEncoder
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import from_dict, to_dict
from nextblock.version import __version__

log = logging.getLogger(__name__)

FORMAT_VERSION = 1
MODEL_FILE = "model.safetensors"
CHECKSUMS_FILE = "checksums.json"
RECORDED_DATA = ("mean", "std", "val_resize_px", "val_crop")
NAMES_SHOWN = 10


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says why and what to do."""


class UnknownFormatError(CheckpointError):
    """A file can be read, but contains no known model; `content` is what it contains."""

    def __init__(self, message: str, path: Path, content: Any) -> None:
        super().__init__(message)
        self.path, self.content = path, content


class MissingSettingError(CheckpointError, UsageError):
    """A foreign file lacks settings that its model needs; the caller must give them."""

    def __init__(self, **reasons: str) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons
        """The reason for each setting that is missing."""


@contextmanager
def blame(origin: str | Path, *, values_of_caller: bool = False) -> Iterator[None]:
    """Turn any error that a damaged or contradictory file causes into a `CheckpointError`.

    With `values_of_caller` a `ValueError` passes: one of the caller's settings may be the cause.
    """
    try:
        yield
    except (CheckpointError, MissingSettingError):
        raise
    # Damaged settings can fail anywhere in a reader, in any way. These errors point to the file; others,
    # such as MemoryError, do not.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        # By name, as higher layers define these classes. They already say cause and remedy.
        named = type(error).__name__ in ("HubError", "WriteError")
        if named or (values_of_caller and isinstance(error, ValueError)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise CheckpointError(
            f"{origin} is damaged, or newer than nextblock {__version__} ({reason}); {_remedy(origin)}"
        ) from error


def _remedy(origin: str | Path) -> str:
    """What to do about a damaged file; a run also has earlier checkpoints."""
    path = Path(origin).parent if Path(origin).name == MODEL_FILE else Path(origin)
    is_checkpoint = re.fullmatch(r"step_\d+", path.name)
    return f"remove {path} to resume from the one before" if is_checkpoint else "take an intact copy of it"


# --------------------------------------------------------------------------------------------- model files


def save_model(
    path: Path,
    model: NextBlockModel | ImageClassifier,
    *,
    data: DataConfig | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a model or classifier as one safetensors file that `nextblock.load` reads.

    `data` records how images are normalised and cropped. `weights` are the gathered weights of a sharded
    model. Weights with NaN or inf are refused.
    """
    if isinstance(model, ImageClassifier):
        kind = "timm classifier" if isinstance(model.encoder_model, TimmEncoder) else "classifier"
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
        "nextblock_version": __version__,
        "kind": kind,
        "config": json.dumps(settings),
    }
    if data is not None:
        metadata["data"] = json.dumps({name: getattr(data, name) for name in RECORDED_DATA})
    write_safetensors(path, model.state_dict() if weights is None else weights, metadata)


def write_safetensors(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors from any device, inside `write_aside`; NaN and inf are refused."""
    # Check before writing: the file to be replaced may be the last good one.
    remedy = "it was not saved; an earlier checkpoint may be finite"
    refuse_non_finite(weights, f"the model for {path}", remedy)
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, path, dict(metadata))


def save_classifier(directory: Path, classifier: ImageClassifier, *, data: DataConfig | None = None) -> None:
    """Write a classifier as `directory/model.safetensors`; the directory appears whole or not at all."""
    make_directory(directory.parent)
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, classifier, data=data)


def is_safetensors(path: Path) -> bool:
    """Whether a file starts like safetensors: the header's length, then a JSON object."""
    with path.open("rb") as file:
        # Eight bytes give the length of the header, then JSON begins. No pickle or zip has a brace there.
        start = file.read(9)
    return start[8:] == b"{"


def read_model(path: Path) -> NextBlockModel | ImageClassifier:
    """Build the network that a model file describes, with its weights, on the CPU in fp32."""
    metadata = read_metadata(path)
    if metadata.get("format") != "nextblock":
        raise CheckpointError(f"{path} is safetensors, but was not written by nextblock")
    with blame(path):
        if int(metadata["format_version"]) > FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {metadata['format_version']}, this release reads up to "
                f"{FORMAT_VERSION}; upgrade nextblock"
            )
        # load_file memory-maps the file, so weights are read once, when they are used.
        settings, weights, kind = json.loads(metadata["config"]), load_file(path), metadata["kind"]
        read_data(path)  # raise now if it is damaged, not when it is needed
        if kind == "model":
            return build_model(from_dict(ModelConfig, settings), weights, str(path))
        if kind not in ("classifier", "timm classifier"):
            raise UsageError(f"kind {kind!r}")
        settings["head"].pop("hidden_dim", None)  # of a head type that no longer exists
        head, names = from_dict(HeadConfig, settings["head"]), settings["class_names"]
        if kind == "classifier":
            return build_model(from_dict(ModelConfig, settings["model"]), weights, str(path), head, names)
        settings["model"].pop("prefix_tokens", None)  # in files from before 0.1.0
        # Not on the meta device: some of timm's networks have tables that no file contains.
        encoder = TimmEncoder.fresh(from_dict(TimmConfig, settings["model"]))
        classifier = ImageClassifier(encoder, head, names)
        load_strictly(classifier, weights, str(path))
        return classifier.eval()


def read_data(path: Path) -> DataConfig | None:
    """The normalisation and crop that a model file records; None if it has none."""
    recorded = read_metadata(path).get("data")
    with blame(path):
        return None if recorded is None else from_dict(DataConfig, json.loads(recorded))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as handle:
            return handle.metadata() or {}
    except (SafetensorError, OSError) as error:
        why = f"{error}; the file is not complete: {_remedy(path)}"
        raise CheckpointError(f"{path} cannot be read as safetensors: {why}") from error


def build_model(
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    origin: str,
    head: HeadConfig | None = None,
    class_names: Sequence[str] | None = None,
) -> NextBlockModel | ImageClassifier:
    """Build a model, or a classifier with this head, around the weights of a file, in evaluation mode."""
    # Even on the meta device, time and memory grow with these sizes: damaged settings must not build a
    # billion layers before the names and shapes of weights are compared.
    layers = max(config.depth, config.predictor_depth, config.num_predicted_blocks)
    numbers = sum(weight.numel() for weight in weights.values())
    if layers > 100 + len(weights) or config.num_patches > numbers:
        raise CheckpointError(
            f"the settings of {origin} contradict its weights: {layers} layers and {config.num_patches} "
            f"patches, but {counted(len(weights), 'tensor')} of {numbers:,} numbers; {_remedy(origin)}"
        )
    # On the meta device tensors have shapes but no data: building costs no memory and draws no random
    # numbers. The file's tensors then replace the empty ones.
    with torch.device("meta"):
        model: NextBlockModel | ImageClassifier = NextBlockModel(config)
        model = model if head is None else ImageClassifier(model, head, class_names)
    load_strictly(model, weights, origin)
    return model.eval()


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Load all weights by name, in fp32; raise if any are missing, do not fit or are not finite."""
    # List all problems at once: their pattern shows what kind of file it is.
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in own]
    both = [(name, weights[name], own[name]) for name in own if name in weights]
    problems += [
        f"shape of {name}: {tuple(w.shape)} in the file, {tuple(mine.shape)} in the model"
        for name, w, mine in both
        if w.shape != mine.shape
    ]
    # Complex weights would load here, and fail on the first image.
    problems += [
        f"dtype of {name}: {w.dtype} in the file, {mine.dtype} in the model"
        for name, w, mine in both
        if not w.is_floating_point() and (mine.is_floating_point() or w.is_complex())
    ]
    if problems:
        listed = _listed(problems, "\n  ")
        raise CheckpointError(f"the weights of {origin} do not fit the model; {_remedy(origin)}:\n  {listed}")
    # Convert, then assign: the tensors themselves become the parameters, without a second copy. A model on
    # the meta device has no memory to copy into.
    in_fp32 = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
    refuse_non_finite(in_fp32, origin, _remedy(origin))
    model.load_state_dict(in_fp32, strict=True, assign=True)


def refuse_non_finite(weights: Mapping[str, Tensor], origin: str, remedy: str) -> None:
    """Refuse weights with NaN or inf, by name."""
    # A finite sum has finite terms, so one pass is enough. Terms are checked only if the sum is not finite.
    bad = [
        name
        for name, w in weights.items()
        if w.is_floating_point() and not w.sum().isfinite() and not w.isfinite().all()
    ]
    if bad:
        named = _listed(bad, ", ")
        raise CheckpointError(
            f"{origin} contains NaN or inf in {counted(len(bad), 'tensor')} ({named}); {remedy}"
        )


def _listed(names: list[str], separator: str) -> str:
    more = [f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return separator.join(names[:NAMES_SHOWN] + more)


# --------------------------------------------------------------------------------------------- checkpoints


def latest_checkpoint(directory: Path) -> Path | None:
    """The latest checkpoint whose model file has the right size, or None.

    Half-written checkpoints have other names and are ignored. A run that resumes checks every byte.
    """
    # Evaluations call this too, perhaps while the run is training: rename nothing, read no file in full.
    for path in reversed(checkpoints(directory).values()):
        damage = find_damage(path, model_size_only=True)
        if damage is None:
            return path
        log.warning("%s; using the checkpoint before it", damage)
    return None


def prune_checkpoints(directory: Path, keep: int, keep_every: int | None = None, *, best: int = 0) -> None:
    """Remove half-written and old checkpoints.

    Keeps the latest `keep`, those of every `keep_every` steps, and that of step `best` (0: none).
    """
    # Left by a killed process. No other process writes here, as the run holds its directory's lock.
    for half_written in directory.glob(".writing-*"):
        remove(half_written)
    for step, path in list(checkpoints(directory).items())[:-keep]:
        if not step or not (step == best or (keep_every and step % keep_every == 0)):
            remove(path)


def checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints by step, in ascending order."""
    names = {path: re.fullmatch(r"step_(\d+)", path.name) for path in directory.glob("step_*")}
    return dict(sorted((int(name[1]), path) for path, name in names.items() if name))


def checksum(path: Path) -> dict[str, int | str]:
    """A file's size and SHA-256."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def digest_of(module: nn.Module) -> str:
    """A hash of a module's weights and their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def find_damage(
    checkpoint: Path, *, model_size_only: bool = False, rank: int = 0, world_size: int = 1
) -> str | None:
    """Describe damage to a checkpoint's files; None if sizes and checksums match.

    Rank r of w checks every w-th file. `model_size_only` checks only the size of the model file.
    """
    try:
        (checkpoint / MODEL_FILE).stat()
        sums_file = checkpoint / CHECKSUMS_FILE  # missing in old checkpoints
        sums = json.loads(sums_file.read_text()) if sums_file.is_file() else {}
        names = [MODEL_FILE] if model_size_only else list(sums)[rank::world_size]
        for name in names:
            size = (checkpoint / name).stat().st_size
            if name in sums and size != sums[name]["bytes"]:
                return f"{checkpoint / name} has {size} bytes instead of {sums[name]['bytes']}"
            if not model_size_only and checksum(checkpoint / name) != sums[name]:
                return f"{checkpoint / name} is damaged: its checksum differs"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{checkpoint} is damaged: {error}"
    return None
