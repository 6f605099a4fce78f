"""What benches share: their result, processes for their variants, stopwatches, peak memory.

Nothing here imports torch before it is needed: the process that compares the others stays small.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch

__all__ = [
    "CLOCKS",
    "BenchError",
    "BenchResult",
    "Clock",
    "Row",
    "Stopwatch",
    "peak_memory_mb",
    "replaced",
    "run_in_process",
    "set_up",
    "synchronizer",
    "take_turns",
]

T = TypeVar("T")
Function = Callable[..., Any]

Clock = Literal["wall", "cpu"]
"""Time as it passes; or what this process spent on all its processors, which with one thread tells its own
speed on a machine that others use as well."""

CLOCKS: dict[Clock, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class BenchError(RuntimeError):
    """A variant failed, or the variants do not compute the same thing."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A comparison: what was measured of ours and of the plain alternative, and the bound it is held to."""

    what: str
    ours: float
    plain: float | None = None
    unit: str
    ratio: float | None = None
    at_least: float | None = None
    """What the ratio should reach."""
    at_most: float | None = None
    """What `ours` should not exceed."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """The rows of a bench, the machine, and what else is worth knowing."""

    bench: str
    rows: tuple[Row, ...]
    machine: dict[str, Any]
    """device, threads, torch."""
    details: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    """Sentences for the reader of the table."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `ratio` is that of the first row."""
        return {
            "bench": self.bench,
            "ratio": self.rows[0].ratio,
            "rows": [vars(row) for row in self.rows],
            **self.machine,
            "load_average": list(os.getloadavg()),
            **self.details,
        }


# ------------------------------------------------------------------------------------------------- processes


def take_turns(jobs: dict[str, tuple[str, dict[str, Any]]], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run every job once a round, in turn, each time in a new process; what each returned, by name.

    A job is the function's "module:name" and its argument.
    """
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, (target, job) in jobs.items():
            results[name].append(run_in_process(target, job))
    return results


def run_in_process(target: str, job: dict[str, Any]) -> dict[str, Any]:
    """What the function "module:name" returns for `job` in a process of its own."""
    environment = dict(os.environ)
    if job.get("threads"):
        environment["OMP_NUM_THREADS"] = str(job["threads"])
    command = [sys.executable, "-m", "nextblock.bench.worker", target, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BenchError(f"a measuring process ({target}) failed: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def peak_memory_mb(device_type: str) -> float:
    """The most memory that this process has held so far, in MB: on CUDA what tensors took, else resident."""
    if device_type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ----------------------------------------------------------------------------------------------- stopwatches


class Stopwatch:
    """Seconds by label, a list of laps; `sync` waits until the device has done what it was given."""

    def __init__(self, sync: Callable[[], None] | None = None, clock: Clock = "wall") -> None:
        self._sync = sync or (lambda: None)
        self.now_s = CLOCKS[clock]
        self.laps_s: dict[str, list[float]] = {}

    @contextmanager
    def lap(self, label: str) -> Iterator[None]:
        """Time what happens inside."""
        self._sync()
        started_s = self.now_s()
        yield
        self._sync()
        self.laps_s.setdefault(label, []).append(self.now_s() - started_s)

    @contextmanager
    def watch(self, owner: Any, name: str, label: str) -> Iterator[None]:
        """Time every call of `owner`'s function or method of this name while inside."""
        with replaced(owner, name, lambda function: self._timed(function, label)):
            yield

    def total_s(self, label: str) -> float:
        """Seconds under a label so far."""
        return sum(self.laps_s.get(label, ()))

    def timed_iterator(self, items: Iterable[T], label: str) -> Iterator[T]:
        """The same items; each `next` is timed."""
        iterator = iter(items)
        while True:
            with self.lap(label):
                item = next(iterator, self)
            if item is self:
                return
            yield item  # type: ignore[misc] # it is no stopwatch

    def _timed(self, function: Function, label: str) -> Function:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.lap(label):
                return function(*args, **kwargs)

        return timed


def set_up(device: str, threads: int | None) -> torch.device:
    """Choose a process's device and how many threads it has; null: as many as torch takes by itself."""
    import torch

    from nextblock.train.runtime import choose_device

    if threads is not None:
        torch.set_num_threads(threads)
    return choose_device(device)


def synchronizer(device: torch.device) -> Callable[[], None]:
    """What waits until a device has done what it was given."""
    import torch

    if device.type == "cuda":
        return torch.cuda.synchronize
    return torch.mps.synchronize if device.type == "mps" else lambda: None


@contextmanager
def replaced(owner: Any, name: str, wrap: Callable[[Function], Function]) -> Iterator[None]:
    """While inside, `owner`'s attribute `name` is what `wrap` makes of it."""
    original, is_its_own = getattr(owner, name), name in vars(owner)
    setattr(owner, name, wrap(original))
    try:
        yield
    finally:
        if is_its_own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)
