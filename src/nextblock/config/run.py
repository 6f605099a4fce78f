"""The settings of a run: optimizer, length, checkpoints, monitors, and all of them together."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from nextblock.config.data import DataConfig
from nextblock.config.model import ModelConfig, pair
from nextblock.settings import Duration, check_types, flatten, require, to_dict

__all__ = ["CheckpointConfig", "MonitorConfig", "OptimConfig", "RunConfig", "TrainConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay, set before every step."""

    lr: float = 1e-3
    """Peak learning rate, used as it is: never scaled by the batch size."""
    start_lr: float = 1e-4
    """Learning rate of the first warm-up step."""
    end_lr: float = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: str = "5%"
    """Length of the linear warm-up: a duration, or a share of the run such as "2.5%"."""
    weight_decay: float = 0.05
    """Decay of weights; biases and one-dimensional parameters are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip_grad: float | None = 1.0
    """Clip the gradient's norm to this; null: not clipped."""

    def __post_init__(self) -> None:
        check_types(self, "optim")
        for name in ("lr", "start_lr", "end_lr", "weight_decay"):
            value = getattr(self, name)
            require(
                value >= 0 and math.isfinite(value),
                f"optim.{name} is {value}; it must be a finite number from 0 on",
            )
        require(
            all(0 <= beta < 1 for beta in self.betas),
            f"optim.betas are {self.betas}; each must lie in [0, 1)",
        )
        require(self.eps > 0, f"optim.eps is {self.eps}; it must be above 0")
        require(
            self.clip_grad is None or self.clip_grad > 0,
            f"optim.clip_grad is {self.clip_grad}; give a norm above 0, or null for none",
        )
        Duration.parse(self.warmup, allow=("ep", "st", "sa", "%"))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at a time, on what, and in which precision."""

    duration: str = "100ep"
    """Length of the run: epochs (800ep), steps (500000st) or samples (2000000sa)."""
    batch_size: int = 256
    """Images per optimizer step, over all micro-batches."""
    micro_batch_size: int | None = None
    """Images per forward pass; below batch_size gradients accumulate; null or more: the whole batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision of forward and backward; weights stay fp32. auto: bf16 if the device computes in it,
    else fp32; a run keeps the one that it began with."""
    predictor_fp32: bool = False
    """Run the predictor in fp32 under fp16, as official XTRA does (it may overflow)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    deterministic: bool = False
    """Only deterministic algorithms, so that CUDA runs repeat bit for bit; slower."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    nonfinite_limit: int = 5
    """Stop after this many steps in a row with a loss or gradient not finite; such steps change no weight."""

    def __post_init__(self) -> None:
        check_types(self, "train")
        length = Duration.parse(self.duration)
        require(length.value > 0, f"train.duration is {self.duration!r}; train for more than nothing")
        require(self.batch_size >= 1, f"train.batch_size is {self.batch_size}; use at least 1")
        require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"train.micro_batch_size is {self.micro_batch_size}; use at least 1, or null for the whole batch",
        )
        require(self.nonfinite_limit >= 1, f"train.nonfinite_limit is {self.nonfinite_limit}; use at least 1")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When to save, and how many to keep."""

    every: str = "30min"
    """Save this often: a duration or minutes. The end of the run, ctrl-C and SIGTERM save as well."""
    keep: int = 2
    """How many of the latest checkpoints stay."""
    keep_every: str | None = None
    """Keep one for good this often (a duration); null: none but the latest."""

    def __post_init__(self) -> None:
        check_types(self, "checkpoint")
        Duration.parse(self.every, allow=("ep", "st", "sa", "min"))
        if self.keep_every is not None:
            Duration.parse(self.keep_every)
        require(self.keep >= 1, f"checkpoint.keep is {self.keep}; keep at least 1")


@dataclass(frozen=True, kw_only=True)
class MonitorConfig:
    """What is looked at while training goes on. None of it changes the weights."""

    log_every: str = "10st"
    """Write a line to metrics.jsonl this often."""
    val_every: str = "1ep"
    """Measure the validation loss this often, where data.val is given."""
    pictures_every: str | None = "20ep"
    """Draw the same few images' predictions this often; null: never."""
    pictures: int = 8
    """How many images to draw."""
    knn_every: str | None = "20ep"
    """Measure kNN accuracy this often, where data.train and data.val have labels; null: never."""
    knn_samples: int = 10_000
    """Use at most this many images of each source for kNN."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""

    def __post_init__(self) -> None:
        check_types(self, "monitor")
        for name in ("log_every", "val_every", "pictures_every", "knn_every"):
            if getattr(self, name) is not None:
                Duration.parse(getattr(self, name))
        for name in ("pictures", "knn_samples"):
            require(getattr(self, name) >= 1, f"monitor.{name} is {getattr(self, name)}; use at least 1")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a pre-training run does."""

    preset: str | None = None
    """Name of the preset these settings started from."""
    seed: int = 0
    """Seed of weights, data order, augmentation, block orders and drop path."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network and its objective."""
    data: DataConfig = field(default_factory=DataConfig)
    """Images, crops, decoding."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer and learning rate."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Duration, batch, precision, device."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When to save."""
    monitor: MonitorConfig = field(default_factory=MonitorConfig)
    """Logging, validation, pictures, kNN."""

    def __post_init__(self) -> None:
        check_types(self)
        require(self.seed >= 0, f"seed is {self.seed}; use 0 or more")
        require(
            self.data.channels == self.model.in_chans,
            f"data.channels is {self.data.channels}, model.in_chans is {self.model.in_chans}; "
            "give both the number of channels that the images have",
        )
        require(
            self.data.normalize == "auto" or len(self.data.mean) == self.model.in_chans,
            f"data.mean has {len(self.data.mean)} channels, model.in_chans is {self.model.in_chans}; "
            "give as many numbers, also for data.std, or use data.normalize auto",
        )
        require(
            self.data.val_resize_px >= max(pair(self.model.image_size)),
            f"data.val_resize_px is {self.data.val_resize_px}, "
            f"smaller than model.image_size {self.model.image_size}; use at least that",
        )

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Dotted settings in which two configs are not the same run: {name: (here, there)}."""
        mine, theirs = flatten(to_dict(self)), flatten(to_dict(other))
        return {
            name: (value, theirs.get(name))
            for name, value in mine.items()
            if theirs.get(name) != value and not _is_free(name)
        }


_FREE_SETTINGS = (
    "preset",
    "data.train",
    "data.val",
    "data.workers",
    "data.max_bad_fraction",
    "data.cache_dir",
    "data.cache_gb",
    "train.device",
    "checkpoint.",
    "monitor.",
)


def _is_free(name: str) -> bool:
    """Whether a setting may change between a run and its continuation."""
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in _FREE_SETTINGS)
