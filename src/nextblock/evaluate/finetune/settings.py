"""Settings of fine-tuning, and the settings of a run that the engine trains by."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

from nextblock.config import (
    Attention,
    CheckpointConfig,
    DataConfig,
    MonitorConfig,
    OptimConfig,
    RunConfig,
    Size,
    TrainConfig,
)
from nextblock.evaluate.settings import CROP_RATIO, CROP_SCALE, EvalSettings
from nextblock.model_config import Rate, Section
from nextblock.settings import (
    Amount,
    Count,
    Natural,
    Positive,
    Rule,
    Share,
    check_types,
    duration,
    require,
    require_range,
)

Kind = Literal["linear", "attentive"]
Decay = Annotated[float, Rule(lambda x: 0 < x <= 1, "above 0 and up to 1 (1: the same rate for all layers)")]

LAYERS: dict[Kind, int] = {"linear": 1, "attentive": 6}
"""Last layers that a head sees unless they are given."""

FREE = {
    *("model", "train", "val", "test", "out", "num_heads", "device", "workers", "max_bad_fraction"),
    *("encode_batch_size", "cache", "overwrite", "baselines", "save_every", "val_every"),
}
"""Settings that change no weight, or name what is known by its content."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the attention of a frozen encoder, merged into it at the end."""

    rank: Natural | None = None
    """Rank of the adapters, such as 8; none or 0: no adapters, the whole network is trained."""
    alpha: Positive | None = None
    """What adapters add is multiplied by alpha / rank; none: the rank, so by 1."""
    dropout: Rate = 0.0
    """Share of an adapter's inputs that is dropped in training."""

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(
            bool(self.rank) or (self.alpha is None and not self.dropout),
            "lora.alpha and lora.dropout need adapters, e.g. --lora.rank 8",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(EvalSettings):
    """What to fine-tune, on what, and how.

    Layer decay, drop path, weight decay, betas, warm-up, end_lr and lr (its rate for 256 images) are those of
    MAE's published recipe for ViT-B/16; the augmentation is plainer: its own is augment timm, mixup 0.8,
    cutmix 1.
    """

    train: str
    """Labelled images to train on."""
    test: str | None = None
    """Labelled images to measure on, once, at the end."""
    val: str | None = None
    """Labelled images to choose the best epoch on; with neither val nor test a tenth of train is held out."""
    out: str = field()  # required: a run needs a place
    """Directory for the result, the classifier and the run; the same command resumes in it."""
    baselines: bool = True
    """Also train the same network from scratch; false halves the time."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train low-rank adapters and the head alone."""
    head: Kind = "linear"
    """A linear layer on the mean patch, or one on patches pooled by a learned query."""
    layers: Count | None = None
    """Mean of the outputs of this many last layers; none: 1 for the linear head, 6 for the attentive one."""
    head_norm: Literal["layer", "batch"] = "layer"
    """Norm of the head's input: the encoder's final norm, or a batch norm as probes have it."""
    attentive_heads: Count | None = None
    """Attentive head: attention heads; must divide the encoder's width. none: 16."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Of encoders with a class token: patches alone, class token, class token and mean patch joined, all."""
    attention: Attention = "native"
    """Attention mask to train and use it with: `native` (as trained for), `causal`, or `full`."""
    image_size: Size | None = None
    """Another side in pixels, or (rows, columns), with positions resampled; none: the model's own."""
    epochs: Count = 100
    """How often every image is seen."""
    batch_size: Count = 256  # type: ignore[assignment] # nothing is encoded here
    """Images per optimizer step, over all processes; a last partial batch of an epoch is dropped."""
    micro_batch_size: Count | None = None
    """Images per forward pass of a process; lower it when memory runs out; none: its share of the batch."""
    lr: Positive = 5e-4
    """Peak learning rate of AdamW, of the head; used as it is, never scaled by the batch size."""
    end_lr: Amount = 1e-6
    """Learning rate at the start of the warm-up and at the end of the cosine."""
    warmup: Annotated[str, duration("ep", "st", "sa", "%", least=0)] = "5%"
    """Length of the linear warm-up: 5ep, 500st, or a share of the run such as 5%."""
    layer_decay: Decay | None = None
    """Each layer learns at this share of the rate of the one above it; none: 0.65, and 1 with LoRA."""
    weight_decay: Amount = 0.05
    """Decay of weights; biases, norms, positions, class and register tokens are not decayed."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """AdamW's two decay rates."""
    clip_grad: Positive | None = 1.0
    """Clip the gradient's norm to this; none: no clipping."""
    drop_path: Rate | None = None
    """Drop-path rate of the last layer, growing linearly from 0 at the first; none: 0.1, and 0 with LoRA."""
    augment: Literal["none", "crop", "timm"] = "crop"
    """none: the centre crop; crop: a random crop and flip; timm: RandAugment and random erasing besides."""
    crop_scale: tuple[float, float] | None = None
    """augment crop: share of the image's area that a crop covers, drawn uniformly; none: 0.08 to 1."""
    flip: Share | None = None
    """augment crop, timm: probability of a horizontal flip; none: that of the model's run, else a half."""
    mixup: Amount = 0.0
    """Mix pairs of images and their labels by a share from Beta(mixup, mixup); 0: off."""
    cutmix: Amount = 0.0
    """Paste a part of one image into another, its area from Beta(cutmix, cutmix); 0: off. With mixup as well,
    each step takes one of the two at random."""
    label_smoothing: Rate = 0.1
    """Share of a label's weight that is spread over all classes."""
    ema_decay: Rate | None = None
    """Average the weights over steps with this decay, such as 0.9999, and keep the average; none: off."""
    val_every: Count = 1
    """Measure on val after every so many epochs, and after the last."""
    save_every: Annotated[str, duration("ep", "st", "sa", "min")] = "1ep"
    """Save a checkpoint this often: 1ep, 500st or 10min. Ctrl-C and SIGTERM save as well."""
    seed: Natural = 0
    """Seed of head, adapters, order, crops, mixing, drop path and held-out images."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Only deterministic algorithms, so that CUDA runs repeat bit for bit; slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        micro = self.micro_batch_size
        require(self.end_lr <= self.lr, f"end_lr {self.end_lr} is above lr {self.lr}; lower it")
        require(
            self.attentive_heads is None or self.head == "attentive", "attentive_heads needs --head attentive"
        )
        require(
            self.head_norm == "layer" or micro is None or micro >= self.batch_size,
            f"head_norm batch would take its statistics from micro-batches of {micro}, not the batch of "
            f"{self.batch_size}; use head_norm layer, or micro_batch_size none",
        )
        require(
            self.head_norm == "layer" or self.batch_size >= 2, "head_norm batch needs batch_size 2 or more"
        )
        require(
            not self.mixes or micro is None or micro % 2 == 0,
            f"micro_batch_size is {micro}, and mixup and cutmix mix pairs; use an even number",
        )
        require_range("crop_scale", self.crop_scale or CROP_SCALE, 0, 1)
        require(self.crop_scale is None or self.augment == "crop", "crop_scale needs --augment crop")
        require(self.flip is None or self.augment != "none", "flip needs --augment crop or timm")
        require(self.cache is None, "fine-tuning keeps no features; leave out --cache")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, in pairs."""
        return bool(self.mixup or self.cutmix)

    @property
    def decay_and_drop_path(self) -> tuple[float, float]:
        """Layer decay and drop-path rate in use: MAE's for ViT-B/16 (its FINETUNE.md), none with LoRA."""
        decay, rate = (1.0, 0.0) if self.lora.rank else (0.65, 0.1)
        return (
            decay if self.layer_decay is None else self.layer_decay,
            rate if self.drop_path is None else self.drop_path,
        )


@dataclass(frozen=True, kw_only=True)
class TunedModel(Section):
    """What the engine needs to know of the network, and what else decides the run."""

    image_size: Size
    in_chans: int
    weights: str
    """Digest of the encoder's weights before the first step."""
    labels: str
    """Digest of the classes of all images to train on."""


@dataclass(frozen=True, kw_only=True)
class TuneCheckpoint(CheckpointConfig):
    """When to save, and that the epoch with the best accuracy is kept."""

    keep_best: Literal["top1"] | None = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RunConfig):
    """The settings of a fine-tuning run as the engine takes them; `finetune` holds all, the rest follows."""

    model: TunedModel  # type: ignore[assignment] # what is common is all that the engine asks for
    checkpoint: TuneCheckpoint = field(default_factory=TuneCheckpoint)
    finetune: FinetuneSettings

    @classmethod
    def of(cls, settings: FinetuneSettings, model: TunedModel, data: DataConfig) -> TuneConfig:
        """The run of these settings; `data` is how the model's images are cut for evaluation."""
        data = replace(
            data,
            crop_scale=settings.crop_scale or CROP_SCALE,
            crop_ratio=CROP_RATIO,
            flip=data.flip if settings.flip is None else settings.flip,
            **dict.fromkeys(("train", "val", "weights", "epoch_samples")),
            normalize="given",
        )

        def same(*names: str) -> dict[str, Any]:
            return {name: getattr(settings, name) for name in names}

        return cls(
            seed=settings.seed,
            model=model,
            data=data,
            optim=OptimConfig(
                start_lr=settings.end_lr,
                **same("lr", "end_lr", "warmup", "weight_decay", "betas", "clip_grad"),
            ),
            train=TrainConfig(
                duration=f"{settings.epochs}ep",
                **same("batch_size", "micro_batch_size", "precision", "device", "deterministic"),
            ),
            checkpoint=TuneCheckpoint(
                every=settings.save_every, keep=1, keep_best=None if settings.val is None else "top1"
            ),
            monitor=MonitorConfig(
                log_every="1ep",
                val_every=f"{settings.val_every}ep",
                pictures_every=None,
                knn_every=None,
                tensorboard=False,
            ),
            finetune=settings,
        )

    def check_trainable(self) -> None:
        """Refuse nothing: any classifier can be trained."""

    def flag(self, name: str) -> str:
        """What the command line calls a setting: the last part of the engine's name."""
        return name.rpartition(".")[2]

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings in which two are not the same run: {name: (here, there)}."""
        found = {name.removeprefix("finetune."): pair for name, pair in super().differences(other).items()}
        ours = {one.name for one in fields(FinetuneSettings)} - FREE
        return {
            n: pair
            for n, pair in found.items()
            if n.partition(".")[0] in ours or n.startswith(("data.", "model."))
        }
