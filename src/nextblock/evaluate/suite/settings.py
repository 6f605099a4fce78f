"""Settings of the suite. Quick to import."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nextblock.config import Attention
from nextblock.evaluate.probe.settings import ProbeSettings
from nextblock.evaluate.settings import EvalSettings, check_distinct
from nextblock.evaluate.suite.benchmarks import EPOCHS, NORM_BATCH, Benchmark, chosen
from nextblock.settings import Amount, Auto, Count, Natural, Positive, require

OF_THE_PROBE = ("attention", "cache_gb", "epochs", "layers", "seed")
"""Settings passed unchanged to every probe, besides those of `EvalSettings`."""


@dataclass(frozen=True, kw_only=True)
class SuiteSettings(EvalSettings):
    """Settings of `suite`, which probes the benchmarks of the AIM and XTRA papers; defaults are official."""

    root: str
    """Directory of the data sets; --list --root DIR shows which ones it contains."""
    out: str = field()
    """Directory for the table and for each benchmark's probe."""
    only: tuple[str, ...] | None = None
    """Benchmarks to measure, by name; none: all."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # type: ignore[assignment]
    """Autocast precision of the encoder; auto: bf16, or fp32 on a device that only emulates bf16."""
    augment: Literal["official", "timm", "crop", "none"] = "official"
    """Training images; official: each benchmark's random crops, encoded in every epoch; none: centre crops,
    encoded once."""
    epochs: Count = EPOCHS
    """Training epochs; warm-ups scale with them."""
    lr: tuple[Positive, ...] | Auto = None
    """Peak learning rates to try; auto: each benchmark's official ones."""
    layers: tuple[str, ...] | Auto = None
    """Layers that a head averages, as in a probe; auto: attentive last6, linear last."""
    attention: tuple[Attention, ...] = ("native",)
    """native: as the checkpoint records; causal: the mask of pre-training; full: no mask."""
    max_images: Count | None = None
    """For a quick look: train and test on at most this many images, drawn by seed."""
    seed: Natural = 0
    """Seed of heads, order, crops, held-out and drawn images."""
    cache_gb: Amount = 16.0
    """With augment none: refuse a benchmark whose features take more gigabytes than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_distinct(self, "only")
        root = str(Path(self.root).absolute())
        require("," not in root, f"root is {root}; use a path or a link without a comma")
        for bench in self.benchmarks:
            ProbeSettings(**self.probe(bench, "train", "test"))

    @property
    def benchmarks(self) -> tuple[Benchmark, ...]:
        """Benchmarks to measure, in the table's order."""
        return chosen(self.only)

    def probe(self, bench: Benchmark, train: str, test: str) -> dict[str, Any]:
        """Settings of a benchmark's probe on these sources."""
        shared = EvalSettings.__dataclass_fields__.keys() - {"out", "overwrite", "precision"}
        lr = self.lr or bench.lr
        return {
            **{name: getattr(self, name) for name in (*shared, *OF_THE_PROBE)},
            "out": f"{self.out}/{bench.name}",
            "train": train,
            "test": test,
            "heads": (bench.head,),
            "lr": lr,
            "end_lr": min(1e-5, *lr),
            "weight_decay": (bench.weight_decay,),
            "batch_size": bench.batch_size,
            "norm_batch_size": NORM_BATCH,
            "warmup_epochs": bench.warmup_epochs * self.epochs / EPOCHS,
            "augment": bench.augment if self.augment == "official" else self.augment,
            "precision": "fp32" if self.precision == "auto" else self.precision,
            "baselines": False,
        }
