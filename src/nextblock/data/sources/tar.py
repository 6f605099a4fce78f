"""Tar shards as a source, in the WebDataset layout: `X.tar`, `shards-{000000..000999}.tar`.

Every image member is a sample of its own, in the order of the shards and of their members. Any image is read
at once by mmap, where the shard's index says it lies; see `tar_index`.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.mixture import parts_of
from nextblock.data.sources.base import EncodedSource, Labels, Source, in_class_order
from nextblock.data.sources.cache import Index
from nextblock.data.sources.listing import EXTENSIONS, Names, describe_others
from nextblock.data.sources.remote import expand
from nextblock.data.sources.subsets import SubsetSource
from nextblock.data.sources.tar_index import tar_index

__all__ = ["Damage", "TarSource", "damage_of", "open_tar"]

log = logging.getLogger(__name__)

MAX_OPEN = 64
"""Shards that a process keeps open; each takes a file descriptor, of which systems allow 1024 or fewer."""
THREADS = 16
PROGRESS_S = 5.0
"""Time between two progress lines."""


class Damage(NamedTuple):
    """A shard that cannot be read to its end."""

    shard: str
    reason: str
    images: int
    """Those before that, which are used."""

    def __str__(self) -> str:
        return f"{self.shard}: {self.reason}; the {self.images} images before that are used"


def damage_of(source: Source) -> list[Damage]:
    """What is damaged of the shards that a source, a mixture or a subset reads."""
    found = []
    for part in parts_of(source):
        if isinstance(part, SubsetSource):
            found += damage_of(part.of)
        elif isinstance(part, TarSource):
            found += part.damage
    return found


def open_tar(spec: str, data: DataConfig) -> TarSource:
    """The shards that a spec names, on this machine; `ValueError` naming the first three that are missing."""
    path = Path(spec).expanduser()
    if path.is_file():
        return TarSource(spec, [path], data)
    paths = [Path(name).expanduser() for name in expand(spec)]
    missing = [path for path in paths if not path.is_file()]
    if missing and len(paths) == 1 and any(sign in spec for sign in "*?["):
        raise ValueError(
            f"{spec!r}: the signs * ? [ have no meaning here, and there is no such file; name shards by the "
            "numbers from one to another, in braces: shards-{000000..000999}.tar"
        )
    if missing:
        first = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{spec!r}: {len(missing)} of {len(paths)} shards are missing: {first}; fetch them, or name only "
            "those there are"
        )
    return TarSource(spec, paths, data)


class TarSource(EncodedSource):
    """The image members of tar shards; `names` is what to call the shards, by default their file names."""

    def __init__(
        self, spec: str, paths: Sequence[Path], data: DataConfig, names: Sequence[str] | None = None
    ) -> None:
        assert len(paths) >= 1
        self.spec = spec
        self._data = data
        self._paths = tuple(paths)
        self._shard_names = tuple(names) if names is not None else _short_names(paths)
        assert len(self._shard_names) == len(paths)
        _check_distinct(spec, self._shard_names)
        self._maps: dict[int, mmap.mmap] = {}
        indexes = self._read_indexes()
        self.damage = self._damage(indexes)
        """Shards that are not whole."""
        self._say(indexes)
        of_names, lengths, offsets, sizes, classes = zip(*(index.parts for index in indexes), strict=True)
        self._names = Names(b"".join(of_names), _numbers(lengths))
        self._offsets, self._sizes = _numbers(offsets), _numbers(sizes)
        # Where each shard's images end, among all.
        self._ends = np.cumsum([len(part) // 8 for part in lengths])
        self._classes, self._class_names = _joined_classes(indexes, classes)
        if not len(self):
            others = sum((Counter(index.header["others"]) for index in indexes), Counter[str]())
            raise ValueError(
                f"{spec!r} holds no images: {describe_others(others)}; an image member's name ends in "
                f"{' '.join(sorted(EXTENSIONS))}"
            )

    def _read_indexes(self) -> list[Index]:
        return _indexes(self.spec, self._paths, self._data)

    def __len__(self) -> int:
        return len(self._offsets)

    @property
    def has_labels(self) -> bool:
        """Whether every image has a label by its key, or, where none has, a folder in its name."""
        if self._class_names:
            return bool(self._classes.min() >= 0)
        return self._names.number_in_root() == 0

    def _content(self, index: int) -> bytes:
        shard = self._shard_of(index)
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        try:
            content = self._map(shard)
            # Beyond the end of a file that was cut since, reading a map kills the process.
            is_whole = content.size() >= offset + size
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadImageError(f"its shard cannot be read: {reason}") from error
        if not is_whole:
            raise BadImageError("its shard has become shorter since it was indexed")
        return content[offset : offset + size]

    def _path(self, shard: int) -> Path:
        """Where a shard lies, when it is opened."""
        return self._paths[shard]

    def _map(self, shard: int) -> mmap.mmap:
        found = self._maps.pop(shard, None)
        if found is None:
            with self._path(shard).open("rb") as file:
                found = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_RANDOM"):
                found.madvise(mmap.MADV_RANDOM)
        self._maps[shard] = found  # the last is the one used last
        if len(self._maps) > MAX_OPEN:
            self._maps.pop(next(iter(self._maps)), None)
        return found

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int) -> str:
        return f"{self._shard_names[self._shard_of(index)]}/{self._names.text(index)}"

    def _find_labels(self) -> Labels:
        if not self._class_names and self.has_labels:
            return self._names.first_folders()
        if not self._class_names:
            raise ValueError(
                f"{self.spec!r} has no labels: there are no .cls members, no label, cls or class in .json "
                "members, and not every member lies in a folder; add one of these"
            )
        without = np.flatnonzero(self._classes < 0)
        if len(without):
            raise ValueError(
                f"{self.spec!r} has no labels for {len(without)} of its {len(self)} images, the first "
                f"{self.name(int(without[0]))!r}; give each a .cls member, or none"
            )
        return self._classes.astype(np.int64), self._class_names

    def _make_fingerprint(self) -> str:
        return f"tar-{len(self)}-{self._names.digest(self._sizes)}"

    def _say(self, indexes: Sequence[Index]) -> None:
        """What is ignored, in one line, and every shard that is not whole, in a line each."""
        others = sum((Counter(index.header["others"]) for index in indexes), Counter[str]())
        if others:
            number = sum(len(index.parts[1]) // 8 for index in indexes)
            log.info("%s: %d images; ignored %s", self.spec, number, describe_others(others))
        for damage in self.damage:
            log.warning("%s", damage)

    def _damage(self, indexes: Sequence[Index]) -> list[Damage]:
        return [
            Damage(name, index.header["problem"], len(index.parts[1]) // 8)
            for name, index in zip(self._shard_names, indexes, strict=True)
            if index.header["problem"] is not None
        ]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}


def _indexes(spec: str, paths: Sequence[Path], data: DataConfig) -> list[Index]:
    """The index of every shard, many at once, with a line of progress every few seconds."""
    started_s = said_s = time.monotonic()
    with ThreadPoolExecutor(min(THREADS, len(paths))) as threads:
        waiting = [threads.submit(partial(tar_index, path, data)) for path in paths]
        try:
            for done, one in enumerate(as_completed(waiting), start=1):
                one.result()
                if time.monotonic() - said_s >= PROGRESS_S:
                    said_s = time.monotonic()
                    log.info("%s: read the headers of %d of %d shards", spec, done, len(paths))
        finally:
            threads.shutdown(cancel_futures=True)
    if said_s > started_s:
        log.info("%s: read the headers of all %d shards in %.0f s", spec, len(paths), said_s - started_s)
    return [one.result() for one in waiting]


def _joined_classes(indexes: Sequence[Index], classes: Sequence[bytes]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The class of every image over all shards, -1 for none, int32, and the classes' names."""
    found = list(dict.fromkeys(name for index in indexes for name in index.header["classes"]))
    rank, names = in_class_order(found)
    number = {name: rank[position] for position, name in enumerate(found)}
    parts = []
    for index, part in zip(indexes, classes, strict=True):
        of_shard = np.array([*(number[name] for name in index.header["classes"]), -1], dtype=np.int32)
        parts.append(of_shard[np.frombuffer(part, dtype=np.int64)])  # -1 is the last
    return np.concatenate(parts), names


def _numbers(parts: Sequence[bytes]) -> np.ndarray:
    return np.frombuffer(b"".join(parts), dtype=np.int64)


def _short_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """The files' names, or their paths where two are named alike."""
    names = tuple(path.name for path in paths)
    return names if len(set(names)) == len(names) else tuple(map(str, paths))


def _check_distinct(spec: str, names: Sequence[str]) -> None:
    twice = next((name for name, number in Counter(names).items() if number > 1), None)
    if twice is not None:
        raise ValueError(f"{spec!r} names the shard {twice!r} twice; name each once")
