"""Tar shards in WebDataset's layout: every image member is a sample, read at any place in any order."""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np

from nextblock.config import DataConfig
from nextblock.data.decode import BadImageError
from nextblock.data.sources.base import Damage, EncodedSource, Labels, check_size
from nextblock.data.sources.folder import any_unicode_form
from nextblock.data.sources.names import EXTENSIONS, Names, describe_others, in_class_order, is_image, text
from nextblock.data.sources.tar_index import OpenFile, TarIndex, tar_indexes

log = logging.getLogger(__name__)

# Shards that a process keeps open; systems allow 1024 open files or fewer.
MAX_OPEN = 64
_SHARD_STEM = re.compile(r".*[-_.]\d+|\d{4,6}|train|val|test")


class TarSource(EncodedSource):
    """The images of tar shards in the order of shards and members; of several of one name the last counts.

    `stems`, if given, are the classes of the shards whose images state none.
    """

    def __init__(
        self,
        spec: str,
        paths: Sequence[Path],
        data: DataConfig,
        names: Sequence[str] = (),
        stems: Sequence[str] = (),
    ) -> None:
        self.spec, self._data, self._paths, self._stems = spec, data, tuple(paths), tuple(stems)
        names = list(names) or [text(os.fsencode(path.name)) for path in paths]
        # Shards of one name in several folders are called by their paths.
        self._shard_names = names if len(set(names)) == len(paths) else [str(path) for path in paths]
        self._files: dict[int, OpenFile] = {}
        head, joined, table = self._read_indexes()
        self._names = Names.from_joined(joined.tobytes(), table[0])
        self._offsets, self._sizes, self._numbers = table[1:]
        self._counts = np.array(head["counts"], dtype=np.int64)
        self._ends = np.cumsum(self._counts)
        self._classes, self._unusable = head["classes"], head["unusable"]
        others = Counter(head["others"])
        if not len(self):
            nested = "; unpack it to a directory, in which each tar is a class" if others[".tar"] else ""
            raise ValueError(
                f"{spec!r} holds no images: {describe_others(others)}; an image member's name ends in "
                f"{' '.join(sorted(EXTENSIONS))}{nested}"
            )
        if others:
            log.info("%s: %d images; ignored %s", spec, len(self), describe_others(others))
        self.damage = tuple(Damage(self._shard_names[shard], *rest) for shard, *rest in head["damage"])
        for damage in self.damage:
            log.warning("%s", damage)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def has_labels(self) -> bool:
        """Whether every image states a label, or all lie in folders, or in tars named after classes."""
        return not isinstance(self._found, str)

    def empty_classes(self) -> list[str]:
        """Tars without images among those that are classes."""
        are_classes = self.has_labels and set(self.class_names) <= set(self._stems)
        return sorted(set(self._stems) - set(self.class_names)) if are_classes else []

    def _content(self, index: int) -> bytes:
        offset, size = int(self._offsets[index]), int(self._sizes[index])
        check_size(size, self._data)
        if offset < 0:
            raise BadImageError("it is stored as a sparse file; pack the tar again without --sparse")
        try:
            content = self._open(self._shard_of(index)).read(size, offset)
        except OSError as error:
            raise BadImageError(f"its shard cannot be read: {error.strerror or error}") from error
        if len(content) != size:
            raise BadImageError("its shard has changed since it was indexed")
        return content

    def _open(self, shard: int) -> OpenFile:
        # The last entry of the dictionary is the one used last, so the first one is closed.
        self._files[shard] = found = self._files.pop(shard, None) or OpenFile(self._paths[shard])
        if len(self._files) > MAX_OPEN:
            self._files.pop(next(iter(self._files)), None)
        return found

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._ends, index, side="right"))

    def _name(self, index: int) -> str:
        return f"{self._shard_names[self._shard_of(index)]}/{text(self._names[index])}"

    @cached_property
    def _found(self) -> Labels | str:
        """The labels, or why there are none."""
        if self._unusable:
            shard, reason = self._unusable[0]
            where = f"{self._shard_names[shard]}/{reason}"
            return f"{self.spec!r} has an unusable label: {where}; use text or numbers"
        without = np.flatnonzero(self._numbers < 0)
        if 0 < len(without) < len(self):
            return (
                f"{self.spec!r} has no labels for {len(without)} of its {len(self)} images, the first "
                f"{self.name(int(without[0]))!r}; give each a .cls member, or none"
            )
        if not len(without):
            rank, names = in_class_order(self._classes)
            return rank[self._numbers], names
        # A tar of one class may hold its images in a folder, called the same in all tars, or like the class.
        # So folders are the classes only if there are several; otherwise the tars are.
        folders = None if self._names.number_in_root() else self._names.first_folders()
        if folders and (len(self._stems) < 2 or len(folders[1]) > 1):
            return folders
        if len(self._stems) >= 2:
            shards = np.flatnonzero(self._counts)  # a tar without images is no class, like an empty folder
            rank, names = in_class_order([self._stems[shard] for shard in shards])
            return np.repeat(rank, self._counts[shards]), names
        return (
            f"{self.spec!r} has no labels; add .cls members, or a label, cls or class in .json members, or "
            "put every image in a folder of its class"
        )

    def _find_labels(self) -> Labels:
        if isinstance(self._found, str):
            raise ValueError(self._found)  # noqa: TRY004 - no wrong type, but no labels
        return self._found

    def _make_fingerprint(self) -> str:
        return f"tar-{len(self)}-{self._names.digest(self._sizes)}"

    def _read_indexes(self) -> TarIndex:
        return tar_indexes(self.spec, self._paths, self._data)

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_files": {}}


def open_tars(spec: str, data: DataConfig) -> TarSource:
    """The shards that a spec with braces names; `ValueError` names the first three that are missing."""
    paths = [any_unicode_form(Path(name).expanduser()) for name in expand_braces(spec)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        first = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise ValueError(
            f"{spec!r}: {len(missing)} of {len(paths)} shards are missing: {first}; name those there are, "
            "such as x-{0000..0099}.tar"
        )
    return TarSource(spec, paths, data)


def open_class_tars(spec: str, path: Path, data: DataConfig) -> TarSource | None:
    """The tars of a directory that has neither images nor folders; None for any other directory.

    Their names are classes (ImageNet-21k), unless all are numbered like shards (`train_003`, `00012`).
    """
    tars = []
    # If the directory cannot be read, the search for images says so.
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            # The first image or folder ends the search, so a large folder of images costs nothing.
            if entry.is_dir() or is_image(os.fsencode(entry.name)):
                return None
            tars += [Path(entry.path)] if entry.name.lower().endswith(".tar") else []
    stems = [text(os.fsencode(tar.stem)) for tar in sorted(tars)]
    are_classes = not all(map(_SHARD_STEM.fullmatch, stems))
    return TarSource(spec, sorted(tars), data, stems=stems if are_classes else ()) if tars else None


def expand_braces(spec: str) -> list[str]:
    """The names that braces stand for: `x-{008..010}.tar` is x-008.tar, x-009.tar, x-010.tar."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}", spec)
    if not found:
        return [spec]
    first, last = found.groups()
    if not 0 <= int(last) - int(first) < 10**6:
        raise ValueError(f"{spec!r}: {found[0]} must run upwards, over a million numbers at most")
    numbers = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    rests = expand_braces(spec[found.end() :])
    return [spec[: found.start()] + number + rest for number in numbers for rest in rests]
