"""Tar shards on a server: `https://HOST/x-{0000..0003}.tar`, `s3://BUCKET/...`, `gs://BUCKET/...`.

A shard's index is kept when its copy goes, so that a run can start again, and know every image's name,
without fetching anything. The first start takes the index `X.tar.nextblock-index` that lies beside a shard on
the server, as `nextblock data pack` writes it; a shard without one is fetched once to make it. An index from
the server is compared with its shard when that is fetched.
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import TypeVar
from urllib.parse import urlsplit

from nextblock.config import DataConfig
from nextblock.data.sources.cache import Index, read_index, write_index
from nextblock.data.sources.remote import (
    RemoteError,
    RemoteState,
    expand,
    folder_of,
    held_copy,
    read_small,
    remote_state,
)
from nextblock.data.sources.tar import PROGRESS_S, TarSource
from nextblock.data.sources.tar_index import VERSION, tar_index
from nextblock.logs import held_back

__all__ = ["RemoteTarSource", "open_remote"]

log = logging.getLogger(__name__)

T = TypeVar("T")

THREADS = 8
TOUCH_EVERY_S = 10.0
"""Time after which reading a copy marks it as used again."""
_ATTEMPTS = 5
_TALKATIVE = ("botocore", "aiobotocore")
"""Loggers that tell of every place where credentials were found."""
_SERVED = "served"
"""In the header of a kept index: it came from the server and was not compared with its shard yet."""


def open_remote(spec: str, data: DataConfig) -> RemoteTarSource:
    """The shards that a spec names; `ValueError` for what is no tar, `RemoteError` where a server fails."""
    urls = expand(spec)
    if not urlsplit(urls[0]).path.endswith(".tar"):
        raise ValueError(
            f"{spec!r}: only tar shards are read from a server; write an address that ends in .tar, such as "
            "https://HOST/x-{0000..0003}.tar"
        )
    return RemoteTarSource(spec, urls, data)


class RemoteTarSource(TarSource):
    """The image members of shards of which only some may lie on this machine."""

    def __init__(self, spec: str, urls: Sequence[str], data: DataConfig) -> None:
        self._urls = tuple(urls)
        self._inodes: dict[int, int] = {}
        self._touched_s: dict[int, float] = {}
        names = tuple(PurePosixPath(urlsplit(url).path).name for url in urls)
        with held_back(logging.WARNING, *_TALKATIVE):
            self._states = _in_threads(
                remote_state, [(url,) for url in urls], "{done} of {all} shards found", spec
            )
            _warn_of_small_cache(spec, self._states, data)
            super().__init__(
                spec,
                [folder_of(url, data) / "copy" for url in urls],
                data,
                names=names if len(set(names)) == len(names) else self._urls,
            )

    def _read_indexes(self) -> list[Index]:
        each = [(url, state, self._data) for url, state in zip(self._urls, self._states, strict=True)]
        indexes = _in_threads(_index, each, "{done} of {all} shards indexed", self.spec)
        # Those from the server, which may be of what the shard was before.
        self._unchecked = {
            shard: _digest(index) for shard, index in enumerate(indexes) if _SERVED in index.header
        }
        return indexes

    def _path(self, shard: int) -> Path:
        with (
            held_back(logging.WARNING, *_TALKATIVE),
            held_copy(self._urls[shard], self._data, self._states[shard]) as copy,
        ):
            if shard in self._unchecked:
                self._check_index(shard, copy)
            return copy

    def _check_index(self, shard: int, copy: Path) -> None:
        """`RemoteError` where the index that came from the server is not this shard's."""
        url, state = self._urls[shard], self._states[shard]
        try:
            index = _index_of_copy(url, copy, self._data)
        except ValueError as error:
            raise RemoteError(str(error)) from error
        write_index(copy.with_name("index"), *index, version=VERSION, stamp=list(state))
        if _digest(index) != self._unchecked[shard]:
            raise RemoteError(
                f"{url} is not what the index beside it on the server says: names or labels differ, so the "
                "shard is newer; upload its own index or delete that one (here it is not used any more), and "
                "begin a new run; one that began by the old index goes on when the old shard is back"
            )
        del self._unchecked[shard]

    def _map(self, shard: int) -> mmap.mmap:
        if shard in self._maps and self._is_there(shard):
            self._touch(shard)
            return super()._map(shard)
        # An open map keeps a removed copy's room on the disk, so those are closed before there is another.
        for other in [other for other in self._maps if not self._is_there(other)]:
            self._maps.pop(other).close()
        for _ in range(_ATTEMPTS):
            try:
                found = super()._map(shard)
                self._inodes[shard] = self._paths[shard].stat().st_ino
            except FileNotFoundError:  # another process has fetched a shard since, and this copy had to go
                self._maps.pop(shard, None)
                continue
            return found
        raise RemoteError(
            f"{self._urls[shard]}: its copy was removed before it could be read; data.cache_gb "
            f"{self._data.cache_gb:g} is too small for this number of workers, make it larger"
        )

    def _is_there(self, shard: int) -> bool:
        """Whether the copy that is open is still the one in the cache."""
        try:
            return self._paths[shard].stat().st_ino == self._inodes.get(shard)
        except FileNotFoundError:
            return False

    def _touch(self, shard: int) -> None:
        now_s = time.monotonic()
        if now_s - self._touched_s.get(shard, -TOUCH_EVERY_S) < TOUCH_EVERY_S:
            return
        self._touched_s[shard] = now_s
        try:
            os.utime(self._paths[shard])
        except FileNotFoundError:
            log.debug("%s was removed while it was read", self._paths[shard])


def _warn_of_small_cache(spec: str, states: Sequence[RemoteState], data: DataConfig) -> None:
    total = sum(state.size or 0 for state in states)
    if total > data.cache_gb * 1e9:
        log.warning(
            "%s: its shards take %.4g GB, and data.cache_gb is %.4g: as images are read in random order, "
            "shards will be fetched over and over; make it %.4g",
            spec,
            total / 1e9,
            data.cache_gb,
            total / 1e9 * 1.01,
        )


def _index(url: str, state: RemoteState, data: DataConfig) -> Index:
    """A shard's index: kept from before, or from beside it on the server, or made from a copy."""
    folder, stamp = folder_of(url, data), list(state)
    index = read_index(folder / "index", version=VERSION, stamp=stamp)
    if index is not None:
        return index
    index = _served_index(url, state, folder)
    if index is not None:
        index.header[_SERVED] = True
    else:
        log.debug("%s has no index on the server; it is fetched to make one", url)
        with held_copy(url, data, state) as copy:
            index = _index_of_copy(url, copy, data)
    write_index(folder / "index", *index, version=VERSION, stamp=stamp)
    return index


def _index_of_copy(url: str, copy: Path, data: DataConfig) -> Index:
    """Made from the shard itself; `ValueError` naming its address where it is no tar that can be used."""
    try:
        return tar_index(copy, data, called=url)
    finally:
        copy.with_name(f"{copy.name}.nextblock-index").unlink(missing_ok=True)


def _digest(index: Index) -> str:
    """Equal for indexes that say the same."""
    told = {name: value for name, value in index.header.items() if name != _SERVED}
    digest = hashlib.blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16)
    for part in index.parts:
        digest.update(hashlib.blake2b(part, digest_size=16).digest())
    return digest.hexdigest()


def _served_index(url: str, state: RemoteState, folder: Path) -> Index | None:
    """The index beside the shard on the server, if there is one for a shard of this size."""
    content = read_small(_beside(url))
    if content is None:
        return None
    place = folder / "served-index"
    place.write_bytes(content)
    try:
        # The stamp is [size, time of change]; the time is that of the shard where it was packed.
        stamp = json.loads(content.partition(b"\n")[0])["stamp"]
        is_its_own = stamp[0] == state.size
        return read_index(place, version=VERSION, stamp=stamp) if is_its_own else None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        log.debug("%s is no index: %s", _beside(url), error)
        return None
    finally:
        place.unlink()


def _beside(url: str) -> str:
    """The address of a shard's index: the name gets an ending, a query (a signature, say) stays."""
    parts = urlsplit(url)
    return parts._replace(path=f"{parts.path}.nextblock-index").geturl()


def _in_threads(function: Callable[..., T], each: Sequence[tuple], said: str, spec: str) -> list[T]:
    """Call with each of the arguments, several at once, with a line of progress every few seconds."""
    said_s = time.monotonic()
    with ThreadPoolExecutor(min(THREADS, len(each))) as threads:
        waiting = [threads.submit(function, *arguments) for arguments in each]
        try:
            for done, one in enumerate(as_completed(waiting), start=1):
                one.result()
                if time.monotonic() - said_s >= PROGRESS_S:
                    said_s = time.monotonic()
                    log.info("%s: %s", spec, said.format(done=done, all=len(each)))
        finally:
            threads.shutdown(cancel_futures=True)
    return [one.result() for one in waiting]
