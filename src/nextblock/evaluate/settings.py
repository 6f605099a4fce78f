"""Settings that every evaluation has: which model, on what device, how exactly. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["EvaluationSettings"]


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
