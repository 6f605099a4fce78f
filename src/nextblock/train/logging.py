"""Display of a run: averages over steps, progress, log files of other ranks."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from nextblock.logs import clock, printable

# --------------------------------------------------------------------------------------- steps and windows


class StepOutcome(NamedTuple):
    """Loss, gradient norm and number of images of one optimizer step."""

    loss: float
    grad_norm: float
    """Before clipping."""
    images: int

    def is_finite(self, *, scaled: bool) -> bool:
        """Whether the step is valid; under a gradient scaler (`scaled`) an infinite gradient is expected."""
        return math.isfinite(self.loss) and (scaled or math.isfinite(self.grad_norm))


@dataclass
class Window:
    """Values since the last line of metrics; saved, so that a resumed run writes the same loss curve."""

    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    images: int = 0
    elapsed_s: float = 0.0
    waited_s: float = 0.0
    skipped: int = 0
    """Steps that changed no weight: non-finite, or without a readable image."""

    def add(self, outcome: StepOutcome, *, waited_s: float, elapsed_s: float) -> None:
        """Add a step; `elapsed_s` is its total time, `waited_s` the part spent waiting for images."""
        # Non-finite losses and norms are skipped separately: when the fp16 scale backs off, only the norm is
        # infinite and the loss still counts.
        if outcome.images and math.isfinite(outcome.loss):
            self.losses.append(outcome.loss)
        if outcome.images and math.isfinite(outcome.grad_norm):
            self.grad_norms.append(outcome.grad_norm)
        self.skipped += not (outcome.images and outcome.is_finite(scaled=False))
        self.images += outcome.images
        self.elapsed_s += elapsed_s
        self.waited_s += waited_s

    def values(self) -> dict[str, float]:
        """Mean finite loss and gradient norm (NaN if there is none), skipped steps, speed, data wait."""
        elapsed_s = max(self.elapsed_s, 1e-9)
        return {
            "loss": _mean(self.losses),
            "grad_norm": _mean(self.grad_norms),
            "skipped": self.skipped,
            "images_per_s": self.images / elapsed_s,
            "data_wait": self.waited_s / elapsed_s,
        }


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log records to a file, created by the first record."""
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    package = logging.getLogger("nextblock")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


# ------------------------------------------------------------------------------------------------ progress

LINE_EVERY_S = 10.0
"""Seconds between lines if there is no terminal."""
LINE_LETTERS = 80
"""Maximum line length if there is no terminal."""

WORDS = {
    **{"copy_previous": "copy", "loss_next": "next", "mean_loss": "mean now"},
    **{"val_loss": "val", "knn/top1": "kNN", "top1": "val top-1"},
}
"""Short names for the progress line."""


class Tick(NamedTuple):
    """The state of a run after a step."""

    step: int
    epoch: float
    lr: float
    values: dict[str, float]
    """`Window.values` since the last line of metrics."""
    num_bad: int
    """Number of unreadable images."""
    baselines: dict[str, float] = {}  # noqa: RUF012 - never changed
    """Losses of predictions that need no model, by name; empty until measured."""
    latest: dict[str, float] = {}  # noqa: RUF012 - never changed
    """Latest validation loss and kNN accuracy."""

    def text(self) -> str:
        """Format as one line, without step and time."""
        parts = [losses_text({"loss": self.values["loss"], **self.latest}, self.baselines)]
        images_per_s = self.values["images_per_s"]
        speed = f"{images_per_s:,.0f}" if images_per_s >= 10 else f"{images_per_s:.2f}"
        parts += [f"lr {self.lr:.1e}", f"{speed} images/s", f"data wait {self.values['data_wait']:.0%}"]
        if self.num_bad:
            parts.append(f"{self.num_bad} unreadable")
        return " · ".join(parts)


def losses_text(losses: dict[str, float], baselines: dict[str, float]) -> str:
    """Format the loss next to losses that need no model, followed by the other values."""
    compare = ", ".join(f"{WORDS.get(name, name)} {loss:.2f}" for name, loss in baselines.items())
    parts, compared = [], "loss_next" if "loss_next" in losses else "loss"
    for name, value in losses.items():
        text = f"{value:.1%}" if name.endswith("top1") else f"{value:.4f}"
        beside = f" ({compare})" if name == compared and compare else ""
        parts.append(f"{WORDS.get(name, name)} {text}{beside}")
    return " · ".join(parts)


class _TwoLines(Progress):
    """Steps, bar and time on one line; values below it, wrapped if the terminal is narrow."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["text"]:
                yield Text(_wrapped(task.fields["text"], self.console.width))


class Reporter:
    """Shows a progress bar in a terminal or notebook, with log records above; else a line every ten seconds.

    It never fails, as a closed terminal must not prevent a checkpoint.
    """

    def __init__(self, console: Console | None = None, *, is_quiet: bool = False) -> None:
        self.is_quiet = is_quiet
        """Whether another rank reports instead."""
        self.console = console or Console(stderr=True, quiet=is_quiet)
        self._busy_with = ""
        self._bar: Progress | None = None
        self._log_streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._task = TaskID(0)
        self._first = self._done = 0.0
        self._total = 0
        self._began_s = self._step_began_s = self._work_began_s = time.monotonic()
        self._line_s = -math.inf
        self._text = ""

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        for handler, stream in self._log_streams:
            handler.setStream(stream)
        self._log_streams = []
        if self._bar is not None:
            self._try(self._bar.stop)

    def begin(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        # A resumed run estimates the time left from its own steps, not from those of earlier starts.
        self._first, self._done, self._total = step, step, total_steps
        self._began_s = self._step_began_s = time.monotonic()
        # A notebook is not a terminal, but shows a bar if ipywidgets is installed.
        is_live = self.console.is_jupyter and find_spec("ipywidgets") is not None
        if not (self.console.is_terminal or is_live) or self.is_quiet:
            return
        self._bar = _TwoLines(
            TextColumn("step {task.fields[step]}/{task.total:,.0f}"),
            BarColumn(bar_width=None),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            console=self.console,
        )
        self._task = self._bar.add_task(
            "train", total=total_steps, completed=step, text="", step=f"{step:,}", left="?"
        )
        stderr = sys.stderr
        self._try(self._bar.start)  # replaces sys.stderr by a stream that writes above the bar
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                self._log_streams.append((handler, stderr))
                handler.setStream(sys.stderr)

    @contextmanager
    def busy(self, work: str, step: int) -> Iterator[None]:
        """Meanwhile, after `step`, other work is done, such as "the checkpoint of step 9"."""
        self._busy_with, self._work_began_s = work, time.monotonic()
        self._done = float(step)
        try:
            yield
        finally:
            self._busy_with = ""

    def measuring(self, what: str, done: int, total: int) -> None:
        """Show how many of the images of a measurement are done, if all of them take long."""
        now_s = time.monotonic()
        left_s = (now_s - self._work_began_s) / max(1, done) * (total - done)
        if now_s - self._work_began_s + left_s < LINE_EVERY_S or not done:
            return
        left = clock(left_s)
        text = f"measuring {what} · {done:,} of {total:,} images · {left} left"
        if self._bar is not None:
            self._bar.update(self._task, text=text)
        elif now_s - self._line_s >= LINE_EVERY_S:
            self._line_s = now_s
            self.note(text)

    def within(self, step: int, share: float) -> None:
        """Show progress within the step after `step`; `share` of it is done."""
        self._done = step + share
        self._show()

    def update(self, tick: Tick) -> None:
        """Show a finished step."""
        self._done, self._text = tick.step, f"epoch {tick.epoch:.1f} · {tick.text()}"
        self._show(is_last=tick.step == self._total)
        self._step_began_s = time.monotonic()

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        # A file name may contain control characters, which the terminal would execute.
        text = "\n".join(map(printable, text.split("\n")))
        self._try(self.console.print, text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def finishing(self) -> str:
        """What ends now and what is saved; shown on the first Ctrl-C, called from another thread."""
        saved = "then the run is saved"
        if self._busy_with:
            return f"finishing {self._busy_with}; {saved if self._done else 'there is no step to save yet'}"
        step = f"finishing step {math.floor(self._done) + 1}"
        done, now_s = self._done - self._first, time.monotonic()
        if done <= 0:
            so_far = clock(now_s - self._began_s)
            return f"{step} (its duration is not known yet; {so_far} so far); {saved}"
        # A mean step, less the time that this one has taken already.
        a_step_s = (now_s - self._began_s) / done
        return f"{step}, about {clock(max(1.0, a_step_s - (now_s - self._step_began_s)))}; {saved}"

    def _show(self, *, is_last: bool = False) -> None:
        now_s, done = time.monotonic(), self._done - self._first
        left = clock((now_s - self._began_s) / done * (self._total - self._done)) if done > 0 else "?"
        step, share = math.floor(self._done), self._done % 1  # finished steps, and the part of the next
        if self._bar is not None:
            shown = f"{self._done:,.2f}" if share else f"{step:,}"
            self._bar.update(self._task, completed=self._done, text=self._text, step=shown, left=left)
            return
        # Within a step only if the step itself is long.
        is_due = not share or now_s - self._step_began_s >= LINE_EVERY_S
        if is_last or (is_due and now_s - self._line_s >= LINE_EVERY_S):
            self._line_s = now_s
            within = f" · {share:.0%} of step {step + 1}" if share else ""
            text = f" · {self._text}" if self._text else ""
            line = f"step {step}/{self._total}{within} · {left} left{text}"
            self.note(_wrapped(line, LINE_LETTERS - 2).replace("\n", "\n  "))

    def _try(self, write: Any, *args: Any, **kwargs: Any) -> None:
        try:
            write(*args, **kwargs)
        except OSError:
            self._bar = None  # the terminal is gone; the run continues without it


def _wrapped(text: str, width: int) -> str:
    """Wrap text to `width` characters, breaking only at " · "."""
    lines = [""]
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)
