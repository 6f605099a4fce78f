"""What `nextblock search` is told: settings, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nextblock.config import Attention
from nextblock.evaluate.embed.config import FeatureSettings, default_batch_size
from nextblock.evaluate.settings import EvaluationSettings
from nextblock.settings import check_types, require

__all__ = ["MAX_QUERIES", "SearchConfig"]

MAX_QUERIES = 64
"""Each is a row of the sheet."""


@dataclass(frozen=True, kw_only=True)
class SearchConfig(EvaluationSettings):
    """Among which images to look for the nearest to which, by which model."""

    data: str | None = None
    """Images to search: a directory, or `digits`; null: those that the features were made of."""
    features: str | None = None
    """A file that `nextblock embed` made with this model of these images, instead of encoding them anew."""
    query: str
    """An image file, or a source of a few images."""
    out: str
    """The sheet, a .png; beside it come a .csv and a .json of the same name."""
    top: int = 10
    """Neighbours of each query."""
    layers: str = "last"
    """last, last6 (or any number), layer7 or 3+4+5 (from 0): their mean is compared; a features file tells
    its own."""
    attention: Attention = "native"
    """Attention at encoding; a features file tells its own."""
    encode_batch_size: int | None = None
    """Images that go through the encoder at a time; null: 16 on a CPU, 128 on a GPU."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.data is not None or self.features is not None,
            "neither data nor features is given; name images to search, or a file of their features",
        )
        require(Path(self.out).suffix == ".png", f"out is {self.out!r}; its name must end in .png")
        require(self.top >= 1, f"top is {self.top}; use at least 1")
        require(self.layers != "each", "layers each is several features; name the layers to compare")
        _ = self.feature_settings  # refuses layers that cannot be
        require(
            self.encode_batch_size is None or self.encode_batch_size >= 1,
            f"encode_batch_size is {self.encode_batch_size}; use at least 1",
        )

    @property
    def feature_settings(self) -> FeatureSettings:
        """What is compared, where no file of features tells."""
        return FeatureSettings(layers=self.layers, attention=self.attention)

    def batch_size(self, device_type: str) -> int:
        """Images that go through the encoder at a time."""
        return self.encode_batch_size or default_batch_size(device_type)
