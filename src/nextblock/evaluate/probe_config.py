"""What a probe is told and what it finds: settings and results, quick to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nextblock.config import Attention
from nextblock.settings import check_types, require

__all__ = ["EncoderName", "HeadName", "ProbeConfig", "ProbeResult", "ProbeRow", "Split"]

HeadName = Literal["attentive", "linear"]
EncoderName = Literal["trained", "untrained", "raw pixels"]
Split = Literal["val", "test", "held-out"]

HEAD_WEIGHT_DECAY: dict[HeadName, float] = {"attentive": 0.1, "linear": 0.0}
"""Official XTRA-B on ImageNet-1k."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """What to probe, on what, and how the heads are trained.

    The defaults are official XTRA's where those are known, save for RandAugment and random erasing, which
    augment timm adds. One of its traps is not reproduced: with a warm-up of 0 its scheduler starts the cosine
    at a tenth of the learning rate; here it starts at the rate that was asked for.
    """

    model: str
    """A run directory or a file of weights."""
    num_heads: int | None = None
    """Attention heads of the encoder, where a foreign file does not tell."""
    train: str
    """Labelled images to train the heads on."""
    val: str | None = None
    """Labelled images to measure on; with neither val nor test, a tenth of train is held out."""
    test: str | None = None
    """Labelled images to measure on as well."""
    out: str
    """Directory for probe.json, probe.md and the trained heads."""
    heads: tuple[HeadName, ...] = ("attentive", "linear")
    """Heads to train on the same features."""
    layers: int = 6
    """Attentive head: mean of the outputs of this many last layers. The linear head sees the last one."""
    attention: Attention = "native"
    """Attention at encoding: what the checkpoint records for its features, the pre-training mask, or none."""
    attentive_heads: int = 16
    """Attentive head: attention heads; must divide the encoder's width."""
    attentive_queries: int = 1
    """Attentive head: learned queries, averaged."""
    epochs: int = 100
    """How often the heads see every image."""
    batch_size: int = 1024
    """Images per step of the heads; a last partial batch of an epoch is dropped."""
    lr: float = 1e-3
    """Peak learning rate of AdamW, used as it is."""
    end_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: float | None = None
    """Decay of the heads' weights; null: 0.1 for the attentive and 0 for the linear head."""
    warmup_epochs: float | None = None
    """Linear warm-up from a tenth of lr; null: a tenth of the epochs; 0: start at lr."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's two decay rates."""
    clip_grad: float | None = 3.0
    """Clip the norm of each head's gradient to this; null: not clipped."""
    seed: int = 0
    """Seed of heads, order, crops, held-out images and the untrained encoder."""
    augment: Literal["none", "crop", "timm"] = "none"
    """none: features of the centre crop, computed once; crop: a new random crop and flip in every epoch;
    timm: official XTRA's, with RandAugment and random erasing besides."""
    baselines: bool = True
    """Also probe the same encoder untrained, and the raw pixels (linear head)."""
    cache_gb: float = 4.0
    """With augment none, keep features in memory up to this size; beyond, compute them anew each epoch."""
    encode_batch_size: int = 128
    """Images that go through the encoder at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the encoder; heads are fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: int | None = None
    """Processes that decode; null: what the run used."""
    overwrite: bool = False
    """Replace another result in out."""

    def __post_init__(self) -> None:
        check_types(self)
        require(
            len(self.heads) > 0 and len(set(self.heads)) == len(self.heads),
            f"heads are {list(self.heads)}; name attentive, linear or both, once each",
        )
        for name in ("layers", "epochs", "encode_batch_size", "attentive_heads", "attentive_queries"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")
        require(self.batch_size >= 2, f"batch_size is {self.batch_size}; batch norm needs at least 2 images")
        require(
            0 <= self.end_lr <= self.lr < math.inf and self.lr > 0,
            f"lr is {self.lr} and end_lr {self.end_lr}; lr must be above 0, and end_lr lie from 0 to lr",
        )
        require(
            0 <= self.warmup < self.epochs,
            f"warmup_epochs is {self.warmup_epochs} and epochs {self.epochs}; warm up for fewer than all",
        )
        require(
            self.clip_grad is None or self.clip_grad > 0,
            f"clip_grad is {self.clip_grad}; give a norm above 0, or null for none",
        )
        for name in ("seed", "cache_gb"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it cannot be below 0")

    @property
    def warmup(self) -> float:
        """Epochs of warm-up."""
        return self.epochs / 10 if self.warmup_epochs is None else self.warmup_epochs

    def decay(self, head: HeadName) -> float:
        """Weight decay of a head."""
        return HEAD_WEIGHT_DECAY[head] if self.weight_decay is None else self.weight_decay


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """Accuracy of one head on one encoder, measured on one set of images."""

    encoder: EncoderName
    head: HeadName
    split: Split
    top1: float
    """Share of images whose likeliest class is the right one."""
    top5: float
    """Share of images whose right class is among the five (or all, if fewer) likeliest."""
    images: int
    """Images measured on."""
    lr: float
    weight_decay: float
    layers: tuple[int, ...]
    """Encoder layers, counted from 0; none for raw pixels."""
    attention: Attention | None
    epochs: int
    elapsed_s: float
    """Time for all heads of this encoder together: features, training, measuring."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found."""

    rows: tuple[ProbeRow, ...]
    num_classes: int
    train_images: int
    """Readable images that the heads were trained on."""
    bad_images: Mapping[str, int]
    """Unreadable images, which were left out, by split."""

    def row(self, encoder: EncoderName, head: HeadName) -> ProbeRow:
        """The first row of this encoder and head."""
        return next(row for row in self.rows if (row.encoder, row.head) == (encoder, head))
