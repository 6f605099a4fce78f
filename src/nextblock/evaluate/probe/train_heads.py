"""Train any number of heads on the features of one frozen encoder, and measure them.

A head in training is a `Student`: it has its own optimizer, schedule and clipping, so what it learns does not
depend on which others learn beside it. A `Feed` makes the batches: of features kept on disk, of features
computed anew in every epoch, or of new random crops. The order of images is the training loader's, f(seed,
epoch), in all three, so a feed may start at any step. As students are independent, several processes could
divide them: each trains `students[rank::world_size]` on a feed of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from einops import rearrange
from jaxtyping import Float, Int64
from torch import Tensor, nn

from nextblock.config import DataConfig, OptimConfig, Size
from nextblock.data import BadSample, Source, TrainLoader, VisitOrder, resolve_workers
from nextblock.data.transforms import TimmCrop
from nextblock.errors import UsageError
from nextblock.evaluate.features import (
    Extract,
    FeatureBatch,
    check_bad,
    features_of_batch,
    iterate_features,
)
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.evaluate.probe.feature_cache import StoredFeatures
from nextblock.models.heads import Head
from nextblock.optim import build_optimizer, lr_at, set_lr

__all__ = ["Feed", "Lesson", "Measured", "Student", "Trained", "measure", "train_heads"]

log = logging.getLogger(__name__)


class Trained(NamedTuple):
    """A head, and which of a batch's features it sees."""

    head: nn.Module
    column: int


class Measured(NamedTuple):
    """What `measure` found."""

    measures: tuple[Measures | None, ...]
    """One a head; None where its logits are no finite numbers."""
    bad: tuple[BadSample, ...]
    """Images that could not be read, left out."""


class Student:
    """A head in training; `column` says which of an extract's features it learns from.

    `official_trap`: without warm-up, start the cosine at `optim.start_lr` instead of `optim.lr`.
    """

    def __init__(
        self,
        head: Head,
        column: int,
        optim: OptimConfig,
        *,
        warmup_steps: int,
        total_steps: int,
        official_trap: bool = False,
    ) -> None:
        self.head = head
        self.column = column
        self.optim = optim
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.peak_lr = optim.start_lr if official_trap and warmup_steps == 0 else optim.lr
        self.optimizer = build_optimizer(head, optim)

    def learn(
        self, features: tuple[Float[Tensor, "b ..."], ...], labels: Int64[Tensor, " b"], step: int
    ) -> None:
        """Take one step of AdamW on a batch."""
        lr = lr_at(
            step,
            peak=self.peak_lr,
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


class Lesson:
    """Students who learn side by side.

    Their batch norms have nothing to learn, so those of one column are the same: it is done once for all of
    them. What each learns is, bit for bit, what it would learn alone.
    """

    def __init__(self, students: Sequence[Student]) -> None:
        self.students = tuple(students)
        self._norms = {student.column: student.head.norm for student in reversed(self.students)}

    def begin(self) -> None:
        """Take the norms out of the heads, and set everything to training."""
        for student in self.students:
            student.head.norm = nn.Identity()
            student.head.train()
        for norm in self._norms.values():
            norm.train()

    def learn(
        self, features: tuple[Float[Tensor, "b ..."], ...], labels: Int64[Tensor, " b"], step: int
    ) -> None:
        """Show all students one batch."""
        normed = {column: _normed(norm, features[column]) for column, norm in self._norms.items()}
        seen = tuple(normed.get(column, one) for column, one in enumerate(features))
        for student in self.students:
            student.learn(seen, labels, step)

    def end(self) -> None:
        """Put the norms back, one for each head, and set everything to evaluation."""
        for student in self.students:
            student.head.norm = deepcopy(self._norms[student.column])
            student.head.eval()

    def state_dict(self) -> dict[str, Any]:
        """All that was learned so far: tensors, numbers and strings only."""
        return {
            "norms": {column: norm.state_dict() for column, norm in self._norms.items()},
            "heads": [student.head.state_dict() for student in self.students],
            "optimizers": [student.optimizer.state_dict() for student in self.students],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, of as many students; the lesson must have begun."""
        for column, norm in self._norms.items():
            norm.load_state_dict(state["norms"][column])
        saved = zip(self.students, state["heads"], state["optimizers"], strict=True)
        for student, head, optimizer in saved:
            student.head.load_state_dict(head)
            student.optimizer.load_state_dict(optimizer)


def _normed(norm: nn.Module, features: Float[Tensor, "b *tokens f"]) -> Float[Tensor, "b *tokens f"]:
    if features.ndim == 2:
        return norm(features)
    normed = norm(rearrange(features, "b n f -> (b n) f"))
    return rearrange(normed, "(b n) f -> b n f", n=features.shape[1])


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
    stored: Callable[[], StoredFeatures | None] | None = None
    """With augment none: gives the features of all images from the disk, or None where they do not fit."""
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

    def batches(
        self, start_step: int = 0
    ) -> Iterator[tuple[tuple[Float[Tensor, "b ..."], ...], Int64[Tensor, " b"]]]:
        """Yield features and labels on the device, from a step on; a batch lacks its unreadable images."""
        if start_step >= self.steps:
            return
        if self.augment != "none":
            drawn = self._cropped(start_step)
        else:
            stored = self.stored() if self.stored is not None else None
            if stored is None:
                log.info("features of %s are computed anew in every epoch", self.source.spec)
                drawn = self._streamed(start_step)
            else:
                drawn = self._from_disk(stored, start_step)
        labels = torch.from_numpy(self.source.labels)
        for batch in drawn:
            self.bad.update({one.sample: one for one in batch.bad})
            check_bad(self.bad.values(), self.source, self.data)
            yield batch.features, labels[batch.samples].to(self.device)

    def _from_disk(self, stored: StoredFeatures, start_step: int) -> Iterator[FeatureBatch]:
        for step in range(start_step, self.steps):
            features, samples = stored.read(self._samples(step))
            on_device = tuple(one.to(self.device) for one in features)
            yield FeatureBatch(on_device, samples, stored.bad if step == start_step else ())

    def _streamed(self, start_step: int) -> Iterator[FeatureBatch]:
        while start_step < self.steps:
            end = (start_step // self.steps_per_epoch + 1) * self.steps_per_epoch
            samples = np.concatenate([self._samples(step) for step in range(start_step, end)])
            yield from iterate_features(
                self.extract,
                self.source,
                self.data,
                self.image_size,
                batch_size=self.actual_batch_size,
                indices=samples,
                device=self.device,
            )
            start_step = end

    def _cropped(self, start_step: int) -> Iterator[FeatureBatch]:
        loader = TrainLoader(
            self.source,
            self.data,
            image_size=self.image_size,
            seed=self.seed,
            batch_size=self.actual_batch_size,
            start_step=start_step,
            workers=resolve_workers(self.data.workers, self.source),
            crop=self._timm_crop() if self.augment == "timm" else None,
        )
        for step in islice(loader, self.steps - start_step):
            (batch,) = step.micro_batches
            yield features_of_batch(batch, self.extract, self.data, self.device)

    def _timm_crop(self) -> TimmCrop:
        return TimmCrop(data=self.data, image_size=self.image_size, seed=self.seed)

    def _samples(self, step: int) -> Int64[np.ndarray, " b"]:
        return self._order.keys(step).samples

    @cached_property
    def _order(self) -> VisitOrder:
        return VisitOrder(len(self.source), seed=self.seed, batch_size=self.actual_batch_size)


def train_heads(
    lesson: Lesson,
    feed: Feed,
    *,
    start_step: int = 0,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """Show every batch of the feed, from a step on, to every student of a lesson that has begun.

    `after_step` is called with the number of steps done. Ends the lesson: the heads are in evaluation mode.
    """
    for step, (features, labels) in enumerate(feed.batches(start_step), start=start_step):
        if len(labels) < 2:
            log.warning("step %d: fewer than 2 readable images, left out", step)
        else:
            lesson.learn(features, labels, step)
        if after_step is not None:
            after_step(step + 1)
    lesson.end()


@torch.no_grad()
def measure(
    trained: Sequence[Trained], batches: Iterable[FeatureBatch], source: Source, *, confusion: bool = True
) -> Measured:
    """Measure heads on a source's features; `ValueError` if none of its images could be read."""
    truth = torch.from_numpy(source.labels)
    tallies: list[Tally | None] = [Tally(len(source.class_names), confusion=confusion) for _ in trained]
    images, bad = 0, []
    for batch in batches:
        bad += batch.bad
        images += len(batch.samples)
        if not batch.features:
            continue
        for number, (head, column) in enumerate(trained):
            tally = tallies[number]
            if tally is None:
                continue
            logits = head(batch.features[column])
            if logits.isfinite().all():
                tally.add(logits, truth[batch.samples])
            else:
                tallies[number] = None
    if not images:
        raise UsageError(f"none of the {len(bad)} images of {source.spec} could be read")
    return Measured(tuple(None if tally is None else tally.measures() for tally in tallies), tuple(bad))
