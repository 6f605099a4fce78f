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
from nextblock.data.subsets import named
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
    notes: tuple[str, ...] = ()
    """Sentences on images that are in other sources too, and on classes of train without images here."""


def open_labelled(specs: Mapping[str, str | None], data: DataConfig) -> dict[str, Labelled]:
    """Open the given sources by purpose, "train" first; warn about images that two sources share.

    Raises `UsageError` if a source has no labels, if train has a single class, or if another source has a
    class that train lacks.
    """
    sources = {purpose: open_source(spec, data) for purpose, spec in specs.items() if spec is not None}
    train = sources["train"].spec
    names = sources["train"].class_names
    if len(names) == 1:
        raise UsageError(f"{train} has only one class ({names[0]}); give images of at least two classes")
    labelled: dict[str, Labelled] = {}
    for purpose, source in sources.items():
        labels, unknown = match_classes(source, names)
        if unknown:
            raise UsageError(
                f"{source.spec} has {count_classes(unknown)} that {train} lacks: {named(unknown, 5)}; remove "
                "these images, or add some to train"
            )
        notes = []
        for other in labelled:
            shared = shared_images(sources[other], source)
            if shared is not None:
                compared = f"{len(shared.pairs)} of {counted(shared.num_compared, 'image')} compared"
                notes.append(
                    f"{compared if shared.pairs else 'all images'} of {purpose} {source.spec} are also in "
                    f"{other}: accuracy on them says nothing about new images."
                )
                warn_once(notes[-1])
        missing = [names[number] for number in np.setdiff1d(np.arange(len(names)), labels)]
        if missing:
            notes.append(
                f"{source.spec} has no image of {count_classes(missing)} of train: {named(missing, 8)}"
            )
        labelled[purpose] = Labelled(source, labels, tuple(notes))
    return labelled


def match_classes(source: Source, names: Sequence[str]) -> tuple[Int64[np.ndarray, " n"], list[str]]:
    """Labels of a source as indices of `names`, and its classes with images that `names` lack (label -1)."""
    numbers = {name: number for number, name in enumerate(names)}
    labels = np.array([numbers.get(name, -1) for name in source.class_names], dtype=np.int64)[source.labels]
    unknown = np.unique(source.labels[labels < 0])
    return labels, [source.class_names[number] for number in unknown]


def count_classes(names: Sequence[str]) -> str:
    """Format the number of some classes."""
    return counted(len(names), "class", "classes")


def classifier_labels(
    source: Source, names: Sequence[str] | None, num_classes: int, names_file: str | None = None
) -> Int64[np.ndarray, " n"]:
    """Labels of a source as indices of a classifier's classes, matched by name if the names are known.

    `names_file` lists the names of the classifier's classes, one per line. Raises `UsageError` if the classes
    cannot be matched.
    """
    if names_file is not None:
        require(Path(names_file).is_file(), f"classes: {names_file} is not a file; give one name per line")
        lines = Path(names_file).read_text(encoding="utf-8").split("\n")
        names = [line.strip() for line in lines if line.strip()]
        require(
            len(names) == num_classes,
            f"{names_file} has {counted(len(names), 'name')}, the classifier {num_classes} classes; "
            f"{AS_LOGITS}",
        )
    if names is None:
        require(
            len(source.class_names) == num_classes,
            f"{source.spec} has {count_classes(source.class_names)}, the classifier {num_classes} without "
            f"names; {AS_LOGITS}",
        )
        return source.labels
    labels, unknown = match_classes(source, names)
    require(
        not unknown,
        f"the classifier does not know {count_classes(unknown)} of {source.spec}: {named(unknown, 5)}; "
        f"{AS_LOGITS}",
    )
    return labels


def source_notes(labelled: Mapping[str, Labelled]) -> list[str]:
    """The notes of all sources."""
    return [note for split in labelled.values() for note in split.notes]


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
