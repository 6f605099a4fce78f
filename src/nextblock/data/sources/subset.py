"""Sources built from other sources: some images of one (`subset:LIST.txt`), or all of several (a mixture)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from nextblock.data.sources.base import Labels, Source
from nextblock.errors import UsageError


class SubsetSource(Source):
    """Some images of the source `of`, in the order of `numbers`; classes keep their numbers and names."""

    def __init__(self, spec: str, of: Source, numbers: np.ndarray, fingerprint: str | None = None) -> None:
        # Numbers are meaningless in another list of images, so raise instead of using wrong images.
        if fingerprint is not None and fingerprint != of.fingerprint:
            remedy = "name the source as it was by of=SPEC, or draw the list again"
            raise UsageError(f"{spec!r}: {of.spec!r} is not what the list was drawn from; {remedy}")
        if (largest := numbers.max()) >= len(of):
            raise UsageError(
                f"{spec!r}: the list names image {largest}, but {of.spec!r} has {len(of)}, from 0"
            )
        # A repeated image would count twice in every epoch and every accuracy.
        if len(np.unique(numbers)) < len(numbers):
            raise UsageError(f"{spec!r}: the list names an image twice; name each once")
        self.spec, self.of, self._numbers = spec, of, numbers
        self.in_memory, self.damage = of.in_memory, of.damage

    def __len__(self) -> int:
        return len(self._numbers)

    @cached_property
    def has_labels(self) -> bool:
        """Whether the other source has labels."""
        return self.of.has_labels

    def _locate(self, index: int) -> tuple[Source, int]:
        super()._locate(index)
        return self.of._locate(int(self._numbers[index]))

    def _name(self, index: int) -> str:
        return self.of.name(int(self._numbers[index]))

    def _find_labels(self) -> Labels:
        # Keep all classes of the other source, even without an image here, so that a classifier's outputs
        # keep their meaning.
        return self.of.labels[self._numbers], self.of.class_names

    def _make_fingerprint(self) -> str:
        # Another order is another source, because runs visit images by number.
        digest = hashlib.blake2b(self.of.fingerprint.encode(), digest_size=16)
        digest.update(self._numbers.astype("<i8").tobytes())
        return f"subset-{len(self)}-{digest.hexdigest()}"


def read_subset_list(spec: str, path: Path) -> tuple[dict[str, str], np.ndarray]:
    """Read a list of numbers; returns its head (`of`, `fingerprint`) and the numbers."""
    if not path.is_file():
        raise UsageError(f"{spec!r}: there is no list {str(path.absolute())!r}; write subset:LIST.txt")
    # Lines of the head are "# key: value"; the first describes the file, and its key is ignored.
    head: dict[str, str] = {}
    numbers = []
    for place, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        number = line.partition("\t")[0].strip()  # the image's name may follow
        if line.startswith("#"):
            key, _, value = line.removeprefix("#").partition(":")
            head[key.strip()] = value.strip()
        elif number.isdecimal():
            numbers.append(int(number))
        elif number:
            begin = f"line {place} of the list begins with {number[:40]!r}, not with the number of an image"
            raise UsageError(f"{spec!r}: {begin}; a list of paths is read as files:LIST.txt")
    if not numbers:
        raise UsageError(f"{spec!r}: the list names no image")
    return head, np.array(numbers, dtype=np.int64)


class ConcatSource(Source):
    """The images of several sources; image i of a part has number i plus the sizes of earlier parts."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self._parts = tuple(parts)
        self.spec = " + ".join(part.spec for part in parts)
        self.in_memory = all(part.in_memory for part in parts)
        self.damage = tuple(damage for part in parts for damage in part.damage)
        # Image i of part p has number starts[p] + i; the last entry is the total.
        self._starts = np.cumsum([0, *map(len, parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def parts(self) -> tuple[Source, ...]:
        """The sources, in their order."""
        return self._parts

    def empty_classes(self) -> list[str]:
        """Empty folders of any part that no other part fills."""
        empty = {name for part in self.parts for name in part.empty_classes()}
        return sorted(empty - set(self.class_names))

    def _part_of(self, index: int) -> tuple[Source, int]:
        # The part is the last one whose start is not above the number.
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[part], index - int(self._starts[part])

    def _locate(self, index: int) -> tuple[Source, int]:
        super()._locate(index)
        part, number = self._part_of(index)
        return part._locate(number)

    def _name(self, index: int) -> str:
        part, number = self._part_of(index)
        return f"{part.spec}: {part.name(number)}"

    def _find_labels(self) -> Labels:
        # Labels can be joined only if equal numbers mean equal classes in all sources.
        if without := [part.spec for part in self.parts if not part.has_labels]:
            raise UsageError(f"{self.spec!r} has no labels, because {without[0]!r} has none")
        if len({part.class_names for part in self.parts}) > 1:
            raise UsageError(f"{self.spec!r} has no labels: its sources have different classes")
        return np.concatenate([part.labels for part in self.parts]), self.parts[0].class_names

    def _make_fingerprint(self) -> str:
        # In the order of the parts, which determines the images' numbers.
        text = "\n".join(part.fingerprint for part in self.parts)
        return f"mixture-{len(self)}-{hashlib.blake2b(text.encode(), digest_size=16).hexdigest()}"
