"""Image files on this machine: a directory, searched recursively, or a list of paths (`files:LIST.txt`)."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections import Counter
from io import BufferedIOBase
from pathlib import Path

from nextblock.atomic import OUTPUT_MARK
from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import EncodedSource, Labels, open_file, read_file
from nextblock.data.sources.names import (
    EXTENSIONS,
    Names,
    describe_others,
    in_class_order,
    is_image,
    kind_of_other,
    text,
)

__all__ = ["SUBSET_HEADER", "FilesSource", "FolderSource", "any_unicode_form", "local_path"]

log = logging.getLogger(__name__)

# The first line of a list of numbers, which tells it from a list of files.
SUBSET_HEADER = b"# images of a source of nextblock; read it as subset:THIS_FILE"


class FolderSource(EncodedSource):
    """The images below a directory, sorted by the parts of their paths. Classes: its first-level folders."""

    def __init__(self, spec: str, root: Path, data: DataConfig) -> None:
        self.spec, self._data, self._root = spec, data, os.fsencode(root)
        images: list[bytes] = []
        others = Counter[str]()
        _search(self._root, b"", (), images, others)
        if not images:
            raise ValueError(
                f"no images in {str(root)!r}, which was searched with all its folders: "
                f"{describe_others(others)}; an image's name ends in {' '.join(sorted(EXTENSIONS))}"
                + "; name tars by X.tar, shards-{000..999}.tar, or the one folder they lie in"
                * (".tar" in others)
            )
        if others:
            level = logging.WARNING if ".tar" in others else logging.INFO
            log.log(
                level, "%s: %d images; ignored %s", text(self._root), len(images), describe_others(others)
            )
        self._names = Names(images)
        self._number_in_root = self._names.number_in_root()

    def __len__(self) -> int:
        return len(self._names)

    @property
    def has_labels(self) -> bool:
        """Whether every image lies in a folder of the directory."""
        return self._number_in_root == 0

    def path(self, index: int) -> Path:
        """Where the file lies."""
        self._check(index)
        return Path(os.fsdecode(self._root + b"/" + self._names[index]))

    def open(self, index: int) -> BufferedIOBase:
        """The file, to read parts of."""
        return open_file(self.path(index))

    def empty_classes(self) -> list[str]:
        """First-level folders in which no image lies."""
        with os.scandir(self._root) as entries:
            # A link was either followed, and is a class, or leads back up.
            folders = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
        names = {text(name) for name in folders if not name.startswith(b".")}
        return sorted(names - set(self.class_names))

    def _content(self, index: int) -> bytes:
        return read_file(self.path(index), self._data)

    def _name(self, index: int) -> str:
        return text(self._names[index])

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            raise ValueError(
                f"{self.spec!r} has no labels: they are its first-level folders, but {self._number_in_root} "
                f"of its {len(self)} images lie directly in it; move every image into a folder named after "
                "its class"
            )
        return self._names.first_folders()

    def _make_fingerprint(self) -> str:
        return f"folder-{len(self)}-{self._names.digest()}"


def _search(
    root: bytes,
    below: bytes,
    parents: tuple[tuple[int, int], ...],
    images: list[bytes],
    others: Counter[str],
) -> None:
    """Append the images in `root/below` and its folders, sorted; count what is no image.

    Links to directories are followed, unless they lead back up. Names that begin with a dot are skipped, and
    so are directories that nextblock wrote.
    """
    try:
        with os.scandir(root + b"/" + below) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
        status = os.stat(root + b"/" + below)  # noqa: PTH116 - bytes
    except OSError as error:
        raise ValueError(
            f"cannot list the folder {text(root + b'/' + below.rstrip(b'/'))!r}: {error.strerror}; make it "
            "readable or move it away"
        ) from error
    if below and any(entry.name == OUTPUT_MARK.encode() for entry in found):
        others["written by nextblock"] += 1
        return
    # A directory is itself, whatever link leads to it, by device and inode: among its own parents it is a
    # loop. Elsewhere it may be listed twice, under two names.
    if (status.st_dev, status.st_ino) in parents:
        return
    parents = (*parents, (status.st_dev, status.st_ino))
    # Folders are searched in place, so images come in the order of their paths' parts (a/z before a-b).
    for entry in found:
        if entry.name.startswith(b"."):
            others["hidden"] += 1
        elif _is_folder(entry):
            _search(root, below + entry.name + b"/", parents, images, others)
        # A link that leads nowhere is listed, to be reported as unreadable; a pipe or a socket is not.
        elif is_image(entry.name) and (entry.is_symlink() or entry.is_file()):
            images.append(below + entry.name)
        else:
            others[kind_of_other(entry.name)] += 1


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be entered
        return False


class FilesSource(EncodedSource):
    """The files of a list, in its order.

    One path a line, absolute or relative to the list's folder; after a tab, if wanted, its class. Blank lines
    and lines that begin with # are skipped. A file that is not there is reported when it is read.
    """

    def __init__(self, spec: str, list_path: Path, data: DataConfig) -> None:
        self.spec, self._data = spec, data
        self._folder = os.fsencode(list_path.parent.absolute())
        try:
            lines = list_path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
        except OSError as error:
            raise ValueError(f"cannot read {spec!r}: {error.strerror} ({list_path.absolute()})") from error
        first_line: dict[bytes, int] = {}
        labels: list[str] = []
        # A dictionary finds repeated names at once, and keeps the order of the list.
        for number, line in enumerate(map(bytes.rstrip, lines, [b"\r"] * len(lines)), start=1):
            if not line.strip() or (line.startswith(b"#") and line != SUBSET_HEADER):
                continue
            name, label = self._parse(number, line)
            if name in first_line:
                raise ValueError(
                    f"{spec!r}, line {number}: {text(name)!r} is already in line {first_line[name]}; list "
                    "each file once"
                )
            if first_line and bool(label) != bool(labels):
                raise ValueError(
                    f"{spec!r}: line {number} has {'a' if label else 'no'} class after a tab, unlike the "
                    "lines before it; give every line one, or none"
                )
            first_line[name] = number
            labels += [label] if label else []
        if not first_line:
            raise ValueError(f"{spec!r} lists no images: every line is blank or a comment")
        self._names = Names(list(first_line))
        self._classes, self._class_names = in_class_order(labels)

    def _parse(self, number: int, line: bytes) -> tuple[bytes, str]:
        """A line's path, and its class or an empty text."""
        if b"\0" in line:
            raise ValueError(
                f"{self.spec!r}, line {number}: a zero byte; a list is text in UTF-8, one path a line"
            )
        if line == SUBSET_HEADER:
            raise ValueError(
                f"{self.spec!r} is a list of image numbers that `nextblock data` wrote; read it as "
                f"subset:{self.spec.removeprefix('files:')}"
            )
        name, _, label = line.partition(b"\t")
        if not name.strip() or b"\t" in label.strip():
            raise ValueError(f"{self.spec!r}, line {number}: write PATH, or PATH, one tab and its class")
        return name, text(label.strip())

    def __len__(self) -> int:
        return len(self._names)

    @property
    def has_labels(self) -> bool:
        """Whether the lines state classes."""
        return len(self._class_names) > 0

    def path(self, index: int) -> Path:
        """Where the file lies, absolute."""
        self._check(index)
        return Path(os.fsdecode(os.path.join(self._folder, self._names[index])))  # noqa: PTH118 - bytes

    def open(self, index: int) -> BufferedIOBase:
        """The file, to read parts of."""
        return open_file(any_unicode_form(self.path(index)))

    def _content(self, index: int) -> bytes:
        path = self.path(index)
        try:
            return read_file(any_unicode_form(path), self._data)
        except BadImageError as error:
            if path.exists() or not Path(str(path).strip()).exists():
                raise
            raise BadImageError(f"{error}; it is there without the spaces around its path") from error

    def _name(self, index: int) -> str:
        return text(self._names[index])

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            raise ValueError(
                f"{self.spec!r} has no labels: they follow a tab after the path, and no line has one; "
                "add a tab and a class to every line"
            )
        return self._classes, self._class_names

    def _make_fingerprint(self) -> str:
        return f"files-{len(self)}-{self._names.digest()}"


def local_path(text: str) -> Path:
    """The path that a user means: `~` is the home directory, and accents come in either Unicode form."""
    return any_unicode_form(Path(os.path.expanduser(text)))  # noqa: PTH111 - Path("./~x") means a user's home


def any_unicode_form(path: Path) -> Path:
    """The path, or, if only that exists, the same with composed or with separate accents (NFC, NFD).

    macOS separates accents in file names and keyboards compose them: they look alike and differ in bytes.
    """
    forms = (path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")))
    return next((form for form in forms if os.path.lexists(form)), path)
