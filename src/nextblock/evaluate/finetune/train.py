"""What is fine-tuned: classifier, optimizer, averaged weights, one step at a time, and all that is saved.

As in pre-training nothing but these has a state: mixing is f(seed, step), and drop path draws from the global
generator, seeded f(seed, step, micro-step) before each forward pass; the CPU's is put back after the step.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812 - the name everybody knows
from jaxtyping import Float, Int64, Shaped
from timm.data.mixup import Mixup, mixup_target
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from nextblock.config import DataConfig, Size, pair
from nextblock.data import BadSample, Source, eval_batches, keyed_seed, normalize, resolve_workers
from nextblock.data.transforms import seeded_globally
from nextblock.evaluate.finetune.config import FinetuneConfig
from nextblock.evaluate.finetune.lora import merge_lora
from nextblock.evaluate.finetune.model import tuning_groups
from nextblock.evaluate.finetune.report import WeightsName
from nextblock.evaluate.metrics import Measures, Tally
from nextblock.models.heads import ImageClassifier
from nextblock.optim import lr_at, set_lr
from nextblock.train.logging import StepOutcome, Window
from nextblock.train.runtime import autocast, seed_device

__all__ = ["FineTuner", "Measured", "measure_classifier", "mixed"]

log = logging.getLogger(__name__)


class Mixed(NamedTuple):
    """Images, and for each how much it is of which class."""

    images: Float[Tensor, "b c h w"]
    targets: Float[Tensor, "b classes"]


def mixed(
    images: Float[Tensor, "b c h w"],
    labels: Int64[Tensor, " b"],
    *,
    num_classes: int,
    mixup: float,
    cutmix: float,
    label_smoothing: float,
    seed: int,
) -> Mixed:
    """Mix images and labels by timm's mixup and cutmix, a function of `seed`; smooth the labels.

    Image i is mixed with the i-th from the end, all by one share. Of an odd number the last is left alone.
    Global generators are as before.
    """
    even = len(images) - len(images) % 2 if mixup or cutmix else 0
    plain = mixup_target(labels[even:], num_classes, smoothing=label_smoothing)
    if not even:
        return Mixed(images, plain)
    mixer = Mixup(
        mixup_alpha=mixup, cutmix_alpha=cutmix, label_smoothing=label_smoothing, num_classes=num_classes
    )
    with seeded_globally(seed):
        mixed_images, targets = mixer(images[:even].clone(), labels[:even])
    return Mixed(torch.cat([mixed_images, images[even:]]), torch.cat([targets, plain]))


class FineTuner:
    """A classifier that learns, as a whole or by what `requires_grad`."""

    def __init__(
        self,
        classifier: ImageClassifier,
        config: FinetuneConfig,
        data: DataConfig,
        *,
        steps_per_epoch: int,
        device: torch.device,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.total_steps = config.epochs * steps_per_epoch
        self.warmup_steps = round(config.warmup * steps_per_epoch)
        self.classifier = classifier.to(device).train()
        groups = tuning_groups(classifier, config)
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "fp16")
        self.autocast = autocast(device, config.precision)
        self.averaged: ModelEmaV3 | None = None
        if config.ema_decay is not None:
            self.averaged = ModelEmaV3(classifier, decay=config.ema_decay, use_warmup=True)
        self.step = 0
        """Optimizer steps done."""
        self.window = Window()
        """What was seen in this epoch."""

    # ----------------------------------------------------------------------------------------------- a step

    @property
    def lr(self) -> float:
        """The rate of the step about to be made, of the head."""
        return lr_at(
            self.step,
            peak=self.config.lr,
            start=self.config.end_lr,
            end=self.config.end_lr,
            warmup_steps=self.warmup_steps,
            total_steps=self.total_steps,
        )

    def learn(self, images: Shaped[Tensor, "b c h w"], labels: Int64[Tensor, " b"]) -> StepOutcome:
        """Make one optimizer step on a batch, of bytes or normalised; what is not finite changes no weight.

        The loss is the sum over images divided by their number in the whole batch, so micro-batches of any
        size give the loss and gradient of the batch. Of fewer images than a batch norm needs none is used.
        """
        least = 2 if self.config.head_norm == "batch" else 1
        set_lr(self.optimizer, self.lr)
        self.step += 1
        if len(labels) < least:
            log.warning("step %d: only %d readable images, left out", self.step - 1, len(labels))
            return StepOutcome(0.0, 0.0, 0)
        batch = self._mixed(images, labels)
        size = self.config.micro_batch_size or len(labels)
        loss = torch.zeros((), device=self.device)
        with torch.random.fork_rng(devices=[]):
            parts = zip(batch.images.split(size), batch.targets.split(size), strict=True)
            for micro_step, (some, targets) in enumerate(parts):
                seed_device(keyed_seed(self.config.seed, "drop-path", self.step - 1, micro_step), self.device)
                loss += self._backward(some, targets, len(labels))
        grad_norm = self._update(loss_is_finite=math.isfinite(loss.item()))
        return StepOutcome(loss.item(), grad_norm, len(labels))

    def _mixed(self, images: Tensor, labels: Tensor) -> Mixed:
        on_device = images.to(self.device, non_blocking=True)
        if not on_device.is_floating_point():  # else they come normalised
            on_device = normalize(on_device, self.data.mean, self.data.std)
        return mixed(
            on_device,
            labels.to(self.device),
            num_classes=self.classifier.head_config.num_classes,
            mixup=self.config.mixup,
            cutmix=self.config.cutmix,
            label_smoothing=self.config.label_smoothing,
            seed=keyed_seed(self.config.seed, "mixing", self.step - 1),
        )

    def _backward(self, images: Tensor, targets: Tensor, divisor: int) -> Float[Tensor, ""]:
        with self.autocast:
            logits = self.classifier(images)
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / divisor
        self.scaler.scale(loss).backward()
        return loss.detach()

    def _update(self, *, loss_is_finite: bool) -> float:
        """Clip, step and average if all is finite, clear the gradients; their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        limit = math.inf if self.config.clip_grad is None else self.config.clip_grad
        grad_norm = nn.utils.clip_grad_norm_(self.classifier.parameters(), limit).item()
        if loss_is_finite and (self.scaler.is_enabled() or math.isfinite(grad_norm)):
            self.scaler.step(self.optimizer)
            if self.averaged is not None:
                self.averaged.update(self.classifier, self.step)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return grad_norm

    # ------------------------------------------------------------------------------------- state and results

    def state(self) -> dict[str, Any]:
        """All that is needed to go on, but for what is frozen: that is what the model was opened with."""
        return {
            "step": self.step,
            "classifier": _moving(self.classifier),
            "averaged": None if self.averaged is None else _moving(self.averaged.module),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "window": dict(vars(self.window)),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up where `state` was taken."""
        self.step = state["step"]
        _restore(self.classifier, state["classifier"])
        if self.averaged is not None:
            _restore(self.averaged.module, state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.window = Window(**state["window"])

    def networks(self) -> dict[WeightsName, ImageClassifier]:
        """The classifier as it is, and its averaged weights if they are kept."""
        found: dict[WeightsName, ImageClassifier] = {"last": self.classifier}
        if self.averaged is not None:
            found["averaged"] = self.averaged.module  # type: ignore[assignment] # a copy of the classifier
        return found

    def finish(self) -> dict[WeightsName, ImageClassifier]:
        """The same as plain classifiers, adapters merged; there is no learning after it."""
        found = self.networks()
        for classifier in found.values():
            if self.config.uses_lora:
                merge_lora(classifier.encoder_model.encoder)
            classifier.eval().requires_grad_(requires_grad=False)
        return found


def _moving(network: nn.Module) -> dict[str, Tensor]:
    """Weights that take gradients, and buffers."""
    frozen = {name for name, parameter in network.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in frozen}


def _restore(network: nn.Module, weights: dict[str, Tensor]) -> None:
    network.load_state_dict({**network.state_dict(), **weights}, strict=True)


# ---------------------------------------------------------------------------------------------- measuring


class Measured(NamedTuple):
    """What was measured, and what could not be read."""

    measures: Measures
    bad: tuple[BadSample, ...]


@torch.no_grad()
def measure_classifier(
    classifier: ImageClassifier,
    source: Source,
    data: DataConfig,
    *,
    image_size: Size,
    batch_size: int,
    precision: str,
) -> Measured:
    """Measure a classifier on the centre crops of a source, where it lies; its mode is left as it was."""
    device = next(classifier.parameters()).device
    tally = Tally(len(source.class_names))
    truth = torch.from_numpy(source.labels)
    was_training, bad = classifier.training, []
    classifier.eval()
    workers = resolve_workers(data.workers, source)
    for batch in eval_batches(source, data, pair(image_size), batch_size, workers=workers):
        bad += batch.bad
        if len(batch.samples):
            images = normalize(batch.images.to(device, non_blocking=True), data.mean, data.std)
            with autocast(device, precision):
                logits = classifier(images)
            tally.add(logits.float(), truth[batch.samples])
    classifier.train(was_training)
    return Measured(tally.measures(), tuple(bad))
