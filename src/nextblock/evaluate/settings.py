"""Settings that every evaluation has: which model, on what device, how exactly. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nextblock.settings import check_types, require

__all__ = ["CROP_RATIO", "CROP_SCALE", "EncodingSettings", "EvaluationSettings"]

CPU_BATCH, GPU_BATCH = 16, 128
"""On a CPU more gain a few percent of speed and take half a gigabyte of memory; a GPU wants many."""

CROP_SCALE, CROP_RATIO = (0.08, 1.0), (0.75, 1.333)
"""Training crops of probes and fine-tuning, as of the official linear probe."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """Which model is evaluated, and by what means."""

    model: str
    """A run directory, a file of weights, hf:USER/NAME, or timm:NAME."""
    num_heads: int | None = None
    """Attention heads of the encoder, where a foreign file does not tell."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the encoder; what is trained or compared is fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: int | None = None
    """Processes that decode; null: what the run used."""
    max_bad_fraction: float | None = None
    """Stop where more than this share of the images cannot be read; null: what the run allowed."""
    overwrite: bool = False
    """Replace another result in out."""


@dataclass(frozen=True, kw_only=True)
class EncodingSettings(EvaluationSettings):
    """The same of what encodes every image once, as many at a time as the device likes."""

    encode_batch_size: int | None = None
    """Images that go through the encoder at a time; null: 16 on a CPU, 128 on a GPU."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            self.encode_batch_size is None or self.encode_batch_size >= 1,
            f"encode_batch_size is {self.encode_batch_size}; use at least 1",
        )

    def batch_size(self, device_type: str) -> int:
        """Images that go through the encoder at a time."""
        return self.encode_batch_size or (CPU_BATCH if device_type == "cpu" else GPU_BATCH)
