"""What the benchmarks share: variants that take turns, the rate of matrix products, and the table.

Each variant runs in a process of its own, in turn with the others, so other work on the machine slows all of
them alike. Times are medians. Compare the ratios, not the times.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median
from typing import Any, NamedTuple

import torch


class Row(NamedTuple):
    """One comparison: with the plain alternative, or with what `what` says."""

    what: str
    ours: float
    against: float
    unit: str
    ratio: float
    budget: str = ""


def parse(doc: str | None, **defaults: int) -> argparse.Namespace:
    """Read the command line, and set the number of threads here and in the variants' processes."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model: checks the script, not the speed")
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    parser.add_argument("--threads", type=int, help="threads of torch; 1 on a CPU measures CPU seconds")
    parser.set_defaults(**defaults)
    options = parser.parse_args()
    if options.threads:
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
        torch.set_num_threads(options.threads)
    return options


def take_turns(
    variants: Mapping[str, Callable[[], Any]], options: argparse.Namespace
) -> dict[str, list[Any]]:
    """Call every variant once a round, each time in a new process; what it returned, by name.

    With --quick it is one round in this process: starting Python takes longer than a tiny model.
    """
    if options.quick:
        return {name: [variant()] for name, variant in variants.items()}
    results: dict[str, list[Any]] = {name: [] for name in variants}
    for number in range(options.rounds):
        for name, variant in variants.items():
            sys.stderr.write(f"round {number + 1} of {options.rounds}: {name}\n")
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                results[name].append(pool.submit(variant).result())
    return results


def median_of(runs: Iterable[Mapping[str, Any]], key: str) -> float:
    """The median over the lists that all runs have under this key."""
    return median(value for run in runs for value in run[key])


def now_s() -> float:
    """Seconds as they pass, after waiting for a GPU; CPU seconds if there is one thread and no GPU.

    CPU seconds of one thread hardly depend on what else the machine does.
    """
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def gemm_gflops(
    shapes: Iterable[tuple[int, int, int]], device: torch.device, dtype: torch.dtype, seconds: float
) -> float:
    """GFLOP/s of the shape (rows, inner, columns) that is multiplied fastest.

    Of each shape it is the median over so many seconds: a processor is faster for a moment than it can be for
    long, and a training step takes long.
    """
    from torch.utils.benchmark import Timer  # here, as it warns if a CUDA toolkit has no GPU

    rates = []
    for rows, inner, columns in shapes:
        a, b = (torch.randn(size, device=device, dtype=dtype) for size in ((rows, inner), (inner, columns)))
        of = {"globals": {"a": a, "b": b, "c": a @ b}, "num_threads": torch.get_num_threads()}
        timer = Timer("torch.mm(a, b, out=c)", timer=now_s, **of)
        rates.append(2e-9 * rows * inner * columns / timer.blocked_autorange(min_run_time=seconds).median)
    return max(rates)


def best_device() -> torch.device:
    """An accelerator if there is one."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def peak_memory_mb(device: torch.device) -> float:
    """The most memory that tensors took on CUDA; otherwise the most that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def report(name: str, options: argparse.Namespace, rows: Iterable[Row], **more: Any) -> None:
    """Print a table of the rows, then what else was found; with --json all of it as one object."""
    rows, device = list(rows), best_device().type
    machine = {
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    lines = [f"{name}: " + ", ".join(f"{key} {value}" for key, value in machine.items())]
    lines += [f"{'':50}{'ours':>10}{'against':>10}{'ratio':>18}  budget"]
    for what, *values, unit, ratio, budget in rows:
        ours, against = (f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values)
        lines += [f"{what:50}{ours:>10}{against:>10} {unit:10}{ratio:7.2f}  {budget}".rstrip()]
    lines += [f"{key.replace('_', ' ')}: {value}" for key, value in more.items()]
    if options.json:
        found = {"bench": name, "quick": options.quick, **machine, "rows": [row._asdict() for row in rows]}
        lines += [json.dumps(found | more)]
    sys.stdout.write("\n".join(lines) + "\n")
