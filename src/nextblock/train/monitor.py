"""What a run lets others look at while it trains: one small protocol.

The loop knows no monitor; the commands hand it some. A monitor draws no global random number and leaves the
model as it found it (`eval()` around it, `no_grad` inside it are the loop's business), so that a run with
and without it ends with the same weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from nextblock.models import NextBlockModel

__all__ = ["Monitor", "MonitorEvent"]


class MonitorEvent(NamedTuple):
    """When and where a monitor is called."""

    step: int
    """Optimizer steps done."""
    run_dir: Path
    """The run directory; a monitor writes into a folder of its own in it."""
    device: torch.device
    """Where the model lies."""


@runtime_checkable
class Monitor(Protocol):
    """Called every `every` (a duration such as "20ep"), and at the end of the run."""

    every: str

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]:
        """Look at the model (evaluation mode, no gradients); what comes back is logged under its names."""
        ...
