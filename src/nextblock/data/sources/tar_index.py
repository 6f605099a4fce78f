"""What lies where in a tar shard: read from its headers once, and kept beside it.

Plain tar in its old, ustar, GNU and pax forms. In the WebDataset layout the members of a sample share their
name up to the first dot: 0001.jpg, 0001.cls, 0001.json. Every image member is a sample of its own; the label
of its key, from `.cls` or from a field of `.json`, is that of each.
"""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from nextblock.config import DataConfig
from nextblock.data.sources.cache import Index, cached_index_path, read_index, warn_once, write_index
from nextblock.data.sources.listing import IMAGE_EXTENSIONS, extension, kind_of_other, member_name, text

__all__ = ["VERSION", "tar_index"]

log = logging.getLogger(__name__)

VERSION = "tar 1"
_BLOCK = 512
_MAX_EXTENDED_BYTES = 2**20
"""Of an extended header; a larger one is damage."""
_MAX_LABEL_BYTES = 2**24
_LABEL_FIELDS = ("label", "cls", "class")
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR = (b"0", b"\0", b"7")
_WITHOUT_DATA = (b"1", b"2", b"3", b"4", b"5", b"6")

Read = Callable[[int, int], bytes]
"""(number of bytes, where they begin) -> the bytes, fewer at the end of the file."""


class Member(NamedTuple):
    """A member of a tar: its name, its type as the header states it, and where its content lies."""

    name: bytes
    kind: bytes
    offset: int
    size: int


class _Cut(Exception):  # noqa: N818 - it says what happened
    """The tar cannot be read further; the message says why."""


def tar_index(path: Path, data: DataConfig, called: str | None = None) -> Index:
    """A tar's index, from beside it or from the cache folder if its size and time of change agree, else new.

    Header: `classes`, `others` (what is ignored, by kind), `problem` (why the rest cannot be read, or None).
    Parts: the images' names joined; then, int64 each, the names' lengths, the images' offsets and sizes, and
    the number of each image's class, -1 for none. `ValueError` where the file is no tar that can be used; it
    names the tar as it is `called`, by default its path.
    """
    called = str(path) if called is None else called
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"cannot read the shard {called!r}: {error.strerror}") from error
    try:
        status = os.fstat(file)
        stamp = [status.st_size, status.st_mtime_ns]
        beside = path.with_name(f"{path.name}.nextblock-index")
        index = read_index(beside, version=VERSION, stamp=stamp)
        cached = cached_index_path(data, path) if index is None else None
        if index is None and cached is not None:
            index = read_index(cached, version=VERSION, stamp=stamp)
        if index is not None:
            return index
        index = _build(called, lambda size, start: os.pread(file, size, start), status.st_size)
    finally:
        os.close(file)
    places = (beside,) if cached is None else (beside, cached)
    if not any(write_index(place, *index, version=VERSION, stamp=stamp) for place in places):
        warn_once(f"no indexes of shards are kept: neither {path.parent} nor the cache folder can be written")
    return index


def _build(called: str, read: Read, end: int) -> Index:
    contents = _Contents(read)
    problem = None
    try:
        for member in _members(called, read, end):
            contents.add(member)
    except _Cut as cut:
        problem = str(cut)
    except OSError as error:
        raise ValueError(f"cannot read the shard {called!r}: {error.strerror}") from error
    return contents.index(problem)


class _Contents:
    """The images found so far, and the labels of keys."""

    def __init__(self, read: Read) -> None:
        self._read = read
        self._images: dict[bytes, tuple[int, int]] = {}
        self._labels: dict[bytes, str] = {}
        self._others = Counter[str]()

    def add(self, member: Member) -> None:
        name = member_name(member.name)
        folder, slash, base = name.rpartition(b"/")
        key, _, rest = base.partition(b".")
        if member.kind == b"5" or not base:
            return
        if member.kind not in _REGULAR:
            self._others["links or special files"] += 1
        elif name.startswith(b".") or b"/." in name:
            self._others["hidden"] += 1
        elif rest.lower() in (b"cls", b"json"):
            self._add_label(folder + slash + key, rest.lower() == b"cls", member)
        elif extension(base) in IMAGE_EXTENSIONS:
            # Unpacking leaves the last of several members of one name.
            self._images[name] = (member.offset, member.size)
        else:
            self._others[kind_of_other(base)] += 1

    def _add_label(self, key: bytes, is_cls: bool, member: Member) -> None:
        if not is_cls and key in self._labels:
            return
        content = self._read(min(member.size, _MAX_LABEL_BYTES), member.offset)
        label = text(content).strip() if is_cls else _field(content)
        if label:
            self._labels[key] = label

    def index(self, problem: str | None) -> Index:
        classes: dict[str, int] = {}
        numbers = array("q")
        for name in self._images:
            folder, slash, base = name.rpartition(b"/")
            label = self._labels.get(folder + slash + base.partition(b".")[0])
            numbers.append(-1 if label is None else classes.setdefault(label, len(classes)))
        parts = [
            b"".join(self._images),
            array("q", map(len, self._images)).tobytes(),
            array("q", (offset for offset, _ in self._images.values())).tobytes(),
            array("q", (size for _, size in self._images.values())).tobytes(),
            numbers.tobytes(),
        ]
        header = {"classes": list(classes), "others": dict(self._others), "problem": problem}
        return Index(header, parts)


def _field(content: bytes) -> str | None:
    """The label in a JSON file; None where it states none."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        log.debug("a .json member is no JSON: %s", error)
        return None
    if not isinstance(values, dict):
        return None
    found = (values.get(field) for field in _LABEL_FIELDS)
    label = next((value for value in found if isinstance(value, str | int)), None)
    return None if label is None else str(label).strip()


# -------------------------------------------------------------------------------------------------- headers


def _members(called: str, read: Read, end: int) -> Iterator[Member]:
    """The members that are whole, in the order of the file; `_Cut` where the rest cannot be read."""
    position, extended = 0, {}
    while True:
        header = read(_BLOCK, position)
        _check_start(called, header, end) if position == 0 else None
        if not header.strip(b"\0") and len(header) == _BLOCK:
            return
        if len(header) < _BLOCK:
            where = f"within a header at byte {position:,}" if header else "without the mark of a tar's end"
            raise _Cut(f"the file ends {where}")
        if not _is_header(header):
            raise _Cut(f"the header at byte {position:,} is damaged")
        member, records = _member(header, position, extended)
        extended = {}
        if member.offset + member.size > end:
            raise _Cut(f"the file ends within {text(member.name)!r}")
        if member.kind in (b"x", b"X", b"L"):
            extended = {**records, **_extended(member, read)}
        elif member.kind in (b"K", b"g"):
            extended = records
        else:
            if member.kind == b"S" or any(key.startswith(b"GNU.sparse") for key in records):
                raise ValueError(
                    f"{called!r}: {text(member.name)!r} is stored sparsely; pack it again without --sparse"
                )
            yield member
        position = member.offset + -(-member.size // _BLOCK) * _BLOCK


def _check_start(called: str, header: bytes, end: int) -> None:
    """`ValueError` where a file is no plain tar."""
    if end == 0:
        raise ValueError(f"{called!r} is empty (0 bytes); fetch or pack it again")
    for magic, name in _COMPRESSED.items():
        if header.startswith(magic):
            raise ValueError(
                f"{called!r} is compressed ({name}), and what is compressed as a whole cannot be read in "
                "any order; unpack it to a plain tar"
            )
    if len(header) < _BLOCK or (header.strip(b"\0") and not _is_header(header)):
        raise ValueError(f"{called!r} is no tar (it begins with {header[:8]!r}); check the file")


def _is_header(header: bytes) -> bool:
    """Whether its checksum is right, over unsigned bytes or, as some old writers had it, signed ones."""
    try:
        stated = _number(header[148:156])
    except ValueError:
        return False
    others = header[:148] + header[156:]
    total = sum(others) + 8 * ord(" ")
    return stated == total or stated == total - 256 * sum(byte > 127 for byte in others)


def _member(header: bytes, position: int, extended: dict[bytes, bytes]) -> tuple[Member, dict[bytes, bytes]]:
    """The member of a header, as corrected by the extended header before it, if there was one."""
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    kind = header[156:157]
    try:
        size = _number(header[124:136])
        if kind not in (b"x", b"X", b"L", b"K", b"g"):
            name, prefix = (extended[b"path"], b"") if b"path" in extended else (name, prefix)
            size = int(extended.get(b"size", size))
    except ValueError:
        size = -1
    if size < 0:
        raise _Cut(f"the header at byte {position:,} is damaged")
    if kind in _WITHOUT_DATA:
        size = 0
    if kind == b"\0" and name.endswith(b"/"):  # a directory, in the oldest form
        kind = b"5"
    return Member(prefix + b"/" + name if prefix else name, kind, position + _BLOCK, size), extended


def _number(field: bytes) -> int:
    """Octal digits, or from a first bit set on, the number itself."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    return int(field.partition(b"\0")[0].strip() or b"0", 8)


def _extended(member: Member, read: Read) -> dict[bytes, bytes]:
    """What an extended header says about the member after it: `path`, `size` and more."""
    if member.size > _MAX_EXTENDED_BYTES:
        raise _Cut(f"the extended header at byte {member.offset:,} is damaged")
    content = read(member.size, member.offset)
    if member.kind == b"L":
        return {b"path": content.partition(b"\0")[0]}
    records: dict[bytes, bytes] = {}
    while content.strip(b"\0"):
        number = content.partition(b" ")[0]
        length = int(number) if number.isdigit() and len(number) < 9 else 0
        record, content = content[len(number) + 1 : max(length - 1, 0)], content[length:]
        key, equals, value = record.partition(b"=")
        if length == 0 or not equals:
            raise _Cut(f"the extended header at byte {member.offset:,} is damaged")
        records[key] = value
    return records
