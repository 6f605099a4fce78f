"""Settings of a probe, and the recipes that supply their defaults. Quick to import.

`xtra` follows XTRA's official code. AIM v1 publishes its heads but not how they were trained, so `aim` trains
AIM's heads with the sweep of AIMv2, from the same lab (AIMv2, Table A2). That table also lists a colour
jitter of 0.3, which timm skips when it uses RandAugment; augment timm skips it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple

from nextblock.config import Attention
from nextblock.evaluate.settings import EvalSettings, check_distinct, check_layers
from nextblock.settings import Amount, Auto, Count, Natural, Positive, Rule, require

HeadName = Literal["linear", "attentive", "ep"]
MIN_STEPS, MIN_BATCH, MAX_BATCH, EPOCHS, MIN_STEPS_PER_EPOCH = 2_000, 16, 1024, 100, 20


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Default settings of one published protocol."""

    lr: tuple[float, ...]
    weight_decay: Mapping[HeadName, tuple[float, ...]]
    layers: Mapping[HeadName, tuple[str, ...]]
    betas: tuple[float, float]
    epochs_per_warmup: int
    """Training epochs per epoch of warm-up."""
    bias: bool
    """Whether the linear layer of a head has a bias."""
    encoder_heads: bool
    """Whether an attentive head has the encoder's number of attention heads; else it has 16."""


RECIPES: Mapping[Literal["xtra", "aim"], Recipe] = {
    # XTRA's official evaluation of its B/16 on ImageNet-1k. It has no ep head, which gets the settings of the
    # attentive head.
    "xtra": Recipe(
        lr=(1e-4, 3e-4, 5e-4, 1e-3, 1.5e-3, 2e-3, 4e-3),
        weight_decay={"linear": (0.0,), "attentive": (0.1,), "ep": (0.1,)},
        layers={"linear": ("last",), "attentive": ("last6",), "ep": ("last6",)},
        betas=(0.9, 0.95),
        epochs_per_warmup=10,
        bias=True,
        encoder_heads=False,
    ),
    # AIM's heads (apple/ml-aim) and AIMv2's attentive sweep; no sweep is published for other heads.
    "aim": Recipe(
        lr=(5e-5, 1e-4, 2e-4, 3e-4, 5e-4, 1e-3, 2e-3),
        weight_decay={"linear": (0.05, 0.1), "attentive": (0.05, 0.1), "ep": (0.05, 0.1)},
        layers={"linear": ("last",), "attentive": ("last6", "best"), "ep": ("last6", "best")},
        betas=(0.9, 0.999),
        epochs_per_warmup=20,
        bias=False,
        encoder_heads=True,
    ),
}


class Schedule(NamedTuple):
    """Epochs, batch size and steps of training."""

    epochs: int
    batch_size: int
    steps_per_epoch: int
    warmup_steps: int

    @property
    def steps(self) -> int:
        """Steps of all epochs."""
        return self.epochs * self.steps_per_epoch


@dataclass(frozen=True, kw_only=True)
class ProbeSettings(EvalSettings):
    """Settings of `probe`, which trains heads on a frozen encoder's features.

    Each kind of head is trained with every combination of learning rate, weight decay, layers, attention and
    tokens. The best of each kind is chosen on val and measured once on test.
    """

    train: str
    """Labelled images to train the heads on."""
    test: str | None = None
    """Labelled images to measure on, once; none: hold out a tenth of train."""
    val: str | None = None
    """Labelled images to choose the best heads on; none: hold out a tenth of train."""
    recipe: Literal["xtra", "aim"] = "xtra"
    """Source of defaults: XTRA's official probes, or AIM's heads with AIMv2's sweep."""
    heads: tuple[HeadName, ...] = ("linear", "attentive", "ep")
    """Kinds of heads: linear (on the mean patch), attentive (XTRA's and AIM's), ep (Efficient Probing)."""
    layers: tuple[str, ...] | Auto = None
    """Layers that a head averages: last, last6, layer7, 3+4+5 (from 0), best (AIM's choice), or each;
    auto: the recipe's (xtra: linear last, the others last6)."""
    attention: tuple[Attention, ...] = ("native",)
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    tokens: tuple[Literal["patches", "class", "all"], ...] = ("patches",)
    """Tokens that a head sees, for encoders with a class token; class is for linear heads only."""
    attentive_heads: Count | Auto = None
    """Attention heads of an attentive head; auto: 16, or the encoder's number (recipe aim)."""
    epochs: Count | Auto = None
    """Training epochs; auto: 100, or more if those are fewer than 2,000 steps."""
    batch_size: Annotated[int, Rule(lambda n: n >= 2, "from 2")] | Auto = None
    """Images per step; auto: the largest power of two from 16 to 1024 with at least 20 steps per epoch. The
    last partial batch of an epoch is dropped."""
    norm_batch_size: Count | None = None
    """Images per batch norm in training; none: the whole batch."""
    lr: tuple[Positive, ...] | Auto = None
    """Peak learning rates of AdamW, never scaled; auto: the recipe's seven, extended if the best is the
    smallest or largest."""
    end_lr: Amount = 1e-5
    """Learning rate at the end of the cosine."""
    weight_decay: tuple[Amount, ...] | Auto = None
    """Decay of the heads' weights; auto: the recipe's (xtra: linear 0, the others 0.1)."""
    warmup_epochs: Amount | Auto = None
    """Linear warm-up from a tenth of lr; auto: a tenth of the epochs (recipe aim: a twentieth)."""
    betas: tuple[float, float] | Auto = None
    """Decay rates of AdamW's moments; auto: 0.9 and 0.95 (recipe aim: 0.999)."""
    clip_grad: Positive | None = 3.0
    """Clip the norm of each head's gradient to this; none: no clipping."""
    augment: Literal["none", "crop", "timm"] = "none"
    """none: centre crops, encoded once; crop: new random crops in every epoch; timm: also RandAugment and
    random erasing, as in XTRA's official probes."""
    baselines: bool = True
    """Also probe the same encoder untrained, and train linear heads on images of 16x16 px and colour
    histograms."""
    seed: Natural = 0
    """Seed of heads, order, crops, held-out images and the untrained encoder."""
    cache_gb: Amount = 16.0
    """With augment none: refuse if the features take more gigabytes than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct(self, "heads", "lr", "weight_decay", "layers", "attention", "tokens")
        check_layers(self.layers or ())
        require(
            self.lr is None or self.end_lr <= min(self.lr),
            f"end_lr {self.end_lr:g} is above lr {min(self.lr or (0,)):g}; lower --end_lr",
        )
        require(
            None in (self.warmup_epochs, self.epochs) or self.warmup_epochs < self.epochs,  # type: ignore[operator]
            f"warmup_epochs is {self.warmup_epochs} of {self.epochs} epochs; warm up for fewer",
        )
        require(
            "linear" in self.heads or self.tokens != ("class",),
            "tokens class is one vector per image, for linear heads only; add --tokens patches",
        )

    def resolved(self) -> Recipe:
        """The recipe, overridden by the given settings."""
        recipe = RECIPES[self.recipe]
        decay = self.weight_decay and dict.fromkeys(recipe.weight_decay, self.weight_decay)
        layers = self.layers and dict.fromkeys(recipe.layers, self.layers)
        return replace(
            recipe,
            lr=self.lr or recipe.lr,
            weight_decay=decay or recipe.weight_decay,
            layers=layers or recipe.layers,
            betas=self.betas or recipe.betas,
        )

    def schedule(self, images: int) -> Schedule:
        """Epochs and batches for this number of training images."""
        batch = self.batch_size
        if batch is None:
            # A small set in batches of 1024 would get one step per epoch, too few to learn in 100 epochs.
            batch = 1 << max(1, images // MIN_STEPS_PER_EPOCH).bit_length() - 1
            batch = min(max(batch, MIN_BATCH), MAX_BATCH)
        batch = min(batch, images)
        steps = images // batch
        epochs = self.epochs or max(EPOCHS, -(-MIN_STEPS // steps))
        warmup = self.warmup_epochs
        if warmup is None:
            warmup = epochs / RECIPES[self.recipe].epochs_per_warmup
        return Schedule(epochs, batch, steps, round(warmup * steps))
