"""Image files on this machine: a directory, searched recursively, or a list of paths (`files:LIST.txt`)."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nextblock.atomic import OUTPUT_MARK
from nextblock.config import DataConfig
from nextblock.data.sources.base import (
    Labels,
    NamedSource,
    Names,
    in_class_order,
    kind_of,
    report_others,
    text,
)
from nextblock.errors import UsageError

# The first line of a list of numbers, which distinguishes it from a list of files.
SUBSET_HEADER = b"# images of a source of nextblock; read it as subset:THIS_FILE"


class FolderSource(NamedSource):
    """The images below a directory, sorted by the parts of their paths. Classes: its first-level folders."""

    _prefix = "folder"

    def __init__(self, spec: str, root: Path, data: DataConfig) -> None:
        self.spec, self._data, self._root = spec, data, os.fsencode(root)
        others = Counter[str]()
        images = list(_images_below(self._root, others))
        report_others(text(self._root), len(images), others)
        self._names = Names.of(images)

    def empty_classes(self) -> list[str]:
        """First-level folders without an image."""
        root = Path(os.fsdecode(self._root))
        # Skip links: they were either followed, and are classes, or lead back up. Skip what nextblock wrote.
        names = {
            text(os.fsencode(path.name))
            for path in root.glob("[!.]*")
            if path.is_dir() and not path.is_symlink() and not (path / OUTPUT_MARK).exists()
        }
        return sorted(names - set(self.class_names))

    def _path(self, index: int) -> Path:
        return Path(os.fsdecode(self._root + b"/" + self._names[index]))


def _images_below(root: bytes, others: Counter[str]) -> Iterator[bytes]:
    """Yield the images in `root` and its folders, sorted; `others` counts all other files.

    Links to directories are followed, unless they lead back up. Names that start with a dot, and directories
    that nextblock wrote, are skipped.
    """
    # What is still to be visited, the next last: an image, or a folder with the places of its parents. Not a
    # recursion, because folders can be nested deeper than Python's stack.
    pending: list[tuple[bytes, tuple[tuple[int, int], ...] | None]] = [(b"", ())]
    while pending:
        below, parents = pending.pop()
        if parents is None:
            yield below
            continue
        try:
            with os.scandir(root + b"/" + below) as entries:
                listing = sorted(entries, key=lambda entry: entry.name)
            status = os.stat(root + b"/" + below)  # noqa: PTH116 - bytes
        except OSError as error:
            folder, how = text(root + b"/" + below.rstrip(b"/")), "make it readable or move it"
            raise UsageError(f"cannot list {folder!r}: {error.strerror}; {how}") from error
        if below and any(entry.name == OUTPUT_MARK.encode() for entry in listing):
            others["written by nextblock"] += 1
            continue
        # Device and inode identify a directory, whatever link leads to it. Among its own parents it is a
        # loop; elsewhere it may be listed twice, under two names.
        place = status.st_dev, status.st_ino
        if place in parents:
            continue
        # Names are sorted as bytes, independent of the file system's order. Folders are searched in place, so
        # images are ordered by the parts of their paths (a/z before a-b). Fingerprints depend on this order.
        found = []
        for entry in listing:
            kind = kind_of(entry.name)
            # A link may lead nowhere or to itself: entry.is_dir would raise an error.
            is_link = entry.is_symlink()
            is_folder = os.path.isdir(entry.path) if is_link else entry.is_dir()  # noqa: PTH112 - bytes
            if kind != "hidden" and is_folder:
                found.append((below + entry.name + b"/", (*parents, place)))
            # List a broken link, to report it as unreadable, but not a pipe or a socket.
            elif kind == "image" and (is_link or entry.is_file()):
                found.append((below + entry.name, None))
            else:
                others["links or special files" if kind == "image" else kind] += 1
        pending += reversed(found)


class FilesSource(NamedSource):
    """Files named by paths below `root`, or absolute ones, in this order; `labels` are their classes, if any.

    A missing file is reported when it is read.
    """

    _prefix = "files"

    def __init__(
        self, spec: str, root: Path, names: Sequence[bytes], labels: Sequence[str], data: DataConfig
    ) -> None:
        self.spec, self._data, self._root = spec, data, os.fsencode(root.absolute())
        self._names, self._listed = Names.of(names), in_class_order(labels)

    def _path(self, index: int) -> Path:
        return any_unicode_form(Path(os.fsdecode(os.path.join(self._root, self._names[index]))))  # noqa: PTH118

    def _find_labels(self) -> Labels:
        if not self._listed[1]:
            raise UsageError(f"{self.spec!r} has no labels; add a tab and a class to every line")
        return self._listed


def open_list(spec: str, list_path: Path, data: DataConfig) -> FilesSource:
    """Open a list: one path per line, absolute or relative to the list's folder, and a class after a tab.

    Every line has a class, or none has. Blank lines and lines that start with # are skipped.
    """
    try:
        lines = list_path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UsageError(f"cannot read {spec!r}: {error.strerror} ({list_path.absolute()})") from error
    # A dictionary finds repeated names, and keeps the order of the list.
    first_line: dict[bytes, int] = {}
    labels: list[str] = []
    for number, ended in enumerate(lines, start=1):
        line, problem = ended.rstrip(b"\r"), ""
        if line == SUBSET_HEADER:
            subset = spec.replace("files:", "subset:", 1)
            raise UsageError(f"{spec!r} is a list of image numbers; read it as {subset}")
        if not line.strip() or line.startswith(b"#"):
            continue
        name, _, label = line.partition(b"\t")
        label = label.strip()
        if not name.strip() or b"\t" in label or b"\0" in line:
            problem = "write PATH, or PATH, one tab and its class, in UTF-8"
        elif name in first_line:
            problem = f"{text(name)!r} is already in line {first_line[name]}; list each file once"
        elif first_line and bool(label) != bool(labels):
            problem = "some lines have a class after a tab, others none; give every line one, or none"
        if problem:
            raise UsageError(f"{spec!r}, line {number}: {problem}")
        first_line[name] = number
        if label:
            labels.append(text(label))
    if not first_line:
        raise UsageError(f"{spec!r} lists no images: every line is blank or a comment")
    return FilesSource(spec, list_path.parent, list(first_line), labels, data)


def local_path(text: str) -> Path:
    """Resolve a path that a user typed: expand `~`, and find either Unicode form of accents."""
    return any_unicode_form(Path(os.path.expanduser(text)))  # noqa: PTH111 - Path("./~x") means a user's home


def any_unicode_form(path: Path) -> Path:
    """The path, or its form with composed (NFC) or separate (NFD) accents if only that exists.

    macOS separates accents in file names, keyboards compose them: they look alike but differ in bytes.
    """
    forms = (path, *(Path(unicodedata.normalize(form, str(path))) for form in ("NFC", "NFD")))
    return next((form for form in forms if os.path.lexists(form)), path)
