"""Settings of fine-tuning, and the run configuration that they become."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from nextblock.config import (
    Attention,
    CheckpointConfig,
    CropScale,
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
)

Kind = Literal["linear", "attentive"]
Decay = Annotated[float, Rule(lambda x: 0 < x <= 1, "above 0 and up to 1 (1: the same rate for all layers)")]

LAYERS: dict[Kind, int] = {"linear": 1, "attentive": 6}
"""Default number of last layers that a head averages."""

FREE = {
    *("model", "train", "val", "test", "out", "num_heads", "device", "workers", "max_bad_fraction"),
    *("encode_batch_size", "cache", "overwrite", "baselines", "save_every", "val_every"),
}
"""Settings that change no weight, or whose content is compared by a digest instead."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the attention of a frozen encoder, merged into it after training."""

    rank: Natural | None = None
    """Rank of the adapters, such as 8; none or 0: no adapters, the whole network is trained."""
    alpha: Positive | None = None
    """Adapter outputs are multiplied by alpha / rank; none: the rank, so by 1."""

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(bool(self.rank) or self.alpha is None, "lora.alpha needs adapters, e.g. --lora.rank 8")


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings(EvalSettings):
    """Settings of `finetune`.

    The defaults of layer decay, drop path, weight decay, betas, warm-up, end_lr and lr (for 256 images) are
    those of MAE's recipe for ViT-B/16. Its stronger augmentation is augment timm, mixup 0.8, cutmix 1.
    """

    train: str
    """Labelled images to train on."""
    test: str | None = None
    """Labelled images to measure on, once, at the end."""
    val: str | None = None
    """Labelled images to choose the best epoch on; without val and test, a tenth of train is held out."""
    out: str = field()  # required: a run needs a place
    """Directory for the result, the classifier and the run; the same command resumes in it."""
    baselines: bool = True
    """Also train the same network from scratch; false halves the time."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train only low-rank adapters and the head."""
    head: Kind = "linear"
    """linear: a linear layer on the mean patch; attentive: one on patches pooled by a learned query. Both
    follow the encoder's final norm."""
    layers: Count | None = None
    """Number of last layers that the head averages; none: 1 for the linear head, 6 for the attentive one."""
    attentive_heads: Count | None = None
    """Attention heads of the attentive head, which must divide the encoder's width; none: 16."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """For encoders with a class token: patches, class token, class token and mean patch joined, or all."""
    attention: Attention = "native"
    """Attention mask in training and use: `native` (as trained for), `causal`, or `full`."""
    image_size: Size | None = None
    """Image size in pixels, or (rows, columns); positions are resampled. none: the model's size."""
    epochs: Count = 100
    """Training epochs."""
    batch_size: Count = 256  # type: ignore[assignment] # nothing is encoded here
    """Images per optimizer step, over all processes; the last partial batch of an epoch is dropped."""
    micro_batch_size: Count | None = None
    """Images per forward pass of a process; lower it if memory runs out; none: its share of the batch."""
    lr: Positive = 5e-4
    """Peak learning rate of AdamW for the head; never scaled by the batch size."""
    end_lr: Amount = 1e-6
    """Learning rate at the start of the warm-up and at the end of the cosine."""
    warmup: Annotated[str, duration("ep", "st", "sa", "%", least=0)] = "5%"
    """Length of the linear warm-up: 5ep, 500st, or a share of the run such as 5%."""
    layer_decay: Decay | None = None
    """Ratio of a layer's learning rate to that of the layer above it; none: 0.65, and 1 with LoRA."""
    weight_decay: Amount = 0.05
    """Weight decay, except for biases, norms, positions, class and register tokens."""
    betas: tuple[Rate, Rate] = (0.9, 0.999)
    """Decay rates of AdamW's moments."""
    clip_grad: Positive | None = 1.0
    """Clip the gradient's norm to this; none: no clipping."""
    drop_path: Rate | None = None
    """Drop-path rate of the last layer, growing linearly from 0 at the first; none: 0.1, and 0 with LoRA."""
    augment: Literal["none", "crop", "timm"] = "crop"
    """none: the centre crop; crop: a random crop and flip; timm: also RandAugment and random erasing."""
    crop_scale: CropScale | None = None
    """augment crop: range of the crop's share of the image area, drawn uniformly; none: 0.08 to 1."""
    flip: Share | None = None
    """augment crop, timm: probability of a horizontal flip; none: that of the model's run, else 0.5."""
    mixup: Amount = 0.0
    """Mix pairs of images and their labels with a weight from Beta(mixup, mixup); 0: off."""
    cutmix: Amount = 0.0
    """Paste part of one image into another, with its area from Beta(cutmix, cutmix); 0: off. If mixup is also
    on, each step draws one of the two at random."""
    label_smoothing: Rate = 0.1
    """Share of a label's weight that is spread over all classes."""
    ema_decay: Rate | None = None
    """Keep an exponential moving average of the weights with this decay, such as 0.9999; none: off."""
    val_every: Count = 1
    """Measure on val every this many epochs, and after the last."""
    save_every: Annotated[str, duration("ep", "st", "sa", "min")] = "1ep"
    """How often to save a checkpoint: 1ep, 500st or 10min. Ctrl-C and SIGTERM also save one."""
    seed: Natural = 0
    """Seed of head, adapters, order, crops, mixing, drop path and held-out images."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Use only deterministic algorithms, so that CUDA runs repeat bit for bit; slower."""

    def __post_init__(self) -> None:
        super().__post_init__()
        micro = self.micro_batch_size
        require(self.end_lr <= self.lr, f"end_lr {self.end_lr} is above lr {self.lr}; lower it")
        has_heads = self.head == "attentive" or self.attentive_heads is None
        require(has_heads, "attentive_heads needs --head attentive")
        require(
            not self.mixes or micro is None or micro % 2 == 0,
            f"micro_batch_size is {micro}, but mixup and cutmix mix pairs; use an even number",
        )
        require(self.crop_scale is None or self.augment == "crop", "crop_scale needs --augment crop")
        require(self.flip is None or self.augment != "none", "flip needs --augment crop or timm")
        require(self.cache is None, "fine-tuning keeps no features; leave out --cache")

    @property
    def mixes(self) -> bool:
        """Whether images are mixed, in pairs."""
        return bool(self.mixup or self.cutmix)

    @property
    def trained(self) -> str:
        """What is trained besides the head, in words."""
        return f"adapters of rank {self.lora.rank}" if self.lora.rank else "the whole network"

    @property
    def decay_and_drop_path(self) -> tuple[float, float]:
        """Layer decay and drop-path rate; by default MAE's for ViT-B/16 (its FINETUNE.md), off with LoRA."""
        decay, rate = (1.0, 0.0) if self.lora.rank else (0.65, 0.1)
        return (
            decay if self.layer_decay is None else self.layer_decay,
            rate if self.drop_path is None else self.drop_path,
        )


@dataclass(frozen=True, kw_only=True)
class TunedModel(Section):
    """What the training loop needs to know about the network, and digests that identify the run."""

    image_size: Size
    in_chans: int
    weights: str
    """Digest of the encoder's weights before training."""
    labels: str
    """Digest of the labels of all training images."""


@dataclass(frozen=True, kw_only=True)
class TuneCheckpoint(CheckpointConfig):
    """When to save, and whether to keep the epoch with the best accuracy."""

    keep_best: Literal["top1"] | None = None  # type: ignore[assignment]


@dataclass(frozen=True, kw_only=True)
class TuneConfig(RunConfig):
    """Run configuration of a fine-tuning; all of it follows from `finetune` and the model."""

    model: TunedModel  # type: ignore[assignment] # the training loop only uses the shared fields
    checkpoint: TuneCheckpoint = field(default_factory=TuneCheckpoint)
    finetune: FinetuneSettings

    @classmethod
    def of(cls, settings: FinetuneSettings, model: TunedModel, data: DataConfig) -> TuneConfig:
        """Make the configuration; `data` says how the model's images are cropped for evaluation."""

        def same(*names: str) -> dict[str, Any]:
            return {name: getattr(settings, name) for name in names}

        return cls(
            seed=settings.seed,
            model=model,
            data=replace(
                data,
                crop_scale=settings.crop_scale or CROP_SCALE,
                crop_ratio=CROP_RATIO,
                flip=data.flip if settings.flip is None else settings.flip,
                **dict.fromkeys(("train", "val", "weights", "epoch_samples")),
                normalize="given",
            ),
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
        """Accept any configuration: every classifier can be trained."""

    def flag(self, name: str) -> str:
        """Name of a setting on the command line: the last part of its name here."""
        return name.rpartition(".")[2]

    def differences(self, other: RunConfig) -> dict[str, tuple[Any, Any]]:
        """Settings that make two configurations different runs: {name: (own, other's)}."""
        return {
            name.removeprefix("finetune."): values
            for name, values in super().differences(other).items()
            if name.startswith(("data.", "model.", "finetune.")) and name.split(".")[1] not in FREE
        }
