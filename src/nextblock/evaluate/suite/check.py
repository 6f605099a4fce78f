"""Compares a benchmark's images below the root with what the papers say of them: there, classes, counts."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from nextblock.config import DataConfig
from nextblock.data import open_source
from nextblock.evaluate.features import check_same_classes
from nextblock.evaluate.suite.benchmarks import Benchmark, Torchvision
from nextblock.evaluate.suite.layouts import Files, MissingDataError, Sources, find

__all__ = ["Check", "check", "class_problem", "count_problems", "known_differences", "labels_are_slow"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was found of one benchmark."""

    name: str
    status: Literal["as it should be", "differs, as known", "differs", "missing"]
    classes: int | None = None
    """None where counting them would mean to read every image."""
    images: tuple[int, int] | None = None
    """Images to train and to test on."""
    problems: tuple[str, ...] = ()
    """What is missing or differs, and what to do."""
    known: tuple[str, ...] = ()
    """What differs from the papers in every copy of this source; no defect of this one."""

    @property
    def is_well(self) -> bool:
        """Whether it is as well as this source has it."""
        return self.status in ("as it should be", "differs, as known")


def check(benchmark: Benchmark, root: Path) -> Check:
    """Find a benchmark's images and count them; of image files, see that each is there. Reads no image."""
    try:
        found = find(benchmark, root)
        counted = _count_files(found) if isinstance(found, Files) else _count_sources(benchmark, found)
    except MissingDataError as error:
        return Check(name=benchmark.name, status="missing", problems=(str(error),))
    except (ValueError, RuntimeError, OSError) as error:
        return Check(name=benchmark.name, status="differs", problems=(" ".join(str(error).split()),))
    of_classes = None if counted.classes is None else class_problem(benchmark, counted.classes)
    problems = [
        *counted.problems,
        *([] if of_classes is None else [of_classes]),
        *count_problems(benchmark, counted.images),
    ]
    known = known_differences(benchmark, counted.images)
    return Check(
        name=benchmark.name,
        status="differs" if problems else "differs, as known" if known else "as it should be",
        classes=counted.classes,
        images=counted.images,
        problems=tuple(problems),
        known=tuple(known),
    )


class _Counted(NamedTuple):
    classes: int | None
    images: tuple[int, int]
    problems: list[str]


def _count_files(found: Files) -> _Counted:
    used = np.concatenate([found.train, found.test])
    lost = [found.paths[number] for number in used.tolist() if not os.path.exists(found.paths[number])]  # noqa: PTH110 - half a million of them
    problems = (
        [f"{len(lost):,} of {len(used):,} image files are not there, the first: {lost[0]}"] if lost else []
    )
    return _Counted(len(set(found.classes)), (len(found.train), len(found.test)), problems)


def _count_sources(benchmark: Benchmark, found: Sources) -> _Counted:
    data = DataConfig(workers=0)
    train, test = (open_source(spec, data) for spec in found)
    images = (len(train), len(test))
    if labels_are_slow(benchmark):
        return _Counted(None, images, [])
    try:
        check_same_classes(train, test)
    except ValueError as error:
        return _Counted(len(train.class_names), images, [str(error)])
    return _Counted(len(train.class_names), images, [])


def labels_are_slow(benchmark: Benchmark) -> bool:
    """Whether its labels come with the images, one by one."""
    return isinstance(benchmark.layout, Torchvision) and benchmark.layout.labels_are_slow


def class_problem(benchmark: Benchmark, classes: int) -> str | None:
    """What is wrong with a number of classes."""
    if classes == benchmark.classes:
        return None
    return f"{classes} classes, not {benchmark.classes}: is it whole? fetch it anew"


def count_problems(benchmark: Benchmark, images: tuple[int, int]) -> list[str]:
    """Which numbers of images are neither the papers', as far as those are known, nor the source's own."""
    if benchmark.source_images == images:
        return []
    purposes = (" + ".join(benchmark.train), benchmark.test)
    return [
        f"{found:,} images in {purpose}, not {known:,} as in AIMv2's Table B1"
        for purpose, found, known in zip(purposes, images, benchmark.images, strict=True)
        if known is not None and known != found
    ]


def known_differences(benchmark: Benchmark, images: tuple[int, int]) -> list[str]:
    """What to say where the source is known to have other numbers of images than the papers."""
    if benchmark.source_images != images:
        return []
    papers = " and ".join("?" if number is None else f"{number:,}" for number in benchmark.images)
    return [
        f"{images[0]:,} and {images[1]:,} images, not {papers} as in AIMv2's Table B1: {benchmark.source} is "
        "known to be divided in another way"
    ]
