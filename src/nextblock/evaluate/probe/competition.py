"""One encoder, or the raw pixels, and the heads that compete on its features: trained, chosen, measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import torch

from nextblock.config import DataConfig, OptimConfig
from nextblock.data import BadSample, Source, keyed_seed
from nextblock.errors import UsageError
from nextblock.evaluate.features import (
    Extract,
    FeatureBatch,
    check_bad,
    iterate_features,
    seeded,
)
from nextblock.evaluate.metrics import Measures
from nextblock.evaluate.probe.config import (
    EncoderName,
    HeadName,
    ProbeCandidate,
    ProbeConfig,
    ProbeRow,
    Split,
    recipe_of,
    warmup_epochs,
)
from nextblock.evaluate.probe.feature_cache import FeatureCache, StoredFeatures
from nextblock.evaluate.probe.grid import Candidate
from nextblock.evaluate.probe.state import Progress
from nextblock.evaluate.probe.train_heads import (
    Feed,
    Lesson,
    Measured,
    Student,
    Trained,
    measure,
    train_heads,
)
from nextblock.evaluate.results import cut_of, images_digest
from nextblock.evaluate.settings import CROP_RATIO, CROP_SCALE
from nextblock.evaluate.unreadable import whole_of
from nextblock.models.heads import FeatureConfig, Head, LinearHead, create_head
from nextblock.settings import to_dict

__all__ = ["Arena", "Division", "Found", "Subject", "choose", "compete"]

log = logging.getLogger(__name__)


class Division(NamedTuple):
    """What the images are for."""

    train: Source
    choice: tuple[Split, Source] | None
    """To choose the winners on; None where there is nothing to choose."""
    measured: dict[Split, Source]

    @property
    def sources(self) -> dict[str, Source]:
        """All of them by what they are for."""
        choice = {} if self.choice is None else {self.choice[0]: self.choice[1]}
        return {"train": self.train, **choice, **self.measured}


@dataclass(frozen=True, kw_only=True)
class Arena:
    """What all subjects of a probe have in common."""

    config: ProbeConfig
    division: Division
    data: DataConfig
    image_size: tuple[int, int]
    device: torch.device
    progress: Progress
    scratch: Path
    """Where features lie while they are needed, unless the config names a cache."""

    @property
    def cache(self) -> FeatureCache:
        """Where features lie."""
        given = self.config.cache
        return FeatureCache(self.scratch if given is None else Path(given), self.config.cache_gb)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder, or the pixels, and the heads to train on it."""

    encoder: EncoderName
    candidates: tuple[Candidate, ...]
    extract: Callable[[Sequence[FeatureConfig | None]], Extract]
    """Makes the extract of these features, in this order."""
    origin: Callable[[], dict[str, Any]]
    """Tells, for a cache, what the features come from; ready for JSON."""
    embed_dim: int
    """Channels of the encoder; of raw pixels, their number."""
    num_classes: int

    @property
    def columns(self) -> tuple[FeatureConfig | None, ...]:
        """The distinct features that its heads see."""
        return tuple(dict.fromkeys(candidate.features for candidate in self.candidates))

    def head(self, candidate: Candidate, seed: int) -> Head:
        """A fresh head; its weights hang on the seed, its kind and its size alone."""
        number = get_args(HeadName).index(candidate.head)
        with seeded(keyed_seed(seed, "probe head", number)):
            if candidate.config is None:
                return LinearHead(self.embed_dim, self.num_classes, bias=True)
            return create_head(candidate.config, self.embed_dim)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What came out for one subject."""

    rows: tuple[ProbeRow, ...]
    grid: tuple[ProbeCandidate, ...]
    bad: dict[str, tuple[BadSample, ...]]
    """Images that could not be read, by what their source is for."""
    winners: dict[HeadName, tuple[int, Head]]
    """By kind, which candidate of the subject's it is."""


def compete(subject: Subject, arena: Arena) -> Found:
    """Train all heads of a subject side by side, choose the best of each kind, and measure those.

    Raises `ValueError` if all heads of a kind diverge.
    """
    started_at_s = time.perf_counter()
    feed = _feed(subject, arena)
    students = [_student(subject, one, arena, feed) for one in subject.candidates]
    lesson = Lesson(students)
    start_step, before_s = arena.progress.begin(lesson, feed)
    started_at_s -= before_s

    def after_step(step: int) -> None:
        arena.progress.after_step(step, lesson, feed, time.perf_counter() - started_at_s)

    train_heads(lesson, feed, start_step=start_step, after_step=after_step)
    if arena.config.cache is None:
        arena.cache.clear()

    bad: dict[str, tuple[BadSample, ...]] = {"train": tuple(feed.bad.values())}
    alive = [number for number, student in enumerate(students) if student.is_finite]
    _require_survivors(subject, alive)
    scores: dict[int, Measures] = {}
    if arena.division.choice is not None:
        split, source = arena.division.choice
        chosen = _measure(subject, [students[n] for n in alive], source, arena, bad, confusion=False)
        bad[split] = chosen.bad
        found = zip(alive, chosen.measures, strict=True)
        scores = {number: measures for number, measures in found if measures is not None}
        alive = list(scores)
        _require_survivors(subject, alive)
    winners = choose(subject.candidates, alive, scores)
    rows = []
    for split, source in arena.division.measured.items():
        measured = _measure(subject, [students[n] for n in winners.values()], source, arena, bad)
        bad[split] = measured.bad
        elapsed_s = time.perf_counter() - started_at_s
        for (head, number), measures in zip(winners.items(), measured.measures, strict=True):
            if measures is None:
                raise UsageError(_diverged(head, [subject.candidates[number].lr]))
            rows.append(_row(subject, number, split, measures, arena.config, elapsed_s))
    return Found(
        rows=tuple(rows),
        grid=_grid(subject, arena.division, alive, scores, set(winners.values())),
        bad=bad,
        winners={head: (number, students[number].head) for head, number in winners.items()},
    )


# ----------------------------------------------------------------------------------------------- training


def _feed(subject: Subject, arena: Arena) -> Feed:
    config, train = arena.config, arena.division.train
    return Feed(
        extract=subject.extract(subject.columns),
        source=train,
        data=replace(arena.data, crop_scale=CROP_SCALE, crop_ratio=CROP_RATIO),
        image_size=arena.image_size,
        batch_size=config.batch_size,
        epochs=config.epochs,
        seed=config.seed,
        device=arena.device,
        augment=config.augment,
        stored=partial(_stored, subject, subject.columns, train, arena),
    )


def _student(subject: Subject, candidate: Candidate, arena: Arena, feed: Feed) -> Student:
    config = arena.config
    optim = OptimConfig(
        lr=candidate.lr,
        start_lr=candidate.lr / 10,
        end_lr=config.end_lr,
        weight_decay=candidate.weight_decay,
        betas=recipe_of(config).betas,
        clip_grad=config.clip_grad,
    )
    return Student(
        subject.head(candidate, config.seed).to(arena.device),
        subject.columns.index(candidate.features),
        optim,
        warmup_steps=round(warmup_epochs(config) * feed.steps_per_epoch),
        total_steps=feed.steps,
        official_trap=config.official_warmup_trap,
    )


def _stored(
    subject: Subject,
    columns: Sequence[FeatureConfig | None],
    source: Source,
    arena: Arena,
) -> StoredFeatures | None:
    """Features of all images of a source, from the cache, or computed and kept there; None: no room."""
    common = {
        "origin": subject.origin(),
        "precision": arena.config.precision,
        # The fingerprint tells lists of names apart; of two folders these may be the same.
        "source": [source.fingerprint, None if source.in_memory else images_digest(source)],
        "images": len(source),
        "image_size": list(arena.image_size),
        "cut": cut_of(arena.data),
    }
    keys = [{**common, "features": "pixels" if column is None else to_dict(column)} for column in columns]

    def make(missing: tuple[int, ...], start: int) -> Iterator[FeatureBatch]:
        extract = subject.extract([columns[number] for number in missing])
        return _encoded(extract, source, arena, start)

    return arena.cache.get(keys, len(source), make)


def _encoded(
    extract: Extract, source: Source, arena: Arena, start: int = 0, besides: int = 0
) -> Iterator[FeatureBatch]:
    """All images from one on through the encoder; stops on request, and where too many cannot be read."""
    bad, done = [], start
    for batch in iterate_features(
        extract,
        source,
        arena.data,
        arena.image_size,
        batch_size=min(arena.config.encode_batch_size, len(source)),
        indices=np.arange(start, len(source)),
        device=arena.device,
    ):
        bad += batch.bad
        check_bad(bad, source, arena.data, besides=besides)
        yield batch
        done += len(batch.samples) + len(batch.bad)
        arena.progress.check_stop(f"when {done} of {len(source)} images of {source.spec} were encoded")


# ------------------------------------------------------------------------------------ choosing and measuring


def _measure(
    subject: Subject,
    students: Sequence[Student],
    source: Source,
    arena: Arena,
    bad: Mapping[str, tuple[BadSample, ...]],
    *,
    confusion: bool = True,
) -> Measured:
    """Measure heads; only the features that these see are computed, or read where a cache is kept.

    `bad` are the unreadable images of the sources that were gone through before.
    """
    besides = _besides(bad, source, arena.division)
    numbers = sorted({student.column for student in students})
    columns = [subject.columns[number] for number in numbers]
    trained = [Trained(student.head, numbers.index(student.column)) for student in students]
    size = arena.config.encode_batch_size
    stored = None
    if arena.config.cache is not None:
        stored = _stored(subject, columns, source, arena)
    if stored is None:
        batches = _encoded(subject.extract(columns), source, arena, besides=besides)
    else:
        check_bad(stored.bad, source, arena.data, besides=besides)
        batches = stored.batches(size, arena.device)
    return measure(trained, batches, source, confusion=confusion)


def _besides(bad: Mapping[str, tuple[BadSample, ...]], source: Source, division: Division) -> int:
    """How many images of the other parts of what this is a part of are known to be unreadable."""
    whole = whole_of(source)
    return sum(len(of) for name, of in bad.items() if whole_of(division.sources[name]) is whole)


def choose(
    candidates: Sequence[Candidate], alive: Sequence[int], scores: Mapping[int, Measures]
) -> dict[HeadName, int]:
    """Name the best candidate of each kind, by its number: highest top-1, then lowest loss, then the first.

    `alive` are those that did not diverge; without scores there must be one of a kind.
    """
    found: dict[HeadName, int] = {}
    for head in _kinds(candidates):
        of_kind = [number for number in alive if candidates[number].head == head]
        if scores:
            found[head] = max(of_kind, key=lambda number: (scores[number].top1, -scores[number].loss))
        else:
            (found[head],) = of_kind
    return found


def _kinds(candidates: Sequence[Candidate]) -> list[HeadName]:
    return list(dict.fromkeys(candidate.head for candidate in candidates))


def _require_survivors(subject: Subject, alive: Sequence[int]) -> None:
    survivors = {subject.candidates[number].head for number in alive}
    for head in _kinds(subject.candidates):
        if head not in survivors:
            raise UsageError(_diverged(head, [one.lr for one in subject.candidates if one.head == head]))


def _diverged(head: HeadName, rates: Sequence[float]) -> str:
    told = ", ".join(f"{lr:g}" for lr in dict.fromkeys(rates))
    return (
        f"{head.capitalize()}Head diverged at learning rate {told}: its weights are no numbers any more; "
        "use a lower one"
    )


def _row(
    subject: Subject, number: int, split: Split, measures: Measures, config: ProbeConfig, elapsed_s: float
) -> ProbeRow:
    one = subject.candidates[number]
    log.info("%s, %s head, %s: top-1 %.2f %%", subject.encoder, one.head, split, 100 * measures.top1)
    return ProbeRow(
        encoder=subject.encoder,
        head=one.head,
        split=split,
        lr=one.lr,
        weight_decay=one.weight_decay,
        layers=() if one.config is None else one.config.layers,
        attention=None if one.config is None else one.config.attention,
        tokens=None if one.config is None else one.config.tokens,
        epochs=config.epochs,
        elapsed_s=elapsed_s,
        **vars(measures),
    )


def _grid(
    subject: Subject,
    division: Division,
    alive: Sequence[int],
    scores: Mapping[int, Measures],
    winners: set[int],
) -> tuple[ProbeCandidate, ...]:
    grid = []
    for number, one in enumerate(subject.candidates):
        score = scores.get(number)
        grid.append(
            ProbeCandidate(
                encoder=subject.encoder,
                head=one.head,
                lr=one.lr,
                weight_decay=one.weight_decay,
                layers=() if one.config is None else one.config.layers,
                attention=None if one.config is None else one.config.attention,
                tokens=None if one.config is None else one.config.tokens,
                chosen_on=None if division.choice is None else division.choice[0],
                top1=None if score is None else score.top1,
                top5=None if score is None else score.top5,
                loss=None if score is None else score.loss,
                winner=number in winners,
                diverged=number not in alive,
            )
        )
    return tuple(grid)
