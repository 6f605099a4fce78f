"""Names of many files: kept small in memory, told apart by extension, turned into classes and messages."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

__all__ = [
    "EXTENSIONS",
    "Names",
    "describe_others",
    "extension",
    "in_class_order",
    "is_image",
    "kind_of_other",
    "member_names",
    "text",
]

# Endings of image files, in small or capital letters.
EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
        *(".avif", ".heic", ".heif"),
    )
)
_ENDINGS = frozenset(name.encode() for name in EXTENSIONS)


class Names:
    """Many names in one array of bytes.

    A million paths as Python strings take 100 MB, and a forked worker that touches one copies its page.
    """

    def __init__(self, names: Sequence[bytes]) -> None:
        self.joined = b"".join(names)
        self._set_lengths(np.fromiter(map(len, names), dtype=np.int64, count=len(names)))

    @classmethod
    def from_joined(cls, joined: bytes, lengths: np.ndarray) -> Names:
        """The names that lie one behind the other in `joined`."""
        names = cls(())
        names.joined = joined
        names._set_lengths(lengths)
        return names

    def _set_lengths(self, lengths: np.ndarray) -> None:
        self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.joined[self._offsets[index] : self._offsets[index + 1]]

    def number_in_root(self) -> int:
        """How many names lie in no folder."""
        # A name lies in a folder if there is a slash between its first byte and its last: then the number of
        # slashes before its end differs from that before its start.
        slashes = np.flatnonzero(np.frombuffer(self.joined, dtype=np.uint8) == ord("/"))
        before = np.searchsorted(slashes, self._offsets)
        return int(np.count_nonzero(before[1:] == before[:-1]))

    def first_folders(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """Each path's first-level folder as a class number, int64 (n,), and the classes' names."""
        folders: dict[bytes, int] = {}
        numbers = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):
            numbers[index] = folders.setdefault(self[index].partition(b"/")[0], len(folders))
        rank, classes = in_class_order([text(folder) for folder in folders])
        return rank[numbers], classes

    def digest(self, *more: np.ndarray) -> str:
        """A hash of all names, and of further numbers if given."""
        digest = hashlib.blake2b(self._offsets.astype("<i8", copy=False).tobytes(), digest_size=16)
        digest.update(self.joined)
        for numbers in more:
            digest.update(numbers.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


def text(name: bytes) -> str:
    """A name as printable text: bytes that are no UTF-8 and control characters appear escaped.

    Accents come in Unicode's composed form (NFC), whichever form the file system stores.
    """
    # Two forms of one accent must be one class and look the same in a message; names are compared as text,
    # while files are opened by their bytes.
    decoded = unicodedata.normalize("NFC", name.decode("utf-8", "backslashreplace"))
    if decoded.isprintable():
        return decoded
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in decoded)


def extension(name: bytes) -> bytes:
    """What follows the last dot of a file name, with the dot and in small letters; empty if nothing does."""
    start, dot, end = name.rpartition(b".")
    return dot + end.lower() if start and end else b""


def is_image(name: bytes) -> bool:
    """Whether a path ends like an image file."""
    return extension(name.rpartition(b"/")[2]) in _ENDINGS


def member_names(names: Sequence[bytes]) -> list[bytes]:
    """Names in an archive as paths below it: without a leading `/` or `./`.

    Some Windows tools write backslashes between folders; they count as such where no name has a slash.
    """
    # On Linux a backslash may be part of a name: it separates folders only where nothing else does.
    if not any(b"/" in name for name in names):
        names = [name.replace(b"\\", b"/") for name in names]
    return [re.sub(rb"^(\.?/)+", b"", name) for name in names]


def in_class_order(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class number of each name, int64, and the classes' names by number.

    Classes are sorted as numbers if all are numbers, else as text. Equal names are one class.
    """
    are_numbers = all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", name) for name in names)
    classes = sorted(set(names), key=lambda name: (Decimal(name) if are_numbers else 0, name))
    number = {name: position for position, name in enumerate(classes)}
    return np.array([number[name] for name in names], dtype=np.int64), tuple(classes)


def kind_of_other(path: bytes) -> str:
    """What to call a file that is no image."""
    name = path.rpartition(b"/")[2]
    return "hidden" if name.startswith(b".") else text(extension(name)) or "no extension"


def describe_others(others: Counter[str]) -> str:
    """How many files are no images, and what they are."""
    hidden, number = others["hidden"], others.total() - others["hidden"]
    if not others.total():
        return "it is empty"
    by_number = sorted(others - Counter(hidden=hidden), key=lambda kind: (-others[kind], kind))
    parts = []
    if number:
        kinds = ", ".join(by_number[:8])
        parts.append(f"{number:,} file{'s' * (number != 1)}, none with an image's extension ({kinds})")
    if hidden:
        parts.append(f"{hidden:,} hidden (beginning with a dot)")
    return " and ".join(parts)
