"""Train any number of heads on the features of one frozen encoder, and measure them.

A head in training is a `Student`: it has its own optimizer, schedule and clipping, so what it learns does not
depend on which others learn beside it. A `Feed` makes the batches: of features kept in memory, of features
computed anew in every epoch, or of new random crops. The order of images is the training loader's, f(seed,
epoch), in all three.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Int64
from torch import Tensor, nn

from nextblock.config import DataConfig, OptimConfig, Size
from nextblock.data import BadSample, Source, TrainLoader, resolve_workers, step_samples
from nextblock.data.keyed import keyed_permutation
from nextblock.data.rand_augment import TimmCrop
from nextblock.evaluate.features import (
    Extract,
    FeatureBatch,
    Features,
    check_bad,
    collect_features,
    features_of_batch,
    iterate_features,
)
from nextblock.optim import build_optimizer, lr_at, set_lr

__all__ = ["Accuracy", "Feed", "Measured", "Student", "hold_out", "measure", "train_heads"]

log = logging.getLogger(__name__)


class Accuracy(NamedTuple):
    """Shares of images whose right class is the likeliest, or among the five (or all, if fewer) likeliest."""

    top1: float
    top5: float


class Measured(NamedTuple):
    """What `measure` found."""

    accuracies: tuple[Accuracy, ...]
    """One a student."""
    images: int
    """Images measured on."""
    bad: tuple[BadSample, ...]
    """Images that could not be read, left out."""


class Student:
    """A head in training; `column` says which of an extract's features it learns from."""

    def __init__(
        self, head: nn.Module, column: int, optim: OptimConfig, *, warmup_steps: int, total_steps: int
    ) -> None:
        self.head = head
        self.column = column
        self.optim = optim
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.optimizer = build_optimizer(head, optim)

    def learn(self, features: tuple[Tensor, ...], labels: Int64[Tensor, " b"], step: int) -> None:
        """Take one step of AdamW on a batch."""
        lr = lr_at(
            step,
            peak=self.optim.lr,
            start=self.optim.start_lr,
            end=self.optim.end_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )
        set_lr(self.optimizer, lr)
        F.cross_entropy(self.head(features[self.column]), labels).backward()
        if self.optim.clip_grad is not None:
            nn.utils.clip_grad_norm_(self.head.parameters(), self.optim.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def is_finite(self) -> bool:
        """Whether all weights and running statistics still are numbers."""
        return all(bool(tensor.isfinite().all()) for tensor in self.head.state_dict().values())


@dataclass(frozen=True, kw_only=True)
class Feed:
    """Batches of features and labels to train heads on."""

    extract: Extract
    source: Source
    data: DataConfig
    """How training crops are drawn, how centre crops are cut, and how both are normalised."""
    image_size: Size
    batch_size: int
    epochs: int
    seed: int
    device: torch.device
    augment: Literal["none", "crop", "timm"] = "none"
    cache_gb: float = 4.0
    bad: dict[int, BadSample] = field(default_factory=dict)
    """Images that could not be read, as far as met; filled while batches are drawn."""

    @property
    def actual_batch_size(self) -> int:
        """`batch_size`, or the whole source where that is smaller."""
        return min(self.batch_size, len(self.source))

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the source."""
        return len(self.source) // self.actual_batch_size

    @property
    def steps(self) -> int:
        """Batches in all epochs."""
        return self.steps_per_epoch * self.epochs

    def batches(self) -> Iterator[tuple[tuple[Tensor, ...], Int64[Tensor, " b"]]]:
        """Yield features and labels on the device, `steps` times; a batch lacks its unreadable images."""
        if self.augment != "none":
            drawn = self._cropped()
        else:
            cached = self._cached()
            drawn = self._streamed() if cached is None else self._from_memory(cached)
        labels = torch.from_numpy(self.source.labels)
        for batch in drawn:
            self.bad.update({one.sample: one for one in batch.bad})
            check_bad(self.bad.values(), self.source, self.data)
            yield batch.features, labels[batch.samples].to(self.device)

    def _cached(self) -> Features | None:
        """Compute the features of all images, or None where they do not fit `cache_gb`."""
        batches = self._iterate(None)
        first = next(batches)
        image_gb = sum(one[0].numel() * one.element_size() for one in first.features) / 1e9
        if image_gb * len(self.source) > self.cache_gb:
            log.info(
                "the features take %.1f GB, more than cache_gb %.1f: they are computed anew in every epoch",
                image_gb * len(self.source),
                self.cache_gb,
            )
            return None
        return collect_features(chain([first], batches))

    def _from_memory(self, cached: Features) -> Iterator[FeatureBatch]:
        row_of = torch.full((len(self.source),), -1)
        row_of[cached.samples] = torch.arange(len(cached.samples))
        for step in range(self.steps):
            samples = torch.from_numpy(self._samples(step))
            samples = samples[row_of[samples] >= 0]
            features = tuple(one[row_of[samples]].to(self.device) for one in cached.features)
            yield FeatureBatch(features, samples, cached.bad if step == 0 else ())

    def _streamed(self) -> Iterator[FeatureBatch]:
        for epoch in range(self.epochs):
            first = epoch * self.steps_per_epoch
            steps = range(first, first + self.steps_per_epoch)
            yield from self._iterate(np.concatenate([self._samples(step) for step in steps]))

    def _cropped(self) -> Iterator[FeatureBatch]:
        loader = TrainLoader(
            self.source,
            self.data,
            image_size=self.image_size,
            seed=self.seed,
            batch_size=self.actual_batch_size,
            workers=resolve_workers(self.data.workers, self.source),
            crop=self._timm_crop() if self.augment == "timm" else None,
        )
        for step in islice(loader, self.steps):
            (batch,) = step.micro_batches
            yield features_of_batch(batch, self.extract, self.data, self.device)

    def _timm_crop(self) -> TimmCrop:
        return TimmCrop(data=self.data, image_size=self.image_size, seed=self.seed)

    def _iterate(self, indices: Int64[np.ndarray, " n"] | None) -> Iterator[FeatureBatch]:
        return iterate_features(
            self.extract,
            self.source,
            self.data,
            self.image_size,
            batch_size=self.actual_batch_size,
            indices=indices,
            device=self.device,
        )

    def _samples(self, step: int) -> Int64[np.ndarray, " b"]:
        return step_samples(self.seed, len(self.source), self.actual_batch_size, step)[1].copy()


def train_heads(students: Sequence[Student], feed: Feed) -> None:
    """Show every batch of the feed to every student. Leaves the heads in evaluation mode.

    Raises `ValueError` if a head's weights stop being finite numbers.
    """
    for student in students:
        student.head.train()
    for step, (features, labels) in enumerate(feed.batches()):
        if len(labels) < 2:
            log.warning("step %d: fewer than 2 readable images, left out", step)
            continue
        for student in students:
            student.learn(features, labels, step)
    for student in students:
        student.head.eval()
        if not student.is_finite:
            raise ValueError(
                f"{type(student.head).__name__} diverged at learning rate {student.optim.lr:g}: its weights "
                "are no numbers any more; use a lower one"
            )


def measure(students: Sequence[Student], batches: Iterable[FeatureBatch], source: Source) -> Measured:
    """Measure trained heads on a source's features; `ValueError` if none of its images could be read."""
    truth = torch.from_numpy(source.labels)
    right = np.zeros((len(students), 2), dtype=np.int64)
    images, bad = 0, []
    for batch in batches:
        bad += batch.bad
        images += len(batch.samples)
        if batch.features:
            right += [_right(student, batch.features, truth[batch.samples]) for student in students]
    if not images:
        raise ValueError(f"none of the {len(bad)} images of {source.spec} could be read")
    return Measured(
        tuple(Accuracy(float(top1), float(top5)) for top1, top5 in right / images), images, tuple(bad)
    )


@torch.no_grad()
def _right(student: Student, features: tuple[Tensor, ...], truth: Int64[Tensor, " b"]) -> tuple[int, int]:
    """How many of these images have their class in first place, and among the first five."""
    logits = student.head(features[student.column])
    likeliest = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
    hits = likeliest == rearrange(truth.to(likeliest.device), "b -> b 1")
    return int(hits[:, 0].sum()), int(hits.any(dim=-1).sum())


def hold_out(
    labels: Int64[np.ndarray, " n"], seed: int, *, share: float = 0.1
) -> tuple[Int64[np.ndarray, " kept"], Int64[np.ndarray, " held"]]:
    """Split indices into (kept, held out): of each class this share, at least one image if it has two."""
    held = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = keyed_permutation(seed, len(members), "hold-out", int(label))
        count = min(max(1, round(share * len(members))), len(members) - 1)
        held.append(members[order[:count]])
    chosen = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(labels)), chosen), chosen
