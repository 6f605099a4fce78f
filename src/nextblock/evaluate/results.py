"""A directory that holds one result: what it was made from, and the refusal to overwrite another one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nextblock.atomic import OUTPUT_MARK
from nextblock.checkpoint import digest_of
from nextblock.config import DataConfig, ModelConfig
from nextblock.data import BadImageError, Source
from nextblock.errors import UsageError
from nextblock.models import EncoderModel
from nextblock.settings import flatten, to_dict

__all__ = [
    "FREE_SETTINGS",
    "cut_of",
    "differences",
    "digest_of",
    "encoder_of",
    "identity_of",
    "images_digest",
    "refuse_other_result",
    "weights_digest",
]

FREE_SETTINGS = (
    "out",
    "device",
    "workers",
    "max_bad_fraction",
    "cache",
    "cache_gb",
    "encode_batch_size",
    "save_every",
    "overwrite",
)
"""Settings that do not change what an evaluation finds."""

_PLACES = ("model", "train", "val", "test", "data", "features", "query")

CUT_SETTINGS = ("mean", "std", "channels", "val_resize_px", "val_crop", "decoder", "max_pixels")
"""Settings of images that tell what an encoder sees of one, and which can be read."""

FORMAT_VERSION = 2
LOOKED_AT = 8
"""So many images of a source are read to know it again."""


def identity_of(
    config: Any, model: EncoderModel, data: DataConfig, sources: Mapping[str, Source]
) -> dict[str, Any]:
    """What makes a result what it is, ready for JSON; two evaluations of equal identity find the same.

    `config` is the verb's dataclass of settings; `sources` are named by what they serve for ("train").
    """
    return {
        "format_version": FORMAT_VERSION,
        "settings": {name: v for name, v in to_dict(config).items() if name not in FREE_SETTINGS},
        **encoder_of(model),
        "images": {**cut_of(data), **_augmented(config, data)},
        "sources": {
            purpose: {
                "spec": source.spec,
                "fingerprint": source.fingerprint,
                "images": len(source),
                "sample": None if source.in_memory else images_digest(source),
                "labels": _labels_digest(source) if source.has_labels else None,
            }
            for purpose, source in sources.items()
        },
    }


def _augmented(config: Any, data: DataConfig) -> dict[str, Any]:
    """What of the images' settings matters only where training images are varied."""
    return {} if getattr(config, "augment", "none") == "none" else {"flip": data.flip}


def cut_of(data: DataConfig) -> dict[str, Any]:
    """What tells the pixels that an encoder sees of an image, ready for JSON."""
    cut = to_dict(data)
    return {name: cut[name] for name in CUT_SETTINGS}


def encoder_of(model: EncoderModel) -> dict[str, Any]:
    """What makes an encoder what it is, ready for JSON: the same weights with other attention are another."""
    config = model.config
    if isinstance(config, ModelConfig):  # also where it has been exported without what it predicts with
        config = config.encoder_alone()
    else:  # how its images are cut is told apart
        config = replace(
            config, mean=None, std=None, crop_pct=None, crop_mode="center", interpolation="bicubic"
        )
    return {"weights": weights_digest(model), "encoder": to_dict(config)}


def images_digest(source: Source) -> str:
    """A hash of the pixels of a few images from all over a source.

    Fingerprints of folders are of names, and 0001.jpg of one folder is another image than that of the next.
    """
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT, dtype=np.int64)).tolist():
        try:
            digest.update(source.read(number).contiguous().numpy().tobytes())
        except BadImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def _labels_digest(source: Source) -> str:
    """A hash of the classes of all images, which a list of the same files may state otherwise."""
    digest = hashlib.sha256("\n".join(source.class_names).encode())
    digest.update(source.labels.tobytes())
    return digest.hexdigest()[:16]


def weights_digest(model: EncoderModel) -> str:
    """A hash of the encoder's weights."""
    return digest_of(model.encoder)


def refuse_other_result(
    out: Path,
    result: str,
    identity: Mapping[str, Any],
    ours: Collection[str],
    *,
    begun: Sequence[str] = (),
    overwrite: bool = False,
) -> None:
    """Raise `ValueError` where `out` holds anything but this very result, whole or cut off.

    `result` is the name of the file in `out` that begins with the identity; `ours` are the names of
    everything that the evaluation may write there. A directory is not taken for ours by its name alone: the
    result must be there, or what matches a pattern of `begun`. To `overwrite`, another result will do.
    """
    found = {path.name for path in out.iterdir()} if out.is_dir() else set()
    known = {*ours, result}
    if result not in found and not any(path for pattern in begun for path in out.glob(pattern)):
        known = {name for name in known if not (out / name).is_dir()}
    if foreign := sorted(name for name in found - known if not name.startswith((".writing-", OUTPUT_MARK))):
        raise UsageError(f"{out} holds other files ({', '.join(foreign[:3])}); give another --out")
    if result not in found or overwrite:
        return
    different = differences(json.loads((out / result).read_text(encoding="utf-8")), identity)
    if different:
        raise UsageError(
            f"{out} holds another result ({'; '.join(different[:3])}); give another --out, or --overwrite"
        )


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, what of the identity `here` another one has not got, or has otherwise.

    Where model and images lie does not count: their digests and fingerprints say what they are.
    """
    old, new = flatten(there), flatten(json.loads(json.dumps(here)))
    if old.get("format_version") != new.get("format_version", old.get("format_version")):
        return ["written by another version of nextblock"]
    return [
        f"{name}: {old.get(name)} there, {value} here"
        for name, value in new.items()
        if old.get(name) != value and not _is_place(name)
    ]


def _is_place(name: str) -> bool:
    parts = name.split(".")
    if parts[0] == "settings":
        return parts[-1] in _PLACES
    return parts[0] == "sources" and parts[-1] == "spec"
