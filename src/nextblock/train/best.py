"""The best measurement of a run so far: which checkpoint to keep, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nextblock.checkpoint import checkpoints
from nextblock.train.run_dir import RunDir

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


def read_bests(run: RunDir, step: int, keeping: Best, stopping: Best) -> None:
    """Restore both bests from the metrics recorded up to the step from which the run resumes."""
    saved = checkpoints(run.checkpoints)
    for _, values in run.metrics_until(step) if step else ():
        stopping.add(values["step"], values)
        # checkpoint.keep_best may be new to this run, so only steps with a checkpoint can be kept.
        if values["step"] in saved:
            keeping.add(values["step"], values)
