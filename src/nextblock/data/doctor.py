"""Examine sources before training: `examine` reads all images, `check` draws the conclusions.

`shared_images` searches quickly for validation images in the training data.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nextblock.config import DataConfig, ModelConfig, Size, pair
from nextblock.data.decode import BadImageError, open_image, orientation_of, pillow_errors
from nextblock.data.loader import BadSample, TrainLoader, most_bad
from nextblock.data.random import keyed_permutation, keyed_rng
from nextblock.data.sources import Source
from nextblock.data.sources.base import decode
from nextblock.data.subsets import named
from nextblock.data.workers import Note, run_in_workers
from nextblock.launch import available_cores
from nextblock.logs import counted

# A readable image: its number in the source, a hash of its content, (height, width) of the upright picture.
# Among 13 million different images, the probability of any two equal 64-bit hashes is 1 in 200,000.
IMAGE = np.dtype([("index", "i8"), ("digest", "u8"), ("size", "i4", (2,)), ("is_blank", "?")])

IMAGE_SIZES = (256, 224, 192, 160, 128, 96, 64, 48, 32)
WHEN_IT_PAYS = "docs/guides/when_it_pays.md"
# Presets for fewer images than this; above, xtra-h14. Rules of thumb, not a published result.
PRESETS_BELOW = {50_000: "xtra-small", 100_000: "xtra-ti16", 300_000: "xtra-s16", 3_000_000: "xtra-b16"}
# What the smallest presets need at least, by the same rule.
FEW_IMAGES = 1000

# ------------------------------------------------------------------------------------------------- examining


class Examination(NamedTuple):
    """What was found in a source: readable `images`, ascending, of dtype `IMAGE`; a report for JSON."""

    source: Source
    images: np.ndarray
    report: dict[str, Any]


def examine(
    source: Source,
    data: DataConfig,
    samples: int | None = None,
    workers: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Examination:
    """Decode all images as training does, or always the same `samples` of them.

    `progress` is called with the number of images done.
    """
    # Sorted, because archives are read fastest from front to back.
    indices = np.sort(keyed_permutation(0, len(source), "doctor")[:samples])
    rows, bad, kinds = list[tuple[Any, ...]](), list[BadSample](), Counter[str]()
    sums = np.zeros((2, data.channels))
    for look in run_in_workers(partial(_look_at, source, data), map(int, indices), source, workers, ahead=32):
        if isinstance(look, BadSample):
            bad.append(look)
        else:
            row, kinds_of_image, moments = look
            rows.append(row)
            kinds.update(kinds_of_image)
            sums += moments
        if progress is not None:
            progress(len(rows) + len(bad))
    images = np.array(rows, IMAGE)
    sides = dict(zip(("shorter", "longer"), np.sort(images["size"], axis=1).T, strict=True)) if rows else {}
    # The variance is the mean square minus the squared mean; rounding may make it negative.
    mean, square = sums / max(1, len(images))
    # Equal digests get equal numbers; only numbers that occur several times form groups.
    _, numbers, counts = np.unique(images["digest"], return_inverse=True, return_counts=True)
    groups = defaultdict[int, list[str]](list)
    for place in np.flatnonzero(counts[numbers] > 1).tolist():
        groups[numbers[place]].append(source.name(int(images["index"][place])))
    classes = source.class_names if source.has_labels else ()
    labels = source.labels[images["index"]] if source.has_labels else np.zeros(0, np.int64)
    in_class = np.bincount(labels, minlength=len(classes)).tolist()
    report = {
        "spec": source.spec,
        "images": len(source),
        "examined": len(indices),
        "bad": [one._asdict() for one in bad],
        "damaged_shards": [damage._asdict() for damage in source.damage],
        "kinds": kinds,
        "sides_px": {k: np.quantile(px, (0, 0.5, 1)).tolist() for k, px in sides.items()},
        "class_counts": dict(zip(classes, in_class, strict=True)),
        "mean_std": [mean.tolist(), np.sqrt(np.maximum(square - mean**2, 0)).tolist()],
        "duplicates": list(groups.values()),
        "blank": _names(source, images[images["is_blank"]]),
    }
    return Examination(source, images, report)


def _names(source: Source, images: np.ndarray) -> list[str]:
    return [source.name(index) for index in images["index"].tolist()]


def _look_at(
    source: Source, data: DataConfig, index: int, note: Note
) -> tuple[tuple[Any, ...], list[str], np.ndarray] | BadSample:
    """A row of `IMAGE`, its kinds, and each channel's mean and mean square; or why it is unreadable."""
    note(index)
    try:
        # Read the file once, for its hash, its header and its pixels.
        content = source.content(index)
        pixels = source.read(index) if content is None else decode(content, data)
    except BadImageError as error:
        return BadSample(index, source.name(index), str(error))
    if len(pixels) != data.channels:
        reason = f"has {counted(len(pixels), 'channel')}, data.channels is {data.channels}"
        return BadSample(index, source.name(index), reason)
    # Counts of the 256 values make the moments independent of the order of pixels.
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in pixels]).numpy()
    values = np.arange(256) / 255
    moments = np.array([counts @ values, counts @ values**2]) / pixels[0].numel()
    # One value per channel: a blank image.
    is_blank = np.count_nonzero(counts) == len(pixels)
    digest = _digest(pixels if content is None else content)
    kinds = ["raw pixels"] if content is None else _kinds_of(content)
    return (index, digest, (pixels.shape[1], pixels.shape[2]), is_blank), kinds, moments


def _digest(image: bytes | Tensor) -> int:
    """A hash of a file's content, or of the pixels of an image that is not a file."""
    content = image if isinstance(image, bytes) else image.numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _kinds_of(content: bytes) -> list[str]:
    """The format and special properties of a readable file, from its header."""
    try:
        with pillow_errors():
            image = open_image(content)
    except BadImageError:  # a library other than Pillow decoded it
        return ["other"]
    # Pillow's mode shows 16 bits only for grey images. A PNG has its depth in byte 24, a TIFF in tag 258.
    depth = content[24] if image.format == "PNG" else max(getattr(image, "tag_v2", {}).get(258, (8,)))
    kinds = {
        str(image.format): True,
        "16 bits": depth == 16 or image.mode.startswith("I;16"),
        "alpha": image.has_transparency_data,
        "grey": image.mode.partition(";")[0] in ("1", "L", "LA", "I"),
        "rotated by EXIF": orientation_of(image) != 1,
    }
    return [kind for kind, is_so in kinds.items() if is_so]


def crops_per_core_s(source: Source, data: DataConfig, image_size: Size) -> float | None:
    """Training crops per second of one core's CPU time, so without waiting for a disk.

    Measured on 64 images; None if none of them can be read.
    """
    # With steps of one image, an epoch includes every source of a mixture, however small.
    loader = TrainLoader(source, data, image_size=image_size, seed=0, batch_size=1)
    counts = (len(batch.images) for step in loader for batch in step.micro_batches)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # One thread, as in a worker; and CPU time, because other processes may use the core too.
    try:
        next(counts)  # draws the order and loads libraries
        started_s = time.process_time()
        crops = sum(islice(counts, 64))
        return crops / max(time.process_time() - started_s, 1e-9) if crops else None
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ conclusions


def check(
    train: Examination,
    val: Examination | None,
    data: DataConfig,
    model: ModelConfig,
    *,
    size_problem: str | None = None,
    per_core_s: float | None = None,
    images_per_s: float | None = None,
    cores: int | None = None,
) -> dict[str, Any]:
    """What was found, what is wrong, which flags suit, and a verdict: the whole report, for JSON.

    `size_problem` says why the model cannot have the requested sizes. `per_core_s` are training crops per
    core and second, `images_per_s` those that the GPU trains on.
    """
    cores = cores or available_cores()
    needed = math.ceil(images_per_s / per_core_s) if images_per_s and per_core_s else None
    shared = None if val is None else _shared(train, val)
    findings = _findings(train, val, data, model, shared, size_problem)
    # The main process needs one core.
    if needed is not None and needed > max(1, cores - 1):
        what = f"{images_per_s:,.0f} images/s need {needed:,} workers, more than {cores} cores"
        remedy = "shrink the images: nextblock data pack --resize_px N"
        findings.append(Finding("warning", "slow decoding", f"{what}; {remedy}"))
    findings.sort(key=lambda finding: finding.severity != "problem")
    problems = dict.fromkeys(finding.what for finding in findings if finding.severity == "problem")
    examined, images = train.report["examined"], len(train.source)
    verdict = "healthy" if examined == images else f"healthy, judging by {examined:,} of {images:,} images"
    if findings:
        verdict = f"fit for training, but read the warnings first ({len(findings)})"
    if problems:
        verdict = f"not fit for training: {', '.join(problems)}"
    workers = min(max(1, cores - 1), needed or cores)
    return {
        "verdict": verdict,
        "advice": _advice(train, data, findings, per_core_s, workers) if len(train.images) else {},
        "per_core_s": per_core_s,
        "images_per_s": images_per_s,
        "workers_needed": needed,
        "cores": cores,
        "healthy": not findings,
        "fit": not problems,
        "findings": [finding._asdict() for finding in findings],
        "train": train.report,
        "val": None if val is None else val.report,
        "leakage": [] if shared is None else shared.pairs,
    }


class Finding(NamedTuple):
    """A problem would stop a run or spoil its results; a warning is worth reading before a run."""

    severity: Literal["problem", "warning"]
    what: str
    text: str


def _findings(
    train: Examination,
    val: Examination | None,
    data: DataConfig,
    model: ModelConfig,
    shared: Shared | None,
    size_problem: str | None,
) -> list[Finding]:
    """What was found and is wrong; each text says what, why and what to do."""
    found: list[Finding] = []

    def problem(what: str, text: str) -> None:
        found.append(Finding("problem", what, text))

    def warning(what: str, text: str) -> None:
        found.append(Finding("warning", what, text))

    for source, _, report in (train,) if val is None else (train, val):
        bad, examined, most = len(report["bad"]), report["examined"], data.max_bad_fraction
        what = f"{bad:,} of {examined:,} in {source.spec}"
        if bad > most_bad(most, examined) or bad == examined:
            remedy = f"repair or remove them (data.max_bad_fraction is {most:g})"
            problem("too many unreadable files", f"{what}; {remedy}")
        elif bad:
            warning("unreadable files", f"{what}; a run skips them")
        if source.damage:
            what = named(list(map(str, source.damage)), 5)
            problem("damaged archives", f"{what}; download or pack again")
    if size_problem is not None:
        problem("image size", size_problem)
    if shared is not None:
        problem("leakage", str(shared))
    images, report = train.images, train.report
    if not len(images):
        return found

    if groups := report["duplicates"]:
        repeated = sum(len(group) - 1 for group in groups)
        twins = named([" = ".join(group[:3]) for group in groups], 5)
        what = f"{repeated:,} of {len(images):,} images repeat another exactly ({twins}); keep one of each"
        # A few twins waste time. Many give images too much weight, and end up in both splits.
        (problem if repeated > len(images) / 10 else warning)("duplicates", what)
    crop = np.array(pair(model.image_size))
    if (np.median(images["size"], axis=0) < crop).any():
        small = (images["size"] < crop).any(axis=1).sum()
        what = f"{small:,} of {len(images):,} will be enlarged to {crop[1]}x{crop[0]} px"
        warning("small images", f"{what}; use the size advised below")
    if blank := report["blank"]:
        what = f"{len(blank):,} with one colour only ({named(blank, 5)}); remove those that are not pictures"
        warning("blank images", what)
    # Folders without an image are no classes of the source, but may have been meant as such. A sample of the
    # images misses small classes, so it says nothing about them.
    empty = train.source.empty_classes() if report["class_counts"] else []
    if report["examined"] == report["images"]:
        empty += [name for name, count in report["class_counts"].items() if not count]
    if empty:
        what = f"{len(empty):,} without a readable image ({named(empty, 5)}); fill or remove them"
        warning("empty classes", what)
    if data.normalize == "given":
        mean, std = np.array(report["mean_std"])
        # Ordinary photographs differ less from ImageNet.
        ratio = np.exp(np.abs(np.log((std + 1e-9) / data.std)))
        if np.abs(mean - data.mean).max() > 0.1 or ratio.max() > 1.5:
            what = "data.mean and data.std are far from those of the images; use --data.normalize auto"
            warning("normalisation", what)
    return found


def _advice(
    train: Examination, data: DataConfig, findings: list[Finding], per_core_s: float | None, workers: int
) -> dict[str, str]:
    """Flags of `nextblock pretrain` that suit the images, with the reason."""
    images, report = len(train.source), train.report
    preset = next((name for most, name in PRESETS_BELOW.items() if images < most), "xtra-h14")
    side, is_small = report["sides_px"]["shorter"][1], preset == "xtra-small"
    # xtra-h14 has patches of at most 14 px; in a small preset larger images cost too much.
    most = 128 if is_small else 224 if preset == "xtra-h14" else 256
    size = next((size for size in IMAGE_SIZES if size <= min(side, most)), IMAGE_SIZES[-1])
    if is_small:
        preset = "xtra-small-128" if size > 64 else "xtra-small-64"
    # 4 x 4 blocks at every size, as in XTRA; blocks of 2 x 2 patches in the small presets.
    patch, block = (size // 16, 4) if size >= 64 and not is_small else (size // 8, 2)
    flags = f"--model.image_size {size} --model.patch_size {patch} --model.block_size {block}"
    number = counted(images, "image")
    number += f", fewer than {FEW_IMAGES:,}" if images < FEW_IMAGES else ""
    advice = {f"--preset {preset}": f"{number}; see {WHEN_IT_PAYS}"}
    if not (is_small and preset.endswith(f"-{size}")):
        advice[flags] = f"median shorter side {side:,.0f} px"
    if data.channels != 3:
        advice[f"--data.channels {data.channels}"] = "as examined"
    elif report["kinds"]["grey"] == len(train.images):
        advice["--data.channels 1"] = "all images are grey"
    if per_core_s is not None and not train.source.in_memory:
        advice[f"--data.workers {workers}"] = f"{per_core_s:,.0f} crops/s each"
    # Only JPEG can be decoded smaller, which pays if a crop is still large enough at half the size.
    if report["kinds"]["JPEG"] > len(train.images) / 2 and side >= 2 * size and data.decoder == "auto":
        advice["--data.decoder fast"] = f"the photos are {side / size:.1f} times the image size"
    # A constant channel cannot be normalised, and would be refused.
    if any(finding.what == "normalisation" for finding in findings) and min(report["mean_std"][1]) > 1e-6:
        advice["--data.normalize auto"] = "measures your images"
    return advice


# -------------------------------------------------------------------------------------------------- leakage


class Shared(NamedTuple):
    """Validation images that are also training images; `str` gives one sentence."""

    pairs: list[tuple[str, str]]
    """Names in validation and in training; empty if the lists are equal and nothing was read."""
    num_compared: int

    def __str__(self) -> str:
        if not self.pairs:
            return "validation and training are the same list of images; take them out of one side"
        names = named([" = ".join(dict.fromkeys(pair)) for pair in self.pairs], 5)
        which = f"{len(self.pairs):,} of the {self.num_compared:,} validation images compared"
        return f"{which} are also training images ({names}); take them out of one side"


def shared_images(train: Source, val: Source, *, most: int = 200, others: int = 1000) -> Shared | None:
    """Quickly search for validation images in the training data; None if there are none.

    Compares `most` validation images with `others` training images of the same file name and `others` of any
    name. So it misses re-encoded copies, and in a large source copies with other names. Sources on a server
    are compared only by their lists.
    """
    is_same_list = train.fingerprint == val.fingerprint
    specs = [getattr(part, "of", part).spec for source in (train, val) for part in source.parts]
    if any("://" in spec for spec in specs):  # reading a few images would fetch as many shards
        return Shared([], 0) if is_same_list else None
    chosen = _drawn(len(val), most)
    wanted = dict(_digests(val, chosen))
    files = {val.name(index).rpartition("/")[2] for index in wanted.values()}
    # Candidates: the same place in the same list, the same file name (moved to another folder), any.
    alike = [index for index in _drawn(len(train), 200_000) if train.name(index).rpartition("/")[2] in files]
    candidates = [*(chosen if is_same_list else ()), *alike[:others], *_drawn(len(train), others)]
    # A dictionary drops repeated candidates, so each image is read once.
    twins: dict[int, int] = {}
    for digest, index in _digests(train, dict.fromkeys(candidates)):
        if digest in wanted:
            twins.setdefault(wanted[digest], index)
    pairs = [(val.name(index), train.name(twin)) for index, twin in sorted(twins.items())]
    return Shared(pairs, len(wanted)) if pairs else None


def _shared(train: Examination, val: Examination) -> Shared | None:
    """The images of `val` whose content is also in `train`; None if there are none."""
    # Map each training digest to its first image, to name only one twin.
    digests, first = np.unique(train.images["digest"], return_index=True)
    copies = val.images[np.isin(val.images["digest"], digests)]
    twins = train.images[first[np.searchsorted(digests, copies["digest"])]]
    pairs = list(zip(_names(val.source, copies), _names(train.source, twins), strict=True))
    return Shared(pairs, len(val.images)) if pairs else None


def _drawn(length: int, most: int) -> list[int]:
    """Up to `most` random numbers below `length`, ascending."""
    return np.sort(keyed_rng(0, "shared").choice(length, min(length, most), replace=False)).tolist()


def _digests(source: Source, indices: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Digest and number of each readable image."""
    for index in indices:
        # Skip unreadable and empty files, which would all match each other.
        with suppress(BadImageError):
            content = source.content(index)
            if content != b"":
                yield _digest(source.read(index) if content is None else content), index
