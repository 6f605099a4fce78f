"""What the caller says of a foreign file that the file does not say itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nextblock.config import Size, pair
from nextblock.settings import require

__all__ = ["LoadOptions", "ProbeLayers"]

ProbeLayers = Literal["last", "best"] | Sequence[int]


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """Settings of a foreign file; None: as the file says."""

    head: str | Path | None = None
    """The head of an AIM classifier, if it is in a file of its own."""
    num_heads: int | None = None
    """Attention heads of the encoder."""
    probe_layers: ProbeLayers | None = None
    """Layers that an AIM head averages, counted from 0, or Apple's "last" or "best"."""
    image_size: Size | None = None
    """AIM: size of its images in pixels, or (rows, columns)."""
    norm_eps: float | None = None
    """AIM: epsilon of the LayerNorms; 1e-6 in the inference layout, 1e-5 in that of the training code."""
    fallback: Mapping[str, Any] = field(default_factory=dict)
    """Values to use, and to report, for settings that neither the caller nor the file tells."""
    drop_prefix_tokens: bool = False
    """Leave out class and register tokens of a timm ViT: good to start from, but other features."""

    def __post_init__(self) -> None:
        heads, eps, size, layers = self.num_heads, self.norm_eps, self.image_size, self.probe_layers
        require(heads is None or heads >= 1, f"num_heads is {heads}; it must be at least 1")
        require(eps is None or eps > 0, f"norm_eps is {eps}; it must be above 0")
        require(size is None or min(pair(size)) >= 1, f"image_size is {size}; it must be at least 1 pixel")
        numbers = not isinstance(layers, str) and isinstance(layers, Sequence) and len(layers) > 0
        require(
            layers in (None, "last", "best")
            or (numbers and all(isinstance(one, int) and one >= 0 for one in layers)),  # type: ignore[union-attr]
            f'probe_layers is {layers!r}; give "last", "best", or a list of layers counted from 0',
        )

    @property
    def given(self) -> list[str]:
        """The settings that the caller gave."""
        names = ("head", "num_heads", "probe_layers", "image_size", "norm_eps")
        return [name for name in names if getattr(self, name) is not None]

    def refuse_others(self, taken: Sequence[str], where: str) -> None:
        """Refuse settings that a format has no use for."""
        for name in self.given:
            require(name in taken, f"{where} has no use for {name}={getattr(self, name)!r}; leave it out")
