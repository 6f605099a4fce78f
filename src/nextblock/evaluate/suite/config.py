"""What the suite is told and what it finds: settings and results, quick to import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nextblock.config import Attention
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.evaluate.suite.benchmarks import Benchmark, chosen
from nextblock.evaluate.suite.published import mean_of
from nextblock.settings import check_types, require

__all__ = ["Score", "SuiteConfig", "SuiteResult"]


@dataclass(frozen=True, kw_only=True)
class SuiteConfig:
    """What to measure, on which benchmarks, and what to change of the official probes.

    Null settings are each benchmark's own, as in the official code of XTRA-H/14.
    """

    model: str
    """A run directory, a file of weights, or timm:NAME."""
    num_heads: int | None = None
    """Attention heads of the encoder, where a foreign file does not tell."""
    root: str
    """Directory of the data sets; `--list --root DIR` tells where each is looked for."""
    out: str
    """Directory for the table (suite.md, .csv, .json, .png) and each benchmark's probe."""
    only: tuple[str, ...] | None = None
    """Benchmarks to measure, by name; null: all sixteen."""
    download: bool = False
    """Fetch what torchvision or the Hugging Face hub have, where it is not below root."""
    layers: tuple[str, ...] | None = None
    """Layers that compete, in the words of the probe; null: attentive last6, linear last."""
    attention: tuple[Attention, ...] = ("native",)
    """Attention at encoding: what the checkpoint records for its features, the pre-training mask, or none."""
    tokens: tuple[Literal["patches", "class", "all"], ...] = ("patches",)
    """Of encoders with a class token: patches, class, or all; attentive: patches or all."""
    attentive_heads: int | None = None
    """Attentive head: attention heads; must divide the width. null: 16."""
    epochs: int | None = None
    """How often the heads see every image; null: 100."""
    batch_size: int | None = None
    """Images per step of the heads."""
    lr: tuple[float, ...] | None = None
    """Peak learning rates that compete; none: those that the official code reaches."""
    weight_decay: tuple[float, ...] | None = None
    """Decays of the heads' weights that compete."""
    warmup_epochs: float | None = None
    """Linear warm-up from a tenth of lr."""
    augment: Literal["none", "crop", "timm", "official"] = "none"
    """none: features of the centre crop, computed once; crop, timm: as for a probe; official: each
    benchmark's own, for which every image is encoded in every epoch."""
    max_images: int | None = None
    """For a quick look: at most so many images to train on and to test on, drawn by the seed."""
    cache: str | None = None
    """Directory that keeps features for later probes."""
    cache_gb: float = 16.0
    """Features on disk take at most this much; those beyond are computed anew in every epoch."""
    encode_batch_size: int = 128
    """Images that go through the encoder at a time."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of the encoder; heads are fp32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute; auto: CUDA, then MPS, then CPU."""
    workers: int | None = None
    """Processes that decode; null: what the run used."""
    seed: int = 0
    """Seed of heads, order, crops, held-out and drawn images."""
    overwrite: bool = False
    """Replace another result in out."""

    def __post_init__(self) -> None:
        if isinstance(self.only, str):
            object.__setattr__(self, "only", (self.only,))
        # One value stands for a tuple of it.
        for name in ("lr", "weight_decay", "layers", "attention", "tokens"):
            value = getattr(self, name)
            if isinstance(value, str | int | float):
                object.__setattr__(self, name, (str(value) if name == "layers" else value,))
        check_types(self)
        require(self.only != (), "only names no benchmark; name one or several, or leave it out")
        require(
            self.max_images is None or self.max_images >= 2,
            f"max_images is {self.max_images}; use at least 2",
        )
        for benchmark in chosen(self.only):
            self.probe(benchmark, train="", test="")

    def probe(self, benchmark: Benchmark, *, train: str, test: str) -> ProbeSettings:
        """The probe of one benchmark, on these sources."""
        recipe = benchmark.recipe
        epochs = recipe.epochs if self.epochs is None else self.epochs
        # A share of fewer epochs than the recipe's is warmed up for as well.
        warmup = recipe.warmup_epochs * epochs / recipe.epochs
        warmup = warmup if self.warmup_epochs is None else self.warmup_epochs
        # Without warm-up the official scheduler begins its cosine at a tenth of the rate that is named.
        rates = recipe.lrs if warmup else tuple(lr / 10 for lr in recipe.lrs)
        return ProbeSettings(
            model=self.model,
            num_heads=self.num_heads,
            train=train,
            test=test,
            out=f"{self.out}/{benchmark.name}",
            heads=(benchmark.head,),
            layers=self.layers,
            attention=self.attention,
            tokens=self.tokens,
            attentive_heads=self.attentive_heads if benchmark.head == "attentive" else None,
            epochs=epochs,
            batch_size=recipe.batch_size if self.batch_size is None else self.batch_size,
            lr=rates if self.lr is None else self.lr,
            weight_decay=(recipe.weight_decay,) if self.weight_decay is None else self.weight_decay,
            warmup_epochs=warmup,
            seed=self.seed,
            augment=recipe.augment if self.augment == "official" else self.augment,
            baselines=False,
            cache=self.cache,
            cache_gb=self.cache_gb,
            encode_batch_size=self.encode_batch_size,
            precision=self.precision,
            device=self.device,
            workers=self.workers,
            overwrite=self.overwrite,
        )


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one benchmark's probe found, by the head that was chosen."""

    name: str
    top1: float
    """Share of the test images."""
    top5: float
    images: tuple[int, int]
    """Images of the training and of the test source, readable or not."""
    trained_on: int
    """Images that the reported head was trained on: readable, and not held out to choose it."""
    classes: int
    bad_images: int
    """Unreadable images of both, left out."""
    lr: float
    weight_decay: float
    layers: tuple[int, ...]
    attention: str | None
    elapsed_s: float


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """What the suite found."""

    model: str
    architecture: str
    scores: tuple[Score, ...]
    """In the order of the table, with those that an earlier call of the same settings found."""
    missing: Mapping[str, str]
    """Benchmarks whose images are not there, and how to get them."""
    failed: Mapping[str, str]
    """Benchmarks whose probe failed, and why."""
    notes: tuple[str, ...]
    """What differs from the papers' measurements."""

    @property
    def top1_percent(self) -> dict[str, float]:
        """Top-1 accuracy in percent by benchmark."""
        return {score.name: 100 * score.top1 for score in self.scores}

    @property
    def mean_percent(self) -> float | None:
        """The papers' mean over the fifteen; None where one is missing."""
        return mean_of(self.top1_percent)
