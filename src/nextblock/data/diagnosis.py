"""What an examination means for a training: the findings of `nextblock doctor`, and its report.

A problem would stop a run or spoil what it is worth; a warning is what one should know. Pure functions of
what `doctor` has found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.data.doctor import Duplicates, Examination, duplicates
from nextblock.data.mixture import parts_of
from nextblock.data.sources.tar import damage_of

__all__ = [
    "Checkup",
    "Finding",
    "Leakage",
    "diagnose",
    "find_leakage",
    "geometry_finding",
    "report",
    "size_summary",
]

IMBALANCE = 10
"""Times as many images of the largest class as of the smallest, from which on it is told."""
MANY_DUPLICATES = 0.1
"""Share of images that repeat another, from which on a training is spoilt."""
FAR_MEAN, FAR_STD = 0.1, 1.5
"""Difference of means, and ratio of deviations, from which on other normalisation is advised."""
FEW = 5
"""Examples in a sentence."""
MAX_GROUPS = 1000
"""Groups of duplicates that a report lists."""


class Finding(NamedTuple):
    """Something to know before training."""

    severity: Literal["problem", "warning"]
    what: str
    """In two words."""
    text: str
    """One sentence: numbers, cause, remedy."""


class Leakage(NamedTuple):
    """Images of the validation source that are also trained on."""

    images: int
    examples: tuple[tuple[str, str], ...]
    """Names in validation and in training."""


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """All that was found out about a source."""

    train: Examination
    val: Examination | None = None
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig
    geometry: Finding | None = None
    """Where the size that was asked for is none that `model` could have."""
    per_core_s: float | None = None
    """Training crops that a core makes in a second."""
    images_per_s: float | None = None
    """What a GPU takes."""
    cores: int = 1

    @property
    def workers_needed(self) -> int | None:
        """Processes that keep the GPU busy; None where a rate is not known."""
        if self.per_core_s is None or self.images_per_s is None:
            return None
        return math.ceil(self.images_per_s / self.per_core_s)


def diagnose(checkup: Checkup) -> list[Finding]:
    """Problems first, the gravest before the others, then warnings."""
    train, val = checkup.train, checkup.val
    repeats = duplicates(train.digests, train.readable)
    found = [
        _broken(train, checkup.data),
        _damaged(train),
        checkup.geometry,
        None if val is None else _damaged(val),
        None if val is None else _broken(val, checkup.data),
        None if val is None else _leakage(find_leakage(train, val)),
        *_duplicates(train, repeats),
        *_classes(train),
        _small(train, checkup.model),
        _blank(train),
        _misnamed(train),
        _normalisation(train, checkup.data),
        _workers(checkup),
    ]
    return sorted(filter(None, found), key=lambda finding: finding.severity != "problem")


# ----------------------------------------------------------------------------------------------- findings


def _broken(found: Examination, data: DataConfig) -> Finding | None:
    if not found.num_bad:
        return None
    where, share = found.source.spec, found.num_bad / found.examined
    if not found.num_readable:
        return Finding(
            "problem", "nothing readable", f"none of the {found.examined:,} images of {where} can be read"
        )
    counted = f"{found.num_bad:,} of {found.examined:,} files of {where} ({share:.2%}) cannot be read"
    limit = f"data.max_bad_fraction {data.max_bad_fraction:g}"
    if share > data.max_bad_fraction:
        text = f"{counted}, more than {limit} allows: a run would stop; fix or remove them"
        return Finding("problem", "too many broken files", text)
    return Finding("warning", "broken files", f"{counted}, which {limit} allows; a run leaves them out")


def _damaged(found: Examination) -> Finding | None:
    damage = damage_of(found.source)
    if not damage:
        return None
    shards = f"{len(damage):,} shard{'s' * (len(damage) != 1)} of {found.source.spec}"
    text = f"{shards} cannot be read to the end ({_listed(list(map(str, damage)))}); fetch or pack them again"
    return Finding("problem", "damaged shards", text)


def geometry_finding(model: ModelConfig, **sizes: Any) -> Finding | None:
    """Whether `model` could have these sizes; where not, the nearest that would do."""
    try:
        replace(model, **sizes)
    except ValueError as error:
        return Finding("problem", "image size", str(error))
    return None


def find_leakage(train: Examination, val: Examination) -> Leakage:
    """The images of `val` whose content is also in `train`."""
    groups = duplicates(
        np.concatenate([train.digests, val.digests]), np.concatenate([train.readable, val.readable])
    )
    border = train.examined
    shared = [
        (group[group >= border] - border, group[0])
        for group in (groups.group(i) for i in _groups_across(groups, border).tolist())
    ]
    examples = ((val.name(int(places[0])), train.name(int(first))) for places, first in shared)
    return Leakage(sum(len(places) for places, _ in shared), tuple(islice(examples, FEW)))


def _groups_across(groups: Duplicates, border: int) -> Int64[np.ndarray, " across"]:
    """Groups with a place below the border and one from it on."""
    last = groups.places[groups.starts + groups.lengths - 1]
    return np.flatnonzero((groups.places[groups.starts] < border) & (last >= border))


def _leakage(leakage: Leakage) -> Finding | None:
    if not leakage.images:
        return None
    pairs = ", ".join(f"{ours} = {theirs}" for ours, theirs in leakage.examples)
    return Finding(
        "problem",
        "leakage",
        f"{leakage.images:,} validation images are also trained on ({pairs}); take them out of one side",
    )


def _duplicates(found: Examination, repeats: Duplicates) -> Iterable[Finding]:
    if not len(repeats):
        return
    share = repeats.surplus / found.num_readable
    examples = "; ".join(" = ".join(names) for names in _names(found, repeats, 2))
    yield Finding(
        "problem" if share > MANY_DUPLICATES else "warning",
        "duplicates",
        f"{repeats.surplus:,} images ({share:.2%}) repeat another exactly, in {len(repeats):,} groups "
        f"({examples}); keep one of each",
    )
    if found.source.has_labels:
        clashes = _clashes(found, repeats)
        if clashes.any():
            names = " = ".join(_names_of(found, repeats.group(int(np.flatnonzero(clashes)[0]))))
            yield Finding(
                "warning",
                "two classes",
                f"{int(clashes.sum()):,} groups of equal images lie in more than one class ({names})",
            )


def _clashes(found: Examination, repeats: Duplicates) -> Bool[np.ndarray, " groups"]:
    labels = found.source.labels[found.indices]
    groups = (labels[repeats.group(i)] for i in range(len(repeats)))
    return np.array([group.min() != group.max() for group in groups], dtype=bool)


def _names(found: Examination, repeats: Duplicates, number: int) -> list[list[str]]:
    return [_names_of(found, repeats.group(i)) for i in range(min(number, len(repeats)))]


def _names_of(found: Examination, places: Int64[np.ndarray, " n"]) -> list[str]:
    return [found.name(int(place)) for place in places[:FEW]] + (["..."] if len(places) > FEW else [])


def _classes(found: Examination) -> Iterable[Finding]:
    counts = found.class_counts()
    if counts is None or not found.num_readable:
        return
    names = found.source.class_names
    empty = [names[i] for i in np.flatnonzero(counts == 0)] + _empty_folders(found)
    if empty:
        text = f"{len(empty):,} classes have no readable image{_of_a_sample(found)}: {_listed(empty)}"
        yield Finding("warning", "empty classes", text)
    present = np.where(counts > 0, counts, np.iinfo(np.int64).max)
    smallest, largest = int(present.argmin()), int(counts.argmax())
    if counts[largest] >= IMBALANCE * counts[smallest]:
        yield Finding(
            "warning",
            "unbalanced classes",
            f"{names[largest]} has {counts[largest]:,} images, {names[smallest]} {counts[smallest]:,}",
        )


def _empty_folders(found: Examination) -> list[str]:
    """First-level folders of a directory in which no image lies, which are no classes."""
    folders: set[str] = set()
    for part in parts_of(found.source):
        root = Path(part.spec).expanduser()
        if root.is_dir():
            folders |= {entry.name for entry in root.iterdir() if entry.is_dir() and entry.name[0] != "."}
    return sorted(folders - set(found.source.class_names))


def _of_a_sample(found: Examination) -> str:
    return "" if found.examined == len(found.source) else " among those examined"


def _small(found: Examination, model: ModelConfig) -> Finding | None:
    rows, columns = pair(model.image_size)
    small = found.readable & ((found.sizes[:, 0] < rows) | (found.sizes[:, 1] < columns))
    if not small.any():
        return None
    places = np.flatnonzero(small)
    tiniest = places[np.argsort(found.sizes[places].prod(axis=1, dtype=np.int64), kind="stable")[:FEW]]
    names = [f"{found.name(int(i))} {found.sizes[i, 1]}x{found.sizes[i, 0]}" for i in tiniest]
    return Finding(
        "warning",
        "small images",
        f"{len(places):,} of {found.num_readable:,} images are smaller than the crop of {columns}x{rows} px "
        f"and will be enlarged; the smallest: {_listed(names)}",
    )


def _blank(found: Examination) -> Finding | None:
    count = found.traits["one colour"]
    return Finding("warning", "blank images", f"{count:,} images are of one colour") if count else None


def _misnamed(found: Examination) -> Finding | None:
    count = found.traits["named as another format"]
    text = f"{count:,} files are named as another format than theirs; they are read by their content"
    return Finding("warning", "misnamed files", text) if count else None


def _normalisation(found: Examination, data: DataConfig) -> Finding | None:
    measured = found.statistics
    if measured is None or data.normalize == "auto":
        return None
    told = f"mean {_numbers(measured.mean)} and deviation {_numbers(measured.std)}"
    if len(data.mean) != len(measured.mean):
        why = f"there are {len(measured.mean)} channels, but data.mean has {len(data.mean)} numbers"
        return Finding("problem", "normalisation", f"{why}; use --data.normalize auto ({told})")
    far = np.abs(np.subtract(measured.mean, data.mean)).max() > FAR_MEAN
    ratios = np.maximum(measured.std, 1e-9) / np.array(data.std)
    if far or ratios.max() > FAR_STD or ratios.min() < 1 / FAR_STD:
        why = f"the images have {told}, far from data.mean {_numbers(data.mean)} and data.std"
        return Finding(
            "warning", "normalisation", f"{why} {_numbers(data.std)}; consider --data.normalize auto"
        )
    return None


def _workers(checkup: Checkup) -> Finding | None:
    needed = checkup.workers_needed
    if needed is None or needed < checkup.cores:
        return None
    return Finding(
        "warning",
        "starving",
        f"{checkup.images_per_s:,.0f} images/s need {needed} workers at {checkup.per_core_s:,.0f} images/s "
        f"each, and there are {checkup.cores} cores; use --data.decoder fast, or store smaller images",
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:FEW]) + (", ..." if len(names) > FEW else "")


def _numbers(values: Iterable[float]) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in values) + ")"


# ------------------------------------------------------------------------------------------------- report


def report(checkup: Checkup) -> dict[str, Any]:
    """All of it, for JSON."""
    findings = diagnose(checkup)
    decisive = findings[0] if findings and findings[0].severity == "problem" else None
    return {
        "healthy": decisive is None,
        "decided_by": None if decisive is None else decisive.what,
        "findings": [finding._asdict() for finding in findings],
        "train": _examined(checkup.train),
        "val": None if checkup.val is None else _examined(checkup.val),
        "leakage": None if checkup.val is None else find_leakage(checkup.train, checkup.val)._asdict(),
        "images_per_core_s": checkup.per_core_s,
        "images_per_s": checkup.images_per_s,
        "workers_needed": checkup.workers_needed,
        "cores": checkup.cores,
        "grid": None if checkup.geometry is not None else list(checkup.model.grid),
        "blocks": None if checkup.geometry is not None else checkup.model.num_blocks,
    }


def _examined(found: Examination) -> dict[str, Any]:
    repeats, measured, counts = (
        duplicates(found.digests, found.readable),
        found.statistics,
        found.class_counts(),
    )
    return {
        "source": found.source.spec,
        "images": len(found.source),
        "examined": found.examined,
        "elapsed_s": found.elapsed_s,
        "bad": [bad._asdict() for bad in found.bad()],
        "damaged_shards": [damage._asdict() for damage in damage_of(found.source)],
        "bad_fraction": found.num_bad / max(1, found.examined),
        "formats": dict(found.formats.most_common()),
        "modes": dict(found.modes.most_common()),
        "traits": dict(found.traits.most_common()),
        "sizes": size_summary(found),
        "mean": None if measured is None else list(measured.mean),
        "std": None if measured is None else list(measured.std),
        "classes": None
        if counts is None
        else dict(zip(found.source.class_names, counts.tolist(), strict=True)),
        "duplicates": {
            "groups": len(repeats),
            "surplus": repeats.surplus,
            "listed": _names(found, repeats, MAX_GROUPS),
        },
    }


def size_summary(found: Examination) -> dict[str, list[float]] | None:
    """Smallest, median and largest height, width and shorter side."""
    sizes = found.sizes[found.readable]
    if not len(sizes):
        return None
    columns = {"height": sizes[:, 0], "width": sizes[:, 1], "shorter_side": sizes.min(axis=1)}
    return {
        name: [float(values.min()), float(np.median(values)), float(values.max())]
        for name, values in columns.items()
    }
