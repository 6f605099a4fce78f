"""Model files and training states, each written whole or not at all.

A model file is safetensors; its metadata holds `format` ("nextblock"), `format_version`, `nextblock_version`,
`kind` ("model", "classifier" or "timm classifier") and `config` (JSON), so the file alone is enough to build
the network; and, if known, `data` (JSON): mean, deviation, resize and crop of its images. A checkpoint is a
directory `step_00001234` with `model.safetensors` (encoder and predictor), what a run needs to resume, and
`checksums.json`, written aside, flushed to disk and renamed.

The promise of `format_version`: every later release reads what an earlier one wrote. A file of a newer
version than this one knows is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nextblock.atomic import remove, write_aside
from nextblock.config import DataConfig, ModelConfig
from nextblock.errors import UsageError
from nextblock.logs import counted
from nextblock.models import NextBlockModel, TimmEncoder
from nextblock.models.heads import HeadConfig, ImageClassifier
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import UnknownSettingError, from_dict, to_dict
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
    """A file can be read, but holds no model that is known; `content` is what it holds."""

    def __init__(self, message: str, path: Path, content: Any) -> None:
        super().__init__(message)
        self.path, self.content = path, content


class MissingSettingError(CheckpointError, UsageError):
    """A foreign file lacks settings without which its model cannot be built: the caller has to give them."""

    def __init__(self, **reasons: str) -> None:
        super().__init__("; ".join(reasons.values()))
        self.reasons = reasons
        """The reason for each setting that is missing."""


@contextmanager
def blame(origin: str | Path, *, values_of_caller: bool = False) -> Iterator[None]:
    """Turn whatever a damaged or contradictory file makes its reader raise into one `CheckpointError`.

    With `values_of_caller` a `ValueError` passes: the caller gave settings, and one of them may be the cause.
    """
    try:
        yield
    except (CheckpointError, MissingSettingError):
        raise
    # Damaged settings can fail anywhere in a reader, in any way. All of these mean the file; anything else,
    # such as a full memory, is not its fault.
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError) as error:
        # By name, as these classes may lie above this file. They say cause and remedy already.
        named = type(error).__name__ in ("HubError", "WriteError")
        if named or (values_of_caller and isinstance(error, ValueError)):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        why = f"is damaged, or is not what it says it is ({reason}); {_remedy(origin)}"
        writer = _newer_writer(origin, error)
        if writer is not None:
            why = f"was written by {writer}, this is {__version__}; upgrade nextblock ({reason})"
        raise CheckpointError(f"{origin} {why}") from error


def _newer_writer(origin: str | Path, error: Exception) -> str | None:
    """The newer release that wrote a file, by its own word or by a setting that is unknown here; or None."""
    version = None
    with suppress(CheckpointError, OSError):
        version = read_metadata(Path(origin)).get("nextblock_version")
    if version is None:  # files from before 0.1.0 do not say it, and others may leave it out
        return "a newer release of nextblock" if isinstance(error, UnknownSettingError) else None
    theirs, ours = ([int(part) for part in re.findall(r"\d+", text)] for text in (version, __version__))
    return f"nextblock {version}" if theirs > ours else None


def _remedy(origin: str | Path) -> str:
    """What to do about a damaged file; a run has checkpoints before the last."""
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

    With `data`, the file says how its images are normalised and cut. `weights`: those of a model that is
    sharded, whole. Weights with NaN or inf are refused.
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
    """Write tensors, from any device, with the file mode that the umask gives; NaN and inf are refused."""
    # Refused before anything is written: what a file replaces may be the last good one.
    remedy = "it was not saved; an earlier checkpoint may be finite"
    refuse_non_finite(weights, f"the model for {path}", remedy)
    # safetensors puts a file of its own in this place, which its owner alone may read. So an empty file shows
    # first which mode the umask gives.
    path.touch()
    mode = path.stat().st_mode
    save_file({name: w.detach().cpu().contiguous() for name, w in weights.items()}, path, dict(metadata))
    path.chmod(mode)


def save_classifier(directory: Path, classifier: ImageClassifier, *, data: DataConfig | None = None) -> None:
    """Write a classifier as `directory/model.safetensors`; the directory appears whole or not at all."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with write_aside(directory) as aside:
        aside.mkdir()
        save_model(aside / MODEL_FILE, classifier, data=data)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the header's length, then a JSON object."""
    with path.open("rb") as file:
        # Eight bytes give the length of the header; then comes JSON, which no pickle and no zip has there.
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
        # load_file maps the file, so weights are read from the disk once, when they are used.
        settings, weights, kind = json.loads(metadata["config"]), load_file(path), metadata["kind"]
        read_data(path)  # refused here if it is damaged, not by whoever asks for it later
        if kind == "model":
            return build_model(from_dict(ModelConfig, settings), weights, str(path))
        if kind not in ("classifier", "timm classifier"):
            raise UsageError(f"kind {kind!r}")
        settings["head"].pop("hidden_dim", None)  # of a kind of head that is gone
        head, names = from_dict(HeadConfig, settings["head"]), settings["class_names"]
        if kind == "classifier":
            return build_model(from_dict(ModelConfig, settings["model"]), weights, str(path), head, names)
        settings["model"].pop("prefix_tokens", None)  # in files from before 0.1.0
        # Not built on meta: some of timm's networks have tables that no file holds.
        encoder = TimmEncoder.fresh(from_dict(TimmConfig, settings["model"]))
        classifier = ImageClassifier(encoder, head, names)
        load_strictly(classifier, weights, str(path))
        return classifier.eval()


def read_data(path: Path) -> DataConfig | None:
    """How a model file says that its images are normalised and cut; None if it does not say."""
    recorded = read_metadata(path).get("data")
    with blame(path):
        return None if recorded is None else from_dict(DataConfig, json.loads(recorded))


def read_metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself."""
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
    # A classifier's encoder is one level deeper than a model's.
    prefix = "" if head is None else "encoder_model."
    # Also on the meta device, time and memory grow with these sizes: whoever damaged the settings must not
    # make us build a billion layers before the weights are compared.
    positions, sizes = weights.get(f"{prefix}encoder.pos_embed"), {}
    if config.positions != "rope":
        sizes["patches"] = (config.num_patches, 0 if positions is None else positions.shape[1])
    parts = {"layers": ("encoder.blocks", config.depth)}
    if config.predictor not in (None, "identity"):
        parts["predicted blocks"] = ("predictor.block_mlps", len(config.distances))
        if config.predictor != "linear":
            parts["predictor layers"] = ("predictor.blocks", config.predictor_depth)
    for what, (part, told) in parts.items():
        pattern = re.compile(rf"{re.escape(prefix + part)}\.(\d+)\.")
        numbers = {match[1] for name in weights if (match := pattern.match(name))}
        sizes[what] = (told, len(numbers))
    wrong = [f"{told} {what}, the weights {held}" for what, (told, held) in sizes.items() if told != held]
    if wrong:
        raise CheckpointError(
            f"the settings of {origin} contradict its weights: they say {'; '.join(wrong)}; {_remedy(origin)}"
        )
    # On the meta device tensors have shapes and no data: building costs no memory and draws no random number,
    # and the tensors of the file then take the places of the empty ones.
    with torch.device("meta"):
        model: NextBlockModel | ImageClassifier = NextBlockModel(config)
        model = model if head is None else ImageClassifier(model, head, class_names)
    load_strictly(model, weights, origin)
    return model.eval()


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], origin: str) -> None:
    """Give a model all weights by name, in fp32; refuse what does not fit it or is not finite."""
    # All problems are listed at once: their pattern tells what kind of file it is.
    own = model.state_dict()
    problems = [f"missing: {name}" for name in own if name not in weights]
    problems += [f"unexpected: {name}" for name in weights if name not in own]
    both = [(name, weights[name], own[name]) for name in own if name in weights]
    problems += [
        f"shape of {name}: {tuple(w.shape)} in the file, {tuple(mine.shape)} in the model"
        for name, w, mine in both
        if w.shape != mine.shape
    ]
    # Complex numbers in place of real ones would pass here and fail in the first image.
    problems += [
        f"dtype of {name}: {w.dtype} in the file, {mine.dtype} in the model"
        for name, w, mine in both
        if not w.is_floating_point() and (mine.is_floating_point() or w.is_complex())
    ]
    if problems:
        listed = _listed(problems, "\n  ")
        raise CheckpointError(f"the weights of {origin} do not fit the model:\n  {listed}")
    # Converted before they are assigned: the tensors themselves become the parameters, so there is no second
    # copy of them. Copying would need the model's own memory, and on the meta device it has none.
    in_fp32 = {name: w.float() if w.is_floating_point() else w for name, w in weights.items()}
    refuse_non_finite(in_fp32, origin, _remedy(origin))
    model.load_state_dict(in_fp32, strict=True, assign=True)


def refuse_non_finite(weights: Mapping[str, Tensor], origin: str, remedy: str) -> None:
    """Refuse weights with NaN or inf, by name."""
    # A finite sum has finite terms, and one pass is all it takes; only if it is not are the terms looked at.
    bad = [
        name
        for name, w in weights.items()
        if w.is_floating_point() and not w.sum().isfinite() and not w.isfinite().all()
    ]
    if bad:
        named = _listed(bad, ", ")
        raise CheckpointError(
            f"{origin} holds NaN or inf in {counted(len(bad), 'tensor')} ({named}); {remedy}"
        )


def _listed(names: list[str], separator: str) -> str:
    more = [f"and {len(names) - NAMES_SHOWN} more"] if len(names) > NAMES_SHOWN else []
    return separator.join(names[:NAMES_SHOWN] + more)


# --------------------------------------------------------------------------------------------- checkpoints


def latest_checkpoint(directory: Path) -> Path | None:
    """The checkpoint of the highest step whose model has its right size, or None.

    What is half written has another name and is not seen. A run that resumes looks at every byte.
    """
    # Whoever evaluates asks too, perhaps of a run that is training: nothing is renamed, nothing read in full.
    for path in reversed(checkpoints(directory).values()):
        damage = find_damage(path, model_size_only=True)
        if damage is None:
            return path
        log.warning("%s; using the checkpoint before it", damage)
    return None


def prune_checkpoints(directory: Path, keep: int, keep_every: int | None = None, *, best: int = 0) -> None:
    """Remove what a kill left half written, and old checkpoints.

    The latest `keep` stay, those of every `keep_every` steps, and that of step `best`; 0 is none.
    """
    # Left by a killed process. Nobody else writes here now, as the run holds the lock of its directory.
    for half_written in directory.glob(".writing-*"):
        remove(half_written)
    for step, path in list(checkpoints(directory).items())[:-keep]:
        if not step or not (step == best or (keep_every and step % keep_every == 0)):
            remove(path)


def checkpoints(directory: Path) -> dict[int, Path]:
    """The checkpoints by step, in the order of steps."""
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
    """What is wrong with a checkpoint's files; None if nothing is, as far as its checksums tell.

    Rank r of w looks at every w-th file. `model_size_only`: only at whether the model has its size.
    """
    try:
        (checkpoint / MODEL_FILE).stat()
        sums_file = checkpoint / CHECKSUMS_FILE  # missing before there were checksums
        sums = json.loads(sums_file.read_text()) if sums_file.is_file() else {}
        names = [MODEL_FILE] if model_size_only else list(sums)[rank::world_size]
        for name in names:
            size = (checkpoint / name).stat().st_size
            if name in sums and size != sums[name]["bytes"]:
                return f"{checkpoint / name} has {size} bytes instead of {sums[name]['bytes']}"
            if not model_size_only and checksum(checkpoint / name) != sums[name]:
                return f"{checkpoint / name} is damaged: its checksum is another"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        return f"{checkpoint} is damaged: {error}"
    return None
