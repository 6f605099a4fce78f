"""Weight files: choosing one of several, reading it, and settings that it does not record.

Every error is one line with the file, the cause and a remedy. Pickles are read without running their code.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from nextblock.checkpoint import CheckpointError, is_safetensors
from nextblock.config import Size, pair
from nextblock.settings import require

# A classifier in Apple's layout.
AIM_FILES = ("backbone.pth", "head.pth")
# Names of a directory's model by hub, timm and transformers, in order of preference.
MAIN_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# Suffixes in order of preference, if several files contain the same weights.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# Keys of a checkpoint that contain the weights; averaged ones (EMA) come first, as in timm.
WRAPPERS = ("state_dict_ema", "model_ema", "model", "state_dict", "module")
MAX_WRAPPERS = 8
# Prefixes that wrappers (DDP, torch.compile, Lightning) add to every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
NAMES_SHOWN = 8
SETTINGS_CLASS = re.compile(
    r"(omegaconf|typing|pathlib)\..+|collections\.defaultdict"
    r"|(builtins|__builtin__)\.(dict|list|tuple|str|int|float|bool|bytes|object|unicode|long)"
)
"""Classes of settings that trainers pickle together with the weights."""
# ONNX starts with its version, then its producer, graph or operators. No pickle starts with a backspace.
ONNX_START = re.compile(rb"\x08[\x01-\x1f][\x12:B]")
# Metadata file of torch.distributed.checkpoint.
DISTRIBUTED_FILE = ".metadata"


# ------------------------------------------------------------------------------------------ choosing a file


def choose_weights(names: Iterable[str], where: str, *, as_named: str) -> tuple[str, ...]:
    """Choose the weight files of a directory's model: one, a backbone with its head, or none.

    Refuses files of several models; `as_named` shows how to name one of them ("hf:USER/NAME/{}").
    """
    # The usual names of a whole model win, as trainers put their own state in other files.
    files = sorted(name for name in names if "/" not in name and name.endswith(WEIGHT_SUFFIXES))
    main = [name for name in MAIN_FILES if name in files]
    if main:
        return (main[0],)
    if tuple(files) == AIM_FILES:
        return AIM_FILES
    if len({PurePosixPath(name).stem for name in files}) > 1:
        listed, named = ", ".join(files[:NAMES_SHOWN]), as_named.format(files[0])
        raise CheckpointError(f"{where} contains several weight files ({listed}); name one of them: {named}")
    # The same model in several formats: safetensors comes first, as it runs no code and is memory-mapped.
    return tuple(sorted(files, key=lambda name: WEIGHT_SUFFIXES.index(PurePosixPath(name).suffix))[:1])


def is_distributed(path: Path) -> bool:
    """Whether torch.distributed.checkpoint wrote this directory."""
    return (path / DISTRIBUTED_FILE).is_file()


# --------------------------------------------------------------------------------------------- reading a file


def read_content(path: Path) -> Any:
    """Content of a weight file: tensors by name, or a pickled structure of tensors and plain values."""
    if not path.is_file() and not is_distributed(path):
        what = "is a directory, not a weight file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; give the path of the file")
    try:
        if path.is_dir():
            return _read_distributed(path)
        # Safetensors are memory-mapped. Pickles are read whole, as trainers overwrite them in place.
        return load_file(path) if is_safetensors(path) else _read_pickle(path)
    except (
        SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
        TypeError, AttributeError, ArithmeticError, MemoryError,
    ) as error:  # fmt: skip
        why = _why_unreadable(path, str(error), type(error).__name__)
        raise CheckpointError(f"{path} {why}") from error


class _Inert:
    """Stand-in for a foreign settings object: accepts any stored state and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path) -> Any:
    # Pickled settings (omegaconf's, in files of AIM's training code) are replaced by inert objects, so none
    # of their code is imported or run. torch still refuses any other class.
    zipped = zipfile.is_zipfile(path)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    # torch fills plain dicts only, so a defaultdict becomes one.
    stand_ins = {"collections.defaultdict": lambda *_: {}}
    stubs: list[Any] = [(stand_ins.get(n, _Inert), n) for n in unsafe if SETTINGS_CLASS.fullmatch(n)]
    with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error says more
        return torch.load(path, map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of a distributed checkpoint; allows only the classes that such metadata contains."""

    ALLOWED: ClassVar = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties",
            "ChunkStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch.serialization": ("_get_layout",),
        "torch": ("Size",),
        "collections": ("OrderedDict",),
    }  # fmt: skip

    # Unpickling imports and calls whatever a file names, so any name other than these classes and torch's
    # dtypes is refused before it is imported. torch's own reader does not restrict the metadata, so it gets
    # the metadata read here. It reads the tensors with weights_only.
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def distributed_reader(folder: Path) -> Any:
    """A reader for torch.distributed.checkpoint that runs no code from the directory."""
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import StorageMeta

    with (folder / DISTRIBUTED_FILE).open("rb") as file:
        table: Any = _MetadataUnpickler(file).load()

    class Reader(FileSystemReader):
        def read_metadata(self, *_: Any, **__: Any) -> Any:
            table.storage_meta = StorageMeta()
            return table

    return Reader(folder)


def _read_distributed(folder: Path) -> dict[str, Tensor]:
    """Weights of a distributed checkpoint, read without a process group."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = distributed_reader(folder)
    weights = {
        # torch fills existing tensors. The optimizer's, twice as large, are skipped.
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(weights, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # not an Exception; it contains a failure per rank
            reasons = {str(failure[0]) for failure in error.failures.values()}
            raise RuntimeError("; ".join(reasons)) from error
    return weights


def _why_unreadable(path: Path, message: str, kind: str) -> str:
    # Check the bytes first, as they explain more than torch's message.
    start = b""
    if path.is_file():
        with path.open("rb") as file:
            start = file.read(100)
        if not start:
            return "cannot be read as a weight file: the file is empty; take the original again"
    if path.suffix == ".onnx" or ONNX_START.match(start):
        return "is an ONNX file, which cannot be loaded; give the run or file that it was made from"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer to the file; fetch it by `git lfs pull`"
    if start.lstrip().startswith(b"<"):
        return "is an HTML page, not a weight file; download it again from the file's own address"
    if forbidden := re.search(r"GLOBAL (\S+)", message):
        return (
            f"is a pickle with more than tensors and plain values ({forbidden[1]}), and reading it could run "
            "code. If you trust its origin, save only its state_dict, elsewhere"
        )
    # Only the first sentence of torch's message, without its advice.
    reason = message.split("WeightsUnpickler error:")[-1].strip().split("\n")[0].split(". ")[0]
    return (
        "cannot be read as a weight file: it is of another kind, or not complete; compare its size with the "
        f"original's ({kind}: {reason})"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Settings in a JSON file; {} if there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); repair or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not settings; repair or remove it")
    return content


def unwrapped(content: Any) -> Mapping[str, Any]:
    """Weights in a file's content, without wrappers, under their plain names; {} if there are none."""
    weights = next(reversed(_wrappings(content)), {})
    if not weights or not all(isinstance(name, str) for name in weights):
        return {}
    # Wrappers nest in any order, so remove prefixes as long as all names share one. A prefix of only some
    # names is part of them.
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def beside_weights(content: Any, key: str) -> Any:
    """Value of `key` in any wrapper around the weights; None if there is none."""
    return next((wrapping[key] for wrapping in _wrappings(content) if key in wrapping), None)


def _wrappings(content: Any) -> list[Mapping[Any, Any]]:
    """A file's content and the mappings nested in it under wrapper keys, from the outside in."""
    # Checkpoints wrap their weights one to three levels deep. The limit guards against a dict in itself.
    found: list[Mapping[Any, Any]] = []
    while isinstance(content, Mapping) and len(found) < MAX_WRAPPERS:
        found.append(content)
        content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    return found


def only_tensors(weights: Mapping[str, Any], origin: str) -> Mapping[str, Tensor]:
    """Return the same weights; `CheckpointError` if any is not a tensor."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise CheckpointError(f"{origin} holds {name!r} of type {kind}; take the original file")
    return weights


# ------------------------------------------------------------------------------------ settings by the caller


ProbeLayers = Literal["last", "best"] | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Settings that a foreign file does not record; None uses the file's value."""

    head: str | Path | None = None
    """Head of an AIM classifier, if it is in a separate file."""
    num_heads: int | None = None
    """Number of attention heads of the encoder."""
    probe_layers: ProbeLayers | None = None
    """Layers that an AIM head averages, counted from 0, or Apple's "last" or "best"."""
    image_size: Size | None = None
    """AIM: image size in pixels, or (rows, columns)."""
    norm_eps: float | None = None
    """AIM: epsilon of the LayerNorms; 1e-6 in the inference layout, 1e-5 in the training layout."""
    fallback: Mapping[str, Any] = field(default_factory=dict)
    """Values to use and report for settings that neither the caller nor the file gives."""
    drop_prefix_tokens: bool = False
    """Drop class and register tokens of a timm ViT: fine for initialisation, but the features differ."""

    def __post_init__(self) -> None:
        heads, eps, size, layers = self.num_heads, self.norm_eps, self.image_size, self.probe_layers
        require(heads is None or heads >= 1, f"num_heads is {heads}; it must be at least 1")
        require(eps is None or eps > 0, f"norm_eps is {eps}; it must be above 0")
        require(size is None or min(pair(size)) >= 1, f"image_size is {size}; it must be at least 1 pixel")
        is_list = isinstance(layers, Sequence) and len(layers) > 0
        require(
            layers in (None, "last", "best")
            or (is_list and all(isinstance(layer, int) and layer >= 0 for layer in layers)),  # type: ignore[union-attr]
            f'probe_layers is {layers!r}; give "last", "best", or a list of layers counted from 0',
        )

    @property
    def given(self) -> dict[str, Any]:
        """The settings that the caller gave."""
        names = ("head", "num_heads", "probe_layers", "image_size", "norm_eps")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}
