"""What `nextblock embed` is told: settings, quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nextblock.config import Attention
from nextblock.evaluate.layers import check_layers
from nextblock.evaluate.settings import EvaluationSettings
from nextblock.settings import check_types, require

__all__ = ["FORMATS", "EmbedConfig", "FeatureSettings", "default_batch_size"]

FORMATS = (".parquet", ".npy", ".safetensors")
CPU_BATCH, GPU_BATCH = 16, 128
"""On a CPU more gain a few percent of speed and take half a gigabyte of memory; a GPU wants many."""


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
class EmbedConfig(FeatureSettings, EvaluationSettings):
    """Of which model and images the features are, which features, and where they go."""

    data: str
    """Images: a directory, `torchvision:CIFAR10,root=DIR`, or `digits`."""
    out: str
    """File of the features: .parquet, .npy or .safetensors."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Numbers in the file."""
    encode_batch_size: int | None = None
    """Images that go through the encoder at a time; null: 16 on a CPU, 128 on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        suffix = Path(self.out).suffix
        require(suffix in FORMATS, f"out is {self.out!r}; its name must end in {', '.join(FORMATS)}")
        require(
            self.encode_batch_size is None or self.encode_batch_size >= 1,
            f"encode_batch_size is {self.encode_batch_size}; use at least 1",
        )

    def batch_size(self, device_type: str) -> int:
        """Images that go through the encoder at a time."""
        return self.encode_batch_size or default_batch_size(device_type)


def default_batch_size(device_type: str) -> int:
    """Images that go through an encoder at a time where nobody says: by what the device is."""
    return CPU_BATCH if device_type == "cpu" else GPU_BATCH
