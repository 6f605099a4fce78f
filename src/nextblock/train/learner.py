"""What learns, whatever it learns: model and optimizer, one step at a time, and all that a checkpoint saves.

`Trainer` predicts next blocks, `FineTuner` classes; the loop knows neither.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nextblock.config import ModelConfig, RunConfig
from nextblock.data import BadSample, Batch, Source, Step, normalize
from nextblock.optim import set_lr
from nextblock.train.distributed import Group
from nextblock.train.logging import StepOutcome, Window
from nextblock.train.parallel import Strategy, local_part, replicate, synchronised, whole
from nextblock.train.runtime import autocast
from nextblock.train.state import Snapshot, load_state


class Sums(NamedTuple):
    """What the micro-batches of a step added up to, over all ranks."""

    loss: float
    images: int
    scale: float
    """Terms of the loss that were planned over those there were: what unreadable images make of it."""
    notes: list[float]
    """What the ranks had to say besides, added up."""


class Learner(ABC):
    """A model that learns. With several processes each holds a copy or a part; all make the same calls.

    A subclass makes the model, calls `resume`, and says what its loss is: `_counts`, `_loss`, `_touch`.
    """

    holes_differ = False
    """Whether a missing image changes each of the loss's divisors by a ratio of its own."""

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        group: Group,
        model: Any,
        optimizer: torch.optim.Optimizer,
        strategy: Strategy,
    ) -> None:
        self.config, self.device, self.group = config, device, group
        self.model, self.optimizer, self.strategy = model, optimizer, strategy
        self.autocast = autocast(device, config.train.precision)
        self._forward: Callable[..., Any] = model
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self.step = 0
        """Optimizer steps done."""
        self.window = Window()
        self.cut_short: list[str] = []
        """What of "val" and "monitor" a signal cut short after the step of the checkpoint."""
        self.loader_options: dict[str, Any] = {}
        """What `TrainLoader` needs to know besides the settings of a run."""
        self.counted: ModelConfig | None = None
        """The model whose arithmetic is counted in TFLOP/s; None: it is not."""

    def resume(self, checkpoint: Path | None) -> None:
        """Continue from a checkpoint, whose weights the model has already."""
        if checkpoint is not None:
            state = load_state(checkpoint, self.model, self.optimizer, self.group)
            self.step = state["step"]
            self.scaler.load_state_dict(state["scaler"])
            self.window = Window(**state["window"])
            self.cut_short = state["cut_short"]

    def snapshot(self, cut_short: Sequence[str], *, copied: bool) -> Snapshot:
        """All that a checkpoint needs. All ranks must call this."""
        state = {"step": self.step, "scaler": self.scaler.state_dict(), "window": dict(vars(self.window))}
        state["cut_short"] = list(cut_short)
        return Snapshot.take(self.model, self.optimizer, state, kept=self.kept(), copied=copied)

    # ------------------------------------------------------------------------------- what a subclass says

    @abstractmethod
    def _counts(self, visits: list[int], samples: list[int]) -> list[int]:
        """How many terms these images add to the loss: the divisors, one for each of its parts."""

    @abstractmethod
    def _loss(self, batch: Batch, drawn: Any, divisors: list[int]) -> Float[Tensor, ""]:
        """The share of a micro-batch in the loss of the batch; `drawn` is what `_draw` gave for the step."""

    @abstractmethod
    def _touch(self, forward: Callable[..., Any], count: int = 1) -> Float[Tensor, ""]:
        """A loss of zero that depends on every parameter: for ranks without an image, as others wait."""

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """The parts of the model, and what becomes of an image, for a run's first lines."""

    @abstractmethod
    def reference_losses(self, own: Sequence[UInt8[Tensor, "_ c h w"]], most: int) -> dict[str, float]:
        """The loss of predictions that need no model, by name, on the first `most` images.

        `own` are this rank's; with those of the others they do not depend on ranks or micro-batches. Empty
        if there is none.
        """

    @abstractmethod
    def validate(
        self, batches: Iterator[Batch], should_stop: Callable[[], object]
    ) -> tuple[dict[str, float], list[BadSample]] | None:
        """What is measured on validation images, and which are unreadable; None if it was asked to stop."""

    def _draw(self, step: Step) -> Any:
        """What the losses of a step's micro-batches share, f(seed, step)."""
        return step

    def _stepped(self) -> None:  # noqa: B027 - nothing, usually
        """Do what follows a step that changed the weights."""

    def health(self) -> dict[str, float]:
        """Signs of training that has gone wrong though the loss looks well, by name. All ranks call it."""
        return {}

    def kept(self) -> Mapping[str, Tensor]:
        """Tensors that a checkpoint needs besides weights and moments."""
        return {}

    def fit_targets(self, source: Source) -> bool:  # noqa: ARG002 - most have none
        """Fit targets that must be, before the first step, and return whether any were."""
        return False

    # ----------------------------------------------------------------------------------------------- a step

    def train_step(
        self,
        step: Step,
        lr: float,
        *,
        notes: Callable[[], Sequence[float]] = tuple,
        check: Callable[[Sums], object] = bool,
    ) -> StepOutcome:
        """Make one optimizer step over the micro-batches as they arrive; non-finite ones change no weight.

        `notes` are numbers that each rank adds to the sums, for which `check` is called; if that raises, no
        weight has changed.
        """
        sums = self._accumulate(step, notes)
        check(sums)
        return self._update(sums, lr)

    def _accumulate(self, step: Step, notes: Callable[[], Sequence[float]]) -> Sums:
        """Run the micro-batches forward and backward as they arrive, then add up over ranks.

        The loss is the sum over its terms (blocks, images) divided by their number in the whole batch, so
        that ranks and micro-batches of any sizes, with or without holes, give the loss and gradient of the
        batch.
        """
        group = self.group
        # Not before the first step, as targets may have to be fitted.
        if self.strategy == "ddp" and not isinstance(self._forward, DistributedDataParallel):
            self._forward = replicate(self.model, self._forward, self.device, self._touch)
        batches, visits, samples = step.micro_batches, step.keys.visits.tolist(), step.keys.samples.tolist()
        # The divisors are known before any image is, as they follow from the keys of the global batch. An
        # unreadable image makes them too large; loss and gradient, which are linear in 1 / divisor, are
        # rescaled once at the end, by what was planned over what was there.
        planned = self._counts(visits, samples)
        if self.holes_differ:
            # No rescaling at the end would be right. What is readable must be known first.
            batches = list(batches)
            there = [self._counts(batch.visits.tolist(), batch.samples.tolist()) for batch in batches]
            planned = [
                int(number) for number in group.sum([sum(numbers) for numbers in zip(*there, strict=True)])
            ]
        drawn = self._draw(step)
        # Summed on the device. Its value is asked for once, after the last micro-batch, as that waits.
        loss = torch.zeros((), device=self.device)
        images, terms = 0, 0
        for number, batch in enumerate(batches, start=1):
            if len(batch.images):
                images += len(batch.images)
                terms += self._counts(batch.visits.tolist(), batch.samples.tolist())[0]
            if len(batch.images) or self.strategy != "single":
                is_last = number == step.num_micro_batches
                loss += self._backward(batch, drawn, [max(1, n) for n in planned], is_last=is_last)
        total, images, terms, *noted = group.sum([loss.item(), images, terms, *notes()])
        scale = planned[0] / max(1, terms)
        return Sums(float(np.float32(total) * np.float32(scale)), int(images), scale, noted)

    def _backward(self, batch: Batch, drawn: Any, divisors: list[int], *, is_last: bool) -> Float[Tensor, ""]:
        with synchronised(self._forward, is_last=is_last):
            found = len(batch.images) > 0
            loss = self._loss(batch, drawn, divisors) if found else self._touch(self._forward)
            # DDP and FSDP2 take the mean over ranks, and the divisor has counted all ranks already.
            shared = loss if self.group.size == 1 else loss * self.group.size
            self.scaler.scale(shared).backward()
        return loss.detach()

    def _update(self, sums: Sums, lr: float) -> StepOutcome:
        """Rescale and clip the gradient and step, if loss and gradient are finite; else no weight changes."""
        self.step += 1
        set_lr(self.optimizer, lr)
        if not sums.images:
            self.optimizer.zero_grad(set_to_none=True)
            return StepOutcome(0.0, 0.0, 0)
        self.scaler.unscale_(self.optimizer)
        if sums.scale != 1:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_([local_part(grad) for grad in grads], sums.scale)
        limit = math.inf if self.config.optim.clip_grad is None else self.config.optim.clip_grad
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)).item()
        # Under a scaler, its own `step` leaves the weights alone if a gradient is infinite, and `update` then
        # lowers the scale; so it must be called.
        if math.isfinite(sums.loss) and (self.scaler.is_enabled() or math.isfinite(grad_norm)):
            self.scaler.step(self.optimizer)
            self._stepped()
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(sums.loss, grad_norm, sums.images)

    def run_empty(self, count: int) -> None:
        """A forward and backward pass of so many images without content, on this rank alone."""
        self._touch(self.model, count).backward()

    def is_fine(self, outcome: StepOutcome) -> bool:
        """Whether a step was finite, or a scaler is still looking for its scale."""
        # A scaler lowers its scale until gradients are finite; below 1 the scale is not what is wrong.
        return outcome.is_finite(scaled=self.scaler.is_enabled() and self.scaler.get_scale() >= 1)

    def to_model(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels as the model takes them: on its device, normalised."""
        on_device = images.to(self.device, non_blocking=True)
        return normalize(on_device, self.config.data.mean, self.config.data.std)

    @contextmanager
    def looking(self) -> Iterator[Any]:
        """Give the model in evaluation mode without gradients."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield self.model
        finally:
            self.model.train()
            # FSDP2 expects a backward pass after each forward pass and leaves the root's parameters whole,
            # where they have no gradient: one looking between backward and step would lose it.
            if self.strategy == "fsdp":
                self.model.reshard()


MakeLearner = Callable[[RunConfig, torch.device, Path | None, Group], Learner]
"""Makes what learns: fresh, or with the weights and state of a checkpoint. All ranks call it."""
