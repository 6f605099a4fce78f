"""What lies where in a tar: read from its headers once, and kept as `X.tar.nextblock-index.npz`.

The index lies beside the tar, or in the cache folder if that place cannot be written.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import os
import tarfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.sources.names import extension, is_image, kind_of_other, member_names, text

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

INDEX_ENDING = ".nextblock-index.npz"
# From this many shards on, their joint index is kept as well: reading one index takes 0.4 ms.
MANY = 100
THREADS = 16
PROGRESS_S = 5.0
_VERSION = 3
_BLOCK = 512
_MAX_HEADER_BYTES = 2**20
_MAX_LABEL_BYTES = 2**20


class OpenFile:
    """A file that processes and threads read at once; it is closed when nobody holds it any longer."""

    def __init__(self, path: Path) -> None:
        # Without O_NONBLOCK, opening a pipe would wait forever.
        self.number = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self.number)

    def read(self, size: int, offset: int) -> bytes:
        """The bytes there; fewer at the end of the file. Forked workers share no file position."""
        return os.pread(self.number, size, offset)


class TarIndex(NamedTuple):
    """What lies where in one tar, or in several."""

    head: dict[str, Any]
    """`classes`; `others`: ignored members by kind; `damage` and `unusable` (labels), each with its shard's
    number; `counts`: images per shard, if joined; `stamp`: size and time of the tar when it was indexed."""
    names: np.ndarray
    """The images' names, joined."""
    table: np.ndarray
    """Rows of int64: the lengths of the names, the images' offsets, sizes and classes (-1: none)."""


def tar_index(path: Path, data: DataConfig) -> TarIndex:
    """A tar's index, kept until the tar's size or time changes; `ValueError` if it is no tar."""
    try:
        file = OpenFile(path)
        status = os.fstat(file.number)
        places = [path.with_name(path.name + INDEX_ENDING), _cached(data, path)]
        stamp = [status.st_size, status.st_mtime_ns]
        return _keep(places, stamp, lambda: build_index(file, str(path)))
    except OSError as error:
        raise ValueError(f"cannot read the shard {str(path)!r}: {error.strerror or error}") from error


def tar_indexes(spec: str, paths: Sequence[Path], data: DataConfig) -> TarIndex:
    """The joint index of all these tars."""

    def build() -> TarIndex:
        return join_indexes(in_threads(lambda path: tar_index(path, data), paths, spec))

    # Opening the indexes of 20,000 tars takes seconds; their sizes and times tell whether a joint one holds.
    if len(paths) >= MANY and all(path.exists() for path in paths):
        stats = [path.stat() for path in paths]
        stamp = digest([(one.st_size, one.st_mtime_ns) for one in stats])
        return _keep([_cached(data, *paths)], stamp, build)
    return build()


def in_threads(function: Callable[[T], R], items: Sequence[T], what: str) -> list[R]:
    """The results for all items, several at once, with a line of progress every few seconds."""
    said_s, results = time.monotonic(), []
    with ThreadPoolExecutor(min(THREADS, len(items))) as threads:
        # After an error `map` cancels the items that have not begun.
        for result in threads.map(function, items):
            results.append(result)
            if time.monotonic() - said_s >= PROGRESS_S:
                said_s = time.monotonic()
                log.info("%s: indexed %d of %d shards", what, len(results), len(items))
    return results


def cache_dir(data: DataConfig, part: str) -> Path:
    """The folder `part` of data.cache_dir, else of $XDG_CACHE_HOME/nextblock or ~/.cache/nextblock."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nextblock"
    return Path(data.cache_dir or default).expanduser() / part


def digest(values: object) -> str:
    """A hash of any JSON value."""
    return hashlib.blake2b(json.dumps(values).encode(), digest_size=16).hexdigest()


def _cached(data: DataConfig, *tars: Path) -> Path:
    return cache_dir(data, "indexes") / f"{digest([str(tar.absolute()) for tar in tars])}.npz"


def _keep(places: Sequence[Path], stamp: object, build: Callable[[], TarIndex]) -> TarIndex:
    """The index found at one of the places, else a new one, written to the first that can be written."""
    for place in places:
        if index := read_index(place, stamp):
            return index
    index = build()
    if not any(write_index(place, index, stamp) for place in places):
        log.info("cannot save the index %s; set data.cache_dir to a writable folder", places[-1])
    return index


def read_index(path: Path, stamp: object = None) -> TarIndex | None:
    """The index at `path`; None if it is missing or damaged, or if its stamp differs (None: any stamp)."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            if head["version"] != _VERSION or stamp not in (None, head["stamp"]):
                return None
            return TarIndex(head, file["names"], file["table"])
    except OSError:
        return None
    except Exception as error:  # whatever is wrong with it, it can be rebuilt
        log.info("%s is damaged (%s) and will be rebuilt", path, error)
        return None


def write_index(path: Path, index: TarIndex, stamp: object) -> bool:
    """Write an index whole or not at all; whether that worked."""
    head = json.dumps({**index.head, "version": _VERSION, "stamp": stamp}).encode()
    # All ranks of a run may write the same index at once, each under a name of its own.
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            np.savez(file, head=np.frombuffer(head, np.uint8), names=index.names, table=index.table)
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        return False
    return True


def join_indexes(indexes: Sequence[TarIndex]) -> TarIndex:
    """One index of all shards, in which equal classes have equal numbers."""
    heads = [index.head for index in indexes]
    classes = list(dict.fromkeys(name for head in heads for name in head["classes"]))
    number = {name: position for position, name in enumerate(classes)}
    tables = []
    for head, _, table in indexes:
        # An image without a class has the number -1, which picks the last entry.
        common = np.array([*(number[name] for name in head["classes"]), -1])
        tables.append(np.vstack([table[:3], common[table[3]]]))
    joined = {
        "classes": classes,
        "others": sum((Counter(head["others"]) for head in heads), Counter[str]()),
        "counts": [table.shape[1] for table in tables],
    }
    for key in ("damage", "unusable"):
        joined[key] = [[shard, *rest] for shard, head in enumerate(heads) for _, *rest in head[key]]
    return TarIndex(joined, np.concatenate([index.names for index in indexes]), np.hstack(tables))


def build_index(file: OpenFile, called: str) -> TarIndex:
    """Read all headers of a tar, which errors call `called`; `ValueError` if it is no plain tar, or empty."""
    members, others, problem = _members(file, called)
    # A dictionary keeps the place of the first member of a name and the content of the last, as on unpacking.
    images: dict[bytes, tuple[int, int]] = {}
    labels: dict[bytes, dict[bytes, _Label]] = {b".json": {}, b".cls": {}}
    for name, (_, offset, size) in zip(member_names([name for name, *_ in members]), members, strict=True):
        ending = extension(name.rpartition(b"/")[2])
        if name.startswith(b".") or b"/." in name:
            others["hidden"] += 1
        elif is_image(name):
            images[name] = offset, size
        elif ending not in labels or offset < 0:
            others[kind_of_other(name)] += 1
        elif label := _label(name, ending, file.read(min(size, _MAX_LABEL_BYTES), offset)):
            labels[ending][name[: -len(ending)]] = label
    of_key = labels[b".json"] | labels[b".cls"]
    classes: dict[str, int] = {}
    unusable, rows = [], []
    for name, place in images.items():
        # An image's label has its name up to the last dot, or up to the first one.
        folder, slash, base = name.rpartition(b"/")
        short = folder + slash + base.partition(b".")[0]
        label, reason = of_key.get(name.rpartition(b".")[0]) or of_key.get(short) or (None, None)
        number = -1 if label is None else classes.setdefault(label, len(classes))
        rows.append((len(name), *place, number))
        if reason and not unusable:
            unusable.append((0, reason))
    damage = [(0, problem, len(images))] if problem else []
    head = {"classes": list(classes), "others": others, "damage": damage, "unusable": unusable}
    table = np.array(rows, dtype=np.int64).reshape(-1, 4).T.copy()
    return TarIndex(head, np.frombuffer(b"".join(images), np.uint8), table)


# An image's class, or what was found instead.
_Label = tuple[str | None, str | None]


def _label(member: bytes, ending: bytes, content: bytes) -> _Label | None:
    """The label in a .cls or .json member; None if it states none."""
    if ending == b".cls":
        return (text(content.strip()), None) if content.strip() else None
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return None, f"{text(member)} is no JSON of up to 1 MiB"
    problem = None
    for field in ("label", "cls", "class") if isinstance(values, dict) else ():
        value = values.get(field)
        # Tables turn whole numbers into floats if one is missing: 2.0 is class 2.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            if name := text(str(value).strip().encode("utf-8", "backslashreplace")):
                return name, None
        elif value is not None:
            problem = problem or (None, f"{text(member)}: {field!r} is {json.dumps(value)[:60]}")
    return problem


class _HeaderFile(io.FileIO):
    """A tar of which `left` bytes may be read, so that no header, whatever it states, fills the memory."""

    left = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= size or 0
        if size is None or size < 0 or self.left < 0:
            raise tarfile.HeaderError("the extended header is too long")
        return super().read(size) or b""


def _members(file: OpenFile, called: str) -> tuple[list[tuple[bytes, int, int]], Counter[str], str]:
    """Name, offset (-1: sparse) and size of every file in a tar; the number of links; the damage, if any."""
    members, others = [], Counter[str]()
    position, end, has_end_mark = 0, os.fstat(file.number).st_size, False
    if not end:
        raise ValueError(f"{called!r} is empty (0 bytes); fetch or pack it again")
    with _HeaderFile(file.number, closefd=False) as reader:
        while block := file.read(_BLOCK, position):
            if not any(block):
                # Blocks of zeros end a tar; another may follow them (cat a.tar b.tar).
                chunk = file.read(2**20, position)
                zeros = len(chunk) - len(chunk.lstrip(b"\0"))
                position, has_end_mark = position + max(_BLOCK, zeros // _BLOCK * _BLOCK), True
                continue
            # A new TarFile for each member: one that continues by itself hides damage as a normal end.
            reader.seek(position)
            reader.left = _MAX_HEADER_BYTES
            try:
                tar = tarfile.TarFile("", fileobj=reader, encoding="utf-8")
                member, following = tar.next(), tar.offset
            except (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError):
                member, following = None, 0
            if position == 0 and member is None:
                begin = f"it begins with {block[:8]!r}"
                raise ValueError(f"{called!r} is no plain tar ({begin}); unpack it if it is compressed")
            # Damage may lead back to an earlier place, and reading would never end.
            if member is None or member.size < 0 or following <= position:
                cut = f"the header at byte {position:,} is cut off or damaged"
                return members, others, "" if has_end_mark else cut
            has_end_mark = False
            if member.isreg():
                name = member.name.encode("utf-8", "surrogateescape")
                # A sparse file takes less room than its size says, any other one up to a block more.
                if min(following, member.offset_data + member.size) > end:
                    return members, others, f"the file ends within {text(name)!r}"
                members.append((name, -1 if member.issparse() else member.offset_data, member.size))
            elif not member.isdir():
                others["links or special files"] += 1
            position = following
    return members, others, "" if has_end_mark else "the file ends without the mark of a tar's end"
