"""Weight files as files: which of several is meant, what one holds, its wrappers, and a place for new ones.

Every failure is one line with the file, the cause and what to do. Pickles are read without running what
they hold.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from nextblock.checkpoint import CheckpointError, is_safetensors

__all__ = [
    "AIM_FILES",
    "MAIN_FILES",
    "WEIGHT_SUFFIXES",
    "beside_weights",
    "choose_weights",
    "make_parent",
    "read_content",
    "read_json",
    "refuse_directory",
    "unwrapped",
]

AIM_FILES = ("backbone.pth", "head.pth")
"""A classifier in Apple's layout, as `convert` writes it."""
MAIN_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
"""Names by which the hub, timm and transformers mean the model of a directory, the first ones first."""
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Of the same weights in several files, the first ones first."""

WRAPPERS = ("model", "state_dict", "module")
"""Keys of a checkpoint that hold the weights."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers of modules (DDP, torch.compile, Lightning) put before every name."""
NAMES_TOLD = 8


# ------------------------------------------------------------------------------------------ which file it is


def choose_weights(names: Iterable[str], where: str, *, as_named: str) -> tuple[str, ...]:
    """Which weight files of a directory are its model: one, a backbone with its head, or none.

    Of the same model in several formats, safetensors. Files of several models are refused with their names;
    `as_named` shows how to give one ("hf:USER/NAME/{}").
    """
    files = sorted(name for name in names if "/" not in name and name.endswith(WEIGHT_SUFFIXES))
    main = [name for name in MAIN_FILES if name in files]
    if main:
        return (main[0],)
    if tuple(files) == AIM_FILES:
        return AIM_FILES
    if len({PurePosixPath(name).stem for name in files}) > 1:
        more = [f"and {len(files) - NAMES_TOLD} more"] if len(files) > NAMES_TOLD else []
        raise CheckpointError(
            f"{where} holds several weight files ({', '.join(files[:NAMES_TOLD] + more)}); name one of them: "
            + as_named.format(files[0])
        )
    return tuple(sorted(files, key=lambda name: WEIGHT_SUFFIXES.index(PurePosixPath(name).suffix))[:1])


# --------------------------------------------------------------------------------------------- what one holds


def read_content(path: Path) -> Any:
    """What a weight file holds: tensors by name, or whatever was pickled of tensors and plain values."""
    if not path.is_file():
        what = "is a directory, and not a weight file" if path.is_dir() else "does not exist"
        raise CheckpointError(f"{path} {what}; give the path of the file")
    try:
        if is_safetensors(path):
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError,
    ) as error:  # fmt: skip
        raise CheckpointError(_why_unreadable(path, str(error), type(error).__name__)) from error


def _why_unreadable(path: Path, message: str, kind: str) -> str:
    with path.open("rb") as file:
        start = file.read(100).lstrip()
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is the pointer of Git LFS to a file, and not the file; fetch it by `git lfs pull`"
    if start.startswith(b"<"):
        return f"{path} is an HTML page, and not a weight file; download it again from the file's own address"
    forbidden = re.search(r"GLOBAL (\S+)", message)
    if forbidden is not None:
        return (
            f"{path} is a pickle with more than tensors and plain values ({forbidden[1]}), and reading "
            "it could run code. If its origin is trusted, save its state_dict alone, elsewhere"
        )
    reason = message.split("WeightsUnpickler error:")[-1].strip().split("\n")[0]  # without torch's advice
    return (
        f"{path} cannot be read as a weight file: it is of another kind, or not complete; "
        f"compare its size with the original's ({kind}: {reason})"
    )


def read_json(path: Path) -> dict[str, Any]:
    """The settings in a JSON file; {} where there is none."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is no JSON ({error}); mend it, or remove it") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not settings; mend it, or remove it")
    return content


def unwrapped(content: Any) -> Mapping[str, Any]:
    """The weights that a file's content is or wraps, under their plain names; {} where it holds none.

    Keys that hold them are followed to any depth, and prefixes that all names have are taken off.
    """
    if not isinstance(content, Mapping):
        return {}
    inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
    if inner is not None:
        return unwrapped(inner)
    if not content or not all(isinstance(name, str) for name in content):
        return {}
    prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in content)), None)
    if prefix is not None:
        return unwrapped({name.removeprefix(prefix): value for name, value in content.items()})
    return content


def beside_weights(content: Any, key: str) -> Any:
    """What stands under `key` in one of the wrappers around the weights; None where nothing does."""
    while isinstance(content, Mapping):
        if key in content:
            return content[key]
        content = next((content[k] for k in WRAPPERS if isinstance(content.get(k), Mapping)), None)
    return None


# ------------------------------------------------------------------------------------- a place for a new one


def make_parent(path: Path) -> None:
    """Make the directory that a new file or directory is to lie in."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be written: the directory {path.parent} cannot be made ({error.strerror}); "
            "choose another place"
        ) from error


def refuse_directory(path: Path) -> None:
    """Refuse a directory where a file is to be written."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a directory; name the file to write")
