"""Accuracy, calibration, loss and confusion of logits, accumulated over batches; standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nextblock.errors import UsageError

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


def accuracies(right: Bool[np.ndarray, " n"], truth: Int64[np.ndarray, " n"]) -> dict[str, float]:
    """Compute top-1 accuracy with its standard error, and the mean accuracy of the classes with images."""
    images = np.bincount(truth)
    of_class = np.bincount(truth, weights=right)[images > 0] / images[images > 0]
    top1 = int(right.sum()) / len(right)
    return {"top1": top1, "top1_se": standard_error(top1, len(right)), "balanced": float(of_class.mean())}


def paired(
    one: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
    other: Bool[np.ndarray, " n"] | Float[np.ndarray, " n"],
) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and its paired standard error.

    Two classifiers err on many of the same images, so this error is smaller than for independent accuracies.
    One image has no standard deviation; its error is the largest possible, 1.
    """
    difference = one.astype(float) - other.astype(float)
    error = float(difference.std(ddof=1)) / math.sqrt(len(difference)) if len(difference) > 1 else 1.0
    return float(difference.mean()), error


class Tally:
    """Accumulates measures on the CPU, batch by batch; logits may be on any device."""

    def __init__(self, num_classes: int, *, confusion: bool = True) -> None:
        self.num_classes, self._confusion = num_classes, confusion
        # Per batch: labels, likeliest classes, whether the label is among the top five, confidences, sum of
        # losses.
        self._batches: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, float]] = []

    @classmethod
    def joined(cls, tallies: Sequence[Tally]) -> Tally:
        """Join tallies, such as those of several processes, in this order."""
        whole = cls(tallies[0].num_classes, confusion=tallies[0]._confusion)
        whole._batches = [batch for tally in tallies for batch in tally._batches]
        return whole

    def add(self, logits: Float[Tensor, "b c"], labels: Int64[Tensor, " b"]) -> None:
        """Add a batch; `UsageError` if logits are NaN or infinite because the model diverged."""
        if not len(labels):
            return
        truth = labels.cpu()
        # Of a batch only what the measures need is kept, never its logits: they may have thousands of
        # classes.
        log_p = logits.detach().float().log_softmax(dim=-1)
        top = log_p.topk(min(5, self.num_classes))
        likeliest, ranked = top.values[:, 0].cpu().double(), top.indices.cpu()
        if likeliest.isnan().any():
            raise UsageError(
                f"{int(likeliest.isnan().sum())} of {len(truth)} images have NaN logits: the head or the "
                "encoder diverged; train with a lower learning rate, encode in fp32, or check the encoder's "
                "weights"
            )
        loss = -float(log_p.cpu().double().gather(1, truth[:, None]).sum())
        in_top5 = (ranked == truth[:, None]).any(dim=1)
        self._batches.append(
            (truth.numpy(), ranked[:, 0].numpy(), in_top5.numpy(), likeliest.exp().numpy(), loss)
        )

    def measures(self) -> Measures:
        """Measures of all images added; `UsageError` if there are none."""
        if not self._batches:
            raise UsageError("no image was measured; give a source with readable, labelled images")
        *arrays, losses = zip(*self._batches, strict=True)
        truth, guess, in_top5, confidence = map(np.concatenate, arrays)
        classes, images, right = self.num_classes, len(truth), truth == guess
        class_images = np.bincount(truth, minlength=classes)
        class_right = np.bincount(truth[right], minlength=classes)
        per_class = tuple(
            of_right / of_all if of_all else None
            for of_right, of_all in zip(class_right.tolist(), class_images.tolist(), strict=True)
        )
        known = [accuracy for accuracy in per_class if accuracy is not None]
        # Per bin: right images minus the sum of confidences, so images x (accuracy - mean confidence).
        # A bin contains its upper end, as in the paper: (0, 1/15], (1/15, 2/15], ...
        bins = (np.ceil(confidence * CONFIDENCE_BINS) - 1).clip(0, CONFIDENCE_BINS - 1).astype(np.int64)
        excess = torch.from_numpy(np.bincount(bins, right - confidence, minlength=CONFIDENCE_BINS))
        confusion = None
        if self._confusion and classes <= MAX_CONFUSION_CLASSES:
            cells = np.bincount(truth * classes + guess, minlength=classes**2)
            confusion = tuple(map(tuple, cells.reshape(classes, classes).tolist()))
        return Measures(
            images=images,
            top1=int(right.sum()) / images,
            top5=int(in_top5.sum()) / images,
            balanced=sum(known) / len(known),
            calibration_error=float(excess.abs().sum()) / images,
            loss=sum(losses) / images,
            per_class=per_class,
            confusion=confusion,
            right=right,
        )
