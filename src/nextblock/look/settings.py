"""Settings that every command that draws has: which model, which images, where to. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextblock.config import Attention
from nextblock.evaluate.settings import EvalSettings, check_layers
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
    distance: Count = 1
    """Draw what is predicted so many blocks ahead; above 1 for models with several predicted blocks."""
    unpredicted: Literal["hatch", "mean"] = "hatch"
    """Blocks that are not predicted, such as the first: a hatch, or their mean colour."""
    each_image: bool = False
    """Also write each drawn image to OUT/images: original and prediction side by side, in full size."""


@dataclass(frozen=True, kw_only=True)
class SurpriseSettings(EvalSettings):
    """How badly each block of images is predicted."""

    data: str
    """Images, all of which are measured: a directory, or any other source."""
    score: Literal["mean", "largest"] = "mean"
    """What ranks the images: the mean loss of the blocks, or the largest."""
    num_images: Count = 8
    """Images that are drawn: so many of the highest scores, and half as many of the lowest."""


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


@dataclass(frozen=True, kw_only=True)
class FeaturesSettings(LookSettings):
    """What `features` draws."""

    model: str
    """A run directory, a file of weights, hf:USER/NAME, or timm:NAME."""
    num_images: Count = 8
    """Number of images, evenly spaced over the source."""
    fit_images: Count = 256
    """Images whose patches choose the colours, evenly spaced too; the colours are the same for all."""
    layers: str = "last"
    """Encoder layers, averaged after the final norm: last, last6, layer7 or 3+4+5 (from 0)."""
    attention: Attention = "native"
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    head: str | None = None
    """Draw where an attentive or ep head on this encoder looks: RUN/probe/ep, or an official AIM head."""
    query: str | None = None
    """Draw the patches nearest to one of this image: a file, or the number of an image of data, from 0."""
    patch: tuple[Natural, Natural] | None = None
    """Row and column of the query's patch, from 0; none: the one least like the rest of its image."""
    top: Count = 13
    """Nearest patches to draw."""
    per_image: Count = 1
    """At most so many of them in one image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers((self.layers,), several=())
        require(
            self.patch is None or self.query is not None, "patch is a patch of the query; give --query too"
        )
