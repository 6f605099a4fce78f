"""The rate at which a machine multiplies matrices, against which benches hold the arithmetic of a model.

A rate is the median over all repetitions, each shape multiplied for seconds on end: as what is compared to it
is a median of seconds on end, and a processor runs faster for a moment than it can for long. The fastest
single product is told beside.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from nextblock.bench.measure import CLOCKS, Clock, set_up, synchronizer

__all__ = ["GEMM_TARGET", "GemmJob", "GemmRates", "gemm_rates", "measure_gemm"]

GEMM_TARGET = "nextblock.bench.gemm:measure_gemm"
SQUARE = 4096
SECONDS_EACH, QUICK_SECONDS_EACH = 2.0, 0.2
MIN_REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class GemmJob:
    """Matrix products to be measured: (rows, inner, columns) each."""

    shapes: tuple[tuple[int, int, int], ...]
    precision: Literal["fp32", "bf16"]
    device: Literal["auto", "cpu", "cuda", "mps"]
    threads: int | None
    clock: Clock = "wall"
    quick: bool = False

    @property
    def all_shapes(self) -> list[tuple[int, int, int]]:
        """Those asked for, and a large square."""
        return [*self.shapes, (SQUARE, SQUARE, SQUARE)]


@dataclass(frozen=True, kw_only=True)
class GemmRates:
    """GFLOP/s over all turns."""

    by_shape: Mapping[str, float]
    """The median of each shape's repetitions."""
    fastest: float
    """The best single product."""

    @property
    def gflops(self) -> float:
        """Of the shape that this machine multiplies best."""
        return max(self.by_shape.values())

    @property
    def details(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "gemm_gflops": self.gflops,
            "gemm_gflops_by_shape": dict(self.by_shape),
            "gemm_gflops_fastest": self.fastest,
        }

    @property
    def note(self) -> str:
        """For the reader of a table."""
        rates = ", ".join(f"{shape} {rate:.0f}" for shape, rate in self.by_shape.items())
        return f"GEMM rate, GFLOP/s, medians: {rates}; the fastest single product {self.fastest:.0f}"


def gemm_rates(runs: Iterable[Mapping[str, Any]]) -> GemmRates:
    """The rates of what `measure_gemm` returned in several turns."""
    by_shape: dict[str, list[float]] = {}
    for run in runs:
        for shape, rates in run["gflops"].items():
            by_shape.setdefault(shape, []).extend(rates)
    return GemmRates(
        by_shape={shape: median(rates) for shape, rates in by_shape.items()},
        fastest=max(map(max, by_shape.values())),
    )


def measure_gemm(values: dict[str, Any]) -> dict[str, Any]:
    """GFLOP/s of every repetition, by shape, after one that is not counted."""
    import torch

    job = GemmJob(**{**values, "shapes": tuple(tuple(shape) for shape in values["shapes"])})
    device = set_up(job.device, job.threads)
    dtype = torch.bfloat16 if job.precision == "bf16" else torch.float32
    synchronize, now_s = synchronizer(device), CLOCKS[job.clock]
    gflops: dict[str, list[float]] = {}
    for rows, inner, columns in job.all_shapes:
        left = torch.randn(rows, inner, device=device, dtype=dtype)
        right = torch.randn(inner, columns, device=device, dtype=dtype)
        out = left @ right
        synchronize()
        rates = gflops[f"{rows}x{inner}x{columns}"] = []
        left_s = QUICK_SECONDS_EACH if job.quick else SECONDS_EACH
        while left_s > 0 or len(rates) < MIN_REPEATS:
            started_s = now_s()
            torch.mm(left, right, out=out)
            synchronize()
            elapsed_s = now_s() - started_s
            rates.append(2 * rows * inner * columns / elapsed_s / 1e9)
            left_s -= elapsed_s
    return {"gflops": gflops}
