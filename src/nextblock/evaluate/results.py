"""The identity of a result: what it was made from, and how two results differ."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from nextblock.checkpoint import digest_of
from nextblock.config import DataConfig, ModelConfig
from nextblock.data import BadImageError, Source
from nextblock.models import EncoderModel
from nextblock.settings import flatten, to_dict

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
    "root",
    "only",
)
"""Settings that do not change a result."""

_PATHS = ("model", "train", "val", "test", "data", "features", "query")

CUT_SETTINGS = ("mean", "std", "channels", "val_resize_px", "val_crop", "decoder", "max_pixels")
"""Settings of images that decide the pixels an encoder sees, and which images can be read."""

FORMAT_VERSION = 2
SAMPLED = 8
"""Images of a source whose pixels are hashed to recognise it."""


def identity_of(
    config: Any, model: EncoderModel, data: DataConfig, sources: Mapping[str, Source]
) -> dict[str, Any]:
    """Everything that a result depends on, ready for JSON: equal identities give equal results.

    `config` is the verb's dataclass of settings; the keys of `sources` are purposes such as "train".
    """
    is_augmented = getattr(config, "augment", "none") != "none"
    return {
        "format_version": FORMAT_VERSION,
        "settings": {name: v for name, v in to_dict(config).items() if name not in FREE_SETTINGS},
        **encoder_of(model),
        # The flip matters only with augmentation.
        "images": {**cut_of(data), **({"flip": data.flip} if is_augmented else {})},
        "sources": {
            purpose: {
                "spec": source.spec,
                "fingerprint": source.fingerprint,
                "images": len(source),
                "sample": None if source.in_memory else images_digest(source),
                "labels": labels_digest(source) if source.has_labels else None,
            }
            for purpose, source in sources.items()
        },
    }


def cut_of(data: DataConfig) -> dict[str, Any]:
    """Settings that decide the pixels an encoder sees, ready for JSON."""
    cut = to_dict(data)
    return {name: cut[name] for name in CUT_SETTINGS}


def encoder_of(model: EncoderModel) -> dict[str, Any]:
    """Identity of an encoder, ready for JSON: its weights, and settings such as its attention."""
    config = model.config
    if isinstance(config, ModelConfig):  # exporting a model without its predictor keeps the identity
        config = config.encoder_alone()
    else:  # `cut_of` records how images are cut
        config = replace(
            config, mean=None, std=None, crop_pct=None, crop_mode="center", interpolation="bicubic"
        )
    return {"weights": digest_of(model.encoder), "encoder": to_dict(config)}


def images_digest(source: Source) -> str:
    """Hash the pixels of a few images spread over a source.

    A folder's fingerprint covers only names, and 0001.jpg in two folders may be two images.
    """
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, len(source) - 1, SAMPLED, dtype=np.int64)).tolist():
        try:
            digest.update(source.read(number).contiguous().numpy().tobytes())
        except BadImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def labels_digest(source: Source) -> str:
    """Hash the classes of all images, in which two lists of the same files may differ."""
    names = "\n".join(source.class_names).encode()
    return hashlib.sha256(names + source.labels.tobytes()).hexdigest()[:16]


def differences(stored: Mapping[str, Any], identity: Mapping[str, Any]) -> list[str]:
    """Describe each entry of `identity` that `stored` lacks, or has with another value.

    Paths of models and images are ignored: digests and fingerprints identify them.
    """
    old, new = flatten(stored), flatten(json.loads(json.dumps(identity)))
    if old.get("format_version") != new.get("format_version", old.get("format_version")):
        return ["written by another version of nextblock"]
    paths = re.compile(rf"settings\.(.*\.)?({'|'.join(_PATHS)})|sources\..*\.spec")
    return [
        f"{name}: {old.get(name)} there, {value} here"
        for name, value in new.items()
        if old.get(name) != value and not paths.fullmatch(name)
    ]
