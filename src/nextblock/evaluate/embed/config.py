"""What `nextblock embed` is told: settings, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextblock.config import Attention
from nextblock.evaluate.layers import check_layers
from nextblock.evaluate.settings import EncodingSettings
from nextblock.settings import check_types, require

__all__ = ["FORMATS", "EmbedConfig", "FeatureSettings"]

FORMATS = (".parquet", ".npy", ".safetensors")


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """Which of an encoder's outputs are written."""

    layers: str = "last"
    """last, last6 (or any number), layer7 or 3+4+5 (counted from 0), or each: every layer, kept apart."""
    layer_pool: Literal["mean", "concat"] = "mean"
    """Several layers are averaged, or joined channel by channel; of no account where each is kept apart."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Patches alone; class token; class token and mean patch, joined; all tokens."""
    pool: Literal["mean", "none"] = "mean"
    """The mean over the tokens, one vector an image; none: every token."""
    norm: bool = True
    """Apply the encoder's final norm to each layer's output first."""
    attention: Attention = "native"
    """Attention at encoding: what the checkpoint records for its features, the pre-training mask, or none."""

    def __post_init__(self) -> None:
        check_types(self)
        check_layers((self.layers,), several=("each",))
        require(
            self.pool == "mean" or self.tokens in ("patches", "all"),
            f"tokens {self.tokens} is one vector an image; pool none needs tokens patches or all",
        )


@dataclass(frozen=True, kw_only=True)
class EmbedConfig(FeatureSettings, EncodingSettings):
    """Of which model and images the features are, which features, and where they go."""

    data: str
    """Images: a directory, `torchvision:CIFAR10,root=DIR`, or `digits`."""
    out: str
    """File of the features: .parquet, .npy or .safetensors."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Numbers in the file."""

    def __post_init__(self) -> None:
        FeatureSettings.__post_init__(self)
        EncodingSettings.__post_init__(self)
        suffix = Path(self.out).suffix
        require(suffix in FORMATS, f"out is {self.out!r}; its name must end in {', '.join(FORMATS)}")
