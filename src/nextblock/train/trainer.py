"""What trains: model, optimizer and scaler, one optimizer step at a time, and all that a checkpoint saves."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nextblock.checkpoint import MODEL_FILE, CheckpointError, read_model
from nextblock.config import RunConfig
from nextblock.data import (
    BadSample,
    Batch,
    Source,
    Step,
    eval_batches,
    keyed_permutation,
    keyed_rng,
    keyed_seed,
    normalize,
    resolve_workers,
)
from nextblock.errors import UsageError
from nextblock.interop import initialize
from nextblock.models import NextBlockModel, Prediction
from nextblock.optim import build_optimizer, set_lr
from nextblock.targets import KMeansTokenizer, combine, count_kept_rows, draw_prefix_lengths
from nextblock.train.distributed import ALONE, Group
from nextblock.train.logging import StepOutcome, Window
from nextblock.train.parallel import choose_strategy, local_part, replicate, shard, synchronised, touch, whole
from nextblock.train.runtime import autocast
from nextblock.train.state import load_state

log = logging.getLogger(__name__)


class Sums(NamedTuple):
    """What the micro-batches of a step added up to, over all ranks."""

    loss: float
    images: int
    scale: float
    """Blocks that were planned over those that were predicted: what unreadable images make of the divisor."""
    notes: list[float]
    """What the ranks had to say besides, added up."""


class Trainer:
    """A model that learns. Made fresh (or from `model.init`), or from a checkpoint.

    With several processes each holds a copy or a part of the model, and all make the same calls.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, checkpoint: Path | None, group: Group = ALONE
    ) -> None:
        self.config, self.device, self.group = config, device, group
        self.strategy = choose_strategy(config, group, device)
        self.autocast = autocast(device, config.train.precision)

        def make() -> NextBlockModel:
            return _fresh_model(config) if checkpoint is None else read_run_model(checkpoint)

        if self.strategy == "fsdp":
            self.model = shard(make, config, device, group)
        else:
            with group.together():
                self.model = make().to(device)
        self.model.train()
        self.model.set_grad_checkpointing(config.train.activation_checkpointing)
        self.model.predictor_fp32 = config.train.predictor_fp32
        self._forward: Callable[..., Prediction] = self.model
        if config.train.compile and self.strategy != "fsdp":
            self._forward = torch.compile(self.model)  # type: ignore[assignment]
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        self._orders = self.model.orders.cpu()  # drawn from there: no wait for a GPU in every step
        self.step = 0
        """Optimizer steps done."""
        self.window = Window()
        self.cut_short: list[str] = []
        """What of "val" and "monitor" a signal cut short after the step of the checkpoint."""
        if checkpoint is not None:
            state = load_state(checkpoint, self.model, self.optimizer, group)
            self.step = state["step"]
            self.scaler.load_state_dict(state["scaler"])
            self.window = Window(**state["window"])
            self.cut_short = state["cut_short"]

    def state(self) -> dict[str, Any]:
        """All that a checkpoint needs besides model and optimizer, as JSON takes it."""
        return {"step": self.step, "scaler": self.scaler.state_dict(), "window": dict(vars(self.window))}

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

        The loss is the sum over predicted blocks divided by their number in the whole batch, so that ranks
        and micro-batches of any sizes, with or without holes, give the loss and gradient of the batch.
        """
        model, group = self.config.model, self.group
        # Not before the first step, as targets may have to be fitted.
        if self.strategy == "ddp" and not isinstance(self._forward, DistributedDataParallel):
            with self.autocast:
                self._forward = replicate(self.model, self._forward, self.device)  # type: ignore[arg-type]
        batches, visits, samples = step.micro_batches, step.keys.visits.tolist(), step.keys.samples.tolist()
        # The divisors are known before any image is, as they follow from the keys of the global batch. An
        # unreadable image makes them too large; loss and gradient, which are linear in 1 / divisor, are
        # rescaled once at the end, by what was planned over what was predicted.
        planned = self._num_predicted(visits, samples)
        if model.prefix and model.num_predicted_blocks > 1:
            # A hole changes each distance's number by its own ratio, so no rescaling at the end is right.
            # What is readable must be known first.
            batches = list(batches)
            there = [self._num_predicted(batch.visits.tolist(), batch.samples.tolist()) for batch in batches]
            planned = [
                int(number) for number in group.sum([sum(numbers) for numbers in zip(*there, strict=True)])
            ]
        # One order for all micro-batches of the step, f(seed, step): one of the model's set.
        order_index = keyed_rng(self.config.seed, "block-order", step.index).integers(len(self._orders))
        order = self._orders[int(order_index)]
        # Summed on the device. Its value is asked for once, after the last micro-batch, as that waits.
        loss = torch.zeros((), device=self.device)
        images, predicted = 0, 0
        for number, batch in enumerate(batches, start=1):
            if len(batch.images):
                images += len(batch.images)
                predicted += self._num_predicted(batch.visits.tolist(), batch.samples.tolist())[0]
            if len(batch.images) or self.strategy != "single":
                is_last = number == step.num_micro_batches
                loss += self._backward(batch, order, [max(1, n) for n in planned], is_last=is_last)
        total, images, predicted, *noted = group.sum([loss.item(), images, predicted, *notes()])
        scale = planned[0] / max(1, predicted)
        return Sums(float(np.float32(total) * np.float32(scale)), int(images), scale, noted)

    def _backward(
        self, batch: Batch, order: Int64[Tensor, " k"], divisors: list[int], *, is_last: bool
    ) -> Float[Tensor, ""]:
        with synchronised(self._forward, is_last=is_last):
            if len(batch.images):
                images = self.to_model(batch.images)
                with self.autocast:
                    draws = batch.drop_path if self.config.model.drop_path else None
                    out = self._forward(images, order, self._prefix_lengths(batch), draws)
                # The share of this micro-batch in the batch's loss; gradients add up to those of the batch.
                loss = combine([part.block_loss for part in out.distances], divisors)
            else:
                with self.autocast:
                    loss = touch(self.model, self._forward, self.device)
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
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(sums.loss, grad_norm, sums.images)

    def run_empty(self, count: int) -> None:
        """A forward and backward pass of so many images without content, on this rank alone."""
        with self.autocast:
            loss = touch(self.model, self.model, self.device, count)
        loss.backward()

    def is_fine(self, outcome: StepOutcome) -> bool:
        """Whether a step was finite, or a scaler is still looking for its scale."""
        # A scaler lowers its scale until gradients are finite; below 1 the scale is not what is wrong.
        return outcome.is_finite(scaled=self.scaler.is_enabled() and self.scaler.get_scale() >= 1)

    def _prefix_lengths(self, batch: Batch) -> Int64[Tensor, " b"] | None:
        """How many blocks of each image all its tokens may attend to; None if the model has no prefix."""
        if not self.config.model.prefix:
            return None
        visits, samples = batch.visits.tolist(), batch.samples.tolist()
        return draw_prefix_lengths(self.config.seed, visits, samples, self.config.model.num_blocks)

    def _num_predicted(self, visits: list[int], samples: list[int]) -> list[int]:
        """How many blocks of these images are predicted, one number for each distance."""
        model = self.config.model
        if model.prefix:
            lengths = draw_prefix_lengths(self.config.seed, visits, samples, model.num_blocks)
        else:
            lengths = torch.zeros(len(samples), dtype=torch.int64)
        distances = range(1, model.num_predicted_blocks + 1)
        return [count_kept_rows(lengths, model.num_blocks, distance) for distance in distances]

    # ---------------------------------------------------------------------------- evaluation, fitted targets

    def to_model(self, images: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Pixels as the model takes them: on its device, normalised."""
        on_device = images.to(self.device, non_blocking=True)
        return normalize(on_device, self.config.data.mean, self.config.data.std)

    @contextmanager
    def looking(self) -> Iterator[NextBlockModel]:
        """Give the model in evaluation mode without gradients."""
        self.model.eval()
        try:
            with torch.no_grad(), self.autocast:
                yield self.model
        finally:
            self.model.train()

    def reference_losses(self, own: Sequence[UInt8[Tensor, "_ c h w"]], most: int) -> dict[str, float]:
        """The loss of predictions that need no model, by name (see `targets`), on the first `most` images.

        `own` are this rank's; with those of the others they do not depend on ranks or micro-batches. Empty
        if there is none.
        """
        found = [images for of_rank in self.group.gather(list(own)) for images in of_rank if len(images)]
        if not found:
            return {}
        images = torch.cat(found)[:most]
        with self.looking() as model:
            assert model.targets is not None, "checked before training begins"
            targets = model.targets.of_blocks(self.to_model(images), model.orders[0])
            losses = model.targets.reference_losses(targets)
            return {name: loss.mean().item() for name, loss in losses.items()}

    def validation_loss(
        self, batches: Iterator[Batch], should_stop: Callable[[], object] = bool
    ) -> tuple[float, list[BadSample]] | None:
        """The loss over all these images, under the first order (NaN of none), and those unreadable.

        An image's prefix, if the model has one, is that of its visit 0, always the same. None if it was asked
        to stop before the end.
        """
        # Sums and counts for each distance, in fp64 on the CPU: the mean does not depend on batches or ranks.
        distances = self.config.model.num_predicted_blocks
        totals = torch.zeros(2, distances, dtype=torch.float64)
        bad: list[BadSample] = []
        with self.looking() as model:
            for batch in batches:
                bad += batch.bad
                if self.group.any(should_stop()):
                    return None
                if len(batch.images):
                    out = model(self.to_model(batch.images), None, self._prefix_lengths(batch)).distances
                    totals[0] += torch.stack([part.block_loss.cpu().double().sum() for part in out])
                    totals[1] += torch.stack([part.kept.cpu().sum() for part in out])
                elif self.strategy == "fsdp":
                    touch(model, model, self.device)
        sums, counts = torch.tensor(self.group.sum(totals.flatten().tolist())).view(2, distances)
        bad = [one for of_rank in self.group.gather(bad) for one in of_rank]
        return float((sums / counts).mean()), bad

    def fit_targets(self, source: Source) -> bool:
        """Fit the targets, f(seed), if they must be, and return whether they were.

        Raises `ValueError` if the patches of `source` are too few.
        """
        targets, group = self.model.targets, self.group
        if targets is None or targets.tokenizer is None or not targets.needs_fit:
            return False
        # Once, on rank 0: k-means gives the same on the same machine only.
        with group.together():
            if group.is_main:
                patches = sample_patches(targets.tokenizer, source, self.config)
                log.info("fitting %d tokens on %d patches", self.config.model.vocab_size, len(patches))
                targets.fit(patches, keyed_seed(self.config.seed, "tokenizer"))
        centroids = targets.tokenizer.centroids
        centroids.copy_(group.broadcast(centroids.cpu() if group.is_main else None))
        return True


def sample_patches(
    tokenizer: KMeansTokenizer,
    source: Source,
    config: RunConfig,
    *,
    max_images: int = 2_000,
    max_patches: int = 200_000,
) -> Float[Tensor, "r p"]:
    """Patches, as the tokenizer sees them, of a sample of centre crops: f(seed, source).

    Those of unreadable images are missing. `ValueError` if no image can be read.
    """
    images = keyed_permutation(config.seed, len(source), "tokenizer-images")[:max_images]
    per_image = config.model.num_patches
    # Chosen by number among all patches of those images, before any is read: then it does not matter which
    # worker reads an image, or that some image cannot be read.
    patches = keyed_permutation(config.seed, len(images) * per_image, "tokenizer-patches")[:max_patches]
    chosen = np.zeros(len(images) * per_image, dtype=bool)
    chosen[patches] = True
    of_image = dict(zip(images.tolist(), torch.from_numpy(chosen).view(-1, per_image), strict=True))
    workers = resolve_workers(config.data.workers, source)
    found = []
    for batch in eval_batches(source, config.data, config.model.image_size, 64, images, workers):
        if len(batch.images):
            pixels = normalize(batch.images, config.data.mean, config.data.std)
            kept = torch.stack([of_image[sample] for sample in batch.samples.tolist()])
            found.append(tokenizer.patches(pixels)[kept])
    if not found:
        raise UsageError(
            f"none of {len(images)} images of {source.spec!r} can be read, so there is nothing to fit "
            "model.tokenizer kmeans on; give images that can be read"
        )
    return torch.cat(found)


def read_run_model(checkpoint: Path) -> NextBlockModel:
    """The model of a pre-training run's checkpoint."""
    model = read_model(checkpoint / MODEL_FILE)
    if not isinstance(model, NextBlockModel):
        raise CheckpointError(f"{checkpoint} holds a classifier, not the model of a pre-training run")
    return model


def _fresh_model(config: RunConfig) -> NextBlockModel:
    """A model whose weights are f(seed), or those of `model.init`."""
    # Built on the CPU. `torch.manual_seed` would reseed the caller's GPUs as well.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(keyed_seed(config.seed, "weights"))
        model = NextBlockModel(config.model)
    if config.model.init is not None:
        initialize(model, config.model.init)
    return model
