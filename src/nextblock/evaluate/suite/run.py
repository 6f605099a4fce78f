"""Probes a model on the benchmarks, one after another; what is done is kept, what fails stops no other."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nextblock.atomic import OUTPUT_MARK
from nextblock.config import DataConfig, ModelConfig, pair
from nextblock.data import open_source
from nextblock.errors import UsageError
from nextblock.evaluate.directories import make_directory
from nextblock.evaluate.evaluation import MODEL, QUARANTINE, RIGHTS, Stopped
from nextblock.evaluate.features import evaluation_data
from nextblock.evaluate.probe.run import probe
from nextblock.evaluate.results import differences, identity_of, refuse_other_result
from nextblock.evaluate.suite.benchmarks import BENCHMARKS, Benchmark, chosen
from nextblock.evaluate.suite.check import (
    class_problem,
    count_problems,
    known_differences,
    labels_are_slow,
)
from nextblock.evaluate.suite.config import Score, SuiteConfig, SuiteResult
from nextblock.evaluate.suite.layouts import MissingDataError, find, root_at
from nextblock.evaluate.suite.sources import write_sources
from nextblock.evaluate.suite.tables import RESULT_FILES, write_tables
from nextblock.interop import open_encoder
from nextblock.models.timm_encoder import TimmConfig
from nextblock.settings import from_dict

__all__ = ["suite"]

log = logging.getLogger(__name__)

_NOT_OF_THE_RESULT = ("only", "root", "download")
"""Settings that change which benchmarks are measured, and where they lie, not what is found."""

PROBE_FILES = ("probe.md", "probe.csv", "grid.csv", QUARANTINE, RIGHTS, "figures", "features", "heads")
PROBE_FILES += ("linear", "attentive", "ep")
PROBE_BEGUN = (OUTPUT_MARK,)

_FILES = ("lists", *RESULT_FILES, *(benchmark.name for benchmark in BENCHMARKS))
_BEGUN = ("lists/*.txt", *(f"*/{pattern}" for pattern in ("probe.json", *PROBE_BEGUN)))
"""What the suite writes, and what tells one that has no table yet."""

_OF_THE_RECIPE = ("epochs", "batch_size", "lr", "weight_decay", "warmup_epochs", "layers")
_OFFICIAL = {"attentive_heads": 16, "attention": ("native",), "tokens": ("patches",)}
"""What else the official probes have; none of it differs between benchmarks."""


def suite(config: SuiteConfig) -> SuiteResult:
    """Probe every chosen benchmark that is below the root, and write the table after each.

    A benchmark that was measured is not probed again, wherever its images are now. Those whose images are
    missing, or whose probe fails, are named in the result; the others go on. Raises `ValueError` where `out`
    holds something else, `Stopped` after a signal: the same call resumes.
    """
    root = root_at(config.root)
    subject = _open(config)
    out = Path(config.out)
    refuse_other_result(out, "suite.json", subject.identity, _FILES, begun=_BEGUN, overwrite=config.overwrite)
    make_directory(out)
    found = _Found(_kept(out / "suite.json"))
    if config.overwrite:
        found = _cleared(out, config, subject, found)
    result = _result(config, subject, found)
    for benchmark in chosen(config.only):
        if benchmark.name in found.scores:
            log.info("%s: measured before; --only %s --overwrite does it anew", *[benchmark.name] * 2)
        else:
            _measure(benchmark, config, root, subject, found)
        result = _result(config, subject, found)
        write_tables(out, result, subject.identity)
    return result


def _cleared(out: Path, config: SuiteConfig, subject: _Subject, found: _Found) -> _Found:
    """Remove what is to be measured anew, all of a table of other settings; what is left of the scores.

    So all that a stop leaves is of this call, or agrees with it.
    """
    table = out / "suite.json"
    is_same = table.is_file() and not differences(
        json.loads(table.read_text(encoding="utf-8")), subject.identity
    )
    again = {benchmark.name for benchmark in (chosen(config.only) if is_same else BENCHMARKS)}
    probes = [out / name for name in sorted(again) if (out / name).is_dir()]
    for probed in probes:
        refuse_other_result(probed, "probe.json", {}, PROBE_FILES, begun=PROBE_BEGUN, overwrite=True)
    left = _Found({name: score for name, score in found.scores.items() if name not in again})
    for name in RESULT_FILES:
        (out / name).unlink(missing_ok=True)
    if left.scores:
        write_tables(out, _result(config, subject, left), subject.identity)
    for probed in probes:
        shutil.rmtree(probed)
    return left


class _Subject(NamedTuple):
    """What is measured, without its weights: every probe reads them anew."""

    identity: dict[str, Any]
    architecture: str
    data: DataConfig


def _open(config: SuiteConfig) -> _Subject:
    model = open_encoder(config.model, num_heads=config.num_heads)
    data = evaluation_data(config.model, model.config)
    identity = identity_of(config, model, data, {})
    for name in _NOT_OF_THE_RESULT:
        del identity["settings"][name]
    return _Subject(identity, _architecture(model.config), data)


def _architecture(config: ModelConfig | TimmConfig) -> str:
    if isinstance(config, TimmConfig):
        return config.architecture
    height, _ = pair(config.image_size)
    return f"ViT {config.embed_dim}x{config.depth}/{config.patch_size} at {height} px"


@dataclass
class _Found:
    """What is known so far, by benchmark."""

    scores: dict[str, Score]
    missing: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _kept(path: Path) -> dict[str, Score]:
    """The scores of an earlier call."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return {score["name"]: from_dict(Score, score) for score in stored["scores"]}


def _measure(benchmark: Benchmark, config: SuiteConfig, root: Path, subject: _Subject, found: _Found) -> None:
    """Measure one benchmark, and note what came of it."""
    name = benchmark.name
    try:
        found.scores[name] = _score(benchmark, config, root, subject)
    except Stopped:
        raise
    except MissingDataError as error:
        found.missing[name] = str(error)
        log.warning("%s is left out: %s", name, error)
    except (ValueError, RuntimeError, OSError) as error:
        found.failed[name] = " ".join(str(error).split())
        log.error("%s failed: %s", name, found.failed[name])  # noqa: TRY400 - a line for the user


def _score(benchmark: Benchmark, config: SuiteConfig, root: Path, subject: _Subject) -> Score:
    located = find(benchmark, root, download=config.download)
    specs = write_sources(
        located,
        Path(config.out) / "lists",
        benchmark.name,
        max_images=config.max_images,
        seed=config.seed,
        data=subject.data,
    )
    train, test = (open_source(spec, subject.data) for spec in specs)
    if not labels_are_slow(benchmark):
        _check_classes(benchmark, len(train.class_names))
    log.info("%s: %d images to train on, %d to test on", benchmark.name, len(train), len(test))
    result = probe(**vars(config.probe(benchmark, train=specs.train, test=specs.test)))
    _check_classes(benchmark, result.facts["num_classes"])
    row = result.row(encoder=MODEL, split="test")
    return Score(
        name=benchmark.name,
        top1=row["top1"],
        top5=row["top5"],
        images=(len(train), len(test)),
        trained_on=result.facts["split_images"]["train"],
        classes=result.facts["num_classes"],
        bad_images=sum(result.facts["bad_images"].values()),
        lr=row["lr"],
        weight_decay=row["weight_decay"],
        layers=tuple(row["layers"]),
        attention=row["attention"],
        elapsed_s=row["elapsed_s"],
    )


def _check_classes(benchmark: Benchmark, classes: int) -> None:
    problem = class_problem(benchmark, classes)
    if problem is not None:
        raise UsageError(problem)


def _result(config: SuiteConfig, subject: _Subject, found: _Found) -> SuiteResult:
    order = {benchmark.name: benchmark for benchmark in BENCHMARKS}
    scores = tuple(found.scores[name] for name in order if name in found.scores)
    return SuiteResult(
        model=config.model,
        architecture=subject.architecture,
        scores=scores,
        missing=dict(found.missing),
        failed=dict(found.failed),
        notes=tuple(_notes(config, scores, order)),
    )


def _notes(config: SuiteConfig, scores: tuple[Score, ...], order: Mapping[str, Benchmark]) -> list[str]:
    """What differs from the papers' measurements."""
    notes = [
        "Where learning rates compete, the best is chosen on a tenth of every class's training images, at "
        "least one, held out: the reported head was never trained on them (column trained on). The test "
        "images are looked at once. Which rate and epoch the papers report is not known, nor how AIM's heads "
        "were trained.",
    ]
    if config.augment != "official":
        notes.append(
            f"Training images: augment {config.augment}; the official probes train on random crops with "
            "RandAugment and random erasing (--augment official)."
        )
    changed = [name for name in _OF_THE_RECIPE if getattr(config, name) is not None]
    changed += [name for name, official in _OFFICIAL.items() if getattr(config, name) not in (None, official)]
    if changed:
        told = ", ".join(f"{name} {_told(getattr(config, name))}" for name in changed)
        notes.append(f"Not the official settings: {told}.")
    if config.lr is None:
        notes.append(
            "Learning rates without a warm-up are those that the official code reaches: a tenth of those it "
            "names."
        )
    if config.max_images is not None:
        notes.append(
            f"Only up to {config.max_images:,} images to train on and to test on: not the benchmarks."
        )
    else:
        notes += [
            f"{order[score.name].title}: {problem}."
            for score in scores
            for problem in (
                *count_problems(order[score.name], score.images),
                *known_differences(order[score.name], score.images),
            )
        ]
    lost = [f"{order[score.name].title} {score.bad_images}" for score in scores if score.bad_images]
    if lost:
        notes.append(f"Unreadable images, left out: {', '.join(lost)}.")
    return notes


def _told(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
