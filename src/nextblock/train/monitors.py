"""What looks at a model while it trains."""

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
"""Called with the step, a name such as "pictures/predictions", and a PNG."""


def rankme(features: Float[Tensor, "n d"]) -> float:
    """Effective rank of features, from 1 to min(n, d): RankMe, Garrido et al., arXiv 2210.02885, ICML 2023.

    exp of the entropy of the singular values, which are divided by their sum; 1e-7 is added to each. Compare
    it between measurements on the same images only: it grows with their number.
    """
    values = torch.linalg.svdvals(features.double())
    shares = values / values.sum() + RANKME_EPS
    return float((-(shares * shares.log()).sum()).exp())


class MonitorEvent(NamedTuple):
    """When and where a monitor is called."""

    step: int
    """Optimizer steps done."""
    run_dir: Path
    """The run directory; a monitor writes into a folder of its own in it."""
    device: torch.device
    """The model's."""
    group: Group = ALONE
    """The processes of the run. All call every monitor; only `group.is_main` may write."""
    should_stop: Callable[[], bool] = bool
    """Whether the run was asked to stop: what is returned is then dropped. All ranks must ask alike."""
    log_image: LogImage | None = None
    """Sends a picture to the run's loggers; None on ranks that have none."""


@runtime_checkable
class Monitor(Protocol):
    """Looks at the model every `every` (a duration such as "20ep"), and at the end of the run.

    The model is in evaluation mode without gradients. What is returned is logged under its names. A monitor
    leaves the model as it was, so that a run with and without it ends with the same weights. With several
    processes, all call it and must call the model equally often, as each may hold a part of it.
    """

    every: str

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]: ...  # noqa: D102
