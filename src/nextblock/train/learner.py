"""The part of training that all tasks share: model, optimizer, training step and checkpoint state.

`Trainer` predicts next blocks, `FineTuner` predicts classes; the loop is the same for both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nextblock.config import ModelConfig, RunConfig
from nextblock.data import BadSample, Batch, Source, Step, TrainLoader, normalize
from nextblock.logs import counted
from nextblock.optim import set_lr
from nextblock.plan import image_bytes
from nextblock.train.distributed import Group
from nextblock.train.logging import StepOutcome, Window
from nextblock.train.parallel import Strategy, local_part, replicate, synchronised
from nextblock.train.runtime import autocast, device_name, free_memory
from nextblock.train.state import Snapshot, load_state, take_snapshot

CPU_SHARE = 0.5
"""Share of a machine's free memory that activations may use, over all its processes."""
GPU_SHARE = 0.8
"""Share of a GPU's memory for activations, after weights, gradients and moments."""
BYTES_PER_TRAINED = 12
"""Gradient and AdamW's two moments, fp32; not allocated before the first step."""


class Sums(NamedTuple):
    """Sums over the micro-batches of a step and over all ranks."""

    loss: float
    images: int
    scale: float
    """Planned number of loss terms over the actual number; above 1 if images were unreadable."""
    notes: list[float]
    """Sums of the `notes` of each rank."""


class Learner(ABC):
    """A model in training. With several processes, each has a copy or a shard, and all make the same calls.

    A subclass builds the model, calls `resume`, and defines its loss in `_counts`, `_loss` and `_zero_loss`.
    """

    holes_differ = False
    """Whether a missing image scales the divisors of the loss by different ratios."""

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
        """Number of optimizer steps done."""
        self.window = Window()
        self.interrupted: list[str] = []
        """Which of "val" and "monitor" a signal interrupted after the step of the checkpoint."""
        self.loader_options: dict[str, Any] = {}
        """Additional arguments for `TrainLoader`."""
        self.counted: ModelConfig | None = None
        """The model whose TFLOP/s are reported; None to report none."""

    def resume(self, checkpoint: Path | None) -> None:
        """Load the training state of a checkpoint; the model already has its weights."""
        if checkpoint is not None:
            state = load_state(checkpoint, self.model, self.optimizer, self.group)
            self.step, self.interrupted = state["step"], state["cut_short"]
            self.scaler.load_state_dict(state["scaler"])
            self.window = Window(**state["window"])

    def snapshot(self, interrupted: Iterable[str], *, copied: bool) -> Snapshot:
        """Content of a checkpoint. All ranks must call this."""
        state = {"step": self.step, "scaler": self.scaler.state_dict(), "window": dict(vars(self.window))}
        state["cut_short"] = sorted(interrupted)
        return take_snapshot(self.model, self.optimizer, state, self.kept(), copied=copied)

    # --------------------------------------------------------------------------- defined by subclasses

    @abstractmethod
    def _counts(self, visits: list[int], samples: list[int]) -> list[int]:
        """Number of terms that these images add to each part of the loss: its divisors."""

    @abstractmethod
    def _loss(self, batch: Batch, drawn: Any, divisors: list[int]) -> Float[Tensor, ""]:
        """Contribution of a micro-batch to the loss of the batch; `drawn` is the step's result of `_draw`."""

    @abstractmethod
    def _zero_loss(self, forward: Callable[..., Any], count: int = 1) -> Float[Tensor, ""]:
        """Zero loss that depends on every parameter, for ranks without an image: the others wait for them."""

    @abstractmethod
    def describe(self) -> tuple[str, str]:
        """Describe the parts of the model and how it divides an image, for a run's opening lines."""

    @abstractmethod
    def reference_losses(self, own: Sequence[UInt8[Tensor, "_ c h w"]], most: int) -> dict[str, float]:
        """Losses of predictions that need no model, by name, on the first `most` images; may be empty.

        `own` contains this rank's images. They are gathered, so the result does not depend on ranks or
        micro-batches.
        """

    @abstractmethod
    def validate(
        self, batches: Iterator[Batch], should_stop: Callable[[], object]
    ) -> tuple[dict[str, float], list[BadSample]] | None:
        """Validation values and unreadable images; None if the run was asked to stop."""

    def _draw(self, step: Step) -> Any:
        """Random numbers that all micro-batches of a step share, f(seed, step)."""
        return step

    def _after_step(self) -> None:  # noqa: B027 - optional
        """Hook after a step that changed the weights."""

    def health(self) -> dict[str, float]:
        """Signs, by name, that training fails although the loss looks good. All ranks must call this."""
        return {}

    def kept(self) -> Mapping[str, Tensor]:
        """Tensors to save in a checkpoint besides weights and moments."""
        return {}

    def fit_targets(self, source: Source) -> bool:  # noqa: ARG002 - most have none
        """Fit targets before the first step if they need it; return whether they did."""
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
        """Make one optimizer step over the micro-batches as they arrive; a non-finite step changes no weight.

        `notes` returns numbers that are summed over ranks. `check` receives the sums before the weights
        change, and may raise.
        """
        sums = self._accumulate(step, notes)
        check(sums)
        self.step += 1
        set_lr(self.optimizer, lr)
        outcome = self._update(sums) if sums.images else StepOutcome(0.0, 0.0, 0)
        self.optimizer.zero_grad(set_to_none=True)
        return outcome

    def _accumulate(self, step: Step, notes: Callable[[], Sequence[float]]) -> Sums:
        """Run the micro-batches forward and backward as they arrive, then sum over ranks.

        The loss is the sum over its terms (blocks, images) divided by their number in the global batch. So
        loss and gradient do not depend on the sizes of ranks and micro-batches, or on missing images.
        """
        group = self.group
        # Wrapped at the first step and not earlier, as targets may have to be fitted first.
        if self.strategy == "ddp" and not isinstance(self._forward, DistributedDataParallel):
            self._forward = replicate(self.model, self._forward, self.device, self._zero_loss)
        batches, visits, samples = step.micro_batches, step.keys.visits.tolist(), step.keys.samples.tolist()
        # The divisors follow from the keys of the global batch, so they are known before any image is read.
        # Unreadable images make them too large. Loss and gradient are linear in 1 / divisor, so they are
        # rescaled once at the end by planned / actual terms.
        planned = self._counts(visits, samples)
        if self.holes_differ:
            # One factor at the end could not correct several divisors: read all images first.
            batches = list(batches)
            actual = [self._counts(batch.visits.tolist(), batch.samples.tolist()) for batch in batches]
            planned = [int(number) for number in group.sum([*map(sum, zip(*actual, strict=True))])]
        drawn = self._draw(step)
        # Summed on the device, and read once after the last micro-batch, as reading waits for the GPU.
        loss = torch.zeros((), device=self.device)
        images, terms = 0, 0
        for number, batch in enumerate(batches, start=1):
            if len(batch.images):
                images += len(batch.images)
                terms += self._counts(batch.visits.tolist(), batch.samples.tolist())[0]
            if len(batch.images) or self.strategy != "single":
                is_last = number == step.num_micro_batches
                loss += self._backward(batch, drawn, [max(1, n) for n in planned], is_last=is_last)
        total, images, terms, *note_sums = group.sum([loss.item(), images, terms, *notes()])
        scale = planned[0] / max(1, terms)
        return Sums(float(np.float32(total) * np.float32(scale)), int(images), scale, note_sums)

    def _backward(self, batch: Batch, drawn: Any, divisors: list[int], *, is_last: bool) -> Float[Tensor, ""]:
        with synchronised(self._forward, is_last=is_last):
            has_images = len(batch.images) > 0
            loss = self._loss(batch, drawn, divisors) if has_images else self._zero_loss(self._forward)
            # DDP and FSDP2 average over ranks, but the divisor already counts all ranks.
            shared = loss if self.group.size == 1 else loss * self.group.size
            self.scaler.scale(shared).backward()
        return loss.detach()

    def _update(self, sums: Sums) -> StepOutcome:
        """Rescale and clip the gradient, then step if loss and gradient are finite."""
        self.scaler.unscale_(self.optimizer)
        if sums.scale != 1:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_([local_part(grad) for grad in grads], sums.scale)
        limit = math.inf if self.config.optim.clip_grad is None else self.config.optim.clip_grad
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        # A gradient scaler skips the step itself if a gradient is infinite, and `update` then lowers the
        # scale. So its `step` must be called in that case too.
        if math.isfinite(sums.loss) and (self.scaler.is_enabled() or math.isfinite(grad_norm)):
            self.scaler.step(self.optimizer)
            self._after_step()
        self.scaler.update()
        return StepOutcome(sums.loss, grad_norm, sums.images)

    def is_fine(self, outcome: StepOutcome) -> bool:
        """Whether a step was finite, or the gradient scaler is still lowering its scale."""
        # The scaler lowers its scale until gradients are finite; below 1 the scale is not the cause.
        return outcome.is_finite(scaled=self.scaler.is_enabled() and self.scaler.get_scale() >= 1)

    def to_model(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Move images to the model's device and normalise them."""
        on_device = images.to(self.device, non_blocking=True)
        return normalize(on_device, self.config.data.mean, self.config.data.std)

    @contextmanager
    def evaluating(self) -> Iterator[Any]:
        """Yield the model in evaluation mode without gradients."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield self.model
        finally:
            self.model.train()
            # FSDP2 expects a backward pass after each forward pass, so it leaves the root's parameters
            # unsharded, without gradients. Without `reshard`, a step after this would lose its gradient.
            if self.strategy == "fsdp":
                self.model.reshard()

    # ---------------------------------------------------------------------------------- before the first step

    def largest_micro_batch(self, share: int) -> int:
        """Largest micro-batch that fits, at most this process's `share` of a batch; the same on all ranks.

        Estimated from the layers' shapes (`plan.image_bytes`). On a GPU, unless the model is sharded,
        the estimate is then tried and halved until it fits.
        """
        device, group, recompute = self.device, self.group, self.config.train.activation_checkpointing
        precision: Any = self.config.train.precision  # "auto" is resolved
        masks, image = image_bytes(self.config, precision, recompute=recompute)
        if device.type == "cuda":
            trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
            trained //= group.size if self.strategy == "fsdp" else 1
            free = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] - BYTES_PER_TRAINED * trained)
        else:
            free = CPU_SHARE * free_memory() / group.on_this_host
        # The first image costs also what does not grow with their number: the masks.
        limit = min(group.gather(max(1, int((free - masks - image) / image) + 1)))
        while True:
            # Parts of equal size, at most `limit`.
            images = math.ceil(share / math.ceil(share / limit))
            can_try = device.type == "cuda" and self.strategy != "fsdp" and images > 1
            if not can_try or all(group.gather(self.fits(images))):
                return images
            limit = images // 2

    def fits(self, images: int) -> bool:
        """Whether a forward and backward pass of this many black images fits into the GPU's memory."""
        try:
            self._zero_loss(self.model, images).backward()
        except torch.OutOfMemoryError:
            return False
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
        return True

    def opening_lines(
        self, loader: TrainLoader, micro: int | None, images: int, total_steps: int, checkpoints: Path
    ) -> list[str]:
        """Summarise in a few lines what a run will do."""
        batch_size, group, saving = loader.batch_size, self.group, self.config.checkpoint
        weights = sum(tensor.numel() * tensor.element_size() for tensor in self.model.state_dict().values())
        moments = 8 * sum(p.numel() for p in self.model.parameters() if p.requires_grad)  # AdamW's two, fp32
        gb = (weights + moments) / 1e9
        size = f"{gb:,.1f} GB" if gb >= 1 else f"{1000 * gb:,.1f} MB"
        in_parts = f" (micro-batches of {micro})" if micro is not None and micro < batch_size else ""
        processes = f"{group.size} processes ({self.strategy}), each on " if group.size > 1 else ""
        parts, image = self.describe()
        lines = [
            f"{processes}{device_name(self.device)} · {self.config.train.precision} · {parts}",
            image,
            f"{counted(images, 'image')}, batch {batch_size:,}{in_parts} -> "
            f"{counted(loader.steps_per_epoch, 'step')} an epoch, "
            f"{counted(total_steps, 'step')} in {counted(total_steps / loader.steps_per_epoch, 'epoch')}",
            f"a checkpoint of {size} every {saving.every} in {checkpoints}, keeping the latest {saving.keep}",
        ]
        return [*lines, f"resuming at step {self.step:,}"] if self.step else lines


MakeLearner = Callable[[RunConfig, torch.device, Path | None, Group], Learner]
"""Makes a learner, fresh or with the weights and state of a checkpoint. All ranks must call it."""
