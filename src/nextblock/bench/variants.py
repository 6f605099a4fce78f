"""What the processes of `nextblock bench step` do: train ours, train the plain model.

Each function takes a job as plain values and returns plain values. Both trainings start from the same
weights, see the same images and use the same settings of the optimizer, so their losses are the same at
every step.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import UInt8
from torch import Tensor

from nextblock.bench.measure import Clock, Stopwatch, peak_memory_mb, set_up, synchronizer
from nextblock.bench.plain import PlainModel, plain_optimizer
from nextblock.config import ModelConfig, RunConfig, TrainConfig
from nextblock.data import Batch, Step, normalize
from nextblock.data.order import StepKeys
from nextblock.models import NextBlockModel
from nextblock.settings import from_dict
from nextblock.train.runtime import autocast, device_name, process_settings
from nextblock.train.trainer import Trainer

__all__ = ["StepJob", "measure_step", "noise", "plain_like", "step_of"]

LEARNING_RATE = 1e-4
WARMUP_STEPS = 2
"""The optimizer's state is made in the first; after the second, memory has settled."""
STEP, FORWARD_BACKWARD, UPDATE = "step", "forward_backward", "update"


@dataclass(frozen=True, kw_only=True)
class StepJob:
    """A training to be measured."""

    variant: Literal["ours", "plain"]
    model: ModelConfig
    batch_size: int
    fused: bool = True
    """AdamW fused, or torch's default; ours is always fused."""
    keep_memory: bool = True
    """Let malloc keep freed memory, as `nextblock pretrain` does on a CPU, or leave it as it is."""
    whole_step: bool = True
    """Clip and update as well, or forward and backward alone."""
    precision: Literal["fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: int | None
    clock: Clock = "wall"
    steps: int
    """Measured ones; `WARMUP_STEPS` more come first."""

    @property
    def train(self) -> TrainConfig:
        """The same as settings of a run."""
        return TrainConfig(
            duration=f"{WARMUP_STEPS + self.steps}st",
            batch_size=self.batch_size,
            precision=self.precision,
            device=self.device,
        )

    @property
    def run(self) -> RunConfig:
        """The run that this would be a part of."""
        base = RunConfig()
        size_px = max(self.model.block_grid[i] * self.model.block_px[i] for i in (0, 1))
        return replace(
            base, model=self.model, train=self.train, data=replace(base.data, val_resize_px=size_px)
        )


def measure_step(values: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every measured step and of its phases, losses of all steps, peak memory."""
    job: StepJob = from_dict(StepJob, values)
    device = set_up(job.device, job.threads)
    watch = Stopwatch(synchronizer(device), job.clock)
    images = noise(job.model, job.batch_size)
    prepare = _ours if job.variant == "ours" else _plain
    losses = []
    with process_settings(device) if job.keep_memory else nullcontext():
        step = prepare(job, device, watch)
        for index in range(WARMUP_STEPS + job.steps):
            with watch.lap(STEP):
                losses.append(step(index, images))
    return {
        "losses": losses,
        "laps_s": {label: laps[WARMUP_STEPS:] for label, laps in watch.laps_s.items()},
        "peak_memory_mb": peak_memory_mb(device.type),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


TrainStep = Callable[[int, UInt8[Tensor, "b c h w"]], float]
"""From the number of the step and its images to the loss before the step."""


def _ours(job: StepJob, device: torch.device, watch: Stopwatch) -> TrainStep:
    """The step that `nextblock pretrain` makes; or its forward and backward pass alone."""
    trainer = Trainer(job.run, device, None)

    def whole_step(index: int, images: UInt8[Tensor, "b c h w"]) -> float:
        step = step_of(index, images)
        with watch.watch(trainer, "_backward", FORWARD_BACKWARD), watch.watch(trainer, "_update", UPDATE):
            return trainer.train_step(step, LEARNING_RATE).loss

    def forward_backward(_: int, images: UInt8[Tensor, "b c h w"]) -> float:
        pixels = trainer.to_model(images)
        trainer.optimizer.zero_grad()
        with watch.lap(FORWARD_BACKWARD):
            with trainer.autocast:
                loss = trainer.model(pixels).loss
            loss.backward()
        return loss.item()

    return whole_step if job.whole_step else forward_backward


def step_of(index: int, images: UInt8[Tensor, "b c h w"]) -> Step:
    """These images as the only micro-batch of a step."""
    samples = torch.arange(len(images))
    visits = torch.zeros_like(samples)
    batch = Batch(images, samples, (), visits, torch.empty(len(images), 0))
    return Step(index, StepKeys(0, visits.numpy(), samples.numpy()), iter([batch]), 1)


def _plain(job: StepJob, device: torch.device, watch: Stopwatch) -> TrainStep:
    """The same step as most training scripts have it."""
    config = job.run
    trainer = Trainer(config, torch.device("cpu"), None)  # for its weights
    model = plain_like(trainer.model).to(device)
    del trainer
    optim = config.optim
    optimizer = plain_optimizer(
        model,
        lr=LEARNING_RATE,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        fused=job.fused,
    )
    precision = autocast(device, config.train.precision)

    def step(_: int, images: UInt8[Tensor, "b c h w"]) -> float:
        pixels = normalize(images.to(device), config.data.mean, config.data.std)
        optimizer.zero_grad()
        with watch.lap(FORWARD_BACKWARD):
            with precision:
                loss = model(pixels)
            loss.backward()
        if job.whole_step:
            with watch.lap(UPDATE):
                torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad or 1.0)
                optimizer.step()
        return loss.item()

    return step


def plain_like(model: NextBlockModel) -> PlainModel:
    """The plain model with the very weights of ours."""
    plain = PlainModel(model.config)
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain.train()


def noise(config: ModelConfig, batch_size: int) -> UInt8[Tensor, "b c h w"]:
    """Noise; how long a step takes does not depend on what is in the images."""
    rows, columns = (config.block_grid[i] * config.block_px[i] for i in (0, 1))
    shape = (batch_size, config.in_chans, rows, columns)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
