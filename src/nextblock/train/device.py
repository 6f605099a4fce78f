"""Where to compute, in which precision, and how exactly."""

from __future__ import annotations

import os

import torch

from nextblock.config import TrainConfig

__all__ = ["autocast", "choose_device", "device_name", "make_deterministic", "seed_device"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """The named device, or with "auto" the best there is; one that is not there is refused."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, there in available.items() if there))
    if not available[name]:
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ValueError(
            f"device {name!r} is not available to this torch ({torch.__version__}); available: {there}"
        )
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What the device calls itself, for the run's records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def autocast(device: torch.device, train: TrainConfig) -> torch.autocast:
    """The precision of forward passes; refuses fp16 on a CPU."""
    if train.precision == "fp16" and device.type == "cpu":
        raise ValueError("train.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    dtype = DTYPES.get(train.precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def seed_device(seed: int, device: torch.device) -> None:
    """Seed the global generators that dropout draws from here; `torch.manual_seed` visits every backend."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def make_deterministic() -> None:
    """Let torch use deterministic algorithms only, for bit-for-bit repetition on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
