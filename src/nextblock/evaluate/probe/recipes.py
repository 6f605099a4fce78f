"""The recipes of probes: what is officially known of how XTRA's and AIM's heads are trained. Quick to import.

`xtra` is what XTRA's official code does. AIM v1 publishes its heads but not how they were trained, so `aim`
trains AIM's heads with the sweep of AIMv2, from the same lab (AIMv2, Table A2). That table names a colour
jitter of 0.3 besides RandAugment; augment timm has none, as timm leaves it out where there is RandAugment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

__all__ = ["RECIPES", "HeadName", "Recipe", "RecipeName"]

HeadName = Literal["attentive", "linear", "mlp"]
RecipeName = Literal["xtra", "aim"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The part of a probe's settings that hangs on whose protocol it follows."""

    lr: tuple[float, ...]
    weight_decay: Mapping[HeadName, tuple[float, ...]]
    layers: Mapping[HeadName, tuple[str, ...]]
    """In the words of `ProbeConfig.layers`."""
    betas: tuple[float, float]
    epochs_per_warmup: int
    """One epoch of warm-up for so many."""
    bias: bool
    """Whether the linear layer of a head has one."""
    encoder_heads: bool
    """Whether an attentive head has as many attention heads as the encoder, else 16."""


RECIPES: Mapping[RecipeName, Recipe] = {
    # XTRA's official evaluation of its B/16 on ImageNet-1k. It has no MLP head: that one is ours.
    "xtra": Recipe(
        lr=(1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
        weight_decay={"attentive": (0.1,), "linear": (0.0,), "mlp": (0.1,)},
        layers={"attentive": ("last6",), "linear": ("last",), "mlp": ("last",)},
        betas=(0.9, 0.95),
        epochs_per_warmup=10,
        bias=True,
        encoder_heads=False,
    ),
    # AIM's heads (apple/ml-aim) and AIMv2's attentive sweep; for other heads none is published.
    "aim": Recipe(
        lr=(5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3),
        weight_decay={"attentive": (0.05, 0.1), "linear": (0.05, 0.1), "mlp": (0.05, 0.1)},
        layers={"attentive": ("last6", "best"), "linear": ("last",), "mlp": ("last",)},
        betas=(0.9, 0.999),
        epochs_per_warmup=20,
        bias=False,
        encoder_heads=True,
    ),
}
