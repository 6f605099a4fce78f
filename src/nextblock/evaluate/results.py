"""A directory that holds one result: what it was made from, and the refusal to overwrite another one."""

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
    is_augmented = getattr(config, "augment", "none") != "none"
    return {
        "format_version": FORMAT_VERSION,
        "settings": {name: v for name, v in to_dict(config).items() if name not in FREE_SETTINGS},
        **encoder_of(model),
        # A flip matters only if training images are varied.
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
    """What tells the pixels that an encoder sees of an image, ready for JSON."""
    cut = to_dict(data)
    return {name: cut[name] for name in CUT_SETTINGS}


def encoder_of(model: EncoderModel) -> dict[str, Any]:
    """What makes an encoder what it is, ready for JSON: the same weights with other attention are another."""
    config = model.config
    if isinstance(config, ModelConfig):  # the same if it was exported without what it predicts with
        config = config.encoder_alone()
    else:  # how its images are cut is recorded apart
        config = replace(
            config, mean=None, std=None, crop_pct=None, crop_mode="center", interpolation="bicubic"
        )
    return {"weights": digest_of(model.encoder), "encoder": to_dict(config)}


def images_digest(source: Source) -> str:
    """A hash of the pixels of a few images from all over a source.

    The fingerprint of a folder covers names alone, and 0001.jpg of two folders may be two images.
    """
    digest = hashlib.sha256()
    for number in np.unique(np.linspace(0, len(source) - 1, LOOKED_AT, dtype=np.int64)).tolist():
        try:
            digest.update(source.read(number).contiguous().numpy().tobytes())
        except BadImageError as error:
            digest.update(str(error).encode())
    return digest.hexdigest()[:16]


def labels_digest(source: Source) -> str:
    """A hash of the classes of all images: two lists of the same files may differ in them."""
    names = "\n".join(source.class_names).encode()
    return hashlib.sha256(names + source.labels.tobytes()).hexdigest()[:16]


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """In words, what of the identity `here` another one lacks, or has with another value.

    Paths of model and images do not count: digests and fingerprints identify them.
    """
    old, new = flatten(there), flatten(json.loads(json.dumps(here)))
    if old.get("format_version") != new.get("format_version", old.get("format_version")):
        return ["written by another version of nextblock"]
    places = re.compile(rf"settings\.(.*\.)?({'|'.join(_PLACES)})|sources\..*\.spec")
    return [
        f"{name}: {old.get(name)} there, {value} here"
        for name, value in new.items()
        if old.get(name) != value and not places.fullmatch(name)
    ]
