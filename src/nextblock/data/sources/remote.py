"""Tar shards on a server: `https://HOST/x-{0000..0003}.tar`, `s3://BUCKET/...`, `gs://BUCKET/...`.

A shard is copied whole into the cache folder when it is first needed, by one process while others wait. Its
index stays when the copy goes, so that a later start knows every name without fetching anything.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from nextblock.config import DataConfig
from nextblock.data.sources.base import DataError
from nextblock.data.sources.tar import TarSource, expand_braces
from nextblock.data.sources.tar_index import (
    INDEX_ENDING,
    OpenFile,
    TarIndex,
    build_index,
    cache_dir,
    digest,
    in_threads,
    join_indexes,
    read_index,
    write_index,
)
from nextblock.logs import held_back

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


class RemoteState(NamedTuple):
    """What a server tells of a file; it differs if the file does, provided the server tells enough."""

    size: int | None
    tag: str | None


def open_remote(spec: str, data: DataConfig) -> RemoteTarSource:
    """The shards that a spec names; `ValueError` for what is no tar, `RemoteError` if the server fails."""
    urls = expand_braces(spec)
    if not urlsplit(urls[0]).path.endswith(".tar"):
        raise ValueError(f"{spec!r}: only tar shards are read from a server, such as https://HOST/x.tar")
    try:
        _file_system(urls[0])
    except ImportError as error:
        package = "gcsfs" if spec.startswith("gs:") else "fsspec aiohttp s3fs"
        raise ValueError(f"{spec!r} needs a package ({error}): pip install {package}") from error
    return RemoteTarSource(spec, urls, data)


class RemoteTarSource(TarSource):
    """The images of shards of which only some may lie on this machine."""

    def __init__(self, spec: str, urls: Sequence[str], data: DataConfig) -> None:
        self._urls, self._data = tuple(urls), data
        with held_back(logging.WARNING, *_TALKATIVE):
            self._states = in_threads(lambda url: _attempt(url, lambda: _state(url)), urls, spec)
            total_gb = sum(state.size or 0 for state in self._states) / 1e9
            if total_gb > data.cache_gb:
                log.warning(
                    "%s takes %.4g GB, so shards will be fetched over and over; set data.cache_gb to %.4g",
                    *(spec, total_gb, total_gb * 1.01),
                )
            names = [PurePosixPath(urlsplit(url).path).name for url in urls]
            # A shard that changes on the server gets another name in the cache, and so another index.
            keys = [digest([url, *state]) for url, state in zip(urls, self._states, strict=True)]
            folder = cache_dir(data, "remote")
            paths = [folder / f"{name[-44:-4]}-{key}.tar" for name, key in zip(names, keys, strict=True)]
            super().__init__(spec, paths, data, names=names if len(set(names)) == len(urls) else urls)

    def _read_indexes(self) -> TarIndex:
        return join_indexes(in_threads(self._index, range(len(self._urls)), self.spec))

    def _index(self, shard: int) -> TarIndex:
        """A shard's index: as kept, or as it lies beside the shard on the server, or made from a copy."""
        url, state, path = self._urls[shard], self._states[shard], self._paths[shard]
        kept = path.with_suffix(".npz")
        index = read_index(kept)
        # Without a stated size nothing tells whether the index on the server is of this shard.
        if index is None and state.size:
            parts = urlsplit(url)  # what follows the path (a signature, say) stays
            address = parts._replace(path=parts.path + INDEX_ENDING).geturl()
            with suppress(RemoteError, OSError):
                _attempt(address, lambda: _download(address, kept, 2**28, "the index is too large"))
                index = read_index(kept)
        if index is None or state.size not in (None, index.head["stamp"][0]):
            index = build_index(_open_copy(url, state, path, self._data), url)
            write_index(kept, index, [state.size])
        return index

    def _open(self, shard: int) -> OpenFile:
        if shard not in self._files:
            # A copy that was removed takes room on the disk as long as it is open.
            for other in [n for n, file in self._files.items() if os.fstat(file.number).st_nlink == 0]:
                del self._files[other]
            with held_back(logging.WARNING, *_TALKATIVE):
                url, state, path = self._urls[shard], self._states[shard], self._paths[shard]
                self._files[shard] = _open_copy(url, state, path, self._data)
        os.utime(self._files[shard].number)  # the copies used longest ago are removed first
        return super()._open(shard)


def _open_copy(url: str, state: RemoteState, path: Path, data: DataConfig) -> OpenFile:
    """The copy of a shard, fetched if need be; it stays readable if it is removed to make room."""
    from filelock import FileLock

    try:
        # The system frees the lock when its process ends, however that ends.
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                _fetch(url, state, path, data)
            return OpenFile(path)
    except OSError as error:
        reason = f"no copy can be kept in {path.parent}: {error.strerror or error}"
        raise RemoteError(f"{url}: {reason}; set data.cache_dir to a writable folder") from error


def _fetch(url: str, state: RemoteState, path: Path, data: DataConfig) -> None:
    limit, part = int(data.cache_gb * 1e9), path.with_suffix(".part")
    too_large = f"{url} is larger than data.cache_gb {data.cache_gb:g}; raise it, or write smaller shards"
    if (state.size or 0) > limit:
        raise RemoteError(too_large)

    def fetch() -> None:
        _download(url, part, limit, too_large)
        # The index is of one state of the file: with another one it would point to wrong bytes.
        if _state(url) != state:
            raise RemoteError(f"{url} has changed on the server; start again when it no longer changes")
        if state.size not in (None, part.stat().st_size):
            raise ConnectionError(f"{part.stat().st_size:,} of {state.size:,} bytes came")

    try:
        _make_room(state.size or 0, limit, path.parent)
        _attempt(url, fetch)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        # Once more, as others may have come meanwhile, and the size may not have been known.
        _make_room(part.stat().st_size, limit, path.parent)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _make_room(coming: int, limit: int, folder: Path) -> None:
    """Remove the copies used longest ago, except those being opened, until `coming` bytes fit the limit."""
    from filelock import FileLock, Timeout

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


def _state(url: str) -> RemoteState:
    files, path = _file_system(url)
    files.invalidate_cache()
    info = files.info(path)
    tag = next((str(info[name]) for name in _TAGS if info.get(name)), None)
    return RemoteState(info.get("size"), tag)


def _download(url: str, target: Path, limit: int, too_large: str) -> None:
    """Fetch a file, and stop after `limit` bytes, whatever length the server states."""
    from fsspec import Callback

    class Limit(Callback):
        def relative_update(self, inc: int = 1) -> None:
            super().relative_update(inc)
            if self.value > limit:
                raise RemoteError(too_large)

    target.parent.mkdir(parents=True, exist_ok=True)
    files, path = _file_system(url)
    files.get_file(path, str(target), callback=Limit())


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
            status = getattr(cause, "status", None)
            refused = isinstance(cause, FileNotFoundError | PermissionError | ValueError) and status is None
            if refused or status in _FINAL_STATUS or "Credentials" in repr(cause):
                raise RemoteError(f"{url} cannot be read: {reason}; check the address and access") from error
            if not pauses_s:
                raise RemoteError(f"{url} cannot be fetched: {reason}; try again later") from error
            log.warning("%s: %s; next attempt in %g s", url, reason, pauses_s[0])
            time.sleep(pauses_s.pop(0))
