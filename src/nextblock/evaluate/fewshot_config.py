"""What an evaluation with few labels is told and what it finds: settings and results, quick to import."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nextblock.config import Attention
from nextblock.errors import UsageError
from nextblock.evaluate.layers import check_layers
from nextblock.evaluate.probe.config import EncoderName
from nextblock.evaluate.settings import EvaluationSettings
from nextblock.settings import check_types, require

__all__ = ["C_GRID", "DEFAULT_C", "FewshotConfig", "FewshotResult", "FewshotRow", "Shots"]

C_GRID, DEFAULT_C = (1e-3, 1e-2, 1e-1, 1.0, 10.0), 1.0
"""Inverse strengths of the L2 penalty to choose among, and the one where there is nothing to choose by."""


@dataclass(frozen=True, kw_only=True)
class Shots:
    """How many labels: so many images of every class, or such a share of every class."""

    per_class: int | None = None
    share: float | None = None

    @classmethod
    def parse(cls, text: str) -> Shots:
        """Read "5" (images a class) or "1%" (of every class)."""
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)%", text)
        if match is not None and match[1] and int(match[1]) >= 1:
            return cls(per_class=int(match[1]))
        if match is not None and match[2] and 0 < float(match[2]) <= 100:
            return cls(share=float(match[2]) / 100)
        raise UsageError(
            f"shots {text!r} is no number of labels; write images a class, such as 5, or a share, such as 1%"
        )


@dataclass(frozen=True, kw_only=True)
class FewshotConfig(EvaluationSettings):
    """What to evaluate with few labels, on what, and how many labels."""

    train: str
    """Labelled images to draw the few from."""
    test: str
    """Labelled images to measure on."""
    out: str | None = None
    """Directory for fewshot.json, fewshot.csv and fewshot.md; null: print only."""
    shots: tuple[str, ...] = ("1", "5", "10")
    """Labels to learn from: so many images of every class, or a share of every class, such as 1%."""
    seeds: int = 5
    """Draws of each number of labels; mean and standard deviation are over these."""
    folds: int = 5
    """Parts of the few labels in the cross-validation that chooses the penalty, or as many as the smallest
    class has images."""
    layers: str = "last"
    """Encoder layers, averaged, each after the final norm: last, last6, layer7 or 3+4+5 (from 0)."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Mean patch; class token, or both joined, where the encoder has one; mean of all tokens."""
    attention: Attention = "native"
    """Attention at encoding: what the checkpoint records for its features, the pre-training mask, or none."""
    baselines: bool = True
    """Also measure the same encoder untrained, and the raw pixels."""
    pixels_gb: float = 4.0
    """Leave out the raw pixels of images that take more memory than this."""
    seed: int = 0
    """Seed of the draws, of the folds, and of the untrained encoder."""
    encode_batch_size: int = 128
    """Images that go through the encoder at a time."""

    def __post_init__(self) -> None:
        check_types(self)
        check_layers((self.layers,), several=())
        parsed = [Shots.parse(text) for text in self.shots]
        require(
            len(parsed) > 0 and len(set(parsed)) == len(parsed),
            f"shots are {list(self.shots)}; name at least one number of labels, each once",
        )
        for name, lowest in (("seeds", 1), ("folds", 2), ("encode_batch_size", 1), ("seed", 0)):
            require(getattr(self, name) >= lowest, f"{name} is {getattr(self, name)}; use at least {lowest}")
        require(
            0 <= self.pixels_gb < math.inf, f"pixels_gb is {self.pixels_gb}; it cannot be below 0 or infinite"
        )


@dataclass(frozen=True, kw_only=True)
class FewshotRow:
    """Accuracy with so many labels on one encoder, over all draws."""

    encoder: EncoderName
    shots: str
    train_images: float
    """Mean number of readable labelled images that were learned from."""
    top1: float
    """Mean over the draws of the share of images whose likeliest class is the right one."""
    top1_std: float | None
    """Standard deviation of that share over the draws (n - 1); None of one draw."""
    top5: float
    balanced: float
    """Mean over the draws of the mean accuracy of the classes that have images."""
    draws: tuple[float, ...]
    """Top-1 of every draw; the same place is the same images for all encoders."""
    c: tuple[float, ...]
    """Inverse strength of the L2 penalty, by draw."""
    chosen: bool
    """Whether the penalty was chosen by cross-validation within the few labels, in every draw."""
    unconverged: int
    """Draws whose regression stopped before it had converged."""


@dataclass(frozen=True, kw_only=True)
class FewshotResult:
    """What an evaluation with few labels found."""

    rows: tuple[FewshotRow, ...]
    num_classes: int
    measured_images: int
    """Readable images measured on."""
    layers: tuple[int, ...]
    """Encoder layers, counted from 0."""
    bad_images: Mapping[str, int]
    """Unreadable images, which were left out, by source."""
    elapsed_s: float

    def row(self, encoder: EncoderName, shots: str) -> FewshotRow:
        """The row of this encoder and number of labels."""
        return next(row for row in self.rows if (row.encoder, row.shots) == (encoder, shots))
