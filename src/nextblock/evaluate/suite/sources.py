"""A benchmark's images as two sources: those to train on and those to test on, whole or a part of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Int64

from nextblock.atomic import write_text
from nextblock.config import DataConfig
from nextblock.data import Source, open_source
from nextblock.data.random import keyed_permutation
from nextblock.data.sources import absolute_spec
from nextblock.data.sources.folder import SUBSET_HEADER
from nextblock.evaluate.suite.layouts import Files, Sources

__all__ = ["write_sources"]


def write_sources(
    found: Files | Sources, lists: Path, name: str, *, max_images: int | None, seed: int, data: DataConfig
) -> Sources:
    """Name the sources of a benchmark; where they need lists of images, write those below `lists`.

    With `max_images`, at most so many images of each are drawn by the seed; classes stay as they are.
    """
    if isinstance(found, Sources) and max_images is None:
        return found
    lists.mkdir(parents=True, exist_ok=True)
    if isinstance(found, Files):
        everything = lists / f"{name}.txt"
        lines = (f"{path}\t{label}" for path, label in zip(found.paths, found.classes, strict=True))
        _write(everything, "\n".join(lines) + "\n")
        of = f"files:{everything.absolute()}"
        train, test = (_some(part, max_images, seed) for part in (found.train, found.test))
        return Sources(
            _write_part(lists / f"{name}-train.txt", of, train),
            _write_part(lists / f"{name}-test.txt", of, test),
        )
    assert max_images is not None
    train, test = (open_source(spec, data) for spec in found)
    return Sources(
        _drawn(train, lists / f"{name}-train.txt", max_images, seed),
        _drawn(test, lists / f"{name}-test.txt", max_images, seed),
    )


def _some(numbers: Int64[np.ndarray, " n"], count: int | None, seed: int) -> Int64[np.ndarray, " some"]:
    if count is None or count >= len(numbers):
        return numbers
    return np.sort(numbers[keyed_permutation(seed, len(numbers), "suite")[:count]])


def _drawn(source: Source, path: Path, count: int, seed: int) -> str:
    if count >= len(source):
        return source.spec
    numbers = np.sort(keyed_permutation(seed, len(source), "suite")[:count])
    return _write_part(path, absolute_spec(source.spec), numbers)


def _write_part(path: Path, of: str, numbers: Int64[np.ndarray, " n"]) -> str:
    _write(path, "\n".join([SUBSET_HEADER.decode(), f"# of: {of}", *map(str, numbers.tolist())]) + "\n")
    return f"subset:{path.absolute()}"


def _write(path: Path, text: str) -> None:
    if not (path.is_file() and path.read_text(encoding="utf-8") == text):
        write_text(path, text)
