"""A training step of XTRA-B/16 against a plain implementation of the same method (plain.py).

256 px, batch 8, fp32. Both start from the same weights and see the same images; if their losses differ, no
ratio is printed. The plain one keeps all blocks, has a dense mask and torch's default AdamW. It is measured
again with fused AdamW, and with freed memory kept for the next step as `nextblock pretrain` does.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from common import Row, best_device, gemm_gflops, median_of, now_s, parse, peak_memory_mb, report, take_turns
from nextblock import plan
from nextblock.config import ModelConfig, RunConfig, TrainConfig, pair
from nextblock.data import Batch, Step, normalize
from nextblock.data.order import StepKeys
from nextblock.presets import model_config
from nextblock.train.runtime import process_settings
from nextblock.train.trainer import Trainer
from plain import PlainModel, plain_optimizer

LEARNING_RATE = 1e-4
WARMUP, STEPS = 2, 3
"""Steps that are not timed (the first makes the optimizer's state, after the second memory has settled), and
those that are."""
MAX_LOSS_DIFFERENCE = 1e-5
"""At the first step, where the weights are the same."""
PLAINLY = {"drop_path": 0.0, "order": "raster", "num_predicted_blocks": 1, "init": None}
"""What a preset is changed to, as the plain implementation has nothing else."""

Result = dict[str, Any]


def run_config(model: ModelConfig, **train: Any) -> RunConfig:
    """Make the settings of a run that trains this model."""
    data = replace(RunConfig().data, val_resize_px=max(pair(model.image_size)))
    return replace(RunConfig(), model=model, data=data, train=TrainConfig(**train))


def noise(model: ModelConfig, batch_size: int) -> UInt8[Tensor, "b c h w"]:
    """Random images of the model's size; what is in them does not change how long a step takes."""
    size = batch_size, model.in_chans, *pair(model.image_size)
    return torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def step_of(index: int, images: UInt8[Tensor, "b c h w"]) -> Step:
    """Make a step that has these images as its only micro-batch."""
    samples = torch.arange(len(images))
    visits = torch.zeros_like(samples)
    batch = Batch(images, samples, (), visits, torch.empty(len(images), 0))
    return Step(index, StepKeys(0, visits.numpy(), samples.numpy()), iter([batch]), 1)


def train_ours(config: RunConfig) -> Result:
    """Train as `nextblock pretrain` does."""
    device = best_device()
    with process_settings(device):
        trainer = Trainer(config, device, None)

        def step(index: int, images: UInt8[Tensor, "b c h w"], mark: Callable[..., None]) -> float:
            # `check` is called between the backward pass and the update.
            return trainer.train_step(step_of(index, images), LEARNING_RATE, check=mark).loss

        return measure(step, config, device)


def train_plain(config: RunConfig, *, fused: bool = False, keeps_memory: bool = False) -> Result:
    """Train as most scripts do, from the same weights."""
    device, optim = best_device(), config.optim
    model = PlainModel(config.model)
    model.load_state_dict(Trainer(config, torch.device("cpu"), None).model.state_dict(), assign=True)
    model.to(device)
    optimizer = plain_optimizer(model, LEARNING_RATE, optim.weight_decay, optim.betas, optim.eps, fused=fused)

    def step(_: int, images: UInt8[Tensor, "b c h w"], mark: Callable[..., None]) -> float:
        optimizer.zero_grad()
        loss = model(normalize(images.to(device), config.data.mean, config.data.std))
        loss.backward()
        mark()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_grad or float("inf"))
        optimizer.step()
        return loss.item()

    with process_settings(device) if keeps_memory else nullcontext():
        return measure(step, config, device)


def measure(step: Callable[..., float], config: RunConfig, device: torch.device) -> Result:
    """Seconds of every step and of its forward and backward pass, all losses, peak memory.

    `step` is given its number, its images, and a function to call after the backward pass.
    """
    images = noise(config.model, config.train.batch_size)
    losses, marks_s = [], []
    for index in range(WARMUP + STEPS):
        marks_s.append(now_s())
        losses.append(step(index, images, lambda *_: marks_s.append(now_s())))
        marks_s.append(now_s())
    laps_s = [marks_s[i : i + 3] for i in range(3 * WARMUP, len(marks_s), 3)]
    return {
        "step_s": [end - start for start, _, end in laps_s],
        "forward_backward_s": [middle - start for start, middle, _ in laps_s],
        "losses": losses,
        "peak_memory_mb": peak_memory_mb(device),
    }


def loss_difference(runs: list[Result]) -> float:
    """The largest difference over all steps; ends the process if the first losses differ."""
    losses = torch.tensor([run["losses"] for run in runs], dtype=torch.float64)
    differences = losses.amax(0) - losses.amin(0)
    if not differences[0] <= MAX_LOSS_DIFFERENCE:  # also if it is NaN
        sys.exit(f"no ratio: ours and plain have other losses at the first step: {losses[:, 0].tolist()}")
    return float(differences.max())


def main() -> None:
    """Measure all variants and print how they compare."""
    options = parse(__doc__)
    model = model_config("xtra-tiny" if options.quick else "xtra-b16", **PLAINLY)
    rows, columns = pair(model.block_size)
    batch = 2 if options.quick else 8
    normal = run_config(model, batch_size=batch, precision="fp32")
    large = replace(normal, model=replace(model, block_size=(2 * rows, 2 * columns)))
    # The encoder's largest products, forward and for the gradient of its weights; and a large square.
    tokens, width = batch * (model.num_blocks - 1) * model.patches_per_block, model.embed_dim
    hidden, square = int(width * model.mlp_ratio), 64 if options.quick else 4096
    shapes = [(tokens, width, hidden), (tokens, hidden, width), (hidden, tokens, width), (square,) * 3]
    seconds = 0.01 if options.quick else 2.0
    variants = {
        "GEMM": partial(gemm_gflops, shapes, best_device(), torch.float32, seconds),
        "ours": partial(train_ours, normal),
        "plain": partial(train_plain, normal),
        "plain, AdamW fused": partial(train_plain, normal, fused=True),
        "plain, AdamW fused, memory kept": partial(train_plain, normal, fused=True, keeps_memory=True),
        "ours, larger blocks": partial(train_ours, large),
        "plain, larger blocks": partial(train_plain, large),
    }
    gemm, ours, plain, fused, tuned, ours_large, plain_large = take_turns(variants, options).values()
    differences = loss_difference(ours + plain + fused + tuned), loss_difference(ours_large + plain_large)

    def speed(what: str, ours: list[Result], plain: list[Result], key: str, budget: str = "") -> Row:
        mine, other = (batch / median_of(runs, key) for runs in (ours, plain))
        return Row(what, mine, other, "images/s", mine / other, budget)

    gflops = batch * plan.step_flops(model) / median_of(ours, "forward_backward_s") / 1e9
    of_gemm = gflops / median(gemm)
    ours_mb, plain_mb = (max(run["peak_memory_mb"] for run in runs) for runs in (ours, plain))
    table = [
        speed("training step", ours, plain, "step_s", "at least 1.15"),
        speed("training step, AdamW fused in both", ours, fused, "step_s"),
        speed("the same, freed memory kept in both", ours, tuned, "step_s"),
        speed("forward + backward", ours, plain, "forward_backward_s"),
        speed("the same, larger blocks", ours_large, plain_large, "forward_backward_s", "at least 1.25"),
        Row("forward + backward, against GEMM", gflops, median(gemm), "GFLOP/s", of_gemm, "at least 0.80"),
        Row("peak memory", ours_mb, plain_mb, "MB", plain_mb / ours_mb, "at least 1.00"),
    ]
    losses = {"losses": ours[0]["losses"], "plain_losses": plain[0]["losses"]}
    report("step", options, table, **losses, largest_loss_difference=max(differences))


if __name__ == "__main__":
    main()
