"""The settings of a run: frozen dataclasses, checked where they are made, to and from YAML.

Every field is a dotted flag of the command line (`--model.block_size 4`) and a key of `config.yaml`. Nothing
here imports torch: `nextblock pretrain --help` must be quick. Impossible settings raise `ValueError` with
the values and the remedy; derived numbers are properties.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from nextblock.settings import (
    Duration,
    check_types,
    flatten,
    require,
    require_divides,
    require_range,
    to_dict,
)

__all__ = [
    "Attention",
    "CheckpointConfig",
    "DataConfig",
    "ModelConfig",
    "MonitorConfig",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Attention = Literal["native", "causal", "full"]
"""Attention at encoding: what the checkpoint records for its features, the pre-training mask, or no mask."""

Size = int | tuple[int, int]


def pair(size: Size) -> tuple[int, int]:
    """`4` and `(4, 4)` alike as (rows, columns)."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# ------------------------------------------------------------------------------------------------- the model


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network and its objective: a timm ViT that encodes, and a predictor of the next block's pixels."""

    image_size: Size = 256
    """Side of the square image in pixels, or (rows, columns)."""
    patch_size: int = 16
    """Side of a patch in pixels."""
    in_chans: int = 3
    """Channels of the image."""
    embed_dim: int = 768
    """Width of the encoder."""
    depth: int = 12
    """Layers of the encoder."""
    num_heads: int = 12
    """Attention heads of the encoder."""
    mlp_ratio: float = 4.0
    """Hidden width of an encoder layer's MLP over its width."""
    norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    drop_path: float = 0.0
    """Drop-path rate of the encoder's last layer; the rate grows linearly from 0 at the first."""
    block_size: Size = 4
    """Patches along a block's side, or (rows, columns). 1 makes the attention plainly causal."""
    order: Literal["raster", "random"] = "raster"
    """Which block comes when: raster, or a random set of as many orders as blocks, one drawn a step."""
    order_seed: int = 0
    """Seed of the random set of orders."""
    num_predicted_blocks: int = 1
    """How many blocks ahead are predicted, each by a block MLP of its own; their losses are averaged."""
    predictor: Literal["transformer"] | None = "transformer"
    """What predicts: XTRA's projection, decoder and block MLP; or null, an encoder alone."""
    projection_dim: int = 4096
    """Hidden width of the MLP between encoder and predictor."""
    predictor_dim: int = 768
    """Width of the predictor."""
    predictor_depth: int = 8
    """Layers of the predictor."""
    predictor_heads: int = 6
    """Attention heads of the predictor."""
    predictor_mlp_ratio: float = 4.0
    """Hidden width of a predictor layer's MLP over its width."""
    block_mlp_dim: int = 6144
    """Hidden width of the MLP that turns a block's tokens into the next block's pixels."""
    norm_pixels: bool = True
    """Normalise the target pixels of each block by its own mean and deviation."""
    loss: Literal["mse", "l1"] = "mse"
    """Distance between predicted and true pixels."""
    feature_attention: Literal["causal", "full"] = "causal"
    """What `attention="native"` means when this model encodes: the pre-training mask, or none."""
    init: str | None = None
    """Start from these weights (a run directory); what does not fit is resampled or fresh, and listed."""

    def __post_init__(self) -> None:
        check_types(self, "model")
        for name in ("patch_size", "in_chans", "embed_dim", "depth", "num_heads", "num_predicted_blocks"):
            require(getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("image_size", "block_size"):
            require(
                min(pair(getattr(self, name))) >= 1, f"model.{name} is {getattr(self, name)}; use at least 1"
            )
        for name in ("mlp_ratio", "predictor_mlp_ratio", "norm_eps"):
            require(getattr(self, name) > 0, f"model.{name} is {getattr(self, name)}; it must be above 0")
        require(0 <= self.drop_path < 1, f"model.drop_path is {self.drop_path}; it must lie in [0, 1)")
        require_divides(self.embed_dim, self.num_heads, "model.embed_dim", "model.num_heads")
        self._check_geometry()
        if self.predictor is not None:
            for name in (
                "projection_dim",
                "predictor_dim",
                "predictor_depth",
                "predictor_heads",
                "block_mlp_dim",
            ):
                require(
                    getattr(self, name) >= 1, f"model.{name} is {getattr(self, name)}; it must be at least 1"
                )
            require_divides(
                self.predictor_dim, self.predictor_heads, "model.predictor_dim", "model.predictor_heads"
            )
            require(
                self.num_blocks == 1 or self.num_predicted_blocks < self.num_blocks,
                f"model.num_predicted_blocks is {self.num_predicted_blocks}, but an image has only "
                f"{self.num_blocks} blocks; predict at most {self.num_blocks - 1} ahead",
            )

    def _check_geometry(self) -> None:
        rows, columns = pair(self.image_size)
        p = self.patch_size
        require(
            rows % p == 0 and columns % p == 0,
            f"an image of {rows}x{columns} px is no whole number of {p}-px patches; "
            f"use model.image_size {_nearest_sizes(self.image_size, (p, p))}",
        )
        unit = (p * pair(self.block_size)[0], p * pair(self.block_size)[1])
        require(
            rows % unit[0] == 0 and columns % unit[1] == 0,
            f"a grid of {rows // p}x{columns // p} patches ({rows}x{columns} px in {p}-px patches) "
            f"cannot be cut into blocks of {pair(self.block_size)[0]}x{pair(self.block_size)[1]} patches; "
            f"use model.image_size {_nearest_sizes(self.image_size, unit)}, or another model.block_size",
        )

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along the image, (rows, columns)."""
        rows, columns = pair(self.image_size)
        return rows // self.patch_size, columns // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches in an image, n."""
        return self.grid[0] * self.grid[1]

    @property
    def block_grid(self) -> tuple[int, int]:
        """Blocks along the image, (rows, columns)."""
        block = pair(self.block_size)
        return self.grid[0] // block[0], self.grid[1] // block[1]

    @property
    def num_blocks(self) -> int:
        """Blocks in an image, k."""
        return self.block_grid[0] * self.block_grid[1]

    @property
    def patches_per_block(self) -> int:
        """Patches in a block, m."""
        block = pair(self.block_size)
        return block[0] * block[1]

    @property
    def block_px(self) -> tuple[int, int]:
        """A block's height and width in pixels."""
        block = pair(self.block_size)
        return block[0] * self.patch_size, block[1] * self.patch_size

    @property
    def block_values(self) -> int:
        """Pixel values in a block, p: channels x height x width."""
        return self.in_chans * self.block_px[0] * self.block_px[1]


# -------------------------------------------------------------------------------------------------- the rest


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images are and how they are cut and normalised."""

    train: str | None = None
    """Images to train on: a directory, `torchvision:CIFAR10,root=DIR,split=train`, or `digits`."""
    val: str | None = None
    """Images to validate on, same grammar; none by default."""
    crop_scale: tuple[float, float] = (0.3, 1.0)
    """Share of the image's area that a training crop covers, drawn uniformly."""
    crop_ratio: tuple[float, float] = (0.75, 1.5)
    """Width over height of a training crop, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    val_resize_px: int = 300
    """Shorter side after resizing for validation; the centre of model.image_size is then cut out."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean per channel, of pixels in [0, 1], that is subtracted."""
    std: tuple[float, ...] = IMAGENET_STD
    """Deviation per channel, of pixels in [0, 1], that is divided by."""
    workers: int | None = None
    """Processes that decode; none given: up to 8, one less than there are cores; 0: in the main process."""
    decoder: Literal["auto", "pillow"] = "auto"
    """JPEG decoder: torchcodec where it works, else Pillow; or Pillow always. Fixed for a run."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the listed files cannot be read."""
    max_pixels: int = 178_956_970
    """A picture of more pixels counts as unreadable (a decompression bomb); the default is Pillow's."""

    def __post_init__(self) -> None:
        check_types(self, "data")
        require_range("data.crop_scale", self.crop_scale, 0, 1)
        require_range("data.crop_ratio", self.crop_ratio, 0, math.inf)
        require(0 <= self.flip <= 1, f"data.flip is {self.flip}; it must lie in [0, 1]")
        require(self.val_resize_px >= 1, f"data.val_resize_px is {self.val_resize_px}; use at least 1")
        require(
            len(self.mean) == len(self.std),
            f"data.mean has {len(self.mean)} channels and data.std {len(self.std)}; give as many of each",
        )
        require(min(self.std) > 0, f"data.std is {self.std}; deviations must be above 0")
        require(
            self.workers is None or self.workers >= 0,
            f"data.workers is {self.workers}; use 0 or more processes",
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            f"data.max_bad_fraction is {self.max_bad_fraction}; it must lie in [0, 1]",
        )
        require(self.max_pixels >= 1, f"data.max_pixels is {self.max_pixels}; use at least 1")


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
    precision: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Autocast precision of forward and backward; weights stay fp32."""
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
            len(self.data.mean) == self.model.in_chans,
            f"data.mean has {len(self.data.mean)} channels, model.in_chans is {self.model.in_chans}; "
            "make them equal",
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
    "data.workers",
    "data.max_bad_fraction",
    "train.device",
    "checkpoint.",
    "monitor.",
)


def _is_free(name: str) -> bool:
    """Whether a setting may change between a run and its continuation."""
    return any(name == free or (free.endswith(".") and name.startswith(free)) for free in _FREE_SETTINGS)


def _nearest_sizes(size: Size, unit: tuple[int, int]) -> str:
    """The nearest image sizes that are whole multiples of `unit` pixels, as words: "192 or 256"."""
    sides = pair(size)
    below = tuple(side // u * u for side, u in zip(sides, unit, strict=True))
    above = tuple(-(-side // u) * u for side, u in zip(sides, unit, strict=True))
    candidates = [s for s in dict.fromkeys((below, above)) if min(s) > 0]
    return " or ".join(
        str(s[0]) if s[0] == s[1] and isinstance(size, int) else f"[{s[0]}, {s[1]}]" for s in candidates
    )
