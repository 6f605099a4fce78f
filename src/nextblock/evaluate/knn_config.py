"""What a nearest-neighbour evaluation is told and what it finds: settings and results, quick to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nextblock.config import Attention
from nextblock.evaluate.layers import check_layers
from nextblock.evaluate.probe.config import EncoderName
from nextblock.evaluate.settings import EvaluationSettings
from nextblock.settings import check_types, require

__all__ = ["DEFAULT_K", "DEFAULT_TEMPERATURE", "KnnConfig", "KnnResult", "KnnRow"]

DEFAULT_K, DEFAULT_TEMPERATURE = 20, 0.07
"""The setting to report, fixed before anything is measured."""


@dataclass(frozen=True, kw_only=True)
class KnnConfig(EvaluationSettings):
    """What to evaluate by nearest neighbours, on what, and with which numbers of neighbours."""

    train: str
    """Labelled images that are the neighbours."""
    val: str | None = None
    """Labelled images to measure on; null: each image of train by all others (leave-one-out)."""
    out: str | None = None
    """Directory for knn.json, knn.csv and knn.md; null: print only."""
    k: tuple[int, ...] = (1, 5, DEFAULT_K, 100)
    """Numbers of neighbours that vote."""
    temperature: tuple[float, ...] = (DEFAULT_TEMPERATURE,)
    """A neighbour's vote weighs exp(cosine similarity / temperature)."""
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
    """Seed of the untrained encoder."""
    encode_batch_size: int = 128
    """Images that go through the encoder at a time."""

    def __post_init__(self) -> None:
        check_types(self)
        check_layers((self.layers,), several=())
        for name, right in (("k", "numbers from 1 on"), ("temperature", "numbers above 0")):
            values = getattr(self, name)
            require(
                len(values) > 0
                and len(set(values)) == len(values)
                and all(0 < value < math.inf for value in values),
                f"{name} is {list(values)}; give one or more {right}, each once",
            )
        require(self.encode_batch_size >= 1, f"encode_batch_size is {self.encode_batch_size}; use at least 1")
        for name in ("seed", "pixels_gb"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it cannot be below 0")


@dataclass(frozen=True, kw_only=True)
class KnnRow:
    """Accuracy of one vote on one encoder."""

    encoder: EncoderName
    k: int
    temperature: float
    top1: float
    """Share of images whose class wins the vote."""
    balanced: float
    """Mean of the accuracies of the classes that have images."""
    is_default: bool
    """Whether this is the setting fixed beforehand."""


@dataclass(frozen=True, kw_only=True)
class KnnResult:
    """What an evaluation by nearest neighbours found."""

    rows: tuple[KnnRow, ...]
    split: Literal["val", "leave-one-out"]
    num_classes: int
    train_images: int
    """Readable images among which neighbours were looked for; leaving one out, one fewer."""
    measured_images: int
    """Readable images measured on."""
    layers: tuple[int, ...]
    """Encoder layers, counted from 0."""
    bad_images: Mapping[str, int]
    """Unreadable images, which were left out, by source."""
    elapsed_s: float

    def row(self, encoder: EncoderName, k: int, temperature: float = DEFAULT_TEMPERATURE) -> KnnRow:
        """The row of this encoder and setting."""
        return next(r for r in self.rows if (r.encoder, r.k, r.temperature) == (encoder, k, temperature))
