"""How many images fit into memory at once: `train.micro_batch_size auto`."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from nextblock.plan import activation_bytes
from nextblock.train.learner import Learner

CPU_SHARE = 0.5
"""Share of a machine's free memory that activations may use, over all its processes."""
GPU_SHARE = 0.8
"""Share of a GPU's memory for activations, after weights, gradients and moments."""
BYTES_PER_TRAINED = 12
"""Gradient and AdamW's two moments, fp32; not allocated before the first step."""


def largest_micro_batch(trainer: Learner, share: int) -> int:
    """Largest micro-batch that fits, at most this process's `share` of a batch; the same on all ranks.

    Estimated from the layers' shapes (`plan.activation_bytes`). On a GPU, unless the model is sharded, the
    estimate is then tried and halved until it fits.
    """
    config, device, group = trainer.config, trainer.device, trainer.group
    one, two = (
        activation_bytes(
            config.model,
            images,
            config.train.precision,  # type: ignore[arg-type] # "auto" is resolved
            predictor_fp32=config.train.predictor_fp32,
            recompute=config.train.activation_checkpointing,
        )
        for images in (1, 2)
    )
    if device.type == "cuda":
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trained //= group.size if trainer.strategy == "fsdp" else 1
        free = GPU_SHARE * (torch.cuda.mem_get_info(device)[0] - BYTES_PER_TRAINED * trained)
    else:
        free = CPU_SHARE * free_memory() / group.on_this_host
    fitting = min(group.gather(max(1, int((free - one) / (two - one)) + 1)))
    images = _even(share, fitting)
    while device.type == "cuda" and trainer.strategy != "fsdp" and images > 1:
        fits = _runs(trainer, images)
        if all(group.gather(fits)):
            break
        images = _even(share, images // 2)
    return images


def _even(share: int, most: int) -> int:
    """Size of the parts if `share` is divided evenly into parts of at most `most`."""
    passes = -(-share // min(share, most))
    return -(-share // passes)


def _runs(trainer: Learner, images: int) -> bool:
    """Whether a forward and backward pass of this many images fits into memory."""
    try:
        trainer.run_empty(images)
    except torch.OutOfMemoryError:
        return False
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
    return True


def free_memory() -> int:
    """Free memory in bytes of this machine, or of its container if that has less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):  # "max" if there is no limit
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{one}").read_text()) for one in ("max", "current"))
        free = min(free, limit - used)
    return free
