"""The image files below a directory, found quickly and kept small.

A million paths as Python strings take some 100 MB, and a forked worker that touches one copies its page. Here
they are one array of bytes and one of offsets.
"""

from __future__ import annotations

import hashlib
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

__all__ = ["EXTENSIONS", "Listing", "list_images"]

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
"""What an image's name may end in, in small or capital letters."""


class Listing:
    """Paths below a root, sorted by their parts."""

    def __init__(self, root: Path, paths: bytes, lengths: np.ndarray, number_in_root: int) -> None:
        self._root = os.fsencode(root)
        self._paths = paths
        self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
        self.number_in_root = number_in_root

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def path(self, index: int) -> Path:
        """Where the file lies."""
        return Path(os.fsdecode(self._root + b"/" + self._bytes(index)))

    def name(self, index: int) -> str:
        """Its path below the root, with slashes; bytes that are no text appear escaped."""
        return _text(self._bytes(index))

    def first_folders(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The first-level folder of every file as a number, int64 (n,), and the folders' names, sorted."""
        numbers: dict[bytes, int] = {}
        labels = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):  # sorted by parts, so the folders come in their order
            folder = self._bytes(index).partition(b"/")[0]
            labels[index] = numbers.setdefault(folder, len(numbers))
        return labels, tuple(map(_text, numbers))

    def digest(self) -> str:
        """A hash of all names."""
        digest = hashlib.blake2b(self._offsets.astype("<i8").tobytes(), digest_size=16)
        digest.update(self._paths)
        return digest.hexdigest()

    def _bytes(self, index: int) -> bytes:
        return self._paths[self._offsets[index] : self._offsets[index + 1]]


def list_images(root: Path) -> Listing:
    """Search a directory recursively, in sorted order, following links to directories but no loop of them.

    Files without an image's extension, and whatever has a name that begins with a dot, are left out and
    counted in one line of the log. `ValueError` where no image is left.
    """
    paths, lengths, number_in_root, others = bytearray(), array("q"), 0, Counter[str]()
    for path, is_image in _walk(root):
        if is_image:
            paths += path
            lengths.append(len(path))
            number_in_root += b"/" not in path
        else:
            others[_kind(path)] += 1
    if not lengths:
        raise ValueError(
            f"no images in {str(root)!r}, which was searched with all its folders: {_describe(others)}; an "
            f"image's name ends in {' '.join(sorted(EXTENSIONS))}"
        )
    if others:
        log.info("%s: %d images; ignored %s", root, len(lengths), _describe(others))
    return Listing(root, bytes(paths), np.frombuffer(lengths, dtype=np.int64), number_in_root)


Folder = tuple[Iterator["os.DirEntry[bytes]"], bytes, tuple[tuple[int, int], ...]]
"""Entries still to come, path below the root ending in a slash, (device, inode) of it and its parents."""


def _walk(root: Path) -> Iterator[tuple[bytes, bool]]:
    """Every file's path below the root and whether it counts as an image, sorted by the path's parts."""
    status = root.stat()
    open_folders: list[Folder] = [(_entries(os.fsencode(root)), b"", ((status.st_dev, status.st_ino),))]
    while open_folders:
        entries, prefix, parents = open_folders[-1]
        entry = next(entries, None)
        if entry is None:
            open_folders.pop()
        elif entry.name.startswith(b"."):
            yield prefix + entry.name, False
        elif entry.is_dir():
            status = entry.stat()
            itself = (status.st_dev, status.st_ino)
            if itself not in parents:  # else a link leads back up
                open_folders.append((_entries(entry.path), prefix + entry.name + b"/", (*parents, itself)))
        else:
            # A link that leads nowhere is listed, to be reported as unreadable; a pipe or a socket is not.
            is_file = entry.is_symlink() or entry.is_file()
            yield prefix + entry.name, is_file and _extension(entry.name) in EXTENSIONS


def _entries(folder: bytes) -> Iterator[os.DirEntry[bytes]]:
    try:
        with os.scandir(folder) as entries:
            return iter(sorted(entries, key=lambda entry: entry.name))
    except OSError as error:
        raise ValueError(
            f"cannot list the folder {_text(folder)!r}: {error.strerror}; make it readable or move it away"
        ) from error


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _extension(name: bytes) -> str:
    return PurePosixPath(_text(name)).suffix.lower()


def _kind(path: bytes) -> str:
    name = path.rpartition(b"/")[2]
    return "hidden" if name.startswith(b".") else _extension(name) or "no extension"


def _describe(others: Counter[str]) -> str:
    hidden, number = others["hidden"], others.total() - others["hidden"]
    if not others.total():
        return "it is empty"
    by_number = sorted(others - Counter(hidden=hidden), key=lambda kind: (-others[kind], kind))
    kinds = ", ".join(by_number[:8])
    parts = (
        [f"{number} file{'s' * (number != 1)}, none with an image's extension ({kinds})"] if number else []
    )
    parts += [f"{hidden} hidden (beginning with a dot)"] if hidden else []
    return " and ".join(parts)
