"""Settings that every command that draws has: which model, which images, where to. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextblock.settings import Auto, Count, Natural, Share, check_types, require


@dataclass(frozen=True, kw_only=True)
class LookSettings:
    """A model, and the images that it is shown."""

    model: str
    """Run, checkpoint or weight file with a predictor, or hf:USER/NAME."""
    num_heads: Count | None = None
    """Attention heads of the encoder; only for files that do not record them."""
    data: str
    """Images: a directory, a tar, `torchvision:CIFAR10,root=DIR`, `digits` or any other source."""
    out: str
    """Directory for the pictures and their numbers."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: Natural | None = None
    """Processes that decode; auto: as in pre-training."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class PredictSettings(LookSettings):
    """What `predict` draws."""

    num_images: Count = 8
    """Number of images, evenly spaced over the source."""


@dataclass(frozen=True, kw_only=True)
class CompleteSettings(LookSettings):
    """What `complete` is given of each image, and how it continues."""

    given: Natural | None = None
    """Give the first so many blocks of the order."""
    given_rows: Share | Auto = None
    """Give the blocks above this share of the height; auto: 0.5, unless given or given_blocks is set."""
    given_blocks: tuple[Natural, ...] | None = None
    """Give these blocks, counted row by row from 0: 0,1,5."""
    order: (
        Literal["raster", "reverse", "column", "reverse_column", "spiral", "checkerboard", "fixed_random"]
        | Auto
    ) = None
    """Order in which the other blocks are predicted; auto: the model's."""
    num_images: Count = 8
    """Number of images, evenly spaced over the source."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ways = [name for name in ("given", "given_rows", "given_blocks") if getattr(self, name) is not None]
        require(len(ways) < 2, f"{' and '.join(ways)} exclude each other; use one")
