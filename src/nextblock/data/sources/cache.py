"""The folder where indexes of folders and shards, and copies of remote shards, are kept between runs.

Whatever lies there can be deleted at any time; it is made anew. An index is a file of one line of JSON and
some arrays as bytes, with a checksum, so that a damaged one is told from a good one.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import secrets
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from nextblock.config import DataConfig

__all__ = ["Index", "cache_dir", "cached_index_path", "read_index", "warn_once", "write_index"]

log = logging.getLogger(__name__)

_WARNING = threading.Lock()

_MAGIC = "nextblock index"
_MAX_HEADER_BYTES = 2**28


class Index(NamedTuple):
    """What an index says about its subject, and its arrays."""

    header: dict[str, Any]
    parts: list[bytes]


def cache_dir(data: DataConfig) -> Path:
    """`data.cache_dir`, else $XDG_CACHE_HOME/nextblock, else ~/.cache/nextblock; made where it is missing.

    `ValueError` where it cannot be made.
    """
    if data.cache_dir is not None:
        path = Path(data.cache_dir).expanduser()
    else:
        path = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "nextblock"
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot make the cache folder {str(path)!r}: {error.strerror}; set data.cache_dir to a folder "
            "that can be written"
        ) from error
    return path


def cached_index_path(data: DataConfig, subject: Path) -> Path | None:
    """Where the index of a file or folder lies in the cache folder; None, said in the log, without one."""
    try:
        folder = cache_dir(data) / "indexes"
        folder.mkdir(exist_ok=True)
    except (OSError, ValueError) as error:
        warn_once(f"no indexes are kept: {error}")
        return None
    key = hashlib.blake2b(os.fsencode(subject.absolute()), digest_size=12).hexdigest()
    return folder / f"{key}.index"


def warn_once(message: str) -> None:
    """Say in the log what would otherwise be said of every shard, by any of the threads that read them."""
    with _WARNING:
        _warn(message)


@cache
def _warn(message: str) -> None:
    log.warning("%s", message)


def read_index(path: Path, *, version: str, stamp: object) -> Index | None:
    """The index at `path`, or None where there is none of this version, or it is damaged, or stale.

    `version` is the kind of index and the version of its format; `stamp`, made of what JSON can hold, is what
    must not have changed since it was written.
    """
    try:
        with path.open("rb") as file:
            index, reason = _read(file, version=version, stamp=stamp)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        index, reason = None, f"is damaged ({error})"
    if reason is not None:
        log.info("%s %s; it is made anew", path, reason)
    return index


def _read(file: BinaryIO, *, version: str, stamp: object) -> tuple[Index | None, str | None]:
    """The index, or why it is of no use."""
    line = file.readline(_MAX_HEADER_BYTES)
    head = json.loads(line)
    if head["format"] != _MAGIC:
        raise ValueError("it is no index")
    if head["version"] != version:
        return None, f"is of another version ({head['version']!r}; this is {version!r})"
    if head["stamp"] != json.loads(json.dumps(stamp)):
        return None, "is out of date"
    if len(line) + sum(head["sizes"]) != os.fstat(file.fileno()).st_size or min(head["sizes"], default=0) < 0:
        raise ValueError("its length is wrong")
    parts = [file.read(size) for size in head["sizes"]]
    if _checksum(head["header"], parts) != head["checksum"]:
        raise ValueError("its checksum is wrong")
    return Index(head["header"], parts), None


def write_index(
    path: Path, header: dict[str, Any], parts: Sequence[bytes], *, version: str, stamp: object
) -> bool:
    """Write an index whole or not at all; whether that could be done."""
    head = {
        "format": _MAGIC,
        "version": version,
        "stamp": stamp,
        "sizes": [len(part) for part in parts],
        "checksum": _checksum(header, parts),
        "header": header,
    }
    aside = path.with_name(f"{path.name}.{secrets.token_hex(6)}.part")
    try:
        try:
            with aside.open("xb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                file.writelines(parts)
            aside.replace(path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        log.debug("cannot write %s: %s", path, error)
        return False
    return True


def _checksum(header: dict[str, Any], parts: Sequence[bytes]) -> str:
    digest = hashlib.blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
