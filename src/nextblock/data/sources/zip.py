"""A zip of images as a source: `X.zip`, its members stored or deflated."""

from __future__ import annotations

import logging
import os
import struct
import zipfile
import zlib
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import EncodedSource, Labels
from nextblock.data.sources.listing import (
    EXTENSIONS,
    IMAGE_EXTENSIONS,
    Names,
    describe_others,
    extension,
    kind_of_other,
    member_name,
)

__all__ = ["ZipSource"]

log = logging.getLogger(__name__)

_HEADER = struct.Struct("<4s5H3I2H")
"""Signature, version, flags, method, time, date, checksum, two sizes, lengths of name and extra field."""
_MAX_BYTES = 2**31
"""A member that says it is larger is unreadable: a bomb, no picture."""
_ENCRYPTED = 0x1


class ZipSource(EncodedSource):
    """The images of a zip in the order of its directory; classes are the members' first-level folders.

    Of the directory only names, places and sizes are kept: the zipfile module's objects, one for each member,
    would be held again by every worker.
    """

    def __init__(self, spec: str, path: Path, data: DataConfig) -> None:
        self.spec = spec
        self._data = data
        self._path = path
        images, others = _directory(spec, path)
        if not images:
            raise ValueError(
                f"{spec!r} holds no images: {describe_others(others)}; an image's name ends in "
                f"{' '.join(sorted(EXTENSIONS))}"
            )
        if others:
            log.info("%s: %d images; ignored %s", spec, len(images), describe_others(others))
        for name, info in images.items():
            _check_member(spec, name, info)
        self._names = Names(b"".join(images), np.array([len(name) for name in images], dtype=np.int64))
        rows = array("q")
        for info in images.values():
            numbers = info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type
            rows.extend(min(number, 2**62) for number in numbers)  # a larger one is damage
        self._places = np.frombuffer(rows, dtype=np.int64).reshape(-1, 5).copy()
        self._file: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self._names)

    @property
    def has_labels(self) -> bool:
        """Whether every image lies in a folder of the zip."""
        return self._names.number_in_root() == 0

    def _content(self, index: int) -> bytes:
        offset, packed, size, checksum, method = self._places[index].tolist()
        if max(size, packed) > _MAX_BYTES:
            raise BadImageError(
                f"it says that it is {max(size, packed):,} bytes large, more than {_MAX_BYTES:,}"
            )
        try:
            header = self._read_at(offset, _HEADER.size)
            signature, *_, name_bytes, extra_bytes = _HEADER.unpack(header)
            if signature != b"PK\3\4":
                raise BadImageError("the zip is damaged: no member begins where its directory says")
            content = self._read_at(offset + _HEADER.size + name_bytes + extra_bytes, packed)
            if method == zipfile.ZIP_DEFLATED:
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except OSError as error:
            raise BadImageError(f"its zip cannot be read: {error.strerror or error}") from error
        except (zlib.error, struct.error) as error:
            raise BadImageError(f"the zip is damaged here: {error}") from error
        if len(content) != size or zlib.crc32(content) != checksum:
            raise BadImageError("the zip is damaged here: length or checksum is wrong")
        return content

    def _read_at(self, offset: int, size: int) -> bytes:
        if self._file is None or self._file[0] != os.getpid():
            self._file = os.getpid(), os.open(self._path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return os.pread(self._file[1], size, offset)

    def _name(self, index: int) -> str:
        return f"{self._path.name}/{self._names.text(index)}"

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            raise ValueError(
                f"{self.spec!r} has no labels: they are its first-level folders, but "
                f"{self._names.number_in_root()} of its {len(self)} images lie in none; pack it with every "
                "image in a folder named after its class"
            )
        return self._names.first_folders()

    def _make_fingerprint(self) -> str:
        return f"zip-{len(self)}-{self._names.digest()}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}

    def __del__(self) -> None:
        file = self.__dict__.get("_file")
        if file is not None and file[0] == os.getpid():
            os.close(file[1])


def _directory(spec: str, path: Path) -> tuple[dict[bytes, zipfile.ZipInfo], Counter[str]]:
    """The image members by name, of several of one name the last; and what else there is."""
    try:
        with zipfile.ZipFile(path) as file:
            members = file.infolist()
    except OSError as error:
        raise ValueError(f"cannot read {spec!r}: {error.strerror or error}") from error
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise ValueError(
            f"{spec!r} is no zip, or a cut or damaged one: {error}; fetch or pack it again"
        ) from error
    images: dict[bytes, zipfile.ZipInfo] = {}
    others = Counter[str]()
    for member in members:
        name = member_name(member.filename.encode("utf-8", "surrogateescape"))
        if member.is_dir():
            continue
        if name.startswith(b".") or b"/." in name:
            others["hidden"] += 1
        elif extension(name.rpartition(b"/")[2]) in IMAGE_EXTENSIONS:
            images[name] = member
        else:
            others[kind_of_other(name)] += 1
    return images, others


def _check_member(spec: str, name: bytes, info: zipfile.ZipInfo) -> None:
    member = name.decode("utf-8", "backslashreplace")
    if info.flag_bits & _ENCRYPTED:
        raise ValueError(
            f"{spec!r}: {member!r} is encrypted; unpack it, and pack it again without a password"
        )
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(
            f"{spec!r}: {member!r} is compressed by the zip method {info.compress_type}; pack it again "
            "stored (zip -0) or deflated"
        )
