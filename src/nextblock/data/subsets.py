"""Subsets of a source: drawn by a seed, split into parts, and written as a list.

Images that are files are listed by path and class (`files:LIST.txt`), others by number, below the source's
name and fingerprint (`subset:LIST.txt`).
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

from nextblock.atomic import make_directory, write_aside, writing
from nextblock.data.random import keyed_permutation
from nextblock.data.sources import Source, absolute_spec
from nextblock.data.sources.base import text
from nextblock.data.sources.folder import SUBSET_HEADER
from nextblock.errors import UsageError
from nextblock.logs import counted

log = logging.getLogger(__name__)

# Images of a source, ascending.
Numbers = Int64[np.ndarray, " n"]

_CONTROL = re.compile(rb"[\x00-\x1f\x7f]")


def draw(source: Source, count: int, seed: int) -> Numbers:
    """Draw `count` images; with equal seeds, larger draws contain smaller ones."""
    if not 1 <= count <= len(source):
        raise UsageError(f"cannot draw {count} of {counted(len(source), 'image')} of {source.spec!r}")
    # Always a prefix of one shuffled order, so that draws of one seed contain each other.
    return np.sort(_shuffled(source, seed)[:count])


def draw_per_class(source: Source, count: int, seed: int) -> Numbers:
    """Draw `count` images of every class; `ValueError` names the classes that have fewer."""
    if count < 1:
        raise UsageError(f"cannot draw {count} images per class; draw at least 1")
    classes = _by_class(source, seed)
    sizes = [len(images) for images in classes]
    # A subset keeps the classes of its source, also those of which it has no image.
    named_sizes = zip(source.class_names, sizes, strict=True)
    small = [f"{name} ({size})" for name, size in named_sizes if 0 < size < count]
    if small:
        raise UsageError(
            f"{source.spec!r} has classes of fewer than {count} images: {named(small)}; draw at most "
            f"{min(filter(None, sizes))} per class"
        )
    return np.sort(np.concatenate([images[:count] for images in classes]))


def split(
    source: Source, parts: Mapping[str, float], seed: int, *, stratify: bool = False
) -> dict[str, Numbers]:
    """Split the images into parts of the given shares; each image is in at most one part.

    Every part has its share to within one image, and with `stratify` to within two of every class. Then each
    of several parts also has an image of every class, if the class has enough. Shares that sum to less than 1
    leave the rest out.
    """
    if not parts or min(parts.values()) <= 0 or sum(parts.values()) > 1 + 1e-9:
        raise UsageError(f"the shares {dict(parts)} must each be above 0, and add up to at most 1")
    # The last share is that of the images left out, which are dealt like a part.
    shares = np.array([*parts.values(), max(0.0, 1 - math.fsum(parts.values()))])
    classes = _by_class(source, seed) if stratify else [_shuffled(source, seed)]
    # One deal runs through all classes, so the next class makes up for rounding in the one before.
    part_of = _deal(shares, len(source))
    # For a single part (1 % of the labels, say) only the share counts.
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
    """The images of each class, shuffled."""
    # A stable sort by class keeps the shuffled order within each class.
    shuffled = _shuffled(source, seed)
    labels = source.labels[shuffled]
    sizes = np.bincount(labels, minlength=len(source.class_names))
    return np.split(shuffled[np.argsort(labels, kind="stable")], np.cumsum(sizes)[:-1])


def _deal(shares: np.ndarray, count: int) -> np.ndarray:
    """Assign a part to each of `count` places; the last share is of those left out."""
    # Each place goes to the part that is furthest behind its share, the first in a tie. So every part has
    # its share to within one in any prefix, and to within two in any range of places.
    got = np.zeros(len(shares))
    part_of = np.empty(count, dtype=np.int64)
    for place in range(count):
        part = int(np.argmax(shares * (place + 1) - got - (shares == 0)))
        got[part] += 1
        part_of[place] = part
    return part_of


def _give_to_empty(part_of: np.ndarray, shares: np.ndarray) -> None:
    """Move single images of a class, in place, so that every part has one if there are enough."""
    num_parts = len(shares) - 1
    for part in range(num_parts):
        counts = np.bincount(part_of, minlength=len(shares))
        # The part furthest above its share gives its last image, but never its only one. If there is an image
        # per part, one can always give: some part has two, or an image is left out.
        can_give = counts >= [2] * num_parts + [1]
        if len(part_of) >= num_parts and counts[part] == 0:
            giver = np.argmax(np.where(can_give, counts - shares * len(part_of), -np.inf))
            part_of[np.flatnonzero(part_of == giver)[-1]] = part


def named(names: Sequence[str], most: int = 10) -> str:
    """Join the first `most` names in one line."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def warn_of_absent_classes(place: str, source: Source, numbers: Numbers) -> None:
    """Warn about classes without an image among `numbers`, which are the images of `place`."""
    if not source.has_labels:
        return
    present = set(source.labels[numbers].tolist())
    absent = [name for label, name in enumerate(source.class_names) if label not in present]
    absent += source.empty_classes()
    if absent:
        log.warning("%s: no image of %s: %s", place, counted(len(absent), "class", "classes"), named(absent))


def write_subsets(source: Source, lists: Mapping[Path, Numbers]) -> list[str]:
    """Write lists of images, each whole or not at all; returns the specs that read them.

    Raises `ValueError` if one of the files exists with other content, before anything is written.
    """
    described = {path: _describe(path, source, numbers) for path, numbers in lists.items()}
    missing = {path: content for path, (content, _) in described.items() if not _is_written(path, content)}
    for path, content in missing.items():
        _write_new(path, content)
    for path, numbers in lists.items():
        warn_of_absent_classes(text(os.fsencode(path)), source, numbers)
    return [spec for _, spec in described.values()]


def _describe(path: Path, source: Source, numbers: Numbers) -> tuple[bytes, str]:
    """The content of a list, and the spec that reads it."""
    lines, spec = _file_lines(source, numbers), f"files:{path}"
    if lines is None:
        of, spec = absolute_spec(source.spec), f"subset:{path}"
        # The head of a list has lines of text; an unprintable path goes into the spec instead.
        head = [f"# of: {of}"] if of.isprintable() else []
        spec += "" if head else f",of={of}"
        head.append(f"# fingerprint: {source.fingerprint}")
        rows = [f"{number}\t{source.name(number)}" for number in numbers.tolist()]
        lines = [SUBSET_HEADER, *(line.encode() for line in head + rows)]
    return b"\n".join(lines) + b"\n", spec


def _is_written(path: Path, content: bytes) -> bool:
    """Whether the same command has written the list before; `ValueError` if the file is another."""
    if path.is_file() and path.read_bytes() == content:
        return True
    if path.exists() or path.is_symlink():
        raise UsageError(f"{text(os.fsencode(path))} exists already; remove it, or write to another file")
    return False


def _write_new(path: Path, content: bytes) -> None:
    """Write a file unless there is one, even if another process has just written it."""
    make_directory(path.parent)
    with writing(path):
        try:
            # Only one of several processes creates the file. The list then replaces the empty file, whole.
            path.touch(exist_ok=False)
        except FileExistsError:
            _is_written(path, content)
            return
    try:
        with write_aside(path) as aside:
            aside.write_bytes(content)
    except BaseException:
        path.unlink()
        raise


def _file_lines(source: Source, numbers: Numbers) -> list[bytes] | None:
    """Paths, with classes if there are any; None if images are not files, or do not fit in a line."""
    lines = []
    for number in numbers.tolist():
        path = source.path(number)
        label = source.class_names[source.labels[number]] if source.has_labels else ""
        # Reading a list strips spaces around a class, and control characters would end a line or a path.
        if path is None or label != label.strip() or _CONTROL.search(line := os.fsencode(path.absolute())):
            return None
        lines.append(line + (b"\t" + label.encode() if source.has_labels else b""))
    return lines
