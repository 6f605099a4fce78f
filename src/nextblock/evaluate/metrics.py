"""Accuracy, calibration, loss and confusion of logits, accumulated over batches; standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nextblock.errors import UsageError

__all__ = ["CONFIDENCE_BINS", "MAX_CONFUSION_CLASSES", "Measures", "Tally"]

CONFIDENCE_BINS = 15
MAX_CONFUSION_CLASSES = 1_000


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How good logits are on labelled images."""

    images: int
    top1: float
    """Share of images whose likeliest class is the right one."""
    top5: float
    """Share of images whose right class is among the five likeliest (all, if there are fewer)."""
    balanced: float
    """Mean accuracy of the classes that have images."""
    calibration_error: float
    """Expected calibration error: mean gap between confidence and accuracy over 15 equal bins of the
    likeliest class's probability, weighted by their images (Guo et al. 2017)."""
    loss: float
    """Mean cross-entropy."""
    per_class: tuple[float | None, ...]
    """Accuracy of each class; None for a class without images."""
    confusion: tuple[tuple[int, ...], ...] | None
    """Images by true class (row) and likeliest class (column); None if off or beyond 1,000 classes."""
    right: Bool[np.ndarray, " n"]
    """Whether each image was classified correctly, in the order of `Tally.add`."""

    def row(self) -> dict[str, float | int]:
        """Numbers for a row of a table, with the standard error of top-1."""
        names = ("images", "top1", "top5", "balanced", "calibration_error", "loss")
        values = {name: getattr(self, name) for name in names}
        return {**values, "top1_se": standard_error(self.top1, self.images)}


def standard_error(accuracy: float, images: int) -> float:
    """Standard error of an accuracy over n independent images: sqrt(p (1 - p) / n)."""
    return math.sqrt(accuracy * (1 - accuracy) / images)


def paired(
    one: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
    other: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and its paired standard error.

    Two classifiers err on many of the same images, so this error is smaller than for independent accuracies.
    """
    difference = one.astype(float) - other.astype(float)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), error


class Tally:
    """Accumulates measures on the CPU, batch by batch; logits may be on any device."""

    def __init__(self, num_classes: int, *, confusion: bool = True) -> None:
        if num_classes < 1:
            raise UsageError(f"num_classes is {num_classes}; use at least 1")
        self.num_classes = num_classes
        keep_confusion = confusion and num_classes <= MAX_CONFUSION_CLASSES
        self._confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64) if keep_confusion else None
        self._class_images = torch.zeros(num_classes, dtype=torch.int64)
        self._class_right = torch.zeros(num_classes, dtype=torch.int64)
        self._top5_right = 0
        self._loss = 0.0
        # Per bin: right images minus the sum of confidences, so images x (accuracy - mean confidence).
        self._excess = torch.zeros(CONFIDENCE_BINS, dtype=torch.float64)
        self._right: list[np.ndarray] = []

    @classmethod
    def joined(cls, tallies: Sequence[Tally]) -> Tally:
        """Join tallies, such as those of several processes, in this order."""
        whole = cls(tallies[0].num_classes, confusion=tallies[0]._confusion is not None)
        for tally in tallies:
            for name, value in vars(tally).items():
                if name != "num_classes" and value is not None:
                    setattr(whole, name, getattr(whole, name) + value)  # sums, and a list that grows
        return whole

    def add(self, logits: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]) -> None:
        """Add a batch.

        Raises `UsageError` if the number of logits is not that of the classes, a label is out of range, or
        logits are NaN or infinite because the model diverged.
        """
        if logits.shape[1] != self.num_classes:
            raise UsageError(f"{logits.shape[1]} logits per image for {self.num_classes} classes")
        if not len(labels):
            return
        truth = labels.cpu()
        if truth.min() < 0 or truth.max() >= self.num_classes:
            raise UsageError(
                f"labels from {int(truth.min())} to {int(truth.max())} for {self.num_classes} classes"
            )
        log_p = logits.detach().float().log_softmax(dim=-1)
        top = log_p.topk(min(5, self.num_classes))
        likeliest, ranked = top.values[:, 0].cpu().double(), top.indices.cpu()
        if likeliest.isnan().any():
            raise UsageError(
                f"{int(likeliest.isnan().sum())} of {len(truth)} images have NaN logits: the head or the "
                "encoder diverged; train with a lower learning rate, encode in fp32, or check the encoder's "
                "weights"
            )
        self._loss -= float(log_p.cpu().double().gather(1, rearrange(truth, "b -> b 1")).sum())
        self._count(truth, ranked, likeliest.exp())

    def _count(
        self, truth: Int64[Tensor, " b"], ranked: Int64[Tensor, "b five"], confidence: Float[Tensor, " b"]
    ) -> None:
        """Add the counts; `ranked` are the likeliest classes, and `confidence` is the first one's."""
        right = ranked[:, 0] == truth
        self._right.append(right.numpy())
        self._class_images += torch.bincount(truth, minlength=self.num_classes)
        self._class_right += torch.bincount(truth[right], minlength=self.num_classes)
        self._top5_right += int((ranked == rearrange(truth, "b -> b 1")).sum())
        bins = (confidence * CONFIDENCE_BINS).ceil().long().sub(1).clamp(0, CONFIDENCE_BINS - 1)
        self._excess.index_add_(0, bins, right.double() - confidence)
        if self._confusion is not None:
            cells = torch.bincount(truth * self.num_classes + ranked[:, 0], minlength=self.num_classes**2)
            self._confusion += rearrange(cells, "(truth guess) -> truth guess", guess=self.num_classes)

    def measures(self) -> Measures:
        """Measures of all images added; `UsageError` if there are none."""
        images = int(self._class_images.sum())
        if not images:
            raise UsageError("no image was measured; give a source with readable, labelled images")
        counts = zip(self._class_right.tolist(), self._class_images.tolist(), strict=True)
        per_class = tuple(right / number if number else None for right, number in counts)
        known = [accuracy for accuracy in per_class if accuracy is not None]
        return Measures(
            images=images,
            top1=int(self._class_right.sum()) / images,
            top5=self._top5_right / images,
            balanced=sum(known) / len(known),
            calibration_error=float(self._excess.abs().sum()) / images,
            loss=self._loss / images,
            per_class=per_class,
            confusion=None if self._confusion is None else tuple(map(tuple, self._confusion.tolist())),
            right=np.concatenate(self._right),
        )
