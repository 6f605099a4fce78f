"""A zip of images as a source: `X.zip`. Classes are the members' first-level folders."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import NamedSource, OpenFile, check_size
from nextblock.data.sources.names import Names, kind_of, member_names, report_others, text
from nextblock.errors import UsageError


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
