"""Labelled sources of an evaluation: match classes by name, find overlaps, hold images out.

In every command, heads learn from `train` and are measured on `test`; `val` only serves to choose.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from nextblock.config import DataConfig
from nextblock.data import Source, open_source
from nextblock.data.doctor import shared_images
from nextblock.data.random import keyed_permutation
from nextblock.errors import UsageError
from nextblock.logs import counted
from nextblock.settings import require

log = logging.getLogger(__name__)
warn_once = cache(log.warning)
"""A command may open its sources several times, and should warn once."""

AS_LOGITS = "name its classes like the images' folders, one per line, in logit order: --classes FILE"


class Labelled(NamedTuple):
    """A source, and its labels as indices of train's classes."""

    source: Source
    labels: Int64[np.ndarray, " n"]
    missing: tuple[str, ...] = ()
    """Classes of train that have no image here."""
    overlaps: tuple[str, ...] = ()
    """Sentences about images that are also in other sources."""


def open_labelled(specs: Mapping[str, str | None], data: DataConfig) -> dict[str, Labelled]:
    """Open the given sources by purpose, "train" first; warn about images that two sources share.

    Raises `UsageError` if a source has no labels, if train has a single class, or if another source has a
    class that train lacks.
    """
    sources = {purpose: open_source(spec, data) for purpose, spec in specs.items() if spec is not None}
    train = sources["train"]
    names = train.class_names
    if len(names) == 1:
        raise UsageError(f"{train.spec} has only one class ({names[0]}); give images of at least two classes")
    labelled = {purpose: _matched(train, source) for purpose, source in sources.items()}
    purposes = list(sources)
    for i, purpose in enumerate(purposes):
        for other in purposes[:i]:
            shared = shared_images(sources[other], sources[purpose])
            if shared is not None:
                which = (
                    f"{len(shared.pairs)} of {counted(shared.num_compared, 'image')} compared"
                    if shared.pairs
                    else "all images"
                )
                note = (
                    f"{which} of {purpose} {sources[purpose].spec} are also in {other}: accuracy on them "
                    "says nothing about new images."
                )
                warn_once(note)
                labelled[purpose] = labelled[purpose]._replace(overlaps=(*labelled[purpose].overlaps, note))
    return labelled


def _matched(train: Source, other: Source) -> Labelled:
    """Match the classes of a source to those of train by name."""
    numbers = {name: number for number, name in enumerate(train.class_names)}
    present = [other.class_names[number] for number in np.unique(other.labels)]
    unknown = [name for name in present if name not in numbers]
    if unknown:
        some = ", ".join(unknown[:5]) + (", …" if len(unknown) > 5 else "")
        raise UsageError(
            f"{other.spec} has {counted(len(unknown), 'class', 'classes')} that {train.spec} lacks: {some}; "
            "remove these images, or add some to train"
        )
    to_train = np.array([numbers.get(name, -1) for name in other.class_names], dtype=np.int64)
    with_images = set(present)
    return Labelled(other, to_train[other.labels], tuple(name for name in numbers if name not in with_images))


def numbered(
    source: Source, names: Sequence[str] | None, num_classes: int, names_file: str | None = None
) -> Int64[np.ndarray, " n"]:
    """Labels of a source as indices of a classifier's classes, matched by name if the names are known.

    `names_file` lists the names of the classifier's classes, one per line. Raises `UsageError` if the classes
    cannot be matched.
    """
    if names_file is not None:
        require(Path(names_file).is_file(), f"classes: {names_file} is not a file; give one name per line")
        names = Path(names_file).read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
        if len(names) != num_classes:
            raise UsageError(
                f"{names_file} has {counted(len(names), 'name')}, the classifier "
                f"{counted(num_classes, 'class', 'classes')}; {AS_LOGITS}"
            )
    if names is None:
        if len(source.class_names) != num_classes:
            raise UsageError(
                f"{source.spec} has {counted(len(source.class_names), 'class', 'classes')}, the classifier "
                f"{num_classes} without names; {AS_LOGITS}"
            )
        return source.labels
    numbers = {name: number for number, name in enumerate(names)}
    unknown = [name for name in source.class_names if name not in numbers]
    if unknown:
        raise UsageError(
            f"the classifier does not know {counted(len(unknown), 'class', 'classes')} of {source.spec}: "
            f"{', '.join(unknown[:5])}{', …' * (len(unknown) > 5)}; {AS_LOGITS}"
        )
    return np.array([numbers[name] for name in source.class_names], dtype=np.int64)[source.labels]


def source_notes(labelled: Mapping[str, Labelled]) -> list[str]:
    """Sentences about images in two sources, and about classes of train without images in another source."""
    return [note for split in labelled.values() for note in split.overlaps] + [
        f"{split.source.spec} has no image of {counted(len(split.missing), 'class', 'classes')} of train: "
        + ", ".join(split.missing[:8])
        + (", …" if len(split.missing) > 8 else "")
        for split in labelled.values()
        if split.missing
    ]


def hold_out(
    labels: Int64[np.ndarray, " n"], seed: int, *, share: float = 0.1
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """Split indices into (kept, held out); hold out this share of each class, at least one of two images."""
    held = [np.empty(0, dtype=np.int64)]
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = keyed_permutation(seed, len(members), "hold-out", int(label))
        number = min(max(1, round(share * len(members))), len(members) - 1)  # a single image is kept
        held.append(members[order[:number]])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
