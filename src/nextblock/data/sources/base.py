"""The base of all sources: a numbered list of images with names and, if there are any, labels.

Also sources built from others (`subset:LIST.txt`, a mixture), and what sources share: reading and decoding
files, names, classes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import stat
import unicodedata
import weakref
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError, Reduce, decode_image
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
# The class of every image, int64 (n,), and the classes' names.
Labels = tuple[np.ndarray, tuple[str, ...]]


class DataError(RuntimeError):
    """Reading images failed, but no single image is at fault; a run saves and stops."""

    def __init__(self, message: str = "") -> None:
        # A worker's error reaches the main process with its traceback in the message: keep the last part.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SomeLabelsError(UsageError):
    """Some images of a source have a label, and others none."""


class Damage(NamedTuple):
    """An archive that cannot be read to its end, and the number of usable images before the damage."""

    shard: str
    reason: str
    images: int

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}; {counted(self.images, 'image')} before that can be used"


class Source(ABC):
    """A numbered list of images, always in the same order. An image is opened only when it is read.

    A subclass defines `_path` if its images are files, `_content` if they are parts of files, else `_read`.
    """

    spec: str
    """The name it was opened by."""
    in_memory = False
    """Whether reading an image is so cheap that worker processes would not help."""
    damage: tuple[Damage, ...] = ()
    """Incomplete archives of this source."""
    _data: DataConfig
    """How to decode files."""
    _parts: tuple[Source, ...] = ()
    """The sources of a mixture."""

    @abstractmethod
    def __len__(self) -> int: ...

    def read(self, index: int, reduce: Reduce | None = None) -> UInt8[Tensor, "c h w"]:
        """The image's upright pixels; raises `BadImageError`. `reduce` may shrink a JPEG."""
        source, number = self._locate(index)
        content = source._content(number)
        return source._read(number) if content is None else decode(content, source._data, reduce)

    def content(self, index: int) -> bytes | None:
        """The encoded file, or None if images are not files; raises `BadImageError`."""
        source, number = self._locate(index)
        return source._content(number)

    def path(self, index: int) -> Path | None:
        """The path of the image's own file; None if it has none."""
        source, number = self._locate(index)
        return source._path(number)

    def name(self, index: int) -> str:
        """The image's printable name for messages: its path below the directory, or its number."""
        self._locate(index)
        return self._name(index)

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources of a mixture, in their order; otherwise the source itself."""
        return self._parts or (self,)

    # Labels are searched on first use: an unlabelled folder is an error only if labels are needed.
    @cached_property
    def has_labels(self) -> bool:
        """Whether all images have labels; if only some do, the log says so."""
        try:
            return bool(self._search_labels())
        except SomeLabelsError as error:
            log.info("%s", error)
        except ValueError:
            pass
        return False

    def _search_labels(self) -> object:
        # Some sources know without reading the labels, and override this.
        return self._labels

    @property
    def labels(self) -> np.ndarray:
        """The class of every image, int64 (n,); raises `ValueError`, which says where it looked."""
        return self._labels[0]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes by number; raises `ValueError` like `labels`."""
        return self._labels[1]

    @cached_property
    def _labels(self) -> Labels:
        return self._find_labels()

    def empty_classes(self) -> list[str]:
        """Folders that look like classes but contain no image."""
        return []

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the list: the number of images and a hash of their names, not of their pixels."""
        return self._make_fingerprint()

    def _locate(self, index: int) -> tuple[Source, int]:
        """The source that stores the image, and the image's number there."""
        # A negative number would count from the end of an array, and silently be another image.
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}; the numbers are 0 to {len(self) - 1}")
        return self, index

    def _path(self, index: int) -> Path | None:  # noqa: ARG002
        return None

    def _content(self, index: int) -> bytes | None:
        path = self._path(index)
        return None if path is None else read_file(path, self._data)

    def _read(self, index: int) -> Tensor:
        raise NotImplementedError

    @abstractmethod
    def _name(self, index: int) -> str: ...

    @abstractmethod
    def _find_labels(self) -> Labels: ...

    @abstractmethod
    def _make_fingerprint(self) -> str: ...


class NamedSource(Source):
    """Files with names, whose first-level folders are the classes."""

    # Workers get a copy of the source, by fork or pickle, so it should hold few and compact objects.
    _names: Names
    _prefix: str
    """Begins the fingerprint."""

    def __len__(self) -> int:
        return len(self._names)

    def _name(self, index: int) -> str:
        return text(self._names[index])

    def _find_labels(self) -> Labels:
        return self._names.first_folders(self.spec)

    def _make_fingerprint(self) -> str:
        return f"{self._prefix}-{len(self)}-{self._names.digest()}"


class SubsetSource(Source):
    """Some images of the source `of`, in the order of `numbers`; classes keep their numbers and names."""

    def __init__(self, spec: str, of: Source, numbers: np.ndarray, fingerprint: str | None = None) -> None:
        # Numbers are meaningless in another list of images, so raise instead of using wrong images.
        if fingerprint is not None and fingerprint != of.fingerprint:
            remedy = "name the source as it was by of=SPEC, or draw the list again"
            raise UsageError(f"{spec!r}: {of.spec!r} is not what the list was drawn from; {remedy}")
        if (largest := numbers.max()) >= len(of):
            raise UsageError(
                f"{spec!r}: the list names image {largest}, but {of.spec!r} has {len(of)}, from 0"
            )
        # A repeated image would count twice in every epoch and every accuracy.
        if len(np.unique(numbers)) < len(numbers):
            raise UsageError(f"{spec!r}: the list names an image twice; name each once")
        self.spec, self.of, self._numbers = spec, of, numbers
        self.in_memory, self.damage = of.in_memory, of.damage

    def __len__(self) -> int:
        return len(self._numbers)

    def _search_labels(self) -> bool:
        return self.of.has_labels

    def _locate(self, index: int) -> tuple[Source, int]:
        super()._locate(index)
        return self.of._locate(int(self._numbers[index]))

    def _name(self, index: int) -> str:
        return self.of.name(int(self._numbers[index]))

    def _find_labels(self) -> Labels:
        # Keep all classes of the other source, even without an image here, so that a classifier's outputs
        # keep their meaning.
        return self.of.labels[self._numbers], self.of.class_names

    def _make_fingerprint(self) -> str:
        # Another order is another source, because runs visit images by number.
        numbers = self._numbers.astype("<i8").tobytes()
        return f"subset-{len(self)}-{digest(self.of.fingerprint.encode(), numbers)}"


class ConcatSource(Source):
    """The images of several sources; image i of a part has number i plus the sizes of earlier parts."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = tuple(parts)
        self.spec = " + ".join(part.spec for part in parts)
        self.in_memory = all(part.in_memory for part in parts)
        self.damage = tuple(damage for part in parts for damage in part.damage)
        # Image i of part p has number starts[p] + i; the last entry is the total.
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def empty_classes(self) -> list[str]:
        """Empty folders of any part that no other part fills."""
        empty = {name for part in self.parts for name in part.empty_classes()}
        return sorted(empty - set(self.class_names))

    def _part_of(self, index: int) -> tuple[Source, int]:
        # The part is the last one whose start is not above the number.
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def _locate(self, index: int) -> tuple[Source, int]:
        super()._locate(index)
        part, number = self._part_of(index)
        return part._locate(number)

    def _name(self, index: int) -> str:
        part, number = self._part_of(index)
        return f"{part.spec}: {part.name(number)}"

    def _find_labels(self) -> Labels:
        # Labels can be joined only if equal numbers mean equal classes in all sources.
        if without := [part.spec for part in self.parts if not part.has_labels]:
            raise UsageError(f"{self.spec!r} has no labels, because {without[0]!r} has none")
        if len({part.class_names for part in self.parts}) > 1:
            raise UsageError(f"{self.spec!r} has no labels: its sources have different classes")
        return np.concatenate([part.labels for part in self.parts]), self.parts[0].class_names

    def _make_fingerprint(self) -> str:
        # In the order of the parts, which determines the images' numbers.
        parts = "\n".join(part.fingerprint for part in self.parts)
        return f"mixture-{len(self)}-{digest(parts.encode())}"


def decode(content: bytes, data: DataConfig, reduce: Reduce | None = None) -> UInt8[Tensor, "c h w"]:
    """Decode a file with the settings of a run; see `decode_image`."""
    settings = {name: getattr(data, name) for name in ("decoder", "max_pixels", "channels", "background")}
    return decode_image(content, reduce=reduce, **settings)


def check_size(num_bytes: int, data: DataConfig) -> None:
    """Raise `BadImageError` for a file larger than `data.max_pixels` pixels of 16 bits with metadata.

    Called before reading, so that a file larger than memory costs nothing.
    """
    # 16 bits for each of at least four channels, uncompressed, and 64 MiB for profiles, EXIF and padding.
    most = 2 * max(4, data.channels) * data.max_pixels + 2**26
    if num_bytes > most:
        raise BadImageError(f"{num_bytes:,} bytes, more than data.max_pixels ({data.max_pixels:,}) can take")


def open_file(path: Path) -> io.BufferedReader:
    """Open a regular file; raises `OSError` if it cannot be read, or is a pipe or a device."""
    # O_NONBLOCK: opening a pipe that nobody writes to would block the worker forever.
    file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is no regular file")
    return file


def read_file(path: Path, data: DataConfig) -> bytes:
    """Read a file; raises `BadImageError` if that fails, or it is too large for an image."""
    try:
        with open_file(path) as file:
            check_size(os.fstat(file.fileno()).st_size, data)
            return file.read()
    except OSError as error:
        raise BadImageError(f"cannot be read: {error.strerror or error}") from error


class OpenFile:
    """A file for concurrent reads by processes and threads; closed when it is garbage-collected."""

    def __init__(self, path: Path) -> None:
        file = open_file(path)
        self.number = file.fileno()
        # Without this, garbage collection would warn about an open file.
        weakref.finalize(self, file.close)

    def read(self, size: int, offset: int) -> bytes:
        """Read up to `size` bytes; fewer at the end of the file."""
        # A plain read would move the file position, which forked workers share; pread does not.
        return os.pread(self.number, size, offset)


# ---------------------------------------------------------------------------------------- names and classes


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
                kind = SomeLabelsError if b"/" in self.joined else UsageError
                raise kind(f"{spec!r} has no labels: {problem}")
            numbers[index] = folders.setdefault(folder, len(folders))
        rank, classes = in_class_order([text(folder) for folder in folders])
        return rank[numbers], classes

    def digest(self, *more: np.ndarray) -> str:
        """A hash of all names, and of more numbers if given."""
        # Include the offsets: ("ab", "c") is not ("a", "bc"). This hash identifies runs, so use little-endian
        # int64, which is the same on every machine.
        offsets, *others = (numbers.astype("<i8", copy=False).tobytes() for numbers in (self._offsets, *more))
        return digest(offsets, self.joined, *others)


def digest(*parts: bytes) -> str:
    """A hash of the parts, one after the other."""
    # Not joined first: the names of millions of files take hundreds of megabytes.
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        hashed.update(part)
    return hashed.hexdigest()


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
