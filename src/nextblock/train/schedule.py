"""The durations of a run, counted in optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nextblock.config import OptimConfig, RunConfig
from nextblock.optim import lr_at
from nextblock.settings import Duration
from nextblock.train.monitor import Monitor

__all__ = ["Schedule"]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When things happen: step numbers, and seconds where a duration was given in minutes."""

    total: int
    warmup: int
    log: int
    val: int
    keep_every: int | None
    """Checkpoints at multiples of this stay for good."""
    save_steps: int | None
    save_s: float | None
    """Save by steps or by the clock; one of the two is None."""
    monitors: tuple[int, ...]

    @classmethod
    def of(
        cls, config: RunConfig, monitors: Sequence[Monitor], *, batch_size: int, steps_per_epoch: int
    ) -> Schedule:
        """Count a run's durations in steps of its real batch size and epochs of its source."""

        def steps(text: str) -> int:
            duration = Duration.parse(text)
            return max(1, duration.steps(batch_size=batch_size, steps_per_epoch=steps_per_epoch))

        total = steps(config.train.duration)
        warmup = Duration.parse(config.optim.warmup, allow=("ep", "st", "sa", "%"))
        saving = Duration.parse(config.checkpoint.every, allow=("ep", "st", "sa", "min"))
        by_clock = saving.unit == "minutes"
        return cls(
            total=total,
            warmup=warmup.steps(batch_size=batch_size, steps_per_epoch=steps_per_epoch, total_steps=total),
            log=steps(config.monitor.log_every),
            val=steps(config.monitor.val_every),
            keep_every=None if config.checkpoint.keep_every is None else steps(config.checkpoint.keep_every),
            save_steps=None if by_clock else steps(config.checkpoint.every),
            save_s=saving.value * 60 if by_clock else None,
            monitors=tuple(steps(monitor.every) for monitor in monitors),
        )

    def lr(self, step: int, optim: OptimConfig) -> float:
        """Learning rate of the step about to be made."""
        return lr_at(
            step,
            peak=optim.lr,
            start=optim.start_lr,
            end=optim.end_lr,
            warmup_steps=self.warmup,
            total_steps=self.total,
        )

    def must_save(self, step: int, since_last_s: float) -> bool:
        """Whether a checkpoint is due after `step` steps."""
        if self.save_steps is not None:
            return step % self.save_steps == 0
        return self.save_s is not None and since_last_s >= self.save_s

    def keeps_for_good(self, step: int) -> bool:
        """Whether the checkpoint of this step stays when newer ones come."""
        return self.keep_every is not None and step > 0 and step % self.keep_every == 0
