"""Tar shards on a server: `https://HOST/x-{0000..0003}.tar`, `s3://BUCKET/...`, `gs://BUCKET/...`.

A shard is copied whole into the cache folder on first use, by one process while others wait. Its index stays
when the copy is removed, so that a later start knows every name without fetching anything.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock, Timeout

from nextblock.config import DataConfig
from nextblock.data.sources import archives
from nextblock.data.sources.base import DataError, OpenFile, digest
from nextblock.errors import UsageError
from nextblock.logs import muted

log = logging.getLogger(__name__)

T = TypeVar("T")
# A file's size, and the server's tag of its content if there is one.
State = tuple[int, str | None]

# Pauses between attempts to reach a server.
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_FINAL_STATUS = (400, 401, 403, 404, 405, 410)
_TAGS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime")
# These loggers report every place where credentials were found.
_muted = muted(logging.WARNING, "botocore", "aiobotocore")


class RemoteError(DataError):
    """A shard on a server cannot be fetched, and no image is at fault: a run saves and stops."""


class RemoteTarSource(archives.TarSource):
    """The images of remote shards, copied here as needed; raises `RemoteError` if the server fails."""

    @_muted
    def __init__(self, spec: str, data: DataConfig) -> None:
        self._urls = urls = archives.expand_braces(spec)
        names = [PurePosixPath(urlsplit(url).path).name for url in urls]
        if not names[0].endswith(".tar"):
            raise UsageError(f"{spec!r}: only tar shards are read from a server, such as https://HOST/x.tar")
        try:
            _file_system(urls[0])
        except ImportError as error:
            package = "gcsfs" if spec.startswith("gs:") else "fsspec aiohttp s3fs"
            raise UsageError(f"{spec!r} needs a package ({error}): pip install {package}") from error
        folder = archives.cache_dir(data, "remote")
        with suppress(OSError):  # reported on the first copy; stored indexes may be enough
            folder.mkdir(parents=True, exist_ok=True)
        self._states = archives.in_threads(lambda url: _attempt(url, lambda: _state(url)), urls)
        total_gb = sum(size for size, _ in self._states) / 1e9
        if total_gb > data.cache_gb:
            log.warning(
                "%s takes %.4g GB, so shards will be fetched over and over; set data.cache_gb to %.4g",
                *(spec, total_gb, total_gb * 1.01),
            )
        # A shard that changes on the server gets a new name in the cache, and so a new index.
        paths = []
        for url, name, state in zip(urls, names, self._states, strict=True):
            key = digest(json.dumps([url, *state]).encode())
            paths.append(folder / f"{name[-44:-4]}-{key}.tar")
        super().__init__(spec, paths, data, names=names if len(set(names)) == len(urls) else urls)

    def _index(self, shard: int) -> archives.TarIndex:
        """A shard's index: from the cache, or from beside the shard on the server, or built from a copy."""
        url, (size, _) = self._urls[shard], self._states[shard]
        cached = self._paths[shard].with_suffix(archives.INDEX_ENDING)
        index = archives.read_index(cached)
        if index is None:
            parts = urlsplit(url)  # keep the query (a signature, say)
            address = parts._replace(path=parts.path + archives.INDEX_ENDING).geturl()
            with suppress(RemoteError, OSError):
                _attempt(address, lambda: _download(address, cached))
                index = archives.read_index(cached)
        # An index from the server belongs to this shard if the size agrees. Uploading changes the time.
        if index is None or index.head["stamp"][0] != size:
            index = archives.build_index(self._open_copy(shard), url)
            archives.write_index(cached, index, [size])
        return index

    @_muted
    def _open(self, shard: int) -> OpenFile:
        if shard not in self._files:
            # A removed copy takes disk space as long as it is open.
            for other in [n for n, file in self._files.items() if os.fstat(file.number).st_nlink == 0]:
                del self._files[other]
            self._files[shard] = self._open_copy(shard)
        os.utime(self._files[shard].number)  # the least recently used copies are removed first
        return super()._open(shard)

    def _open_copy(self, shard: int) -> OpenFile:
        """Open a shard's copy, fetching it if necessary; it stays readable when removed to make room."""
        url, path = self._urls[shard], self._paths[shard]
        try:
            # The system releases the lock when its process ends, for whatever reason.
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _fetch(url, self._states[shard], path, int(self._data.cache_gb * 1e9))
                return OpenFile(path)
        except OSError as error:
            reason = f"no copy can be kept in {path.parent}: {error.strerror or error}"
            raise RemoteError(f"{url}: {reason}; set data.cache_dir to a writable folder") from error


def _fetch(url: str, state: State, path: Path, limit: int) -> None:
    """Copy a shard to `path`, whole or not at all, within `limit` bytes of copies."""
    size, part = state[0], path.with_suffix(".part")
    if size > limit:
        how = "raise it, or write smaller shards"
        raise RemoteError(f"{url} is larger than data.cache_gb {limit / 1e9:g}; {how}")

    def fetch() -> None:
        _download(url, part)
        # The index describes one state of the file: in another it would point to wrong bytes.
        if _state(url) != state:
            raise RemoteError(f"{url} has changed on the server; start again when it no longer changes")
        if part.stat().st_size != size:
            raise ConnectionError(f"received {part.stat().st_size:,} of {size:,} bytes")

    # One process at a time makes room: two would both count the same space as free.
    room = FileLock(path.parent / "lock")
    try:
        with room:
            _make_room(size, limit, path.parent)
        _attempt(url, fetch)
        # Flush before renaming: after a power cut a copy is whole or absent.
        with part.open("rb") as file:
            os.fsync(file.fileno())
        with room:  # again, as other copies may have arrived meanwhile
            _make_room(size, limit, path.parent)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _make_room(needed: int, limit: int, folder: Path) -> None:
    """Remove the least recently used copies, unless being opened, until `needed` bytes fit the limit."""
    stats = [(path.stat(), path) for path in folder.glob("*.tar")]
    total = needed + sum(status.st_size for status, _ in stats)
    for status, path in sorted(stats, key=lambda one: one[0].st_mtime_ns):
        if total <= limit:
            break
        # A held lock means that the copy is being opened; waiting for it could deadlock.
        with suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
            path.unlink()
            total -= status.st_size


def _state(url: str) -> State:
    """A file's size and the server's first tag (ETag or similar), which change with the file."""
    files, path = _file_system(url)
    files.invalidate_cache()  # fsspec caches earlier answers
    info = files.info(path)
    if info.get("size") is None:
        raise RemoteError(f"{url}: the server states no length; use one that does")
    return info["size"], next((str(info[name]) for name in _TAGS if info.get(name)), None)


def _download(url: str, target: Path) -> None:
    files, path = _file_system(url)
    files.get_file(path, str(target))


def _file_system(url: str) -> tuple[Any, str]:
    """A file system for a server; created per call, as one from a parent process does not work."""
    from fsspec.core import url_to_fs

    if not url.startswith("http"):
        return url_to_fs(url)
    import aiohttp

    # By default aiohttp allows five minutes for the whole file, and ignores proxies.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)
    return url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True})


def _attempt(url: str, action: Callable[[], T]) -> T:
    """Run an action; retry after a pause if the network or the server failed."""
    pauses_s = list(RETRY_AFTER_S)
    while True:
        try:
            return action()
        except RemoteError:
            raise
        except Exception as error:  # every kind of server raises its own
            # Over http, fsspec reports any error as FileNotFoundError.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            # Retrying helps if the network or the server failed, not if file or permission is missing.
            status = getattr(cause, "status", None)
            refused = isinstance(cause, FileNotFoundError | PermissionError | ValueError) and status is None
            if refused or status in _FINAL_STATUS or "Credentials" in repr(cause):
                raise RemoteError(f"{url} cannot be read: {reason}; check the address and access") from error
            if not pauses_s:
                raise RemoteError(f"{url} cannot be fetched: {reason}; try again later") from error
            log.warning("%s: %s; next attempt in %g s", url, reason, pauses_s[0])
            time.sleep(pauses_s.pop(0))
