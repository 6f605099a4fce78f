"""What a probe is told and what it finds: settings and results, quick to import."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from nextblock.config import Attention
from nextblock.evaluate.layers import check_layers
from nextblock.evaluate.probe.recipes import RECIPES, HeadName, Recipe, RecipeName
from nextblock.evaluate.settings import EvaluationSettings
from nextblock.settings import Duration, check_types, from_dict, require

__all__ = [
    "EncoderName",
    "HeadName",
    "ProbeCandidate",
    "ProbeConfig",
    "ProbeResult",
    "ProbeRow",
    "Split",
    "Tokens",
    "probe_config",
    "recipe_of",
    "result_from_dict",
    "row_from_dict",
    "warmup_epochs",
]

EncoderName = Literal["trained", "untrained", "raw pixels"]
Split = Literal["val", "test", "held-out", "choice"]
"""held-out: a tenth of train, kept apart to measure on; choice: another, to choose the winners on."""
Tokens = Literal["patches", "class", "joined", "all"]

_SEVERAL = ("heads", "lr", "weight_decay", "layers", "attention", "tokens")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig(EvaluationSettings):
    """What to probe, on what, and which heads compete.

    Every head is trained with every learning rate, weight decay, choice of layers, attention and tokens, all
    on the same features. Where there is more than one to choose from, the best of its kind is chosen on
    images that it is not measured on, and measured once. What is null comes from the recipe.
    """

    train: str
    """Labelled images to train the heads on."""
    val: str | None = None
    """Labelled images to choose on if test is given, else to measure on."""
    test: str | None = None
    """Labelled images to measure on; with neither val nor test, a tenth of train is held out."""
    out: str
    """Directory for the result: probe.json, probe.md, probe.csv, figures, and the trained heads."""
    recipe: RecipeName = "xtra"
    """Where null settings come from: XTRA's official probes, or AIM's heads with AIMv2's hyper-parameters."""
    heads: tuple[HeadName, ...] = ("attentive", "linear")
    """Heads to train on the same features: attentive, linear, mlp."""
    layers: tuple[str, ...] | None = None
    """Layers a head sees the mean of: last, last6 or 6 (the last six), layer7, 3+4+5 (from 0), best (AIM's
    six); each: all."""
    attention: tuple[Attention, ...] = ("native",)
    """Attention at encoding: what the checkpoint records for its features, the pre-training mask, or none."""
    tokens: tuple[Tokens, ...] = ("patches",)
    """Of encoders with a class token: patches, class, both joined, or all; attentive: patches or all."""
    attentive_heads: int | None = None
    """Attentive head: attention heads; must divide the width. null: 16, or as the encoder (recipe aim)."""
    attentive_queries: int = 1
    """Attentive head: learned queries, averaged."""
    epochs: int = 100
    """How often the heads see every image."""
    batch_size: int = 1024
    """Images per step of the heads; a last partial batch of an epoch is dropped."""
    lr: tuple[float, ...] | None = None
    """Peak learning rates of AdamW, used as they are; null: the recipe's seven."""
    end_lr: float = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: tuple[float, ...] | None = None
    """Decay of the heads' weights; null: the recipe's for each head (xtra: attentive 0.1, linear 0)."""
    warmup_epochs: float | None = None
    """Linear warm-up from a tenth of lr; null: a tenth of the epochs (recipe aim: a twentieth)."""
    official_warmup_trap: bool = False
    """Without warm-up, start the cosine at a tenth of lr, as XTRA's official scheduler does: there the rate
    that counts is a tenth of the one that is named. Give warmup_epochs 0 with it."""
    betas: tuple[float, float] | None = None
    """AdamW's two decay rates; null: 0.9 and 0.95 (recipe aim: 0.999)."""
    clip_grad: float | None = 3.0
    """Clip the norm of each head's gradient to this; null: not clipped."""
    seed: int = 0
    """Seed of heads, order, crops, held-out images and the untrained encoder."""
    augment: Literal["none", "crop", "timm"] = "none"
    """none: features of the centre crop, computed once; crop: a new random crop in every epoch, flipped as
    often as the model's run did; timm: official XTRA's, with RandAugment and random erasing besides."""
    baselines: bool = True
    """Also probe the same encoder untrained, and the raw pixels (linear head)."""
    cache: str | None = None
    """With augment none: directory that keeps features for later probes; null: in out, until done."""
    cache_gb: float = 16.0
    """Features on disk take at most this much; those beyond are computed anew in every epoch."""
    encode_batch_size: int = 128
    """Images that go through the encoder at a time."""
    save_every: str = "10min"
    """Save what the heads have learned so often: minutes, or epochs (5ep); the same command goes on."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in _SEVERAL:
            given = getattr(self, name)
            require(
                given is None or (len(given) > 0 and len(set(given)) == len(given)),
                f"{name} are {list(given or ())}; name at least one, and each once",
            )
        check_layers(self.layers or ())
        for name in ("epochs", "encode_batch_size", "attentive_queries"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")
        require(
            self.attentive_heads is None or self.attentive_heads >= 1,
            f"attentive_heads is {self.attentive_heads}; use at least 1",
        )
        require(self.batch_size >= 2, f"batch_size is {self.batch_size}; batch norm needs at least 2 images")
        self._check_rates()
        for name in ("seed", "cache_gb"):
            require(getattr(self, name) >= 0, f"{name} is {getattr(self, name)}; it cannot be below 0")
        Duration.parse(self.save_every, allow=("min", "ep"))

    def _check_rates(self) -> None:
        for lr in self.lr or ():
            require(
                0 <= self.end_lr <= lr < math.inf and lr > 0,
                f"lr is {lr} and end_lr {self.end_lr}; lr must be above 0, and end_lr lie from 0 to lr",
            )
        require(
            0 <= self.end_lr < math.inf,
            f"end_lr is {self.end_lr}; it must be a finite number from 0 on",
        )
        for decay in self.weight_decay or ():
            require(0 <= decay < math.inf, f"weight_decay is {decay}; it must be a finite number from 0 on")
        require(
            self.warmup_epochs is None or 0 <= self.warmup_epochs < self.epochs,
            f"warmup_epochs is {self.warmup_epochs} and epochs {self.epochs}; warm up for fewer than all",
        )
        warmup = warmup_epochs(self)
        require(
            warmup == 0 or not self.official_warmup_trap,
            f"official_warmup_trap is of no effect with a warm-up, of {warmup:g} epochs here; give "
            "warmup_epochs 0 with it, or leave it out",
        )
        require(
            self.clip_grad is None or self.clip_grad > 0,
            f"clip_grad is {self.clip_grad}; give a norm above 0, or null for none",
        )


@dataclass(frozen=True, kw_only=True)
class ProbeRow:
    """How good the best head of its kind is on one encoder, measured on one set of images."""

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
    tokens: Tokens | None
    """None for raw pixels."""
    balanced: float
    """Mean over the classes of their accuracies."""
    calibration_error: float
    """Expected calibration error, 15 equal bins of confidence."""
    loss: float
    """Mean cross-entropy."""
    per_class: tuple[float | None, ...]
    """Accuracy of each class; None where it has no image."""
    confusion: tuple[tuple[int, ...], ...] | None
    """Rows truth, columns prediction; None beyond 1,000 classes."""


@dataclass(frozen=True, kw_only=True)
class ProbeCandidate:
    """A head that competed, and how it did on the images that the winner was chosen on."""

    encoder: EncoderName
    head: HeadName
    lr: float
    weight_decay: float
    layers: tuple[int, ...]
    """Encoder layers, counted from 0; none for raw pixels."""
    attention: Attention | None
    tokens: Tokens | None
    chosen_on: Split | None
    """Where it was compared with the others; None where there was nothing to choose."""
    top1: float | None
    """On those images; None where nothing was chosen, or the head diverged."""
    top5: float | None
    loss: float | None
    winner: bool
    """The best of its kind on this encoder: highest top1, then lowest loss, then the first."""
    diverged: bool
    """Its weights stopped being finite numbers."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found."""

    rows: tuple[ProbeRow, ...]
    """The winners."""
    grid: tuple[ProbeCandidate, ...]
    """Every head that was trained."""
    num_classes: int
    class_names: tuple[str, ...]
    train_images: int
    """Readable images that the heads were trained on."""
    split_images: Mapping[str, int]
    """Images of each split, readable or not."""
    bad_images: Mapping[str, int]
    """Unreadable images, which were left out, by split."""
    resolved: Mapping[str, Any]
    """The recipe's settings as they were used."""

    def row(self, encoder: EncoderName, head: HeadName) -> ProbeRow:
        """The first row of this encoder and head."""
        return next(row for row in self.rows if (row.encoder, row.head) == (encoder, head))

    @property
    def chosen_on(self) -> Split | None:
        """The images that all winners were chosen on; None where there was nothing to choose."""
        return self.grid[0].chosen_on


def probe_config(settings: Mapping[str, Any]) -> ProbeConfig:
    """Build a config from a Python call's keywords; lists and single values may stand for tuples."""
    given = {
        name: (value,) if name in _SEVERAL and isinstance(value, str | int | float) else value
        for name, value in settings.items()
    }
    if given.get("layers") is not None:
        given["layers"] = tuple(str(word) for word in given["layers"])
    return from_dict(ProbeConfig, given)


def result_from_dict(values: Mapping[str, Any]) -> ProbeResult:
    """Build a result from what `to_dict` wrote, once through JSON; further keys are left out."""
    known = {name: values[name] for name in ProbeResult.__dataclass_fields__}
    known["rows"] = tuple(row_from_dict(row) for row in known["rows"])
    known["grid"] = tuple(from_dict(ProbeCandidate, one) for one in known["grid"])
    return from_dict(ProbeResult, known)


def row_from_dict(values: Mapping[str, Any]) -> ProbeRow:
    """Build a row from what `to_dict` wrote, once through JSON."""
    confusion = values["confusion"]
    pairs = None if confusion is None else tuple(tuple(counts) for counts in confusion)
    return from_dict(ProbeRow, {**values, "confusion": pairs})


def recipe_of(config: ProbeConfig) -> Recipe:
    """The recipe that a config names, with what the config itself says in its place."""
    recipe = RECIPES[config.recipe]
    if config.lr is not None:
        recipe = replace(recipe, lr=config.lr)
    if config.weight_decay is not None:
        recipe = replace(recipe, weight_decay=dict.fromkeys(recipe.weight_decay, config.weight_decay))
    if config.layers is not None:
        recipe = replace(recipe, layers=dict.fromkeys(recipe.layers, config.layers))
    if config.betas is not None:
        recipe = replace(recipe, betas=config.betas)
    return recipe


def warmup_epochs(config: ProbeConfig) -> float:
    """Epochs of warm-up, as the config says or its recipe."""
    if config.warmup_epochs is not None:
        return config.warmup_epochs
    return config.epochs / RECIPES[config.recipe].epochs_per_warmup
