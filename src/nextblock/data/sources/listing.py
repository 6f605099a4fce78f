"""The image files below a directory, found quickly and kept small.

A million paths as Python strings take some 100 MB, and a forked worker that touches one copies its page. Here
they are one array of bytes and one of offsets. The lists of large folders are kept between runs, in an index
that holds as long as no directory has changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from functools import partial
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.sources.cache import cached_index_path, read_index, write_index

__all__ = [
    "EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "Listing",
    "Names",
    "describe_others",
    "extension",
    "in_class_order",
    "kind_of_other",
    "list_images",
    "member_name",
    "text",
]

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
        *(".avif", ".heic", ".heif"),
    )
)
"""What an image's name may end in, in small or capital letters."""
IMAGE_EXTENSIONS = frozenset(name.encode() for name in EXTENSIONS)
"""The same, as `extension` gives them."""

INDEX_FROM = 10_000
"""Folders of fewer entries are searched as fast as their index would be checked."""
SETTLE_S = 2.0
"""A directory that changed this shortly before it was searched may change again with the same time stamp."""
THREADS = 16
"""Searching waits for the disk or the network, not for a core."""

_VERSION = "folder 1"


class Names:
    """Many names, as bytes; a process that reads them copies none of their memory."""

    def __init__(self, joined: bytes, lengths: np.ndarray) -> None:
        self.joined = joined
        self._offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.joined[self._offsets[index] : self._offsets[index + 1]]

    def text(self, index: int) -> str:
        """The name as text; bytes that are no text appear escaped."""
        return text(self[index])

    def number_in_root(self) -> int:
        """How many lie in no folder."""
        slashes = np.flatnonzero(np.frombuffer(self.joined, dtype=np.uint8) == ord("/"))
        before = np.searchsorted(slashes, self._offsets)
        return int(np.count_nonzero(before[1:] == before[:-1]))

    def first_folders(self) -> tuple[np.ndarray, tuple[str, ...]]:
        """The first-level folder of every path as a number, int64 (n,), and the folders' names by number."""
        numbers: dict[bytes, int] = {}
        labels = np.empty(len(self), dtype=np.int64)
        for index in range(len(self)):
            labels[index] = numbers.setdefault(self[index].partition(b"/")[0], len(numbers))
        rank, classes = in_class_order([text(name) for name in numbers])
        return rank[labels], classes

    def digest(self, *more: np.ndarray) -> str:
        """A hash of all names, and of further numbers if given."""
        digest = hashlib.blake2b(self._offsets.astype("<i8", copy=False).tobytes(), digest_size=16)
        digest.update(self.joined)
        for numbers in more:
            digest.update(numbers.astype("<i8", copy=False).tobytes())
        return digest.hexdigest()


class Listing:
    """Paths below a root, sorted by their parts."""

    def __init__(self, root: Path, names: Names, number_in_root: int) -> None:
        self._root = os.fsencode(root)
        self.names = names
        self.number_in_root = number_in_root

    def __len__(self) -> int:
        return len(self.names)

    def path(self, index: int) -> Path:
        """Where the file lies."""
        return Path(os.fsdecode(self._root + b"/" + self.names[index]))


def list_images(root: Path, data: DataConfig | None = None) -> Listing:
    """Search a directory recursively, in sorted order, following links to directories but no loop of them.

    Files without an image's extension, and whatever has a name that begins with a dot, are left out and
    counted in one line of the log. `ValueError` where no image is left. With `data`, a large folder's index
    is kept in the cache folder, and used for as long as no directory's inode or time of change differs.
    """
    known = _from_index(root, data) if data is not None else None
    listing, others = _search(root, data) if known is None else known
    if not len(listing):
        found = describe_others(others)
        shards = "; name tar shards in full, as in shards-{000000..000999}.tar" if others[".tar"] else ""
        raise ValueError(
            f"no images in {str(root)!r}, which was searched with all its folders: {found}; an image's name "
            f"ends in {' '.join(sorted(EXTENSIONS))}{shards}"
        )
    if others:
        log.info("%s: %d images; ignored %s", root, len(listing), describe_others(others))
    return listing


# ------------------------------------------------------------------------------------------------ searching


class _Folder:
    """A directory: what was found in it, between its own folders.

    Sorted by the parts of their paths, the images come as `runs[0]`, those of `folders[0]`, `runs[1]`, those
    of `folders[1]`, and so on.
    """

    __slots__ = ("folders", "others", "parents", "path", "runs", "stamp")

    def __init__(
        self, path: bytes, parents: tuple[tuple[int, int], ...], stamp: tuple[int, int, int]
    ) -> None:
        self.path = path
        """Below the root, ending in a slash; empty for the root."""
        self.parents = parents
        """(device, inode) of it and of those above it."""
        self.stamp = stamp
        self.runs: list[tuple[bytes, array[int]]] = []
        self.folders: list[_Folder] = []
        self.others = Counter[str]()


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns


def _search(root: Path, data: DataConfig | None) -> tuple[Listing, Counter[str]]:
    started_s = time.time()
    top = _scan_all(os.fsencode(root))
    joined, lengths, folders, others = bytearray(), array("q"), [], Counter[str]()
    for item in _in_order(top):
        if isinstance(item, _Folder):
            folders.append(item)
            others.update(item.others)
        else:
            joined += item[0]
            lengths += item[1]
    in_root = sum(len(lengths) for _, lengths in top.runs)
    listing = Listing(root, Names(bytes(joined), np.frombuffer(lengths, dtype=np.int64)), in_root)
    if data is not None and len(listing) + others.total() + len(folders) >= INDEX_FROM:
        _keep_index(root, data, listing, others, folders, lengths, started_s)
    return listing, others


def _scan_all(root: bytes) -> _Folder:
    """Search level by level, many directories at once."""
    status = os.stat(root)  # noqa: PTH116 - bytes
    top = _Folder(b"", ((status.st_dev, status.st_ino),), _stamp(status))
    level = [top]
    with ThreadPoolExecutor(THREADS) as threads:
        while level:
            size = max(1, min(256, len(level) // (2 * THREADS)))
            chunks = [level[start : start + size] for start in range(0, len(level), size)]
            for _ in threads.map(partial(_scan, root), chunks):
                pass
            level = [child for folder in level for child in folder.folders]
    return top


def _scan(root: bytes, folders: Sequence[_Folder]) -> None:
    for folder in folders:
        path = root + b"/" + folder.path
        try:
            with os.scandir(path) as entries:
                _fill(folder, sorted(entries, key=lambda entry: entry.name))
        except OSError as error:
            name = text(path.rstrip(b"/") or b"/")
            raise ValueError(
                f"cannot list the folder {name!r}: {error.strerror}; make it readable or move it away"
            ) from error


def _fill(folder: _Folder, entries: Sequence[os.DirEntry[bytes]]) -> None:
    names: list[bytes] = []

    def end_run() -> None:
        folder.runs.append((b"".join(names), array("q", map(len, names))))
        names.clear()

    for entry in entries:
        name = entry.name
        if name.startswith(b"."):
            folder.others["hidden"] += 1
        elif _is_folder(entry):
            status = entry.stat()
            itself = (status.st_dev, status.st_ino)
            if itself not in folder.parents:  # else a link leads back up
                end_run()
                path = folder.path + name + b"/"
                folder.folders.append(_Folder(path, (*folder.parents, itself), _stamp(status)))
        # A link that leads nowhere is listed, to be reported as unreadable; a pipe or a socket is not.
        elif extension(name) in IMAGE_EXTENSIONS and (entry.is_symlink() or entry.is_file()):
            names.append(folder.path + name)
        else:
            folder.others[kind_of_other(name)] += 1
    end_run()


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


def _in_order(top: _Folder) -> Iterator[_Folder | tuple[bytes, array[int]]]:
    """Every folder, and every run of images in the order of their paths."""
    to_come: list[_Folder | tuple[bytes, array[int]]] = [top]
    while to_come:
        item = to_come.pop()
        yield item
        if isinstance(item, _Folder):
            to_come.append(item.runs[-1])
            for run, child in zip(reversed(item.runs[:-1]), reversed(item.folders), strict=True):
                to_come += [child, run]


# ---------------------------------------------------------------------------------------------------- index


def _keep_index(
    root: Path,
    data: DataConfig,
    listing: Listing,
    others: Counter[str],
    folders: Sequence[_Folder],
    lengths: array[int],
    started_s: float,
) -> None:
    newest = max(max(folder.stamp[1:]) for folder in folders)
    if newest > (started_s - SETTLE_S) * 1e9:
        log.info("%s is still changing: its index will be kept by a later start", root)
        return
    path = cached_index_path(data, root)
    if path is None:
        return
    header = {"number_in_root": listing.number_in_root, "others": dict(others)}
    parts = [
        listing.names.joined,
        lengths.tobytes(),
        b"\0".join(folder.path for folder in folders),
        np.array([folder.stamp for folder in folders], dtype=np.int64).tobytes(),
    ]
    if not write_index(path, header, parts, version=_VERSION, stamp=_place(root)):
        log.warning("cannot write %s: %s will be searched again at the next start", path, root)


def _from_index(root: Path, data: DataConfig) -> tuple[Listing, Counter[str]] | None:
    """What the index says, where there is one and no directory has changed since."""
    path = cached_index_path(data, root)
    index = None if path is None else read_index(path, version=_VERSION, stamp=_place(root))
    if index is None:
        return None
    joined, lengths, folders, stamps = index.parts
    expected = np.frombuffer(stamps, dtype=np.int64).reshape(-1, 3)
    if not _unchanged(os.fsencode(root), folders.split(b"\0"), expected):
        log.info("%s has changed since it was last searched; it is searched again", root)
        return None
    names = Names(joined, np.frombuffer(lengths, dtype=np.int64))
    return Listing(root, names, index.header["number_in_root"]), Counter(index.header["others"])


def _place(root: Path) -> str:
    return text(os.fsencode(root.absolute()))


def _unchanged(root: bytes, folders: Sequence[bytes], expected: np.ndarray) -> bool:
    def is_same(part: slice) -> bool:
        try:
            found = [_stamp(os.stat(root + b"/" + folder)) for folder in folders[part]]  # noqa: PTH116 - bytes
        except OSError:
            return False
        return np.array_equal(np.array(found, dtype=np.int64), expected[part])

    size = max(64, min(4096, len(folders) // (2 * THREADS)))
    with ThreadPoolExecutor(THREADS) as threads:
        parts = [slice(start, start + size) for start in range(0, len(folders), size)]
        return all(threads.map(is_same, parts))


# ---------------------------------------------------------------------------------------------------- names


def text(name: bytes) -> str:
    """A file's name as text; bytes that are no text appear escaped."""
    return name.decode("utf-8", "backslashreplace")


def extension(name: bytes) -> bytes:
    """What follows the last dot of a file's name, with the dot and in small letters; empty where nothing."""
    start, dot, end = name.rpartition(b".")
    return dot + end.lower() if start and end else b""


def member_name(name: bytes) -> bytes:
    """A name in an archive as a path below the archive: without slashes or ./ at its start."""
    while name.startswith((b"/", b"./")):
        name = name.partition(b"/")[2]
    return name


def in_class_order(names: Sequence[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The number of each class, int64, and the classes by number: as numbers if all are, else as text."""

    def key(position: int) -> tuple[Decimal, str]:
        return Decimal(names[position]) if are_numbers else Decimal(0), names[position]

    are_numbers = all(re.fullmatch(r"[+-]?[0-9]+(\.[0-9]*)?", name) for name in names)
    order = sorted(range(len(names)), key=key)
    rank = np.empty(len(names), dtype=np.int64)
    rank[order] = np.arange(len(names))
    return rank, tuple(names[position] for position in order)


def kind_of_other(path: bytes) -> str:
    """What to call a file that counts as no image."""
    name = path.rpartition(b"/")[2]
    return "hidden" if name.startswith(b".") else text(extension(name)) or "no extension"


def describe_others(others: Counter[str]) -> str:
    """How many files are no images, and what they are."""
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
