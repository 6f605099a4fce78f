"""A zip of images as a source: `X.zip`. Classes are the members' first-level folders."""

from __future__ import annotations

import logging
import os
import struct
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import EncodedSource, Labels, check_size
from nextblock.data.sources.names import Names, describe_others, is_image, kind_of_other, member_names, text
from nextblock.data.sources.tar_index import OpenFile

log = logging.getLogger(__name__)


class ZipSource(EncodedSource):
    """The images of a zip in the order of its directory; of several of one name the last counts."""

    def __init__(self, spec: str, path: Path, data: DataConfig) -> None:
        self.spec, self._data, self._path = spec, data, path
        try:
            # Only names, places and sizes are kept: `zipfile` takes 1 KB a member, and forks cannot share it.
            with zipfile.ZipFile(path) as file:
                members = file.infolist()
        except OSError as error:
            raise ValueError(f"cannot read {spec!r}: {error.strerror or error}") from error
        except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
            raise ValueError(f"{spec!r} is no zip, or damaged: {error}; fetch or pack it again") from error
        images: dict[bytes, zipfile.ZipInfo] = {}
        others = Counter[str]()
        names = member_names([member.filename.encode("utf-8", "surrogateescape") for member in members])
        for name, member in zip(names, members, strict=True):
            if name.startswith(b".") or b"/." in name:
                others["hidden"] += 1
            elif is_image(name):
                images[name] = member
            elif name and not name.endswith(b"/"):
                others[kind_of_other(name)] += 1
        if not images:
            raise ValueError(f"{spec!r} holds no images: {describe_others(others)}")
        if others:
            log.info("%s: %d images; ignored %s", spec, len(images), describe_others(others))
        for name, member in images.items():
            # Bits 0 and 6 mark encryption. Of methods, only these two unpack in bounded memory.
            if member.flag_bits & 0x41 or member.compress_type not in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
            ):
                raise ValueError(
                    f"{spec!r}: {text(name)!r} is encrypted or not packed by deflate; pack it again by zip -0"
                )
        self._names = Names(list(images))
        places = [
            (m.header_offset, m.compress_size, m.file_size, m.CRC, m.compress_type) for m in images.values()
        ]
        # A damaged directory may state sizes beyond int64.
        self._places = np.array([[min(n, 2**63 - 1) for n in place] for place in places], dtype=np.int64)
        self._file: OpenFile | None = None

    def __len__(self) -> int:
        return len(self._names)

    @property
    def has_labels(self) -> bool:
        """Whether every image lies in a folder of the zip."""
        return self._names.number_in_root() == 0

    def _content(self, index: int) -> bytes:
        offset, packed_size, size, checksum, method = self._places[index].tolist()
        check_size(max(size, packed_size), self._data)
        try:
            self._file = file = self._file or OpenFile(self._path)
            # The member follows its own header, whose name and extra field have lengths of their own.
            name_size, extra_size = struct.unpack("<26xHH", file.read(30, offset))
            content = file.read(packed_size, offset + 30 + name_size + extra_size)
            if method == zipfile.ZIP_DEFLATED:
                # One byte more than stated shows a false size without unpacking a bomb.
                content = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
        except OSError as error:
            raise BadImageError(f"its zip cannot be read: {error.strerror or error}") from error
        except (zlib.error, struct.error) as error:
            raise BadImageError(f"the zip is damaged here: {error}") from error
        if len(content) != size or zlib.crc32(content) != checksum:
            raise BadImageError("the zip is damaged here: length or checksum is wrong")
        return content

    def _name(self, index: int) -> str:
        return f"{text(os.fsencode(self._path.name))}/{text(self._names[index])}"

    def _find_labels(self) -> Labels:
        if not self.has_labels:
            without = f"{self._names.number_in_root()} of its {len(self)} images lie in no folder"
            raise ValueError(
                f"{self.spec!r} has no labels: {without}; pack each image in a folder of its class"
            )
        return self._names.first_folders()

    def _make_fingerprint(self) -> str:
        return f"zip-{len(self)}-{self._names.digest()}"

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_file": None}
