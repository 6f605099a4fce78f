"""Some images of a source: drawn by a seed, divided into parts, and written as a list.

Images that are files are listed by path and class (`files:LIST.txt`). Others are listed by number, below the
source's name and fingerprint (`subset:LIST.txt`).
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from nextblock.atomic import WriteError, write_aside
from nextblock.data.random import keyed_permutation
from nextblock.data.sources import Source, absolute_spec
from nextblock.data.sources.folder import SUBSET_HEADER
from nextblock.data.sources.names import text
from nextblock.errors import UsageError
from nextblock.logs import counted

log = logging.getLogger(__name__)

# Images of a source, ascending.
Numbers = Int64[np.ndarray, " n"]

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


def draw(source: Source, count: int, seed: int) -> Numbers:
    """Draw `count` images; with equal seeds, a smaller draw is part of every larger one."""
    if not 1 <= count <= len(source):
        raise UsageError(f"cannot draw {count} of {counted(len(source), 'image')} of {source.spec!r}")
    # The first of one shuffled order, whatever the count: that makes draws of one seed parts of each other.
    return np.sort(_shuffled(source, seed)[:count])


def draw_per_class(source: Source, count: int, seed: int) -> Numbers:
    """Draw `count` images of every class; `ValueError` names the classes that have fewer."""
    if count < 1:
        raise UsageError(f"cannot draw {count} images per class; draw at least 1")
    classes = _by_class(source, seed)
    sizes = [len(images) for images in classes]
    small = [f"{name} ({size})" for name, size in zip(source.class_names, sizes, strict=True) if size < count]
    if small:
        raise UsageError(
            f"{source.spec!r} has classes of fewer than {count} images: {named(small)}; draw at most "
            f"{min(sizes)} per class"
        )
    return np.sort(np.concatenate([images[:count] for images in classes]))


def split(
    source: Source, parts: Mapping[str, float], seed: int, *, stratify: bool = False
) -> dict[str, Numbers]:
    """Divide the images into parts of the given shares, each image in one part at most.

    Every part has its share to within one image. With `stratify` it has it to within two of every class, and
    of several parts each has at least one image of every class with as many images as there are parts. Shares
    that sum to less than 1 leave the rest out.
    """
    if not parts or min(parts.values()) <= 0 or sum(parts.values()) > 1 + 1e-9:
        raise UsageError(f"the shares {dict(parts)} must each be above 0, and add up to at most 1")
    # A last share stands for the images that are left out: they are dealt like a part.
    shares = np.array([*parts.values(), max(0.0, 1 - math.fsum(parts.values()))])
    classes = _by_class(source, seed) if stratify else [_shuffled(source, seed)]
    # One deal runs through all classes, so rounding in one class is made up for in the next.
    part_of = _deal(shares, len(source))
    # Of a single part (1 % of the labels, say) the share is what counts.
    if stratify and len(parts) > 1:
        for in_class in np.split(part_of, np.cumsum([len(images) for images in classes])[:-1]):
            _give_to_empty(in_class, shares)
        pairs = zip(source.class_names, map(len, classes), strict=True)
        small = [f"{name} ({size})" for name, size in pairs if 0 < size < len(parts)]
        if small:
            log.warning(
                "%s: %d classes have fewer images than the %d parts, and are missing from some: %s",
                *(source.spec, len(small), len(parts), named(small)),
            )
    order = np.concatenate(classes)
    divided = {name: np.sort(order[part_of == number]) for number, name in enumerate(parts)}
    empty = [name for name, numbers in divided.items() if not len(numbers)]
    if empty:
        raise UsageError(f"no image of {source.spec!r} is left for {', '.join(empty)}; give larger shares")
    return divided


def _shuffled(source: Source, seed: int) -> np.ndarray:
    return keyed_permutation(seed, len(source), "data subset")


def _by_class(source: Source, seed: int) -> list[np.ndarray]:
    """The images of every class, shuffled."""
    # A stable sort by class keeps the shuffled order within each class.
    shuffled = _shuffled(source, seed)
    labels = source.labels[shuffled]
    sizes = np.bincount(labels, minlength=len(source.class_names))
    return np.split(shuffled[np.argsort(labels, kind="stable")], np.cumsum(sizes)[:-1])


def _deal(shares: np.ndarray, count: int) -> np.ndarray:
    """A part for each of `count` places; the last share is of those left out."""
    # Each place goes to the part that is furthest behind its share, the first of equal ones. So every part
    # has its share of the places before any place to within one, and of those between two to within two.
    got = np.zeros(len(shares))
    part_of = np.empty(count, dtype=np.int64)
    for place in range(count):
        part = int(np.argmax(shares * (place + 1) - got - (shares == 0)))
        got[part] += 1
        part_of[place] = part
    return part_of


def _give_to_empty(part_of: np.ndarray, shares: np.ndarray) -> None:
    """Move single images, in place, so that every part has one of a class that has enough of them."""
    num_parts = len(shares) - 1
    for part in range(num_parts):
        counts = np.bincount(part_of, minlength=len(shares))
        # Whoever is furthest above its share gives its last image, but no part its only one. With as many
        # images as parts there is always one who can: some part has two, or an image is left out.
        can_give = counts >= [2] * num_parts + [1]
        if len(part_of) >= num_parts and counts[part] == 0:
            giver = np.argmax(np.where(can_give, counts - shares * len(part_of), -np.inf))
            part_of[np.flatnonzero(part_of == giver)[-1]] = part


def named(names: Sequence[str], most: int = 10) -> str:
    """Names in one line, the first `most` of them."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def warn_of_absent_classes(place: str, source: Source, numbers: Numbers) -> None:
    """Name the classes of which `place` holds no image; `numbers` are the images that it holds."""
    if not source.has_labels:
        return
    found = set(source.labels[numbers].tolist())
    absent = [name for label, name in enumerate(source.class_names) if label not in found]
    absent += source.empty_classes()
    if absent:
        log.warning("%s: no image of %d classes: %s", place, len(absent), named(absent))


def write_subset(path: Path, source: Source, numbers: Numbers) -> str:
    """Write a list of images, whole or not at all; returns the spec that reads it.

    `ValueError` if there is another file of that name, also if another process has just written it.
    """
    shown = text(os.fsencode(path))
    warn_of_absent_classes(shown, source, numbers)
    lines, spec = _file_lines(source, numbers), f"files:{path}"
    if lines is None:
        of, spec = absolute_spec(source.spec), f"subset:{path}"
        # The head of a list holds a line of text; a path that is none is given with the spec instead.
        head = [f"# of: {of}"] if of.isprintable() else []
        spec += "" if head else f",of={of}"
        head.append(f"# fingerprint: {source.fingerprint}")
        rows = [f"{number}\t{source.name(number)}" for number in numbers.tolist()]
        lines = [SUBSET_HEADER, *(line.encode() for line in head + rows)]
    content = b"\n".join(lines) + b"\n"
    if path.is_file() and path.read_bytes() == content:  # the same command, repeated
        return spec
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes, one gets the name. The list then replaces the empty file, whole.
        path.touch(exist_ok=False)
    except FileExistsError as error:
        raise UsageError(f"{shown} exists already; remove it, or write to another file") from error
    except OSError as error:
        raise WriteError(f"cannot write {shown}: {error.strerror}; choose another place") from error
    try:
        with write_aside(path) as aside:
            aside.write_bytes(content)
    except BaseException:
        path.unlink()
        raise
    return spec


def _file_lines(source: Source, numbers: Numbers) -> list[bytes] | None:
    """Paths, with classes if there are any; None if images are not files, or a line cannot hold one."""
    lines = []
    for number in numbers.tolist():
        path = source.path(number)
        label = source.class_names[source.labels[number]] if source.has_labels else ""
        # Spaces around a class are lost when the list is read, and control characters end a line or a path.
        if path is None or label != label.strip() or _CONTROL.search(line := os.fsencode(path.absolute())):
            return None
        lines.append(line + (b"\t" + label.encode() if source.has_labels else b""))
    return lines
