"""Tar shards on a server: `https://HOST/x-{0000..0003}.tar`, `s3://BUCKET/...`, `gs://BUCKET/...`.

A shard is copied whole into the cache folder when it is first needed, by one process while others wait. Its
index stays when the copy goes, so that a later start knows every name without fetching anything.
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

from nextblock.config import DataConfig
from nextblock.data.sources import tar
from nextblock.data.sources.base import DataError, OpenFile
from nextblock.errors import UsageError
from nextblock.logs import muted

log = logging.getLogger(__name__)

T = TypeVar("T")

# Pauses between the attempts to reach a server.
RETRY_AFTER_S = (1.0, 2.0, 4.0, 8.0, 16.0)
_FINAL_STATUS = (400, 401, 403, 404, 405, 410)
_TAGS = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "updated", "mtime")
# Loggers that report every place where credentials were found.
_TALKATIVE = ("botocore", "aiobotocore")


class RemoteError(DataError):
    """A shard on a server cannot be fetched, which is no image's fault: a run saves and stops."""


class RemoteTarSource(tar.TarSource):
    """The images of shards of which only some may lie on this machine; `RemoteError` if the server fails."""

    def __init__(self, spec: str, data: DataConfig) -> None:
        self._urls = urls = tar.expand_braces(spec)
        if not urlsplit(urls[0]).path.endswith(".tar"):
            raise UsageError(f"{spec!r}: only tar shards are read from a server, such as https://HOST/x.tar")
        try:
            _file_system(urls[0])
        except ImportError as error:
            package = "gcsfs" if spec.startswith("gs:") else "fsspec aiohttp s3fs"
            raise UsageError(f"{spec!r} needs a package ({error}): pip install {package}") from error
        folder = tar.cache_dir(data, "remote")
        with suppress(OSError):  # told when the first copy is to be kept; indexes alone may be there already
            folder.mkdir(parents=True, exist_ok=True)
        with muted(logging.WARNING, *_TALKATIVE):
            self._states = tar.in_threads(lambda url: _attempt(url, lambda: _state(url)), urls)
            total_gb = sum(size for size, _ in self._states) / 1e9
            if total_gb > data.cache_gb:
                log.warning(
                    "%s takes %.4g GB, so shards will be fetched over and over; set data.cache_gb to %.4g",
                    *(spec, total_gb, total_gb * 1.01),
                )
            names = [PurePosixPath(urlsplit(url).path).name for url in urls]
            # A shard that changes on the server gets another name in the cache, and so another index.
            keys = [
                tar.digest(json.dumps([url, *state]).encode())
                for url, state in zip(urls, self._states, strict=True)
            ]
            paths = [folder / f"{name[-44:-4]}-{key}.tar" for name, key in zip(names, keys, strict=True)]
            super().__init__(spec, paths, data, names=names if len(set(names)) == len(urls) else urls)

    def _index(self, shard: int) -> tar.TarIndex:
        """A shard's index: as kept, or as it lies beside the shard on the server, or made from a copy."""
        url, (size, _) = self._urls[shard], self._states[shard]
        kept = self._paths[shard].with_suffix(tar.INDEX_ENDING)
        index = tar.read_index(kept)
        if index is None:
            parts = urlsplit(url)  # what follows the path (a signature, say) stays
            address = parts._replace(path=parts.path + tar.INDEX_ENDING).geturl()
            with suppress(RemoteError, OSError):
                _attempt(address, lambda: _download(address, kept))
                index = tar.read_index(kept)
        # An index from the server is of this shard if the size agrees. Its time never does: uploading changes
        # it.
        if index is None or index.head["stamp"][0] != size:
            index = tar.build_index(self._open_copy(shard), url)
            tar.write_index(kept, index, [size])
        return index

    def _open(self, shard: int) -> OpenFile:
        if shard not in self._files:
            # A copy that was removed takes room on the disk as long as it is open.
            for other in [n for n, file in self._files.items() if os.fstat(file.number).st_nlink == 0]:
                del self._files[other]
            with muted(logging.WARNING, *_TALKATIVE):
                self._files[shard] = self._open_copy(shard)
        os.utime(self._files[shard].number)  # the copies used longest ago are removed first
        return super()._open(shard)

    def _open_copy(self, shard: int) -> OpenFile:
        """The copy of a shard, fetched if need be; it stays readable if it is removed to make room."""
        from filelock import FileLock

        url, path = self._urls[shard], self._paths[shard]
        try:
            # The system frees the lock when its process ends, however that ends.
            with FileLock(path.with_suffix(".lock")):
                if not path.exists():
                    _fetch(url, self._states[shard], path, int(self._data.cache_gb * 1e9))
                return OpenFile(path)
        except OSError as error:
            reason = f"no copy can be kept in {path.parent}: {error.strerror or error}"
            raise RemoteError(f"{url}: {reason}; set data.cache_dir to a writable folder") from error


def _fetch(url: str, state: tuple[int, str | None], path: Path, limit: int) -> None:
    """Copy a shard to `path`, whole or not at all, among at most `limit` bytes of copies."""
    size, part = state[0], path.with_suffix(".part")
    if size > limit:
        how = "raise it, or write smaller shards"
        raise RemoteError(f"{url} is larger than data.cache_gb {limit / 1e9:g}; {how}")

    def fetch() -> None:
        _download(url, part)
        # The index is of one state of the file: with another one it would point to wrong bytes.
        if _state(url) != state:
            raise RemoteError(f"{url} has changed on the server; start again when it no longer changes")
        if part.stat().st_size != size:
            raise ConnectionError(f"{part.stat().st_size:,} of {size:,} bytes came")

    try:
        _make_room(size, limit, path.parent)
        _attempt(url, fetch)
        # On the disk before it gets its name: after a power cut a copy is whole, or not there.
        with part.open("rb") as file:
            os.fsync(file.fileno())
        _make_room(size, limit, path.parent)  # once more, as others may have come meanwhile
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _make_room(coming: int, limit: int, folder: Path) -> None:
    """Remove the copies used longest ago, except those being opened, until `coming` bytes fit the limit."""
    from filelock import FileLock, Timeout

    # One process at a time counts and removes: two would each see the other's room as free.
    with FileLock(folder / "lock"):
        stats = [(path.stat(), path) for path in folder.glob("*.tar")]
        total = coming + sum(status.st_size for status, _ in stats)
        for status, path in sorted(stats, key=lambda one: one[0].st_mtime_ns):
            if total <= limit:
                break
            # A lock that is held means that its copy is being opened; waiting for it could last forever.
            with suppress(Timeout), FileLock(path.with_suffix(".lock"), timeout=0):
                path.unlink()
                total -= status.st_size


def _state(url: str) -> tuple[int, str | None]:
    """A file's size, and the first tag that the server states: what differs if the file does."""
    files, path = _file_system(url)
    files.invalidate_cache()  # fsspec remembers what it was told earlier
    info = files.info(path)
    if info.get("size") is None:
        raise RemoteError(f"{url}: the server states no length; use one that does")
    return info["size"], next((str(info[name]) for name in _TAGS if info.get(name)), None)


def _download(url: str, target: Path) -> None:
    files, path = _file_system(url)
    files.get_file(path, str(target))


def _file_system(url: str) -> tuple[Any, str]:
    """The means to reach a server; asked for each time, as those of a parent process do not work."""
    from fsspec.core import url_to_fs

    if not url.startswith("http"):
        return url_to_fs(url)
    import aiohttp

    # aiohttp's own limit is five minutes for the whole file, and it disregards proxies.
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=60, sock_read=60)
    return url_to_fs(url, client_kwargs={"timeout": timeout, "trust_env": True})


def _attempt(url: str, action: Callable[[], T]) -> T:
    """Do it, again after a pause if the network or the server failed."""
    pauses_s = list(RETRY_AFTER_S)
    while True:
        try:
            return action()
        except RemoteError:
            raise
        except Exception as error:  # every kind of server has its own
            # Over http fsspec says of whatever went wrong that the file was not found.
            cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())
            # Asking again helps if the network or the server failed, not if the file or the right is missing.
            status = getattr(cause, "status", None)
            refused = isinstance(cause, FileNotFoundError | PermissionError | ValueError) and status is None
            if refused or status in _FINAL_STATUS or "Credentials" in repr(cause):
                raise RemoteError(f"{url} cannot be read: {reason}; check the address and access") from error
            if not pauses_s:
                raise RemoteError(f"{url} cannot be fetched: {reason}; try again later") from error
            log.warning("%s: %s; next attempt in %g s", url, reason, pauses_s[0])
            time.sleep(pauses_s.pop(0))
