"""What the optimizer is told: which parameters decay, and the learning rate of every step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from nextblock.config import OptimConfig

__all__ = ["build_optimizer", "lr_at", "parameter_groups", "set_lr"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Official XTRA's two groups: what has several dimensions and no "bias" in its name is decayed.

    The learned positions have three dimensions, so they are decayed. Frozen parameters are in neither.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if p.ndim > 1 and "bias" not in name]
    rest = [p for name, p in named if p.ndim <= 1 or "bias" in name]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the two groups. Fused: several times quicker than the default, on a CPU too."""
    groups = parameter_groups(model, config.weight_decay)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def lr_at(step: int, *, peak: float, start: float, end: float, warmup_steps: int, total_steps: int) -> float:
    """Learning rate of a step (from 0): a line from `start` up to `peak`, then a cosine down to `end`.

    The line reaches the peak on the last warm-up step, and the cosine would reach `end` on step
    `total_steps`, one after the last: the scheduler that official XTRA uses. Without warm-up
    the first step has `peak`; a warm-up of one step has `start`.
    """
    if step < warmup_steps:
        share = step / (warmup_steps - 1) if warmup_steps > 1 else 0.0
        return start + (peak - start) * share
    share = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * min(1.0, share))) / 2


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr
