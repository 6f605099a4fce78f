"""Monitors: measurements of a model during training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nextblock.models.next_block import NextBlockModel
from nextblock.train.distributed import ALONE, Group

RANKME_EPS = 1e-7

LogImage = Callable[[int, str, Path], None]
"""Called with the step, a name such as "pictures/predictions", and the path of a PNG."""


def rankme(features: Float[Tensor, "n d"]) -> float:
    """Effective rank of features, from 1 to min(n, d): RankMe, Garrido et al., arXiv 2210.02885, ICML 2023.

    It is exp of the entropy of the normalised singular values, plus 1e-7 each. Compare values on the same
    images only, as it grows with their number.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + RANKME_EPS
    return float((-(shares * shares.log()).sum()).exp())


class MonitorEvent(NamedTuple):
    """Context of a monitor call."""

    step: int
    """Number of optimizer steps done."""
    run_dir: Path
    """The run directory; a monitor writes into its own folder there."""
    device: torch.device
    """Device of the model."""
    group: Group = ALONE
    """The processes of the run. All call every monitor; only `group.is_main` may write."""
    should_stop: Callable[[], bool] = bool
    """Whether the run was asked to stop; results are then dropped. All ranks must call it equally often."""
    log_image: LogImage | None = None
    """Sends a picture to the run's loggers; None on ranks without loggers."""


@runtime_checkable
class Monitor(Protocol):
    """Measures the model every `every` (a duration such as "20ep") and at the end of the run.

    The model is in evaluation mode without gradients. The returned values are logged under their names. A
    monitor must not change the model, so a run ends with the same weights with and without it. All processes
    call it and must call the model equally often, as each may hold a shard of it.
    """

    every: str

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]: ...  # noqa: D102
