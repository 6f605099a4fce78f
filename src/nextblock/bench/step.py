"""`nextblock bench step`: a training step, against a plain implementation of the same method.

The plain one (`plain.py`) sends all blocks through encoder and predictor, uses torch's default AdamW and
leaves malloc as it is. It is measured with AdamW fused as well, and with memory kept as `nextblock pretrain`
does it (`train/memory.py`), so that each part of the difference can be told. No ratio is printed unless both
have the same loss. Also measured: what share of the rate at which this machine multiplies matrices the step
reaches with the arithmetic it needs (`flops.py`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import zip_longest
from statistics import median
from typing import Any, Literal

from nextblock.bench.flops import forward_flops, step_flops
from nextblock.bench.gemm import GEMM_TARGET, GemmRates, gemm_rates
from nextblock.bench.measure import BenchError, BenchResult, Clock, Row, take_turns
from nextblock.config import ModelConfig, pair
from nextblock.presets import model_config
from nextblock.settings import check_types, require, to_dict

__all__ = ["StepBench", "check_losses"]

SPEEDUP, GEMM_SHARE, MEMORY = 1.25, 0.75, 1.0
"""What the ratios should reach: images per second, share of the GEMM rate, plain peak memory over ours."""

MAX_LOSS_DIFFERENCE = {"fp32": 1e-5, "bf16": 1e-2}
"""Between ours and plain at the first step, where the weights are the same; in bf16 the sums' order shows."""

PLAIN_SETTINGS = {
    "predictor": "transformer",
    "bias": True,
    "patch_norm": False,
    "positions": "learned",
    "prefix": False,
    "tokenizer": None,
    "loss": "mse",
    "norm_pixels": True,
}
"""What the plain implementation can do of these settings; and it needs `projection_dim`, `block_mlp_dim`."""

Result = dict[str, Any]
STEP_TARGET = "nextblock.bench.variants:measure_step"


@dataclass(frozen=True, kw_only=True)
class StepBench:
    """What to measure, and how long."""

    model: str = "xtra-b16"
    """Size or preset."""
    image_size: int | None = None
    """Side of the image in pixels; null: the model's."""
    batch_size: int = 8
    """Images a step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of forward and backward."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where; auto: CUDA, then MPS, then CPU."""
    threads: int | None = None
    """Threads of every process; null: as many as torch takes by itself."""
    clock: Clock = "wall"
    """Seconds as they pass, or CPU seconds: with `--threads 1`, for a machine that is not yours alone."""
    rounds: int = 2
    """How often each variant has its turn, every time in a new process."""
    steps: int = 3
    """Measured steps in a turn; two more come first."""
    quick: bool = False
    """One round of two steps: a first idea."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("batch_size", "rounds", "steps"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; use at least 1")

    @property
    def config(self) -> ModelConfig:
        """The network that is trained: the named one without what the plain implementation leaves out.

        Raises `ValueError` where that would make it another method.
        """
        size = {} if self.image_size is None else {"image_size": self.image_size}
        changes = {"drop_path": 0.0, "order": "raster", "num_predicted_blocks": 1, "init": None}
        config = model_config(self.model, **size, **changes)
        wrong = [name for name, value in PLAIN_SETTINGS.items() if getattr(config, name) != value]
        wrong += [name for name in ("projection_dim", "block_mlp_dim") if getattr(config, name) is None]
        require(
            not wrong,
            f"the plain implementation is XTRA's alone, but {self.model} has "
            + ", ".join(f"model.{name} {getattr(config, name)!r}" for name in wrong)
            + "; use --model xtra-b16 or another size of XTRA",
        )
        return config

    @property
    def large_blocks(self) -> ModelConfig:
        """The same network with blocks twice as wide and twice as high."""
        rows, columns = pair(self.config.block_size)
        return replace(self.config, block_size=(2 * rows, 2 * columns))

    def run(self) -> BenchResult:
        """Measure all variants, and compare."""
        results = take_turns(self._jobs(), 1 if self.quick else self.rounds)
        differences = {
            **check_losses(results, ["ours", "plain", "plain fused", "plain tuned"], self.precision),
            **check_losses(results, ["ours large", "plain large"], self.precision),
        }
        gemm = gemm_rates(results["gemm"])
        first = results["ours"][0]
        return BenchResult(
            bench="step",
            rows=(
                *self._speed_rows(results),
                *self._share_rows(results, gemm.gflops),
                _memory(results),
            ),
            machine={name: first[name] for name in ("device", "threads", "torch")},
            details={**self._details(results, gemm), "loss_differences": differences},
            notes=self._notes(first, differences, gemm),
        )

    def _jobs(self) -> dict[str, tuple[str, dict[str, Any]]]:
        common = {
            "batch_size": self.batch_size,
            "steps": 2 if self.quick else self.steps,
            **{name: getattr(self, name) for name in ("precision", "device", "threads", "clock")},
        }
        normal = {**common, "model": to_dict(self.config)}
        large = {**common, "model": to_dict(self.large_blocks), "whole_step": False}
        gemm = {name: common[name] for name in ("precision", "device", "threads", "clock")}
        return {
            "gemm": (GEMM_TARGET, {**gemm, "shapes": self._shapes(), "quick": self.quick}),
            "ours": (STEP_TARGET, {**normal, "variant": "ours"}),
            "plain": (STEP_TARGET, {**normal, "variant": "plain", "fused": False, "keep_memory": False}),
            "plain fused": (STEP_TARGET, {**normal, "variant": "plain", "keep_memory": False}),
            "plain tuned": (STEP_TARGET, {**normal, "variant": "plain"}),
            "ours large": (STEP_TARGET, {**large, "variant": "ours"}),
            "plain large": (STEP_TARGET, {**large, "variant": "plain", "keep_memory": False}),
        }

    def _shapes(self) -> list[tuple[int, int, int]]:
        """The encoder's largest products, forward and for the weights' gradient."""
        config = self.config
        tokens = self.batch_size * (config.num_blocks - 1) * config.patches_per_block
        width, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        return [(tokens, width, hidden), (tokens, hidden, width), (hidden, tokens, width)]

    def _speed_rows(self, results: dict[str, list[Result]]) -> list[Row]:
        block, large = ("x".join(map(str, pair(c.block_size))) for c in (self.config, self.large_blocks))
        return [
            self._speed(f"training step, {block} blocks", results["ours"], results["plain"], "step", SPEEDUP),
            self._speed(
                "training step, AdamW fused in both", results["ours"], results["plain fused"], "step"
            ),
            self._speed("the same, memory kept in both too", results["ours"], results["plain tuned"], "step"),
            self._speed(
                "forward + backward",
                results["ours"],
                results["plain"] + results["plain fused"],
                "forward_backward",
            ),
            self._speed(
                "forward + backward, memory kept in both",
                results["ours"],
                results["plain tuned"],
                "forward_backward",
            ),
            self._speed(
                f"forward + backward, {large} blocks",
                results["ours large"],
                results["plain large"],
                "forward_backward",
                SPEEDUP,
            ),
            _updates("clip + optimizer", results["ours"], results["plain"]),
            _updates("clip + optimizer, fused in both", results["ours"], results["plain fused"]),
        ]

    def _speed(
        self, what: str, ours: list[Result], plain: list[Result], label: str, at_least: float | None = None
    ) -> Row:
        """A comparison in images per second, of the medians over all steps."""
        ours_per_s, plain_per_s = (self.batch_size / _median(runs, label) for runs in (ours, plain))
        return Row(
            what=what,
            ours=ours_per_s,
            plain=plain_per_s,
            unit="images/s",
            ratio=ours_per_s / plain_per_s,
            at_least=at_least,
        )

    def _share_rows(self, results: dict[str, list[Result]], gemm_gflops: float) -> list[Row]:
        """Rate of the arithmetic that is needed, in ours and in plain; ratio: of ours to the GEMM rate."""
        gflop = self.batch_size * step_flops(self.config) / 1e9
        rows = []
        for what, label, plain, at_least in (
            ("forward + backward", "forward_backward", "plain fused", GEMM_SHARE),
            ("the step", "step", "plain", None),
        ):
            ours_gflops, plain_gflops = (gflop / _median(results[name], label) for name in ("ours", plain))
            rows.append(
                Row(
                    what=f"model flops of {what} / GEMM",
                    ours=ours_gflops,
                    plain=plain_gflops,
                    unit="GFLOP/s",
                    ratio=ours_gflops / gemm_gflops,
                    at_least=at_least,
                )
            )
        return rows

    def _details(self, results: dict[str, list[Result]], gemm: GemmRates) -> dict[str, Any]:
        return {
            "model": self.model,
            "batch_size": self.batch_size,
            "precision": self.precision,
            "clock": self.clock,
            "first_loss": results["ours"][0]["losses"][0],
            **gemm.details,
            "model_gflop_per_image": step_flops(self.config) / 1e9,
            "forward_gflop_by_part": {part: n / 1e9 for part, n in forward_flops(self.config).items()},
            "laps_s": {
                name: {label: _laps(runs, label) for label in runs[0]["laps_s"]}
                for name, runs in results.items()
                if name != "gemm"
            },
        }

    def _notes(self, first: Result, differences: dict[str, float], gemm: GemmRates) -> tuple[str, ...]:
        return (
            f"{self.model}, batch {self.batch_size}, {self.precision}, on {first['device']}"
            + (", in CPU seconds" if self.clock == "cpu" else ""),
            f"same loss: {first['losses'][0]:.6f} at the first step; ours and plain differ by at most "
            f"{max(differences.values()):.1e} over all steps",
            f"model flops: {step_flops(self.config) / 1e9:.1f} GFLOP an image, forward and backward, of the "
            "matrix products that the loss needs",
            gemm.note,
        )


def check_losses(results: dict[str, list[Result]], names: list[str], precision: str) -> dict[str, float]:
    """Largest difference over all steps to the first variant; raises where the first losses differ."""
    reference = results[names[0]][0]["losses"]
    differences = {}
    for name in names:
        for run in results[name]:
            there = [abs(a - b) for a, b in zip_longest(reference, run["losses"], fillvalue=float("nan"))]
            if not there[0] <= MAX_LOSS_DIFFERENCE[precision]:
                raise BenchError(
                    f"no ratio: the first loss is {reference[0]:.6f} of {names[0]!r} and "
                    f"{run['losses'][0]:.6f} of {name!r}, so they do not compute the same thing"
                )
            differences[name] = max(differences.get(name, 0.0), *there)
    return differences


def _updates(what: str, ours: list[Result], plain: list[Result]) -> Row:
    ours_s, plain_s = _median(ours, "update"), _median(plain, "update")
    return Row(what=what, ours=ours_s, plain=plain_s, unit="s", ratio=plain_s / ours_s)


def _memory(results: dict[str, list[Result]]) -> Row:
    ours, plain = (max(run["peak_memory_mb"] for run in results[name]) for name in ("ours", "plain"))
    return Row(what="peak memory", ours=ours, plain=plain, unit="MB", ratio=plain / ours, at_least=MEMORY)


def _laps(runs: Iterable[Result], label: str) -> list[float]:
    return [lap_s for run in runs for lap_s in run["laps_s"][label]]


def _median(runs: Iterable[Result], label: str) -> float:
    return median(_laps(runs, label))
