"""What `nextblock classify` is told: settings, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextblock.evaluate.settings import EncodingSettings
from nextblock.settings import require

__all__ = ["CLASSIFY_FORMATS", "ClassifyConfig"]

CLASSIFY_FORMATS = (".csv", ".json", ".parquet")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(EncodingSettings):
    """Which images to name the classes of, by which classifier, and where to write it."""

    model: str
    """A directory of a trained head (PROBE/attentive, PROBE/linear), that of a fine-tuning, or an official
    classifier file."""
    head: str | None = None
    """The second file of an official AIM classifier."""
    num_heads: int | None = None
    """Attention heads of the encoder, where a foreign file does not tell."""
    probe_layers: Literal["last", "best"] | tuple[int, ...] | None = None
    """Layers that an official AIM head averages, which its file does not tell."""
    data: str
    """Images: a directory, `torchvision:CIFAR10,root=DIR`, or `digits`; they need no labels."""
    out: str | None = None
    """File of the classes: .csv, .json or .parquet; null: print only."""
    top: int = 5
    """Likeliest classes of each image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.top >= 1, f"top is {self.top}; use at least 1")
        require(
            self.out is None or Path(self.out).suffix in CLASSIFY_FORMATS,
            f"out is {self.out!r}; its name must end in {', '.join(CLASSIFY_FORMATS)}",
        )
