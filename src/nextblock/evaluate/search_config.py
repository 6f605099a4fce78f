"""What `nextblock search` is told: settings, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nextblock.config import Attention
from nextblock.evaluate.embed.config import FeatureSettings
from nextblock.evaluate.probe.config import Tokens
from nextblock.evaluate.settings import EncodingSettings
from nextblock.settings import require

__all__ = ["MAX_QUERIES", "SearchConfig"]

MAX_QUERIES = 64
"""Each is a row of the sheet."""

_OF_THE_FEATURES = ("layers", "tokens", "attention")


@dataclass(frozen=True, kw_only=True)
class SearchConfig(EncodingSettings):
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
    layers: str | None = None
    """last, last6 (or any number), layer7 or 3+4+5 (from 0): their mean is compared; null: last, or as the
    features were made."""
    tokens: Tokens | None = None
    """patches, class, joined (class token and mean patch) or all; null: patches, or as the features were
    made."""
    attention: Attention | None = None
    """Attention at encoding; null: native, or as the features were made."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.data is not None or self.features is not None,
            "neither data nor features is given; name images to search, or a file of their features",
        )
        require(Path(self.out).suffix == ".png", f"out is {self.out!r}; its name must end in .png")
        require(self.top >= 1, f"top is {self.top}; use at least 1")
        require(self.layers != "each", "layers each is several features; name the layers to compare")
        _ = self.feature_settings  # refuses layers that cannot be
        given = [name for name in _OF_THE_FEATURES if getattr(self, name) is not None]
        require(
            self.features is None or not given,
            f"features are given, and {' and '.join(given)}; a file of features has its own: leave one out",
        )

    @property
    def feature_settings(self) -> FeatureSettings:
        """What is compared, where no file of features tells."""
        given = {name: getattr(self, name) for name in _OF_THE_FEATURES}
        return FeatureSettings(**{name: value for name, value in given.items() if value is not None})
