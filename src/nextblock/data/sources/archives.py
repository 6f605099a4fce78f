"""Archives: tar shards in WebDataset's layout (every image member is a sample), and zips.

An index is built from a tar's headers once, and stored as `X.tar.nextblock-index` beside the tar, or in the
cache folder if that place is not writable. A zip has a directory of its own.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from uuid import uuid4

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import (
    Damage,
    Labels,
    NamedSource,
    Names,
    OpenFile,
    SomeLabelsError,
    check_size,
    digest,
    in_class_order,
    kind_of,
    member_names,
    report_others,
    text,
)
from nextblock.data.sources.folder import local_path
from nextblock.errors import UsageError

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

INDEX_ENDING = ".nextblock-index"
_VERSION = 4
_MAX_HEADER_BYTES = _MAX_LABEL_BYTES = 2**20
# What `tarfile` raises for damaged headers.
_DAMAGE = (tarfile.TarError, ValueError, ArithmeticError, LookupError, RecursionError)
# Shards that a process keeps open; systems allow 1024 open files or fewer.
MAX_OPEN = 64
# Names of tars that are parts of a dataset: train_003, 00012. Any other name may be a class.
_SHARD_STEM = re.compile(r".*[-_.]\d+|\d{4,6}|train|val|test")


class TarSource(NamedSource):
    """The images of tar shards, in the order of shards and members; the last of equal names counts.

    `stems`, if given, are the classes of shards whose images have no labels.
    """

    def __init__(
        self,
        spec: str,
        paths: Sequence[Path],
        data: DataConfig,
        names: Sequence[str] = (),
        stems: Sequence[str] = (),
    ) -> None:
        self.spec, self._data, self._paths, self._stems = spec, data, tuple(paths), tuple(stems)
        names = list(names) or [text(os.fsencode(path.name)) for path in paths]
        # Shards with the same name in several folders are named by their paths.
        self._shard_names = names if len(set(names)) == len(paths) else [str(path) for path in paths]
        self._files: dict[int, OpenFile] = {}  # in order of last use
        heads, joined, tables = zip(*in_threads(self._index, range(len(paths))), strict=True)
        lengths, self._offsets, self._sizes, numbers = np.hstack(tables)
        named = list(zip(self._shard_names, heads, strict=True))
        self.damage = tuple(Damage(name, *head["damage"]) for name, head in named if head["damage"])
        if self.damage and not len(lengths):
            raise UsageError(f"{spec!r} has no images: {self.damage[0]}; download or pack it again")
        report_others(spec, len(lengths), sum((Counter(head["others"]) for head in heads), Counter()))
        self._names = Names(b"".join(joined), lengths)
        self._counts = np.array([table.shape[1] for table in tables])
        self._ends = np.cumsum(self._counts)
        # Every shard numbers its own classes. Shift a shard's numbers to its start in the joint list, then
        # map equal classes to equal numbers. An image without a class has the number -1 in every shard.
        classes = [name for head in heads for name in head["classes"]]
        starts = np.cumsum([0, *(len(head["classes"]) for head in heads)])[:-1]
        rank, self._classes = in_class_order(classes)
        numbers = np.where(numbers < 0, -1, numbers + np.repeat(starts, self._counts))
        self._numbers = np.append(rank, -1)[numbers]
        self._unusable = [f"{name}/{head['unusable']}" for name, head in named if head["unusable"]]
        for damage in self.damage:
            log.warning("%s", damage)

    def empty_classes(self) -> list[str]:
        """Tars without images, if tars are the classes."""
        classes, stems = set(self.class_names), set(self._stems)
        return sorted(stems - classes) if classes <= stems else []

    def _content(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        check_size(size, self._data)
        if offset < 0:
            raise BadImageError("it is stored as a sparse file; pack the tar again without --sparse")
        try:
            content = self._open(self._shard_of(index)).read(size, offset)
        except OSError as error:
            raise BadImageError(f"its shard cannot be read: {error.strerror or error}") from error
        if len(content) != size:
            raise BadImageError("its shard has changed since it was indexed")
        return content

    def _open(self, shard: int) -> OpenFile:
        self._files[shard] = file = self._files.pop(shard, None) or OpenFile(self._paths[shard])
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files)), None)
        return file

    def _shard_of(self, index: int) -> int:
        # _ends[i] is where shard i's images end; side="right" skips shards without images.
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int) -> str:
        return f"{self._shard_names[self._shard_of(index)]}/{text(self._names[index])}"

    def _find_labels(self) -> Labels:
        """Labels of members; if there are none, first-level folders, or tars named after classes."""
        if self._unusable:
            raise UsageError(f"{self.spec!r} has an unusable label: {self._unusable[0]}; use text or numbers")
        without = np.flatnonzero(self._numbers < 0)
        if not len(without):
            return self._numbers, self._classes
        if len(without) < len(self):
            which = f"{len(without)} of its {len(self)} images, the first {self.name(int(without[0]))!r}"
            raise SomeLabelsError(f"{self.spec!r} has no labels for {which}; add .cls members")
        # A tar of one class may have its images in a folder, named the same in all tars, or like the class.
        # So folders are the classes only if there are several; otherwise the tars are.
        with suppress(ValueError):
            folders = self._names.first_folders(self.spec)
            if len(self._stems) < 2 or len(folders[1]) > 1:
                return folders
        if len(self._stems) < 2:
            raise UsageError(f"{self.spec!r} has no labels; add .cls members, or put each class in a folder")
        shards = np.flatnonzero(self._counts)  # like an empty folder, a tar without images is not a class
        rank, names = in_class_order([self._stems[shard] for shard in shards])
        return np.repeat(rank, self._counts[shards]), names

    def _make_fingerprint(self) -> str:
        return f"tar-{len(self)}-{self._names.digest(self._sizes)}"

    def _index(self, shard: int) -> TarIndex:
        return tar_index(self._paths[shard], self._data)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}  # each process opens its own


def open_tars(spec: str, data: DataConfig) -> TarSource:
    """Open the shards of a spec with braces; `ValueError` names the first three missing ones."""
    paths = [local_path(name) for name in expand_braces(spec)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UsageError(f"{spec!r}: {len(missing)} of {len(paths)} shards are missing: {first}")
    return TarSource(spec, paths, data)


def open_class_tars(spec: str, path: Path, data: DataConfig) -> TarSource | None:
    """Open the tars of a directory without images and folders; None for any other directory.

    Their names are classes (ImageNet-21k), unless all are numbered like shards (`train_003`, `00012`).
    """
    tars = []
    # If the directory cannot be read, the later search for images reports it.
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # The first image or folder ends the search, so a large folder of images costs nothing.
            if entry.is_dir() or kind_of(os.fsencode(entry.name)) == "image":
                return None
            tars += [Path(entry.path)] if entry.name.lower().endswith(".tar") else []
    with suppress(OSError, ValueError, LookupError, TypeError):  # no manifest, or another program's
        if tars and not json.loads((path / "manifest.json").read_bytes())["finished"]:
            log.warning("%s lacks images: `data pack` was interrupted; the same command continues it", spec)
    stems = [text(os.fsencode(tar.stem)) for tar in sorted(tars)]
    are_classes = not all(map(_SHARD_STEM.fullmatch, stems))
    return TarSource(spec, sorted(tars), data, stems=stems if are_classes else ()) if tars else None


def expand_braces(spec: str) -> list[str]:
    """Expand braces: `x-{008..010}.tar` gives x-008.tar, x-009.tar, x-010.tar."""
    braces = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not braces:
        return [spec]
    first, last = braces.groups()
    if not 0 <= int(last) - int(first) < 10**6:
        raise UsageError(f"{spec!r}: {braces[0]} must run upwards, over at most a million numbers")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rests = expand_braces(spec[braces.end() :])
    return [spec[: braces.start()] + number + rest for number in numbers for rest in rests]


# ----------------------------------------------------------------------------------------------- indexes


class TarIndex(NamedTuple):
    """The positions of images in a tar, and their classes."""

    head: dict[str, Any]
    """`classes`; `others`: ignored members by kind; `damage`: reason and images before it; `unusable`: the
    first invalid label; `stamp`: size and time of the tar when it was indexed."""
    names: bytes
    """The images' names, concatenated."""
    table: np.ndarray
    """Rows of int64: lengths of the names, offsets of the images (-1: sparse), sizes, classes (-1: none)."""


def tar_index(path: Path, data: DataConfig) -> TarIndex:
    """Read or build a tar's index, stored until its size or time changes; `ValueError` if it is not a tar."""
    try:
        # Beside the tar, the index serves every user and moves with it; if that is read-only, use the cache.
        # A tar that was repacked or extended has another size or time, so its index is rebuilt.
        status = path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        places = [path.with_name(path.name + INDEX_ENDING)]
        with suppress(UsageError):  # without a cache folder there is still that place
            folder = cache_dir(data, "indexes")
            places.append(folder / (digest(os.fsencode(path.absolute())) + INDEX_ENDING))
        for place in places:
            if index := read_index(place, stamp):
                return index
        index = build_index(OpenFile(path), str(path))
    except OSError as error:
        raise UsageError(f"cannot read the shard {str(path)!r}: {error.strerror or error}") from error
    if not any(write_index(place, index, stamp) for place in places):
        log.info("cannot save the index %s; set data.cache_dir to a writable folder", places[-1])
    return index


def in_threads(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Apply a function to all shards in parallel, with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hide = len(items) < 2 or not console.is_terminal
    with ThreadPoolExecutor(min(16, len(items))) as threads:
        # After an error `map` cancels the items that have not started.
        results = threads.map(function, items)
        shown = track(results, "indexing", len(items), console=console, transient=True, disable=hide)
        return list(shown)


def cache_dir(data: DataConfig, part: str) -> Path:
    """The folder `part` of data.cache_dir, else of $XDG_CACHE_HOME/nextblock or ~/.cache/nextblock."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nextblock"
    try:
        return Path(data.cache_dir or default).expanduser() / part
    except RuntimeError as error:
        raise UsageError(f"there is no cache folder ({error}); set data.cache_dir") from error


def read_index(path: Path, stamp: object = None) -> TarIndex | None:
    """Read an index; None if it is missing, damaged, or has another stamp (None accepts any)."""
    # A line of JSON, the table, the names. Every start reads one such file per shard, and ImageNet-21k has
    # 20,000 shards: this format takes 2 s for all, .npz takes 8 s.
    try:
        line, _, body = path.read_bytes().partition(b"\n")
        head = json.loads(line)
        if head["version"] != _VERSION or stamp not in (None, head["stamp"]):
            return None
        numbers = np.frombuffer(body, dtype="<i8", count=4 * head["images"])
        names = body[numbers.nbytes :]
        if head["check"] == digest(body):
            return TarIndex(head, names, numbers.reshape(4, -1))
    except (OSError, ValueError, LookupError, TypeError):  # missing, not JSON, or not an index
        pass
    return None


def write_index(path: Path, index: TarIndex, stamp: object) -> bool:
    """Write an index whole or not at all; returns whether that worked."""
    body = index.table.astype("<i8").tobytes() + index.names
    head = {"version": _VERSION, "stamp": stamp, "check": digest(body), "images": index.table.shape[1]}
    # All ranks of a run may write the same index at once, so each needs its own temporary name.
    aside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_bytes(json.dumps(index.head | head).encode() + b"\n" + body)
        aside.replace(path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        return False
    return True


def build_index(file: OpenFile, origin: str) -> TarIndex:
    """Index a tar, named `origin` in errors, from its headers; `ValueError` if it is empty or not plain."""
    members, others, problem = _members(file, origin)
    # Of equal names, a dictionary keeps the first position and the last content, like unpacking.
    images: dict[bytes, tuple[int, int]] = {}
    labels: dict[str, dict[bytes, str | ValueError]] = {".json": {}, ".cls": {}}
    for name, (_, offset, size) in zip(member_names([name for name, *_ in members]), members, strict=True):
        kind = kind_of(name)
        if kind == "image":
            images[name] = offset, size
        elif kind not in labels or offset < 0:
            others[kind] += 1
        elif label := _label(name, kind, file.read(min(size, _MAX_LABEL_BYTES), offset)):
            labels[kind][name[: -len(kind)]] = label
    of_key = labels[".json"] | labels[".cls"]  # .cls wins
    classes: dict[str, int] = {}
    unusable, rows = "", []
    for name, place in images.items():
        # An image's label has its name up to the last dot (v1.0_3.png and v1.0_3.cls) or, as in WebDataset,
        # up to the first dot: the images of a sample share it (k.left.png, k.right.png and k.cls).
        folder, slash, base = name.rpartition(b"/")
        short = folder + slash + base.partition(b".")[0]
        label = of_key.get(name.rpartition(b".")[0]) or of_key.get(short) or ""
        if isinstance(label, ValueError):
            unusable, label = unusable or str(label), ""
        rows.append((len(name), *place, classes.setdefault(label, len(classes)) if label else -1))
    damage = [problem, len(images)] if problem else []
    head = {"classes": list(classes), "others": others, "damage": damage, "unusable": unusable}
    return TarIndex(head, b"".join(images), np.array(rows, dtype=np.int64).reshape(-1, 4).T)


def _label(member: bytes, kind: str, content: bytes) -> str | ValueError:
    """The label in a .cls or .json member; empty if it has none, an error if it is invalid."""
    if kind == ".cls":
        return text(content.strip())
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        return ValueError(f"{text(member)} is not JSON of up to 1 MiB")
    problem: str | ValueError = ""
    for field in ("label", "cls", "class") if isinstance(values, dict) else ():
        value = values.get(field)
        # Tables turn integers into floats if one is missing: 2.0 is class 2.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
            if label := text(str(value).strip().encode("utf-8", "backslashreplace")):
                return label
        elif value is not None:
            problem = problem or ValueError(f"{text(member)}: {field!r} is {json.dumps(value)[:60]}")
    return problem


class _HeaderFile(io.FileIO):
    """A tar of which only `left` bytes may be read, so that no forged header fills the memory."""

    left = _MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= size or 0
        if size is None or size < 0 or self.left < 0:
            raise tarfile.HeaderError("the extended header is too long")
        return super().read(size) or b""


def _members(file: OpenFile, origin: str) -> tuple[list[tuple[bytes, int, int]], Counter[str], str]:
    """Name, offset (-1: sparse) and size of every file in a tar; the number of links; the damage, if any."""
    members, others = [], Counter[str]()
    position, end, has_end_mark = 0, os.fstat(file.number).st_size, False
    if not end:
        raise UsageError(f"{origin!r} is empty (0 bytes); fetch or pack it again")
    with _HeaderFile(file.number, closefd=False) as reader:
        reader.seek(0)
        try:
            tar = tarfile.TarFile(fileobj=reader, encoding="utf-8")
        except _DAMAGE as error:
            begin = f"it starts with {repr(file.read(8, 0))[1:]}"
            raise UsageError(
                f"{origin!r} is not a plain tar, or cut off ({begin}); unpack it if it is compressed"
            ) from error
        # Read only headers, each of which gives the position and size of its member's content. `tarfile`
        # handles the long names and sizes that precede it in extra headers. Its iterator is not used, because
        # it takes damage for a normal end, and stops at the first end mark.
        while block := file.read(tarfile.BLOCKSIZE, position):
            if not any(block):
                # Blocks of zeros end a tar; another may follow them (cat a.tar b.tar).
                chunk = file.read(2**20, position)
                zeros = len(chunk) - len(chunk.lstrip(b"\0"))
                position, has_end_mark = position + max(512, zeros // 512 * 512), True
                continue
            reader.seek(position)
            reader.left = _MAX_HEADER_BYTES
            try:
                member = tarfile.TarInfo.fromtarfile(tar)
            except _DAMAGE:
                member = None
            # A damaged header may point backwards, and reading would never end.
            if member is None or member.size < 0 or tar.offset <= position:
                cut = f"the header at byte {position:,} is cut off or damaged"
                return members, others, "" if has_end_mark else cut
            # A header after the end mark starts another tar, which needs its own mark.
            has_end_mark = False
            if member.isreg():
                name = member.name.encode("utf-8", "surrogateescape")
                # A sparse file takes less space than its size, any other file up to a block more. So the
                # smaller of the two ends is beyond the file only if content is missing.
                if min(tar.offset, member.offset_data + member.size) > end:
                    return members, others, f"the file ends within {text(name)!r}"
                members.append((name, -1 if member.issparse() else member.offset_data, member.size))
            elif not member.isdir():
                others["links or special files"] += 1
            position = tar.offset
    return members, others, "" if has_end_mark else "the file ends without the mark of a tar's end"


# --------------------------------------------------------------------------------------------------- zips


class ZipSource(NamedSource):
    """The images of a zip in the order of its directory; the last of equal names counts."""

    _prefix = "zip"

    def __init__(self, spec: str, path: Path, data: DataConfig) -> None:
        self.spec, self._data, self._zip = spec, data, path
        try:
            # Keep only names, positions and sizes: `zipfile` takes 1 KB per member, which forks cannot share.
            with zipfile.ZipFile(path) as file:
                members = file.infolist()
        except OSError as error:
            raise UsageError(f"cannot read {spec!r}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise UsageError(f"{spec!r} is not a zip, or damaged: {error}; fetch or pack it again") from error
        images: dict[bytes, zipfile.ZipInfo] = {}
        others = Counter[str]()
        names = member_names([member.filename.encode("utf-8", "surrogateescape") for member in members])
        for name, member in zip(names, members, strict=True):
            kind = kind_of(name)
            if kind != "image":
                if name and not name.endswith(b"/"):
                    others[kind] += 1
                continue
            # Bits 0 and 6 mark encryption. Only these two methods unpack in bounded memory.
            is_known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
            if member.flag_bits & 0x41 or not is_known:
                how = "is encrypted or not packed by deflate; pack it again by zip -0"
                raise UsageError(f"{spec!r}: {text(name)!r} {how}")
            images[name] = member
        report_others(spec, len(images), others)
        self._names = Names.of(list(images))
        places = [
            (m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in images.values()
        ]
        # The directory at the zip's end has all positions, so members need not be opened here. A damaged one
        # may have sizes beyond int64.
        self._places = np.array([[min(n, 2**63 - 1) for n in place] for place in places], dtype=np.int64)
        self._file: OpenFile | None = None

    def _content(self, index: int) -> bytes:
        offset, packed_size, size, checksum, method = self._places[index].tolist()
        check_size(max(size, packed_size), self._data)
        try:
            self._file = file = self._file or OpenFile(self._zip)
            # The content follows the member's own header, whose name and extra field vary in length.
            name_size, extra_size = struct.unpack("<26xHH", file.read(30, offset))
            content = file.read(packed_size, offset + 30 + name_size + extra_size)
            if method == zipfile.ZIP_DEFLATED:
                # One byte more than stated reveals a false size without unpacking a bomb.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except OSError as error:
            raise BadImageError(f"its zip cannot be read: {error.strerror or error}") from error
        except (zlib.error, struct.error) as error:
            raise BadImageError(f"the zip is damaged here: {error}") from error
        # Check the bytes every time: a damaged image may still decode, to wrong pixels.
        if len(content) != size or zlib.crc32(content) != checksum:
            raise BadImageError("the zip is damaged here: length or checksum is wrong")
        return content

    def _name(self, index: int) -> str:
        return f"{text(os.fsencode(self._zip.name))}/{text(self._names[index])}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}  # each process opens its own
