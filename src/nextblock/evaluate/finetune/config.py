"""What fine-tuning is told: settings, quick to import."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from nextblock.config import Attention, Size
from nextblock.evaluate.settings import CROP_SCALE, EvaluationSettings
from nextblock.settings import Duration, check_types, require, require_range

__all__ = ["FinetuneConfig", "LoraSettings"]

HeadKind = Literal["linear", "attentive"]

LAYERS: dict[HeadKind, int] = {"linear": 1, "attentive": 6}
"""Last layers that a head sees where none are told."""
ATTENTIVE_HEADS = 16
WHOLE_LAYER_DECAY, WHOLE_DROP_PATH = 0.65, 0.1
"""Of the whole network: MAE's published recipe for ViT-B/16 (its FINETUNE.md)."""


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the attention of a frozen encoder, merged into it at the end."""

    rank: int | None = None
    """Rank of the adapters, such as 8; null or 0: no adapters, the whole network is trained."""
    alpha: float | None = None
    """What adapters add is multiplied by alpha / rank; null: the rank, so by 1."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped in training."""

    def __post_init__(self) -> None:
        check_types(self, "lora")
        require(
            self.rank is None or self.rank >= 0,
            f"lora.rank is {self.rank}; use at least 1, or 0 for the whole network",
        )
        require(
            self.alpha is None or 0 < self.alpha < math.inf,
            f"lora.alpha is {self.alpha}; it must be a finite number above 0",
        )
        require(0 <= self.dropout < 1, f"lora.dropout is {self.dropout}; it must lie in [0, 1)")
        require(
            bool(self.rank) or (self.alpha is None and not self.dropout),
            "lora.alpha and lora.dropout are of adapters, and there are none; set lora.rank, such as 8",
        )


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(EvaluationSettings):
    """What to fine-tune, on what, and how.

    Layer decay, drop path, weight decay, betas, warm-up, end_lr and lr (its rate for 256 images) are those of
    MAE's published recipe for ViT-B/16; the augmentation is plainer: its own is augment timm, mixup 0.8,
    cutmix 1.
    """

    train: str
    """Labelled images to train on."""
    val: str | None = None
    """Labelled images to measure on after every epoch; with neither val nor test, a tenth of train is held
    out."""
    test: str | None = None
    """Labelled images to measure on at the end."""
    out: str
    """Directory for finetune.json, finetune.md, metrics.jsonl and the classifier; the same command again goes
    on in it."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Train low-rank adapters and the head alone."""
    head: HeadKind = "linear"
    """A linear layer on the mean patch, or one on patches pooled by a learned query."""
    layers: int | None = None
    """Mean of the outputs of this many last layers; null: 1 for the linear head, 6 for the attentive one."""
    head_norm: Literal["layer", "batch"] = "layer"
    """What the head's input is normalised by: the encoder's final norm, or a batch norm as probes have it."""
    attentive_heads: int | None = None
    """Attentive head: attention heads; must divide the encoder's width. null: 16."""
    tokens: Literal["patches", "class", "joined", "all"] = "patches"
    """Of encoders with a class token: patches alone, class token, class token and mean patch joined, all."""
    attention: Attention = "native"
    """Attention to train and use it under: what the checkpoint records, the pre-training mask, or none."""
    image_size: Size | None = None
    """Another side in pixels, or (rows, columns), with positions resampled; null: the model's own."""
    epochs: int = 100
    """How often every image is seen."""
    batch_size: int = 256
    """Images per optimizer step; a last partial batch of an epoch is dropped."""
    micro_batch_size: int | None = None
    """Images per forward pass; below batch_size gradients accumulate; null: the whole batch."""
    lr: float = 5e-4
    """Peak learning rate of AdamW, of the head; used as it is, never scaled by the batch size."""
    end_lr: float = 1e-6
    """Learning rate at the start of the warm-up and at the end of the cosine."""
    warmup_epochs: float | None = None
    """Length of the linear warm-up; null: a twentieth of the epochs."""
    layer_decay: float | None = None
    """Each layer learns at this share of the rate of the one above it; null: 0.65, and 1 with LoRA."""
    weight_decay: float = 0.05
    """Decay of weights; biases, norms, positions, class and register tokens are not decayed."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's two decay rates."""
    clip_grad: float | None = 1.0
    """Clip the gradient's norm to this; null: not clipped."""
    drop_path: float | None = None
    """Drop-path rate of the last layer, growing linearly from 0 at the first; null: 0.1, and 0 with LoRA."""
    augment: Literal["none", "crop", "timm"] = "crop"
    """none: the centre crop; crop: a random crop and flip; timm: RandAugment and random erasing besides."""
    crop_scale: tuple[float, float] | None = None
    """augment crop: share of the image's area that a crop covers, drawn uniformly; null: 0.08 to 1."""
    flip: float | None = None
    """augment crop, timm: probability of a horizontal flip; null: what the model's run had, else a half."""
    mixup: float = 0.0
    """Mix pairs of images and their labels by a share from Beta(mixup, mixup); 0: not."""
    cutmix: float = 0.0
    """Paste a part of one image into another, its area from Beta(cutmix, cutmix); 0: not. With mixup as well,
    a coin decides at each step."""
    label_smoothing: float = 0.1
    """Share of a label's weight that is spread over all classes."""
    ema_decay: float | None = None
    """Average the weights over steps with this decay, such as 0.9999, and keep the average; null: do not."""
    val_every: int = 1
    """Measure on val after every so many epochs, and after the last."""
    save_every: str = "1ep"
    """Save the state this often: a duration or minutes (10min). Ctrl-C and SIGTERM save as well."""
    seed: int = 0
    """Seed of head, adapters, order, crops, mixing, drop path and held-out images."""
    activation_checkpointing: bool = False
    """Recompute each layer's activations in the backward pass: less memory, about a third more time."""
    deterministic: bool = False
    """Only deterministic algorithms, so that CUDA runs repeat bit for bit; slower."""
    encode_batch_size: int = 128
    """Images that are measured at a time."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("epochs", "val_every", "encode_batch_size", "batch_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")
        for name in ("layers", "attentive_heads", "micro_batch_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} is {value}; use at least 1, or null")
        require(self.seed >= 0, f"seed is {self.seed}; it cannot be below 0")
        self._check_optimizer()
        self._check_images()
        require(
            self.attentive_heads is None or self.head == "attentive",
            f"attentive_heads is {self.attentive_heads}, and the head is {self.head}; set head attentive, or "
            "leave attentive_heads out",
        )
        require(
            self.head_norm == "layer" or not self.accumulates,
            f"head_norm batch would take its statistics from micro-batches of {self.micro_batch_size}, not "
            f"the batch of {self.batch_size}; use head_norm layer, or micro_batch_size null",
        )
        require(
            self.head_norm == "layer" or self.batch_size >= 2,
            f"batch_size is {self.batch_size}; head_norm batch needs at least 2 images",
        )
        Duration.parse(self.save_every, allow=("ep", "st", "sa", "min"))

    def _check_optimizer(self) -> None:
        require(
            0 <= self.end_lr <= self.lr < math.inf and self.lr > 0,
            f"lr is {self.lr} and end_lr {self.end_lr}; lr must be above 0, and end_lr lie from 0 to lr",
        )
        require(
            0 <= self.warmup < self.epochs,
            f"warmup_epochs is {self.warmup_epochs} and epochs {self.epochs}; warm up for fewer than all",
        )
        require(
            self.layer_decay is None or 0 < self.layer_decay <= 1,
            f"layer_decay is {self.layer_decay}; it must lie above 0 and up to 1, which is none",
        )
        require(
            0 <= self.weight_decay < math.inf,
            f"weight_decay is {self.weight_decay}; it must be a finite number from 0 on",
        )
        require(all(0 <= beta < 1 for beta in self.betas), f"betas are {self.betas}; each must lie in [0, 1)")
        require(
            self.clip_grad is None or self.clip_grad > 0,
            f"clip_grad is {self.clip_grad}; give a norm above 0, or null for none",
        )
        for name in ("drop_path", "ema_decay"):
            value = getattr(self, name)
            require(value is None or 0 <= value < 1, f"{name} is {value}; it must lie in [0, 1)")

    def _check_images(self) -> None:
        require_range("crop_scale", self.actual_crop_scale, 0, 1)
        require(
            self.crop_scale is None or self.augment == "crop",
            f"crop_scale is of augment crop, and augment is {self.augment}; leave one of them out",
        )
        require(
            self.flip is None or self.augment != "none",
            "flip is of augment crop and timm, and augment is none; leave one of them out",
        )
        require(self.flip is None or 0 <= self.flip <= 1, f"flip is {self.flip}; it must lie in [0, 1]")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"{name} is {value}; use a finite number above 0, or 0 for none")
        require(
            0 <= self.label_smoothing < 1,
            f"label_smoothing is {self.label_smoothing}; it must lie in [0, 1)",
        )

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained, and not the whole network."""
        return bool(self.lora.rank)

    @property
    def accumulates(self) -> bool:
        """Whether a step takes several forward passes."""
        return self.micro_batch_size is not None and self.micro_batch_size < self.batch_size

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 20 if self.warmup_epochs is None else self.warmup_epochs

    @property
    def actual_layer_decay(self) -> float:
        """The layer decay in use."""
        if self.layer_decay is not None:
            return self.layer_decay
        return 1.0 if self.uses_lora else WHOLE_LAYER_DECAY

    @property
    def actual_drop_path(self) -> float:
        """The drop-path rate in use."""
        if self.drop_path is not None:
            return self.drop_path
        return 0.0 if self.uses_lora else WHOLE_DROP_PATH

    @property
    def actual_attentive_heads(self) -> int:
        """The attention heads of an attentive head."""
        return ATTENTIVE_HEADS if self.attentive_heads is None else self.attentive_heads

    @property
    def actual_crop_scale(self) -> tuple[float, float]:
        """The share of the area that crops cover."""
        return CROP_SCALE if self.crop_scale is None else self.crop_scale

    @property
    def actual_layers(self) -> int:
        """How many last layers the head asks for; an encoder may have fewer."""
        return LAYERS[self.head] if self.layers is None else self.layers
