"""Monitors: measurements of a model during training, and what follows from their values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from nextblock.config import RunConfig
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
    progress: Callable[[int, int], None] | None = None
    """Shows how many images are done, of how many, if a measurement takes long."""


@runtime_checkable
class Monitor(Protocol):
    """Measures the model every `every` (a duration such as "20ep") and at the end of the run.

    The model is in evaluation mode without gradients. The returned values are logged under their names. A
    monitor must not change the model, so a run ends with the same weights with and without it. All processes
    call it and must call the model equally often, as each may hold a shard of it.
    """

    every: str

    def __call__(self, model: NextBlockModel, event: MonitorEvent) -> dict[str, float]: ...  # noqa: D102


# ------------------------------------------------------------------------------- what the values mean

EARLY_STOP = "early stop"
"""`TrainResult.stopped_by` of a run whose metric stopped improving."""

NAMES: dict[str, tuple[str, int]] = {
    "knn": ("knn/top1", 1),
    "rankme": ("rankme", 1),
    "val_loss": ("val_loss", -1),
    "top1": ("top1", 1),
}
"""Name of each metric in metrics.jsonl, and whether higher (1) or lower (-1) is better."""


@dataclass
class Best:
    """The best value of a metric after at least one training step."""

    metric: str | None
    """Metric to compare; None disables the comparison."""
    value: float = math.nan
    step: int = 0
    """Step of the best value; 0 if there is none yet."""
    since: int = 0
    """Number of measurements since then without improvement."""
    last_step: int = 0
    """Step of the latest measurement."""

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """Add the values measured after a step; return whether they are a new best."""
        name, sign = NAMES[self.metric] if self.metric else ("", 0)
        value = values.get(name)
        # A run that was stopped while measuring measures the same step again after resuming: count it once.
        if step <= self.last_step or value is None or not math.isfinite(value):
            return False
        self.last_step = step
        if self.step and sign * value <= sign * self.value:
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        return True

    def record(self) -> dict[str, Any]:
        """Content of best.json."""
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def __str__(self) -> str:
        name, sign = NAMES[self.metric] if self.metric else ("", 0)
        improved = "risen above" if sign > 0 else "fallen below"
        best = f"{self.value:.4g}, that of step {self.step}"
        return f"{name} has not {improved} {best}, in {self.since} measurements (monitor.patience)"


def not_learned(losses: dict[str, float], references: dict[str, float]) -> str | None:
    """Cause and remedy if the loss is not below that of a constant prediction; else None."""
    # Visible blocks have another loss, so compare the next-block loss. If targets change, so does their mean.
    loss = losses.get("loss_next", losses.get("loss", math.nan))
    references = references | ({"mean": losses["mean_loss"]} if "mean_loss" in losses else {})
    words = {"zero": "zero", "uniform": "all alike", "chance": "all classes alike", "mean": "the mean vector"}
    known = [(value, words[name]) for name, value in references.items() if name in words]
    if not known or loss < known[0][0]:
        return None
    return (
        f"the loss {loss:.4f} is not below {known[0][0]:.4f}, that of predicting {known[0][1]}: nothing is "
        "learned so far. Train longer, try another learning rate, or look at the images"
    )


def collapsed(health: dict[str, float], config: RunConfig) -> str | None:
    """Cause and remedy if the targets have become nearly the same vector; else None."""
    variance, limit = health.get("target_variance", math.inf), config.monitor.collapse
    if limit is None or not variance < limit:  # NaN is left to the check of the loss
        return None
    return (
        f"the targets have collapsed. Their variance {variance:.2g} is below monitor.collapse {limit:g}: "
        f"patch embeddings are nearly on one line, so the low loss means nothing. Try a lower "
        f"{config.flag('optim.lr')}, a longer {config.flag('optim.warmup')}, or model.target pixels"
    )
