"""A list of image files as a source: `files:LIST.txt`.

One path a line, absolute or relative to the list's folder; after a tab, if wanted, its class. Blank lines and
lines that begin with # are skipped. Whether the files are there is found out when they are read.
"""

from __future__ import annotations

import os
from array import array
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import SUBSET_HEADER, EncodedSource, Labels, in_class_order, read_file
from nextblock.data.sources.listing import Names, text

__all__ = ["FilesSource"]


class FilesSource(EncodedSource):
    """The files of a list, in its order."""

    def __init__(self, spec: str, path: Path, data: DataConfig) -> None:
        self.spec = spec
        self._data = data
        self._folder = os.fsencode(path.parent.absolute())
        lines = _Lines(spec, path)
        lines.check()
        self._names = Names(
            b"".join(lines.names), np.array([len(name) for name in lines.names], dtype=np.int64)
        )
        rank, self._class_names = in_class_order(list(lines.classes))
        self._classes = rank[np.frombuffer(lines.labels, dtype=np.int32)].astype(np.int32)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def has_labels(self) -> bool:
        """Whether the list's lines state a class."""
        return len(self._class_names) > 0

    def _content(self, index: int) -> bytes:
        name = self._names[index]
        path, stripped = self._path(name), self._path(name.strip())
        try:
            return read_file(path)
        except BadImageError as error:
            if path == stripped or path.exists() or not stripped.exists():
                raise
            hint = "it is there without the spaces around its path in the list"
            raise BadImageError(f"{error}; {hint}") from error

    def _path(self, name: bytes) -> Path:
        return Path(os.fsdecode(os.path.join(self._folder, name)))  # noqa: PTH118 - bytes

    def _name(self, index: int) -> str:
        return self._names.text(index)

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            raise ValueError(
                f"{self.spec!r} has no labels: they follow a tab after the path, and no line has one; "
                "add a tab and a class to every line"
            )
        return self._classes.astype(np.int64), self._class_names

    def _make_fingerprint(self) -> str:
        return f"files-{len(self)}-{self._names.digest()}"


class _Lines:
    """What the lines say, and in which line each image stands."""

    def __init__(self, spec: str, path: Path) -> None:
        self.spec = spec
        self.names: list[bytes] = []
        self.lines = array("q")
        self.classes: dict[str, int] = {}
        self.labels = array("i")
        self._labelled: tuple[bool, int] | None = None
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    self._add(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        except OSError as error:
            raise ValueError(f"cannot read {spec!r}: {error.strerror} ({path.absolute()})") from error

    def _add(self, number: int, line: bytes) -> None:
        line = line.rstrip(b"\r\n")
        if b"\0" in line:
            raise ValueError(
                f"{self.spec!r}, line {number}: a zero byte; a list is text in UTF-8, one path a line"
            )
        if line == SUBSET_HEADER:
            raise ValueError(
                f"{self.spec!r} is a list of a subset, as `nextblock data` writes it; read it as "
                f"subset:{self.spec.removeprefix('files:')}"
            )
        if not line.strip() or line.startswith(b"#"):
            return
        name, _, label = line.partition(b"\t")
        label = text(label.strip())
        if not name.strip() or "\t" in label:
            raise ValueError(f"{self.spec!r}, line {number}: write PATH, or PATH, one tab and its class")
        self._check_labelled(number, bool(label))
        self.names.append(name)
        self.lines.append(number)
        if label:
            self.labels.append(self.classes.setdefault(label, len(self.classes)))

    def _check_labelled(self, number: int, is_labelled: bool) -> None:
        if self._labelled is None:
            self._labelled = is_labelled, number
        first_is, first = self._labelled
        if is_labelled != first_is:
            with_one, without = (first, number) if first_is else (number, first)
            raise ValueError(
                f"{self.spec!r}: line {with_one} has a class after a tab and line {without} has none; give "
                "every line one, or none"
            )

    def check(self) -> None:
        """`ValueError` for a list that names no image, or one twice."""
        if not self.names:
            raise ValueError(f"{self.spec!r} names no images: every line is blank or a comment")
        if len(np.unique(np.fromiter(map(hash, self.names), dtype=np.int64))) == len(self.names):
            return
        first: dict[bytes, int] = {}
        for number, name in zip(self.lines, self.names, strict=True):
            if name in first:
                raise ValueError(
                    f"{self.spec!r}, line {number}: {text(name)!r} stands in line {first[name]} already; "
                    "name each once"
                )
            first[name] = number
