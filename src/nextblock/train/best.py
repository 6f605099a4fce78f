"""The best measurement of a run so far: which checkpoint to keep, and when to stop early."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nextblock.checkpoint import checkpoints
from nextblock.train.run_dir import RunDir

EARLY_STOP = "early stop"
"""What ended a run whose metric no longer improved."""

NAMES: dict[str, tuple[str, int]] = {
    "knn": ("knn/top1", 1),
    "rankme": ("rankme", 1),
    "val_loss": ("val_loss", -1),
    "top1": ("top1", 1),
}
"""What each metric is called in metrics.jsonl, and whether high (1) or low (-1) is good."""


@dataclass
class Best:
    """The best value of a metric among those added, all after at least one step of training."""

    metric: str | None
    """None: nothing is compared."""
    value: float = math.nan
    step: int = 0
    """When it was measured; 0: nothing was."""
    since: int = 0
    """Measurements after it, none of them better."""
    last_step: int = 0
    """When the latest of them was made."""

    def add(self, step: int, values: Mapping[str, Any]) -> bool:
        """Take in what was measured after a step; whether it is a new best."""
        name, sign = NAMES[self.metric] if self.metric else ("", 0)
        value = values.get(name)
        # A run that was stopped while it measured does so again when it resumes: the second time is no news.
        if step <= self.last_step or value is None or not math.isfinite(value):
            return False
        self.last_step = step
        if self.step and sign * value <= sign * self.value:
            self.since += 1
            return False
        self.value, self.step, self.since = value, step, 0
        return True

    def record(self) -> dict[str, Any]:
        """What best.json says."""
        return {"metric": self.metric, "value": self.value, "step": self.step}

    def __str__(self) -> str:
        name, sign = NAMES[self.metric] if self.metric else ("", 0)
        improved = "risen above" if sign > 0 else "fallen below"
        best = f"{self.value:.4g}, that of step {self.step}"
        return f"{name} has not {improved} {best}, in {self.since} measurements (monitor.patience)"


def read_bests(run: RunDir, step: int, keeping: Best, stopping: Best) -> None:
    """Add what a run has measured up to the step from which it resumes, to what it keeps and stops by."""
    saved = checkpoints(run.checkpoints)
    for _, values in run.metrics_until(step) if step else ():
        stopping.add(values["step"], values)
        # The setting may be new to this run: the best that can still be kept is one that was saved.
        if values["step"] in saved:
            keeping.add(values["step"], values)
