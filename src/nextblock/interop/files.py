"""Weight files: which of several is meant, what one holds, and what a caller adds that it does not say.

Every failure is one line with the file, the cause and what to do. Pickles are read without running what
they hold.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
# Names by which the hub, timm and transformers mean the model of a directory, the first ones first.
MAIN_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
# If the same weights are in several files, the first of these is read.
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")

# Keys of a checkpoint that hold the weights; averaged ones (EMA) come first, as timm takes them.
WRAPPERS = ("state_dict_ema", "model_ema", "model", "state_dict", "module")
MAX_WRAPPERS = 8
# What wrappers of modules (DDP, torch.compile, Lightning) put before every name.
PREFIXES = ("module.", "_orig_mod.", "model.")
NAMES_SHOWN = 8
SETTINGS_CLASS = re.compile(
    r"(omegaconf|typing|pathlib)\..+|collections\.defaultdict"
    r"|(builtins|__builtin__)\.(dict|list|tuple|str|int|float|bool|bytes|object|unicode|long)"
)
"""Classes of the settings that trainers pickle beside the weights."""
# ONNX begins with its version, then its producer, graph or operators; no pickle begins with a backspace.
ONNX_START = re.compile(rb"\x08[\x01-\x1f][\x12:B]")
# The table of contents in what torch.distributed.checkpoint writes.
DISTRIBUTED_FILE = ".metadata"


# ------------------------------------------------------------------------------------------ which file it is


def choose_weights(names: Iterable[str], where: str, *, as_named: str) -> tuple[str, ...]:
    """Which weight files of a directory are its model: one, a backbone with its head, or none.

    Files of several models are refused; `as_named` shows how to give one ("hf:USER/NAME/{}").
    """
    # The usual names of a whole model win: a trainer leaves its own state in other files beside it.
    files = sorted(name for name in names if "/" not in name and name.endswith(WEIGHT_SUFFIXES))
    main = [name for name in MAIN_FILES if name in files]
    if main:
        return (main[0],)
    if tuple(files) == AIM_FILES:
        return AIM_FILES
    if len({PurePosixPath(name).stem for name in files}) > 1:
        more = [f"and {len(files) - NAMES_SHOWN} more"] if len(files) > NAMES_SHOWN else []
        listed = ", ".join(files[:NAMES_SHOWN] + more)
        named = as_named.format(files[0])
        raise CheckpointError(f"{where} holds several weight files ({listed}); name one of them: {named}")
    # The same model in several formats: safetensors, which runs nothing and is mapped, comes first.
    return tuple(sorted(files, key=lambda name: WEIGHT_SUFFIXES.index(PurePosixPath(name).suffix))[:1])


def is_distributed(path: Path) -> bool:
    """Whether a directory is a checkpoint of torch.distributed.checkpoint."""
    return (path / DISTRIBUTED_FILE).is_file()


# --------------------------------------------------------------------------------------------- what one holds


def read_content(path: Path) -> Any:
    """What a weight file holds: tensors by name, or whatever was pickled of tensors and plain values."""
    if not path.is_file() and not is_distributed(path):
        what = "is a directory, and not a weight file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; give the path of the file")
    try:
        if path.is_dir():
            return _read_distributed(path)
        # Safetensors are mapped into memory; pickles are read whole, as trainers write them again in place.
        return load_file(path) if is_safetensors(path) else _read_pickle(path)
    except (
        SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
        TypeError, AttributeError, ArithmeticError, MemoryError,
    ) as error:  # fmt: skip
        raise CheckpointError(_why_unreadable(path, str(error), type(error).__name__)) from error


class _Inert:
    """Stands for an object of someone else's settings: it takes whatever is stored, and does nothing."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path) -> Any:
    # Settings beside the weights (omegaconf's, in what AIM's training code saves) are replaced by inert
    # objects, so that nothing of theirs is imported or run; any other class is still refused by torch.
    zipped = zipfile.is_zipfile(path)
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path) if zipped else []
    # torch fills only true dictionaries, so a defaultdict becomes one.
    stand_ins = {"collections.defaultdict": lambda *_: {}}
    stubs: list[Any] = [(stand_ins.get(n, _Inert), n) for n in unsafe if SETTINGS_CLASS.fullmatch(n)]
    with torch.serialization.safe_globals(stubs), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected pickle protocol")  # the error tells more
        return torch.load(path, map_location="cpu", weights_only=True)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads the table of contents of a distributed checkpoint: only the classes of such tables exist."""

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

    # Unpickling imports and calls whatever a file names, so names are looked up here: what is not a class of
    # such a table, or a plain value of torch, is refused before it is imported. torch's own reader has none
    # of these limits for the table, so it is given the one read here; tensors it reads with weights_only.
    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("pathlib"):
            return PurePath
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in self.ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")


def distributed_reader(folder: Path) -> Any:
    """A reader for torch.distributed.checkpoint of what it wrote to a directory, that runs nothing in it."""
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
    """The weights of a directory that torch.distributed.checkpoint wrote, without a process group."""
    from torch.distributed.checkpoint import load
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = distributed_reader(folder)
    weights = {
        # torch fills tensors that are there already. An optimizer's, twice as many, are left out.
        name: torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(weights, storage_reader=reader, no_dist=True)
        except CheckpointException as error:  # not an Exception; it holds a failure for each rank
            reasons = {str(failure[0]) for failure in error.failures.values()}
            raise RuntimeError("; ".join(reasons)) from error
    return weights


def _why_unreadable(path: Path, message: str, kind: str) -> str:
    # What the bytes show comes first: it says more than what torch says of them.
    start = b""
    if path.is_file():
        if path.stat().st_size == 0:
            return f"{path} cannot be read as a weight file: the file is empty; take the original again"
        with path.open("rb") as file:
            start = file.read(100).lstrip()
    if path.suffix == ".onnx" or ONNX_START.match(start):
        return (
            f"{path} is an ONNX file, from which no model is read; give the run or file that it was made from"
        )
    forbidden = re.search(r"GLOBAL (\S+)", message)
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is the pointer of Git LFS to a file, and not the file; fetch it by `git lfs pull`"
    if start.startswith(b"<"):
        return f"{path} is an HTML page, and not a weight file; download it again from the file's own address"
    if forbidden is not None:
        return (
            f"{path} is a pickle with more than tensors and plain values ({forbidden[1]}), and reading "
            "it could run code. If its origin is trusted, save its state_dict alone, elsewhere"
        )
    # Without torch's advice: its first sentence.
    reason = message.split("WeightsUnpickler error:")[-1].strip().split("\n")[0].split(". ")[0]
    return (
        f"{path} cannot be read as a weight file: it is of another kind, or not complete; "
        f"compare its size with the original's ({kind}: {reason})"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file; {} if there is none."""
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
    """The weights that a file's content is or wraps, under their plain names; {} if it holds none."""
    *_, weights = {}, *_wrappings(content)
    if not weights or not all(isinstance(name, str) for name in weights):
        return {}
    # Wrappers nest in any order, so prefixes are taken off as long as all names share one. A prefix that only
    # some names have is part of these names.
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in weights)), None):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def beside_weights(content: Any, key: str) -> Any:
    """What stands under `key` in one of the wrappers around the weights; None if nothing does."""
    return next((wrapping[key] for wrapping in _wrappings(content) if key in wrapping), None)


def _wrappings(content: Any) -> Iterator[Mapping[Any, Any]]:
    """A file's content, and what its wrappers hold, from the outside in; a content in itself is no loop."""
    # A checkpoint wraps its weights one to three levels deep. A limit, as a pickle can hold itself.
    for _ in range(MAX_WRAPPERS):
        if isinstance(content, Mapping):
            yield content
            content = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)


def make_parent(path: Path) -> None:
    """Make the directory that a new file or directory is to lie in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: the directory {path.parent} cannot be made ({error.strerror}); "
            "choose another place"
        ) from error


# ----------------------------------------------------------------------------------- what a file does not say


ProbeLayers = Literal["last", "best"] | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What the caller says of a foreign file that the file does not say itself; None: as the file says."""

    head: str | Path | None = None
    """The head of an AIM classifier, if it is in a file of its own."""
    num_heads: int | None = None
    """Attention heads of the encoder."""
    probe_layers: ProbeLayers | None = None
    """Layers that an AIM head averages, counted from 0, or Apple's "last" or "best"."""
    image_size: Size | None = None
    """AIM: size of its images in pixels, or (rows, columns)."""
    norm_eps: float | None = None
    """AIM: epsilon of the LayerNorms; 1e-6 in the inference layout, 1e-5 in that of the training code."""
    fallback: Mapping[str, Any] = field(default_factory=dict)
    """Values to use, and to report, for settings that neither the caller nor the file tells."""
    drop_prefix_tokens: bool = False
    """Leave out class and register tokens of a timm ViT: good to start from, but other features."""

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
    def given(self) -> list[str]:
        """The settings that the caller gave."""
        names = ("head", "num_heads", "probe_layers", "image_size", "norm_eps")
        return [name for name in names if getattr(self, name) is not None]

    def refuse_aims(self, origin: str) -> None:
        """Refuse what AIM's readers alone look at: every other format records these settings itself."""
        for name in self.given:
            value = getattr(self, name)
            require(name == "num_heads", f"{origin} has no use for {name}={value!r}; leave it out")
