"""What an examined source means for a run: findings, suitable flags, and a verdict."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.data.doctor import Examination, Shared
from nextblock.data.subsets import named
from nextblock.logs import counted

IMAGE_SIZES = (256, 224, 192, 160, 128, 96, 64, 48, 32)
WHEN_IT_PAYS = "docs/guides/when_it_pays.md"
# Presets for fewer images than this; above, xtra-h14. Rules of thumb, not a published result.
PRESETS_BELOW = {50_000: "xtra-small", 100_000: "xtra-ti16", 300_000: "xtra-s16", 3_000_000: "xtra-b16"}


class Finding(NamedTuple):
    """A problem would stop a run or spoil its results; a warning is worth reading before a run."""

    severity: Literal["problem", "warning"]
    what: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Checkup:
    """The findings of a check, and the advice that follows."""

    train: Examination
    val: Examination | None = None
    data: DataConfig
    model: ModelConfig
    size_problem: str | None = None
    """Why the model cannot have the requested sizes."""
    per_core_s: float | None = None
    """Training crops per core and second."""
    images_per_s: float | None = None
    """Images per second that the GPU trains on."""
    cores: int = 1

    @property
    def workers_needed(self) -> int | None:
        """Processes needed to keep the GPU busy; None if a rate is unknown."""
        if self.per_core_s is None or self.images_per_s is None:
            return None
        return math.ceil(self.images_per_s / self.per_core_s)

    @cached_property
    def shared(self) -> Shared | None:
        """The images of `val` whose content is also in `train`; None if there are none."""
        if self.val is None:
            return None
        train, val = self.train.images, self.val.images
        # Map each training digest to its first image, to name only one twin.
        digests, first = np.unique(train["digest"], return_index=True)
        copies = val[np.isin(val["digest"], digests)]
        twins = train[first[np.searchsorted(digests, copies["digest"])]]
        pairs = list(zip(self.val.names(copies), self.train.names(twins), strict=True))
        return Shared(pairs, len(val)) if pairs else None

    @cached_property
    def findings(self) -> list[Finding]:
        """Problems first, then warnings; each says what, why and what to do."""
        findings = [*self._check_reading(self.train)]
        findings += [] if self.val is None else self._check_reading(self.val)
        if self.size_problem is not None:
            findings.append(Finding("problem", "image size", self.size_problem))
        if self.shared is not None:
            findings.append(Finding("problem", "leakage", str(self.shared)))
        if len(self.train.images):
            findings += [*self._check_images(), *self._check_classes(), *self._check_settings()]
        return sorted(findings, key=lambda finding: finding.severity != "problem")

    def _check_reading(self, examination: Examination) -> Iterator[Finding]:
        bad, examined, most = len(examination.bad), examination.examined, self.data.max_bad_fraction
        what = f"{bad:,} of {examined:,} in {examination.spec}"
        # The rule of a run: one unreadable file is always allowed, unless the setting is 0.
        if bad > (max(1, most * examined) if most else 0) or bad == examined:
            remedy = f"repair or remove them (data.max_bad_fraction is {most:g})"
            yield Finding("problem", "too many unreadable files", f"{what}; {remedy}")
        elif bad:
            yield Finding("warning", "unreadable files", f"{what}; a run skips them")
        if examination.source.damage:
            what = named(list(map(str, examination.source.damage)), 5)
            yield Finding("problem", "damaged archives", f"{what}; download or pack again")

    def _check_images(self) -> Iterator[Finding]:
        train, images, crop = self.train, self.train.images, np.array(pair(self.model.image_size))
        if groups := train.duplicates:
            repeated = sum(len(group) - 1 for group in groups)
            twins = named([" = ".join(train.names(group[:3])) for group in groups], 5)
            what = (
                f"{repeated:,} of {len(images):,} images repeat another exactly ({twins}); keep one of each"
            )
            # A few twins waste time. Many give images too much weight, and end up in both splits.
            yield Finding("problem" if repeated > len(images) / 10 else "warning", "duplicates", what)
        # Slightly small images matter if most are; images below half the crop always do.
        is_usual = bool((np.median(images["size"], axis=0) < crop).any())
        small = images[(images["size"] < crop / (1 if is_usual else 2)).any(axis=1)]
        if len(small):
            remedy = "use the size advised below" if is_usual else "remove thumbnails"
            what = f"{len(small):,} of {len(images):,} will be enlarged to {crop[1]}x{crop[0]} px"
            yield Finding("warning", "small images", f"{what} ({named(train.names(small), 5)}); {remedy}")
        if blank := train.names(images[images["is_blank"]]):
            what = f"{len(blank):,} with one colour only ({named(blank, 5)}); remove what is no picture"
            yield Finding("warning", "blank images", what)

    def _check_classes(self) -> Iterator[Finding]:
        train, present = self.train, Counter(self.train.class_counts).most_common()
        if not present:
            return
        # Folders without an image are not classes of the source, but may have been meant as such.
        empty = train.source.empty_classes()
        if train.examined == len(train.source):  # a sample misses small classes
            empty = [name for name, count in present if not count] + empty
        if empty:
            what = f"{len(empty):,} without a readable image ({named(empty, 5)}); fill or remove them"
            yield Finding("warning", "empty classes", what)
        # Overall accuracy hides a class with a tenth of another's images.
        (largest, many), (smallest, few) = present[0], [item for item in present if item[1]][-1]
        if many >= 10 * few:
            what = f"{counted(many, 'image')} in {largest}, {few:,} in {smallest}"
            yield Finding("warning", "unbalanced classes", f"{what}; report the accuracy of each class")

    def _check_settings(self) -> Iterator[Finding]:
        data, (mean, std), needed = self.data, self.train.mean_std, self.workers_needed
        # The main process needs one core.
        if needed is not None and needed > max(1, self.cores - 1):
            what = f"{self.images_per_s:,.0f} images/s need {needed:,} workers, more than {self.cores} cores"
            remedy = "shrink the images: nextblock data pack --resize_px N"
            yield Finding("warning", "slow decoding", f"{what}; {remedy}")
        if data.normalize == "given" and len(data.mean) != len(mean):
            what = f"{counted(len(mean), 'channel')}, but data.mean has {len(data.mean)}"
            yield Finding("problem", "normalisation", f"{what}; use --data.normalize auto")
        elif data.normalize == "given":
            # Ordinary photographs differ less from ImageNet.
            ratio = np.exp(np.abs(np.log((std + 1e-9) / data.std)))
            if np.abs(mean - data.mean).max() > 0.1 or ratio.max() > 1.5:
                what = "data.mean and data.std are far from those of the images; use --data.normalize auto"
                yield Finding("warning", "normalisation", what)

    @cached_property
    def advice(self) -> dict[str, str]:
        """Flags of `nextblock pretrain` that suit the images, with the reason."""
        train, data, images = self.train, self.data, len(self.train.source)
        if not len(train.images):
            return {}
        preset = next((name for most, name in PRESETS_BELOW.items() if images < most), "xtra-h14")
        side, is_small = train.sides_px["shorter"][1], preset == "xtra-small"
        # xtra-h14 has patches of at most 14 px; in a small preset larger images cost too much.
        most = 128 if is_small else 224 if preset == "xtra-h14" else 256
        size = next((size for size in IMAGE_SIZES if size <= min(side, most)), IMAGE_SIZES[-1])
        if is_small:
            preset = "xtra-small-128" if size > 64 else "xtra-small-64"
        # 4 x 4 blocks at every size, as in XTRA; blocks of 2 x 2 patches in the small presets.
        patch, block = (size // 16, 4) if size >= 64 and not is_small else (size // 8, 2)
        flags = f"--model.image_size {size} --model.patch_size {patch} --model.block_size {block}"
        advice = {f"--preset {preset}": f"{counted(images, 'image')}; see {WHEN_IT_PAYS}"}
        if not (is_small and preset.endswith(f"-{size}")):
            advice[flags] = f"median shorter side {side:,.0f} px"
        if data.channels != 3:
            advice[f"--data.channels {data.channels}"] = "as examined"
        if self.per_core_s is not None and not train.source.in_memory:
            workers = min(max(1, self.cores - 1), self.workers_needed or self.cores)
            advice[f"--data.workers {workers}"] = f"{self.per_core_s:,.0f} crops/s each"
        # Only JPEG can be decoded smaller, which pays if a crop is still large enough at half the size.
        if train.kinds["JPEG"] > len(train.images) / 2 and side >= 2 * size and data.decoder == "auto":
            advice["--data.decoder fast"] = f"the photos are {side / size:.1f} times the image size"
        # A constant channel cannot be normalised, and would be refused.
        is_far = any(finding.what == "normalisation" for finding in self.findings)
        if is_far and train.mean_std[1].min() > 1e-6:
            advice["--data.normalize auto"] = "measures your images"
        return advice

    @cached_property
    def verdict(self) -> str:
        """Whether a run can start, in one line."""
        problems = dict.fromkeys(finding.what for finding in self.findings if finding.severity == "problem")
        if problems:
            return f"not fit for training: {', '.join(problems)}"
        if self.findings:
            return f"fit for training, but read the warnings first ({len(self.findings)})"
        examined, images = self.train.examined, len(self.train.source)
        return "healthy" if examined == images else f"healthy, judging by {examined:,} of {images:,} images"

    def report(self) -> dict[str, Any]:
        """All of it, for JSON."""
        names = ("verdict", "advice", "per_core_s", "images_per_s", "workers_needed", "cores")
        return {name: getattr(self, name) for name in names} | {
            "healthy": not self.findings,
            "fit": all(finding.severity != "problem" for finding in self.findings),
            "findings": [finding._asdict() for finding in self.findings],
            "train": self.train.report(),
            "val": None if self.val is None else self.val.report(),
            "leakage": [] if self.shared is None else self.shared.pairs,
        }
