"""`nextblock bench loop`: what the training loop itself costs a step, beside forward, backward and update.

The loop that runs is `train()` itself, on the digits and a tiny model, with its records and its progress bar;
forward, backward, clipping, the optimizer's step and the loader's `next` are wrapped and their time is taken
off. Checkpoints and monitors are left out: they come as often as a user wants.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from statistics import fmean, median
from typing import Any

from nextblock.bench.measure import BenchResult, Clock, Row, Stopwatch, replaced, take_turns
from nextblock.presets import get_preset
from nextblock.settings import check_types, require

__all__ = ["LoopBench", "measure_loop"]

MAX_MS = 2.0
WARMUP_STEPS = 20
QUICK_STEPS = 30
TARGET = "nextblock.bench.loop:measure_loop"
COMPUTE, DATA, STEP = "compute", "data", "step"


@dataclass(frozen=True, kw_only=True)
class LoopBench:
    """How long to measure."""

    steps: int = 100
    """Measured steps in a turn."""
    rounds: int = 2
    """Turns, each in a new process."""
    threads: int | None = None
    """Threads of torch; null: as many as it takes by itself."""
    clock: Clock = "wall"
    """Seconds as they pass, or CPU seconds: for a machine that is not yours alone."""
    quick: bool = False
    """One short turn: a first idea."""

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("steps", "rounds"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; use at least 1")
        require(self.threads is None or self.threads >= 1, f"threads is {self.threads}; use at least 1")

    def run(self) -> BenchResult:
        """Train, and take off what is not the loop's."""
        job = {
            "steps": QUICK_STEPS if self.quick else self.steps,
            "threads": self.threads,
            "clock": self.clock,
        }
        runs = take_turns({"loop": (TARGET, job)}, 1 if self.quick else self.rounds)["loop"]
        laps_s = {name: [lap for run in runs for lap in run["laps_s"][name]] for name in runs[0]["laps_s"]}
        ms = {name: 1e3 * median(laps) for name, laps in laps_s.items()}
        mean_ms = 1e3 * fmean(laps_s["loop"])
        return BenchResult(
            bench="loop",
            rows=(
                _row("the loop itself, median step", ms["loop"], ms[COMPUTE], at_most=MAX_MS),
                _row("the loop itself, mean step", mean_ms, 1e3 * fmean(laps_s[COMPUTE])),
                _row("waiting for images, in the main process", ms[DATA], ms[COMPUTE]),
                _row("the whole step", ms[STEP], ms[COMPUTE]),
            ),
            machine={name: runs[0][name] for name in ("device", "threads", "torch")},
            details={"compute_ms": ms[COMPUTE], "steps": len(laps_s["loop"])},
            notes=(
                f"xtra-tiny on digits, batch {runs[0]['batch_size']}, on {runs[0]['device']}"
                f"{', in CPU seconds' if self.clock == 'cpu' else ''}; ratios are to "
                f"the {ms[COMPUTE]:.1f} ms of forward, backward, clipping and update",
            ),
        )


def _row(what: str, ms: float, compute_ms: float, at_most: float | None = None) -> Row:
    return Row(what=what, ours=ms, unit="ms", ratio=ms / compute_ms, at_most=at_most)


def measure_loop(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of every step after the first few: in all, computing, waiting for images, and the rest."""
    import torch

    from nextblock.data import open_source
    from nextblock.train import Reporter, train
    from nextblock.train.runtime import device_name

    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    config = get_preset("xtra-tiny").config
    steps = WARMUP_STEPS + job["steps"] + 1
    config = replace(
        config,
        data=replace(config.data, train="digits:split=train", workers=0),
        train=replace(config.train, duration=f"{steps}st", device="cpu"),
    )
    sources = {"train": open_source("digits:split=train", config.data)}
    watch = Stopwatch(clock=job["clock"])
    with tempfile.TemporaryDirectory() as folder, _step_laps(watch) as laps_s:
        train(config, Path(folder) / "run", sources, reporter=Reporter(_terminal()))
    return {
        "laps_s": {name: laps[WARMUP_STEPS:] for name, laps in laps_s.items()},
        "batch_size": config.train.batch_size,
        "device": device_name(torch.device("cpu")),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


@contextmanager
def _step_laps(watch: Stopwatch) -> Iterator[dict[str, list[float]]]:
    """Wrap what `train` calls; the seconds from the end of a step to the end of the next, and their parts."""
    import torch

    from nextblock.data import TrainLoader
    from nextblock.models import NextBlockModel
    from nextblock.train.trainer import Trainer

    laps_s: dict[str, list[float]] = {STEP: [], COMPUTE: [], DATA: [], "loop": []}
    marks: list[tuple[float, float, float]] = []

    def marking(train_step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            outcome = train_step(*args, **options)
            marks.append((watch.now_s(), watch.total_s(COMPUTE), watch.total_s(DATA)))
            if len(marks) > 1:
                step_s, compute_s, data_s = (b - a for a, b in zip(*marks[-2:], strict=True))
                parts_s = step_s, compute_s, data_s, step_s - compute_s - data_s
                for laps, lap_s in zip(laps_s.values(), parts_s, strict=True):
                    laps.append(lap_s)
            return outcome

        return wrapped

    def timing(iterate: Callable[..., Any]) -> Callable[..., Any]:
        def timed(loader: TrainLoader) -> Iterator[Any]:
            for step in watch.timed_iterator(iterate(loader), DATA):
                yield step._replace(micro_batches=watch.timed_iterator(step.micro_batches, DATA))

        return timed

    with ExitStack() as stack:
        for owner, name in (
            (NextBlockModel, "forward"),
            (torch.Tensor, "backward"),
            (torch.nn.utils, "clip_grad_norm_"),
            (torch.optim.AdamW, "step"),
        ):
            stack.enter_context(watch.watch(owner, name, COMPUTE))
        stack.enter_context(replaced(TrainLoader, "__iter__", timing))
        stack.enter_context(replaced(Trainer, "train_step", marking))
        yield laps_s


def _terminal() -> Any:
    """A terminal that nobody sees, so that the progress bar is drawn."""
    from rich.console import Console

    return Console(file=StringIO(), force_terminal=True, width=120)
