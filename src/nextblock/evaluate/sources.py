"""Labelled sources of an evaluation: opened together, of the same classes; and parts of one held out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np
from jaxtyping import Int64

from nextblock.config import DataConfig
from nextblock.data import Source, open_source
from nextblock.data.random import keyed_permutation
from nextblock.errors import UsageError
from nextblock.evaluate.features import check_same_classes
from nextblock.evaluate.results import images_digest
from nextblock.evaluate.unreadable import Part

__all__ = ["are_same_images", "check_classes", "hold_out", "hold_out_test", "open_labelled", "part_of"]

log = logging.getLogger(__name__)


K = TypeVar("K", bound=str)


def open_labelled(
    train: str, others: Mapping[K, str | None], data: DataConfig, *, advice: str = ""
) -> tuple[Source, dict[K, Source]]:
    """Open what is learned from, and by what they serve for the others that are given.

    Warns of those that are the images of train, and gives the advice. Raises `ValueError` as `check_classes`
    does.
    """
    source = open_source(train, data)
    opened = {purpose: open_source(spec, data) for purpose, spec in others.items() if spec is not None}
    check_classes(source, opened.values())
    for purpose, other in opened.items():
        if are_same_images(source, other):
            log.warning(
                "%s %s is the same images as train: accuracy on them says nothing of new images%s",
                purpose,
                other.spec,
                advice and f"; {advice}",
            )
    return source, opened


def are_same_images(one: Source, other: Source) -> bool:
    """Whether two sources have the same images in the same order: by their names and a look at a few."""
    if one.fingerprint != other.fingerprint:
        return False
    return one.spec == other.spec or images_digest(one) == images_digest(other)


def check_classes(train: Source, others: Iterable[Source]) -> None:
    """Raise `ValueError` where a source has no labels, train has one class only, or the classes differ."""
    names = train.class_names
    if len(names) == 1:
        raise UsageError(
            f"{train.spec} has one class only ({''.join(names)}), so there is nothing to tell apart; give "
            "images of two classes or more"
        )
    for other in others:
        check_same_classes(train, other)


def hold_out_test(train: Source, seed: int) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """A tenth of every class to measure on, where no other images were given: (kept, held out)."""
    kept, held = hold_out(train.labels, seed)
    log.info(
        "neither val nor test was given: %d of %d images of %s are held out, a tenth of every class",
        len(held),
        len(train),
        train.spec,
    )
    return kept, held


def part_of(source: Source, numbers: Int64[np.ndarray, " n"]) -> Part:
    """Some images of a source, as a source; `ValueError` where there are none."""
    if not len(numbers):
        raise UsageError(
            f"no class of {source.spec} has an image to spare, so none can be held out; give --val and --test"
        )
    return Part(source.spec, source, numbers)


def hold_out(
    labels: Int64[np.ndarray, " n"], seed: int, *, share: float = 0.1
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """Split indices into (kept, held out): of each class this share, at least one image if it has two."""
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = keyed_permutation(seed, len(members), "hold-out", int(label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[order[:count]])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
