"""Parts of a source: drawn by a seed, kept as a list of numbers, read back as `subset:LIST.txt`.

A list names the source it was drawn from, and that source's fingerprint, in lines that begin with `#`; then
come the numbers of its images, one a line, each followed by a tab and the image's name for people to read.
Where the source has moved since, `subset:LIST.txt,of=SPEC` says where it is now. Of a directory the list is
one of files instead, with their classes: `files:LIST.txt`.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from nextblock.atomic import write_aside
from nextblock.config import DataConfig
from nextblock.data.keyed import keyed_permutation
from nextblock.data.sources.base import SUBSET_HEADER, FolderSource, Labels, Source, open_source
from nextblock.data.sources.remote import is_remote

__all__ = ["SubsetSource", "absolute_spec", "draw", "draw_per_class", "open_subset", "split", "write_subset"]

log = logging.getLogger(__name__)

Numbers = Int64[np.ndarray, " n"]
"""Images of a source, ascending."""


# ------------------------------------------------------------------------------------------------ drawing


def draw(source: Source, count: int, seed: int) -> Numbers:
    """Draw `count` images without order; of one seed a smaller draw is part of every larger one."""
    if not 1 <= count <= len(source):
        raise ValueError(f"{count} of the {len(source)} images of {source.spec!r}; draw 1 to {len(source)}")
    return np.sort(_shuffled(source, seed)[:count])


def draw_per_class(source: Source, count: int, seed: int) -> Numbers:
    """Draw `count` images of every class; `ValueError` naming the classes that have fewer."""
    if count < 1:
        raise ValueError(f"{count} images per class; draw at least 1")
    labels = source.labels
    number = np.bincount(labels, minlength=len(source.class_names))
    short = [f"{name} ({n})" for name, n in zip(source.class_names, number, strict=True) if n < count]
    if short:
        more = f" and {len(short) - 5} more" if len(short) > 5 else ""
        raise ValueError(
            f"{source.spec!r} has classes of fewer than {count} images: {', '.join(short[:5])}{more}; draw "
            f"at most {number.min()} per class"
        )
    by_class, place = _by_class(source, seed)
    return np.sort(by_class[place < count])


def split(
    source: Source, parts: Mapping[str, float], seed: int, *, stratify: bool = False
) -> dict[str, Numbers]:
    """Divide the images into parts of the given shares, each image in one part at most.

    Every part has its share to within one image; with `stratify` also, to within two, of every class. Shares
    that sum to less than 1 leave the rest out.
    """
    if not parts or min(parts.values()) <= 0 or sum(parts.values()) > 1 + 1e-9:
        raise ValueError(
            f"the parts {dict(parts)} are no shares; each must be above 0, and all together at most 1"
        )
    order = _by_class(source, seed)[0] if stratify else _shuffled(source, seed)
    assigned = _deal(list(parts.values()), len(order))
    divided = {name: np.sort(order[assigned == number]) for number, name in enumerate(parts)}
    empty = [name for name, numbers in divided.items() if not len(numbers)]
    if empty:
        raise ValueError(
            f"of the {len(source)} images of {source.spec!r} none is left for {' and '.join(empty)}; make "
            "that part larger"
        )
    return divided


def _shuffled(source: Source, seed: int) -> np.ndarray:
    return keyed_permutation(seed, len(source), "data subset")


def _by_class(source: Source, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The images, shuffled, sorted by class, and the place of each within its class."""
    shuffled = _shuffled(source, seed)
    labels = source.labels[shuffled]
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(labels))])
    return shuffled[order], np.arange(len(order)) - starts[labels[order]]


def _deal(shares: Sequence[float], count: int) -> np.ndarray:
    """A part for each of `count` places, so that up to every place each part has about its share.

    Each place goes to the part that is the furthest behind, the first of equals; -1: to none of them.
    """
    rest = max(0.0, 1 - math.fsum(shares))
    wanted = np.array([*shares, rest])
    got = np.zeros(len(wanted))
    assigned = np.empty(count, dtype=np.int64)
    for place in range(count):
        part = int(np.argmax(wanted * (place + 1) - got - (wanted == 0)))
        got[part] += 1
        assigned[place] = part if part < len(shares) else -1
    return assigned


# -------------------------------------------------------------------------------------------------- lists


def write_subset(path: Path, source: Source, numbers: Numbers) -> str:
    """Write a list whole or not at all, of files for a directory; returns the spec that reads it."""
    if path.exists():
        raise ValueError(f"{path} is there already; remove it, or write to another file")
    lines = _file_lines(source, numbers) if isinstance(source, FolderSource) else None
    kind = "subset" if lines is None else "files"
    if lines is None:
        lines = [
            SUBSET_HEADER,
            os.fsencode(f"# of: {absolute_spec(source.spec)}"),
            f"# fingerprint: {source.fingerprint}".encode(),
            *(f"{number}\t{_plain(source.name(number))}".encode() for number in numbers.tolist()),
        ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}; name another file") from error
    with write_aside(path) as aside:
        aside.write_bytes(b"\n".join(lines) + b"\n")
    return f"{kind}:{path}"


def _file_lines(source: FolderSource, numbers: np.ndarray) -> list[bytes] | None:
    """Paths, with their classes where they have some; None where a line of text cannot hold them."""
    paths = [os.fsencode(source.path(number).absolute()) for number in numbers.tolist()]
    if any(byte in path for path in paths for byte in b"\t\n\r"):
        return None
    if not source.has_labels:
        return paths
    labels = source.labels[numbers]
    missing = set(range(len(source.class_names))) - set(labels.tolist())
    if missing:
        log.warning(
            "%d of the %d classes have no image in the list, which numbers its classes without them; draw "
            "more, or --per_class, or divide with --stratify",
            len(missing),
            len(source.class_names),
        )
    return [
        path + b"\t" + source.class_names[label].encode()
        for path, label in zip(paths, labels.tolist(), strict=True)
    ]


def absolute_spec(spec: str) -> str:
    """The same source, named so that any working directory will do; as it is where that is no matter."""
    if is_remote(spec):
        return spec
    kind, _, rest = spec.partition(":")
    if kind == "subset":
        path, comma, of = rest.partition(",of=")
        return f"subset:{_absolute(path)}{comma}{absolute_spec(of) if of else ''}"
    if kind == "files":
        return f"files:{_absolute(rest)}"
    if kind == "hf":
        name, comma, options = rest.partition(",")
        there = _absolute(name) if Path(name).expanduser().exists() else name
        return f"hf:{there}{comma}{options}"
    if kind == "torchvision":
        options = (option.partition("=") for option in rest.split(","))
        told = [
            f"root={_absolute(value)}" if key == "root" else key + sign + value
            for key, sign, value in options
        ]
        return f"torchvision:{','.join(told)}"
    if kind == "digits":
        return spec
    return _absolute(spec)


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def _plain(name: str) -> str:
    return " ".join(name.split())


def open_subset(spec: str, data: DataConfig) -> SubsetSource:
    """Open `subset:LIST.txt` or `subset:LIST.txt,of=SPEC`; everything after `of=` is the other source."""
    text, _, of = spec.removeprefix("subset:").partition(",of=")
    path = Path(text).expanduser()
    if not path.is_file():
        raise ValueError(f"{spec!r}: there is no list {str(path.absolute())!r}; write subset:LIST.txt")
    head, numbers = _read_list(spec, path)
    of = of or head.get("of", "")
    if not of:
        raise ValueError(f"{spec!r}: the list names no source; write subset:{text},of=SPEC")
    try:
        source = open_source(of, data)
    except ValueError as error:
        raise ValueError(
            f"{spec!r}: the source that the list {str(path)!r} is of cannot be opened: {error}; where it "
            f"lies elsewhere now, write subset:{text},of=SPEC"
        ) from error
    return SubsetSource(spec, source, numbers, head.get("fingerprint"))


def _read_list(spec: str, path: Path) -> tuple[dict[str, str], np.ndarray]:
    head: dict[str, str] = {}
    numbers = []
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if line.startswith("#"):
            key, _, value = line[1:].partition(":")
            head[key.strip()] = value.strip()
            continue
        number = line.partition("\t")[0].strip()
        if number and not number.isdecimal():
            raise ValueError(
                f"{spec!r}: line {place} of the list begins with {number[:40]!r}, not with the number of an "
                "image; a list of paths is read as files:LIST.txt"
            )
        if number:
            numbers.append(int(number))
    if not numbers:
        raise ValueError(f"{spec!r}: the list names no image")
    return head, np.array(numbers, dtype=np.int64)


class SubsetSource(Source):
    """Some images of another source, in the order of `numbers`; classes keep their numbers and names."""

    def __init__(self, spec: str, of: Source, numbers: np.ndarray, fingerprint: str | None = None) -> None:
        if fingerprint is not None and fingerprint != of.fingerprint:
            raise ValueError(
                f"{spec!r}: {of.spec!r} is not what the list was drawn from (fingerprint {of.fingerprint}, "
                f"not {fingerprint}); give the source as it was by of=SPEC, or draw the list again"
            )
        if numbers.max() >= len(of):
            raise ValueError(
                f"{spec!r}: the list names image {numbers.max()}, and {of.spec!r} has {len(of)}, from 0"
            )
        if len(np.unique(numbers)) < len(numbers):
            raise ValueError(f"{spec!r}: the list names an image twice; name each once")
        self.spec = spec
        self.of = of
        self.in_memory = of.in_memory
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @property
    def has_labels(self) -> bool:
        """Whether the other source has labels."""
        return self.of.has_labels

    def content(self, index: int) -> bytes | None:
        """The encoded file, as the other source has it."""
        self._check(index)
        return self.of.content(int(self._numbers[index]))

    def _read(self, index: int) -> Tensor:
        return self.of.read(int(self._numbers[index]))

    def _name(self, index: int) -> str:
        return self.of.name(int(self._numbers[index]))

    def _find_labels(self) -> Labels:
        return self.of.labels[self._numbers], self.of.class_names

    def _make_fingerprint(self) -> str:
        digest = hashlib.blake2b(self.of.fingerprint.encode(), digest_size=16)
        digest.update(self._numbers.astype("<i8").tobytes())
        return f"subset-{len(self)}-{digest.hexdigest()}"
