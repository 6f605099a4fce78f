"""What is measured beside the training loss: reference losses, and what others look at while a run trains.

The loop knows no monitor; the commands hand it some. A monitor draws no global random number and leaves the
model as it found it (evaluation mode and `no_grad` are the loop's business), so that a run with and without
it ends with the same weights.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nextblock.models import NextBlockModel

__all__ = ["Monitor", "MonitorEvent", "not_learned", "reference_losses"]


class MonitorEvent(NamedTuple):
    """When and where a monitor is called."""

    step: int
    """Optimizer steps done."""
    run_dir: Path
    """The run directory; a monitor writes into a folder of its own in it."""
    device: torch.device
    """The model's."""


@runtime_checkable
class Monitor(Protocol):
    """Called every `every` (a duration such as "20ep"), and at the end of the run."""

    every: str

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Look at the model (evaluation mode, no gradients); the result is logged under its names."""
        ...


def reference_losses(model: NextBlockModel, images: Float[Tensor, "b c h w"]) -> dict[str, float]:
    """The loss on these normalised images of predictions that need no model, by name: see `targets`."""
    assert model.targets is not None, "checked before training begins"
    losses = model.targets.reference_losses(model.targets.of_blocks(images, model.orders[0]))
    return {name: loss.mean().item() for name, loss in losses.items()}


def not_learned(loss: float, references: dict[str, float]) -> str | None:
    """Cause and remedy if a loss is not below that of predicting zero, or all tokens alike; else None."""
    name, meaning = ("zero", "zero") if "zero" in references else ("uniform", "all tokens alike")
    if loss < references.get(name, math.inf):
        return None
    return (
        f"the loss {loss:.4f} is not below {references.get(name, math.nan):.4f}, that of predicting "
        f"{meaning}: nothing is learned so far. Train longer, try another optim.lr, or look at the images"
    )
