"""Names of many files: compact storage, kinds by extension, classes, and text for messages."""

from __future__ import annotations

import hashlib
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from nextblock.errors import UsageError
from nextblock.logs import counted

log = logging.getLogger(__name__)

# Endings of image files, in lower or upper case.
EXTENSIONS = b".avif .bmp .gif .heic .heif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()

# What to do about a folder that has no images, but such files.
_CONTAINERS = {
    ".tar": "name tars by X.tar or shards-{000..999}.tar, and unpack a tar of tars",
    ".parquet": "read a folder of parquet files as hf:DIR,split=train",
    ".zip": "name one zip by X.zip, or unpack them",
}


class Names:
    """Many names, concatenated in the bytes `joined`.

    A million paths as Python strings take 100 MB, and a forked worker that touches one copies its page.
    """

    def __init__(self, joined: bytes, lengths: np.ndarray) -> None:
        self.joined = joined
        self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        """Store a list of names."""
        return cls(b"".join(names), np.fromiter(map(len, names), dtype=np.int64, count=len(names)))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.joined[self._offsets[index] : self._offsets[index + 1]]

    def first_folders(self, spec: str) -> tuple[np.ndarray, tuple[str, ...]]:
        """Each path's first-level folder as a class number, int64 (n,), and the classes' names.

        Raises `ValueError`, which names the source `spec`, if a path has no folder.
        """
        folders: dict[bytes, int] = {}
        numbers = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):
            folder, slash, _ = self[index].partition(b"/")
            if not slash:
                problem = f"{text(folder)!r} is in no folder; put every image into a folder of its class"
                raise UsageError(f"{spec!r} has no labels: {problem}")
            numbers[index] = folders.setdefault(folder, len(folders))
        rank, classes = in_class_order([text(folder) for folder in folders])
        return rank[numbers], classes

    def digest(self, *more: np.ndarray) -> str:
        """A hash of all names, and of more numbers if given."""
        # Include the offsets: ("ab", "c") is not ("a", "bc"). This hash identifies runs, so use little-endian
        # int64, which is the same on every machine.
        digest = hashlib.blake2b(self._offsets.astype("<i8", copy=False).tobytes(), digest_size=16)
        digest.update(self.joined)
        for numbers in more:
            digest.update(numbers.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


def text(name: bytes) -> str:
    """Convert a name to printable text, with invalid UTF-8 and control characters escaped.

    Accents are in Unicode's composed form (NFC), whichever form the file system stores.
    """
    # Two forms of one accent must be one class and look the same in a message. Files are still opened by
    # their bytes.
    decoded = unicodedata.normalize("NFC", name.decode("utf-8", "backslashreplace"))
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def kind_of(path: bytes) -> str:
    """A file's kind by its name: "image", "hidden" (itself or a folder), or another extension."""
    if path.startswith(b".") or b"/." in path:
        return "hidden"
    start, dot, end = path.rpartition(b"/")[2].lower().rpartition(b".")
    if not start or not end:
        return "no extension"
    return "image" if dot + end in EXTENSIONS else text(dot + end)


def report_others(spec: str, num_images: int, others: Counter[str]) -> None:
    """Log the files of a source that are not images, by kind; raises `ValueError` if there is no image."""
    hidden, ignored = others.pop("hidden", 0), []
    if others:
        kinds = ", ".join(sorted(others, key=lambda kind: (-others[kind], kind))[:8])
        ignored.append(f"{counted(others.total(), 'file')}, none with an image's extension ({kinds})")
    if hidden:
        ignored.append(f"{hidden:,} hidden (beginning with a dot)")
    if not num_images:
        found = " and ".join(ignored) or "it is empty"
        remedy = f"an image's name ends in {b' '.join(EXTENSIONS).decode()}"
        remedy = next((how for kind, how in _CONTAINERS.items() if kind in others), remedy)
        raise UsageError(f"no images in {spec!r} and its folders: {found}; {remedy}")
    if ignored:
        level = logging.WARNING if ".tar" in others else logging.INFO
        log.log(level, "%s: %s; ignored %s", spec, counted(num_images, "image"), " and ".join(ignored))


def member_names(names: Sequence[bytes]) -> list[bytes]:
    """Convert names in an archive to relative paths, without a leading `/` or `./`."""
    # Some Windows tools write backslashes between folders. On Linux a backslash may be part of a name, so it
    # is a separator only if no name has a slash.
    if not any(b"/" in name for name in names):
        names = [name.replace(b"\\", b"/") for name in names]
    return [re.sub(rb"^(\.?/)+", b"", name) for name in names]


def in_class_order(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class number of each name, int64, and the names of the classes.

    Classes are sorted as numbers if all are numbers, else as text.
    """
    # As text, 10 comes before 9. Decimal compares exactly; as floats, long numbers could be equal.
    distinct = set(names)
    are_numbers = all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", name) for name in distinct)
    classes = sorted(distinct, key=lambda name: (Decimal(name) if are_numbers else 0, name))
    number = {name: position for position, name in enumerate(classes)}
    return np.array([number[name] for name in names], dtype=np.int64), tuple(classes)
