"""The settings of a run: frozen dataclasses, checked on construction, to and from YAML.

Every field is a command-line flag (`--model.block_size 4`) and a key of `config.yaml`. Types carry the
bounds; only rules across fields are written by hand. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from nextblock.logs import counted
from nextblock.model_config import Attention as Attention
from nextblock.model_config import ModelConfig, Rate, Section, pair
from nextblock.model_config import Size as Size
from nextblock.settings import (
    Amount,
    Auto,
    Count,
    Natural,
    Positive,
    Rule,
    Share,
    check_types,
    duration,
    flatten,
    require,
    to_dict,
    typed,
)

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

ValCrop = Literal["center", "squash", "border"]
"""How an image is fitted to the size of a validation crop."""

Pixel = Annotated[float, Rule(lambda x: 0 <= x <= 1, "from 0 to 1 (divide values of bytes by 255)")]
Deviation = Annotated[
    float, Rule(lambda x: 0 < x <= 1, "above 0 and up to 1 (divide values of bytes by 255)")
]
CropScale = Annotated[
    tuple[float, float], Rule(lambda x: 0 < x[0] <= x[1] <= 1, "smallest,largest above 0 and up to 1")
]
CropRatio = Annotated[
    tuple[float, float], Rule(lambda x: 0 < x[0] <= x[1] <= 1e6, "smallest,largest above 0")
]
Jitter = Annotated[
    tuple[Share, Share, Share, Share],
    Rule(lambda changes: changes[3] <= 0.5, "four numbers from 0 to 1, the last (hue) at most 0.5"),
]
Length = Annotated[str, duration("ep", "st", "sa")]


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where the images are and how they are cropped and normalised."""

    train: str | tuple[str, ...] | None = None
    """Images to train on: a directory, a tar, `hf:NAME,split=train`, `digits`; repeat it for a mixture."""
    weights: tuple[Positive, ...] | Auto = None
    """Relative share of each source of a mixture in an epoch; auto: its number of images."""
    epoch_samples: Count | Auto = None
    """Samples per epoch; auto: the number of images."""
    val: str | None = None
    """Images to validate on, named as in data.train."""
    crop_scale: CropScale = (0.3, 1.0)
    """Share of the image's area that a training crop covers, smallest and largest; drawn uniformly."""
    crop_ratio: CropRatio = (0.75, 1.5)
    """Width over height of a training crop, smallest and largest; drawn log-uniformly."""
    flip: Share = 0.5
    """Probability of a horizontal flip; use 0 when left and right differ, as in text."""
    color_jitter: Jitter | None = None
    """Largest change of brightness, contrast, saturation and hue in training: four numbers."""
    color_jitter_prob: Share = 0.8
    """Probability that data.color_jitter is applied to a training image."""
    val_resize_px: Count | Auto = None
    """Shorter side in pixels before the validation crop; auto: follows model.image_size (300 for 256)."""
    val_crop: ValCrop = "center"
    """Validation crop: center cuts out the middle, squash ignores the aspect ratio, border shows the whole
    image and fills the rest with data.mean."""
    background: Literal["white", "grey", "black"] = "white"
    """Colour behind the transparent parts of an image."""
    channels: Count = 3
    """Channels per image: 1 (grey), 3 (colour), or the number in the files. Sets model.in_chans too, and the
    defaults of mean and std: ImageNet's for 1 and 3, else normalize auto."""
    normalize: Literal["given", "auto"] = "given"
    """given: normalise by data.mean and data.std; auto: measure them on a sample of data.train."""
    mean: tuple[Pixel, ...] = IMAGENET_MEAN
    """Mean of each channel, for pixels in [0, 1]."""
    std: tuple[Deviation, ...] = IMAGENET_STD
    """Standard deviation of each channel, for pixels in [0, 1]."""
    workers: Natural | Auto = None
    """Processes that decode images; auto: number of cores minus one, at most 8; 0: the main process."""
    decoder: Literal["auto", "pillow", "fast"] = "auto"
    """JPEG decoder: auto is torchcodec if it works here, else Pillow; fast decodes large photos at a half, a
    quarter or an eighth of their size for training crops. Cannot change within a run."""
    max_bad_fraction: Share = 0.01
    """Stop when more than this share of the files cannot be read; one is always allowed, unless this is 0."""
    max_pixels: Count = 178_956_970
    """Treat images with more pixels than this as unreadable; raise it for large scenes."""
    cache_dir: str | Auto = None
    """Folder for indexes of shards and copies of remote shards; auto: ~/.cache/nextblock."""
    cache_gb: Positive = 100.0
    """Limit on the copies of remote shards, in GB; the least recently used are removed first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        specs, weights = self.train_specs, self.weights
        require(self.train != () != weights, "data.train or data.weights is empty; name one or several")
        require(len(set(specs)) == len(specs), f"data.train names a source twice: {typed(specs)}")
        require(
            weights is None or not specs or len(specs) == len(weights),
            f"data.train names {counted(len(specs), 'source')} and data.weights "
            f"{len(weights or ())}; give --data.train once for each weight, or set data.weights auto",
        )
        require(
            self.color_jitter is None or self.channels in (1, 3),
            f"data.color_jitter changes colours, but data.channels is {self.channels}; set it to none",
        )
        require(
            self.val_crop != "border" or self.normalize == "given",
            "data.val_crop border fills with data.mean, which data.normalize auto measures on such crops; "
            "use center or squash, or give data.mean and data.std",
        )
        require(
            len(self.mean) == len(self.std) > 0,
            f"data.mean has {counted(len(self.mean), 'channel')} and data.std {len(self.std)}; "
            "give as many of each",
        )

    @property
    def train_specs(self) -> tuple[str, ...]:
        """The sources to train on."""
        return (self.train,) if isinstance(self.train, str) else self.train or ()

    def resize_px(self, image_size: int | tuple[int, int]) -> int:
        """Pixels of the shorter side before the validation crop: as given, or in proportion 300 to 256."""
        return self.val_resize_px or round(max(pair(image_size)) * 300 / 256)


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """How images are written to shards."""

    shard_mb: Annotated[float, Rule(lambda mb: mb >= 0.001, "from 0.001")] = 256.0
    """Size of a shard in megabytes; a larger image, or all tiles of one, makes a larger shard."""
    resize_px: Count | None = None
    """Shrink images whose shorter side is longer than this; none: keep the size, and the bytes."""
    quality: Annotated[int, Rule(lambda q: 1 <= q <= 100, "from 1 to 100")] = 90
    """Quality of JPEG and WebP, 1 to 100."""
    format: Literal["jpeg", "webp", "png"] | None = None
    """Re-encode every image; none: only those that are shrunk or cut (as JPEG), or are not files (as PNG)."""
    tile_px: Count | None = None
    """Cut larger images into square tiles with this side; the last tiles overlap."""
    workers: Natural | Auto = None
    """Processes that read and encode; auto: number of cores minus one, at most 8; 0: the main process."""

    def __post_init__(self) -> None:
        check_types(self)
        require(not (self.resize_px and self.tile_px), "give either resize_px or tile_px, not both")


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Section):
    """AdamW with linear warm-up and cosine decay, set before every step."""

    lr: Amount = 1e-3
    """Peak learning rate, used as it is: never scaled by the batch size."""
    start_lr: Amount = 1e-4
    """Learning rate of the first warm-up step."""
    end_lr: Amount = 1e-6
    """Learning rate at the end of the cosine."""
    warmup: Annotated[str, duration("ep", "st", "sa", "%", least=0)] = "5%"
    """Length of the linear warm-up: 15ep, 500st, 10000sa, or a share of the run such as 2.5%."""
    weight_decay: Amount = 0.05
    """Decay of weights; biases and one-dimensional parameters are not decayed."""
    betas: tuple[Rate, Rate] = (0.9, 0.95)
    """AdamW's two decay rates."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip_grad: Annotated[float, Rule(lambda x: x > 0, "above 0")] | None = 1.0
    """Clip the gradient's norm to this; none: no clipping."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Section):
    """Length of the run, batch size, device and precision."""

    duration: Length = "100ep"
    """Length of the run: epochs (800ep), steps (500000st) or samples (2000000sa)."""
    batch_size: Count = 256
    """Images per optimizer step, over all GPUs and micro-batches."""
    micro_batch_size: Count | Literal["auto"] | None = None
    """Images per forward pass of a process; lower it when memory runs out: gradients accumulate. auto: the
    most that fit in memory; none: the process's whole share of the batch."""
    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: replicate the model (ddp), or shard it (fsdp); auto: ddp if it fits."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; weights stay fp32. auto: bf16 if the device supports it, else fp32."""
    predictor_fp32: bool = False
    """Run the predictor in fp32 under fp16, as official XTRA does (it may overflow)."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that CUDA runs repeat bit for bit; slower."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile."""
    nonfinite_limit: Count = 5
    """Stop after this many steps in a row with NaN or inf in loss or gradient; such steps are skipped."""


Metric = Literal["knn", "rankme", "val_loss"]
"""A metric to compare checkpoints by; higher is better, except for the loss."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    """When to save, and how many to keep."""

    every: Annotated[str, duration("ep", "st", "sa", "min")] = "30min"
    """Save this often: 30min, 1ep, 500st or 10000sa. The end of the run, Ctrl-C and SIGTERM save as well."""
    in_background: bool = False
    """Keep training while a checkpoint is written; copies weights and moments to main memory."""
    keep: Count = 2
    """How many of the latest checkpoints to keep."""
    keep_every: Length | None = None
    """Keep one checkpoint permanently this often (a duration); none: only the latest."""
    requeue: bool = False
    """Under SLURM, put the job back into the queue when a signal stopped the run, so that it resumes."""
    keep_best: Metric | None = None
    """Also keep the checkpoint with the best knn, rankme or val_loss; RUN/best.json names it."""


@dataclass(frozen=True, kw_only=True)
class MonitorConfig(Section):
    """What is logged and drawn during training. None of it changes the weights."""

    log_every: Length = "10st"
    """Write a line to metrics.jsonl this often."""
    val_every: Length = "1ep"
    """Measure the validation loss this often, if data.val is given."""
    pictures_every: Length | None = "20ep"
    """Draw predictions of the same few images this often; none: never."""
    pictures: Count = 8
    """How many images to draw."""
    knn_every: Length | None = "20ep"
    """Measure kNN accuracy, if there are labels, and RankMe of the features this often; none: never."""
    knn_train: str | Auto = None
    """Labelled images that kNN compares with, if those of data.train have no labels; auto: data.train."""
    knn_val: str | Auto = None
    """Labelled images on which kNN is measured; goes with monitor.knn_train; auto: data.val."""
    knn_samples: Count = 10_000
    """Use at most this many images of each source for kNN and RankMe."""
    early_stop: Metric | None = None
    """End the run when knn, rankme or val_loss no longer improves, see monitor.patience; none: never."""
    patience: Count = 5
    """End the run after this many measurements in a row without a new best of monitor.early_stop."""
    collapse: Share | None = 0.01
    """With model.target embedding, stop when the variance of the targets' directions falls below this: 1 is
    random directions, 0 all alike; none: never."""
    tensorboard: bool = True
    """Write TensorBoard events to RUN/tensorboard."""
    loggers: tuple[Literal["wandb", "mlflow", "trackio"], ...] = ()
    """Also send metrics to these services; each needs its package."""
    project: str = "nextblock"
    """Project of the loggers (MLflow: experiment); the run is named after its directory."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.knn_train is None) == (self.knn_val is None),
            "monitor.knn_train and monitor.knn_val go together; give both, or neither",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a pre-training run does."""

    preset: str | None = None
    """Preset to start from; `nextblock presets` lists them. none: xtra-b16, the defaults."""
    seed: Natural = 0
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
        resize_px = self.data.resize_px(self.model.image_size)
        # Store the resolved number: a later release may change the rule, but not the run.
        if self.data.val_resize_px is None:
            object.__setattr__(self, "data", replace(self.data, val_resize_px=resize_px))
        require(
            resize_px >= max(pair(self.model.image_size)),
            f"data.val_resize_px is {resize_px}, smaller than model.image_size {self.model.image_size}",
        )
        channels = self.model.in_chans
        require(
            self.data.channels == channels,
            f"data.channels is {self.data.channels}, model.in_chans is {channels}; give one of them",
        )
        require(
            self.data.normalize == "auto" or len(self.data.mean) == channels,
            f"data.mean has {counted(len(self.data.mean), 'channel')}, model.in_chans is {channels}; "
            "give as many numbers, also for data.std, or use data.normalize auto",
        )

    def check_trainable(self) -> None:
        """Refuse settings of a model that can encode but not be trained."""
        self.model.check_predicts()
        require(
            self.train.precision != "fp16" or self.train.device != "cpu",
            "train.precision fp16 needs a GPU; on a CPU use bf16 or fp32",
        )
        for name, metric in (
            ("checkpoint.keep_best", self.checkpoint.keep_best),
            ("monitor.early_stop", self.monitor.early_stop),
        ):
            require(
                metric in (None, "val_loss") or self.monitor.knn_every is not None,
                f"{name} {metric} needs monitor.knn_every, e.g. --monitor.knn_every 5ep",
            )

    def flag(self, name: str) -> str:
        """The command-line name of a setting, for messages."""
        return name

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that make two configs different runs: {dotted name: (own, the other's)}."""
        # A resumed run must compute the same; where its images are and how it saves may change.
        own, others = flatten(to_dict(self)), flatten(to_dict(other))
        return {
            name: (value, others.get(name))
            for name, value in own.items()
            if others.get(name) != value
            and not (name in _FREE_SETTINGS or name.startswith(("checkpoint.", "monitor.")))
        }


_DATA_PLACES = ("train", "val", "workers", "max_bad_fraction", "cache_dir", "cache_gb")
_FREE_SETTINGS = {"preset", "train.device", "train.strategy", *(f"data.{name}" for name in _DATA_PLACES)}
_FREE_SETTINGS.add("model.teacher")
"""What may change on resume, besides checkpoint and monitor. source.json identifies the images, and
model.teacher_digest the teacher."""
