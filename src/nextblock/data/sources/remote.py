"""Copies of files on a server (https, s3, gs), whole or not at all, in a cache folder of bounded size.

A copy is fetched when it is first needed, by one process while the others wait for it. What the server tells
of a file (size, ETag or date) is kept beside the copy, and another file under the same address is fetched
anew. When the copies take more than `data.cache_gb`, those used longest ago are removed; a process that still
has one open can go on reading it, as the system keeps a removed file until it is closed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from nextblock.config import DataConfig
from nextblock.data.sources.cache import cache_dir

__all__ = [
    "RemoteError",
    "RemoteState",
    "expand",
    "folder_of",
    "held_copy",
    "is_remote",
    "local_copy",
    "read_small",
    "remote_state",
]

log = logging.getLogger(__name__)

T = TypeVar("T")

RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
"""Pauses between the attempts to reach a server."""

_TIMEOUT_S = 60
_FINAL_STATUS = (400, 401, 403, 404, 405, 410)
_TAGS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime")


class RemoteError(RuntimeError):
    """A file on a server cannot be had: nothing is wrong with the images in it, so the run must stop."""

    def __init__(self, message: str) -> None:
        # A worker's error reaches the main process as one whose message is the text of its traceback.
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class RemoteState(NamedTuple):
    """What a server tells of a file; two files that differ, differ in it where the server tells enough."""

    size: int | None
    tag: str | None


def is_remote(spec: str) -> bool:
    """Whether a source lies on a server."""
    return re.match(r"(https?|s3|gs)://", spec) is not None


def expand(spec: str) -> list[str]:
    """The addresses that braces stand for: `x-{008..010}.tar` is x-008.tar, x-009.tar, x-010.tar."""
    parts = re.split(r"\{(\d+\.\.\d+)\}", spec)
    choices = [_numbers(spec, part) if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(chosen) for chosen in product(*choices)]


def _numbers(spec: str, text: str) -> list[str]:
    first, last = text.split("..")
    if int(last) < int(first):
        raise ValueError(f"{spec!r}: {{{text}}} runs backwards; write the smaller number first")
    return [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]


# ------------------------------------------------------------------------------------------------- copies


def folder_of(url: str, data: DataConfig) -> Path:
    """The folder in the cache that belongs to an address."""
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(urlsplit(url).path).name)[-80:]
    digest = hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
    folder = cache_dir(data) / "remote" / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def local_copy(url: str, data: DataConfig, state: RemoteState | None = None) -> Path:
    """Where a copy of the file lies, which is fetched if need be; `state`: what the server told of it.

    `RemoteError` where it cannot be fetched after several attempts, or has become another file. It may be
    removed at any time, to make room.
    """
    with held_copy(url, data, state) as copy:
        return copy


@contextmanager
def held_copy(url: str, data: DataConfig, state: RemoteState | None = None) -> Iterator[Path]:
    """`local_copy`, that is not removed meanwhile."""
    from filelock import FileLock

    with FileLock(_folder(url, data) / "lock"):  # the system frees it when its process ends, however it ends
        try:
            copy = _copy(url, data, state)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RemoteError(
                f"{url}: no copy can be kept in {cache_dir(data)}: {reason}; make room or set data.cache_dir"
            ) from error
        yield copy


def _folder(url: str, data: DataConfig) -> Path:
    try:
        return folder_of(url, data)
    except (OSError, ValueError) as error:
        raise RemoteError(f"{url}: no copy can be kept: {error}") from error


def _copy(url: str, data: DataConfig, state: RemoteState | None) -> Path:
    folder = folder_of(url, data)
    copy = folder / "copy"
    state = remote_state(url) if state is None else state
    if copy.exists() and _read_state(folder) == state:
        os.utime(copy)
        return copy
    _renew(url, data, folder, state)
    _remove_beyond_limit(data, keep=copy)
    return copy


def _renew(url: str, data: DataConfig, folder: Path, state: RemoteState) -> None:
    """Fetch the file aside and put it in place of the copy, if there is one."""
    if state.size is not None and state.size > data.cache_gb * 1e9:
        raise RemoteError(
            f"{url} takes {_size(state.size)}, more than data.cache_gb {data.cache_gb:g} allows; make that "
            "larger, or write smaller shards"
        )
    log.debug("fetching %s (%s)", url, "size unknown" if state.size is None else _size(state.size))
    part, copy = folder / "part", folder / "copy"
    found = _attempt(url, lambda: _fetch(url, part))
    if found != state:
        part.unlink()
        raise RemoteError(
            f"{url} has changed on the server ({_told(state)} before, {_told(found)} now); start again when "
            "its shards no longer change"
        )
    copy.unlink(missing_ok=True)  # before its state is, as that must never describe another copy
    (folder / "state.json").write_text(json.dumps(state._asdict()))
    part.replace(copy)


def _read_state(folder: Path) -> RemoteState | None:
    try:
        return RemoteState(**json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError, TypeError):  # a power cut left it half-written: the copy is fetched anew
        return None


def _fetch(url: str, part: Path) -> RemoteState:
    """Fetch a file, and tell what the server says of it now; an `OSError` where it is not whole."""
    files, path = _file_system(url)
    files.get_file(path, str(part))
    size = part.stat().st_size
    found = _state(url)
    if found.size is not None and size != found.size:
        raise OSError(f"{size:,} of {found.size:,} bytes came")
    with part.open("rb") as file:
        os.fsync(file.fileno())
    return found


def _remove_beyond_limit(data: DataConfig, keep: Path) -> None:
    """Remove the copies used longest ago, but for those being opened, until the rest is within the limit."""
    from filelock import FileLock, Timeout

    root = cache_dir(data) / "remote"
    with FileLock(root / "lock"):
        copies = []
        for copy in root.glob("*/copy"):
            try:
                status = copy.stat()
            except FileNotFoundError:  # it is being replaced by a new one
                continue
            copies.append((status.st_mtime_ns, status.st_size, copy))
        total = sum(size for _, size, _ in copies)
        for _, size, copy in sorted(copies):
            if total <= data.cache_gb * 1e9:
                break
            if copy == keep:
                continue
            try:
                with FileLock(copy.with_name("lock"), timeout=0):
                    copy.unlink(missing_ok=True)
            except Timeout:  # another process or thread is at it
                continue
            total -= size
            log.debug("removed %s (%s) from the cache", copy, _size(size))


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


def _told(state: RemoteState) -> str:
    return f"{'unknown size' if state.size is None else f'{state.size:,} bytes'}, {state.tag or 'no ETag'}"


# ------------------------------------------------------------------------------------------------- servers


def remote_state(url: str) -> RemoteState:
    """Ask the server what the file is; `RemoteError` where it is not there, or no answer comes."""
    return _attempt(url, lambda: _state(url))


def read_small(url: str) -> bytes | None:
    """A small file's content, or None where the server has no such file (or does not let it be read)."""

    def read() -> bytes | None:
        files, path = _file_system(url)
        try:
            return files.cat_file(path)
        except (FileNotFoundError, PermissionError):
            return None

    return _attempt(url, read)


def _state(url: str) -> RemoteState:
    files, path = _file_system(url)
    files.invalidate_cache()
    info = files.info(path)
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), None)
    return RemoteState(info.get("size"), tag)


def _file_system(url: str) -> tuple[Any, str]:
    """The means to reach a server; one for every process, as its threads do not survive a fork."""
    try:
        from fsspec.core import url_to_fs

        if not url.startswith("http"):
            return url_to_fs(url)
        import aiohttp
    except ImportError as error:
        package = "gcsfs" if url.startswith("gs:") else "'nextblock[remote]'"
        raise RemoteError(f"{url} needs a package ({error}): pip install {package}") from error
    # aiohttp's own limit is five minutes for the whole file, and it disregards proxies.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=_TIMEOUT_S, sock_read=_TIMEOUT_S)
    return url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True})


def _attempt(url: str, action: Callable[[], T]) -> T:
    """Do it, again after a pause where the network or the server failed."""
    for pause_s in (*RETRY_AFTER_S, None):
        try:
            return action()
        except RemoteError:
            raise
        except Exception as error:  # every kind of server has its own
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
            cause = _cause(error)
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            if _is_final(error):
                raise RemoteError(
                    f"{url} cannot be read: {reason}; check the address and that you may read it"
                ) from error
            if pause_s is None:
                raise RemoteError(
                    f"{url} cannot be fetched, after {len(RETRY_AFTER_S) + 1} attempts: {reason}; run the "
                    "same command again when the server answers, and it goes on"
                ) from error
            log.warning("%s: %s; next attempt in %g s", url, reason, pause_s)
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def _cause(error: BaseException) -> BaseException:
    """What went wrong: over http fsspec says of everything that the file was not found."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    return error if cause is None else cause


def _is_final(error: BaseException) -> bool:
    """Whether another attempt would end the same way."""
    cause = _cause(error)
    status = getattr(cause, "status", None)
    if isinstance(status, int):
        return status in _FINAL_STATUS
    return isinstance(cause, FileNotFoundError | PermissionError | ValueError) or "Credentials" in repr(cause)
