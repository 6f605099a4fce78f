"""Settings of `predict`, `complete`, `surprise`, `features` and `serve`. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nextblock.config import Attention
from nextblock.evaluate.settings import EvalSettings, check_layers
from nextblock.settings import Auto, Count, Natural, Positive, Rule, Share, check_types, require

Port = Annotated[int, Rule(lambda n: 0 <= n <= 65_535, "from 0 to 65535")]


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
    """Processes that decode images; none: as many as in pre-training."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class PredictSettings(LookSettings):
    """What `predict` draws."""

    num_images: Count = 8
    """Number of images, evenly spaced over the source."""
    distance: Count = 1
    """How many blocks ahead to draw predictions; above 1 only for models that predict several blocks."""
    unpredicted: Literal["hatch", "mean"] = "hatch"
    """How to draw blocks that are not predicted, such as the first: a hatch, or their mean colour."""
    each_image: bool = False
    """Also write each drawn image to OUT/images: original and prediction side by side, at full size."""


@dataclass(frozen=True, kw_only=True)
class SurpriseSettings(EvalSettings):
    """What `surprise` measures."""

    data: str
    """Images to measure: a directory, or any other source."""
    score: Literal["mean", "largest"] = "mean"
    """Rank images by the mean loss of their blocks, or by the largest."""
    num_images: Count = 8
    """Images to draw: this many with the highest scores, and half as many with the lowest."""


@dataclass(frozen=True, kw_only=True)
class CompleteSettings(LookSettings):
    """Which blocks `complete` gives the model, and in which order it predicts the others."""

    given: Natural | None = None
    """Give this many blocks, the first of the order."""
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
    """A run directory, a weight file, hf:USER/NAME, or timm:NAME."""
    num_images: Count = 8
    """Number of images, evenly spaced over the source."""
    fit_images: Count = 256
    """Images whose patches determine the colours, also evenly spaced."""
    layers: str = "last"
    """Encoder layers, averaged after the final norm: last, last6, layer7 or 3+4+5 (from 0)."""
    attention: Attention = "native"
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    head: str | None = None
    """Draw the attention of an attentive or ep head on this encoder: RUN/probe/ep, or an AIM head."""
    query: str | None = None
    """Draw the patches nearest to one of this image: a file, or the number of an image of data, from 0."""
    patch: tuple[Natural, Natural] | None = None
    """Row and column of the query's patch, from 0; none: the patch least like the rest of its image."""
    top: Count = 13
    """Nearest patches to draw."""
    per_image: Count = 1
    """At most this many of them in one image."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers((self.layers,), several=())
        require(
            self.patch is None or self.query is not None, "patch is a patch of the query; give --query too"
        )


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What `serve` shows, and its address."""

    model: str
    """A run (finished or still training), a checkpoint or weight file, hf:USER/NAME, or timm:NAME. May be the
    first word, without --model."""
    data: str | None = None
    """Images to choose from and to search for the nearest: a directory, `digits` or any other source."""
    host: str = "127.0.0.1"
    """Address to listen on. The page has no password: with another address, everyone who reaches it can use
    it."""
    port: Port = 8000
    """Port of the page; 0: any free one."""
    open: bool = False
    """Open the page in a browser."""
    max_upload_mb: Positive = 20
    """Largest accepted image file, in MB."""
    num_heads: Count | None = None
    """Attention heads of the encoder; only for files that do not record them."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: Natural = 0
    """Processes that decode --data while it is encoded; 0: none."""

    def __post_init__(self) -> None:
        check_types(self)
