"""What a run tells whoever watches the terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple, Protocol, runtime_checkable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

__all__ = ["ConsoleReporter", "Reporter", "Tick"]

LINE_EVERY_S = 10.0
"""Where there is no terminal, a line this often."""

WORDS = {"zero": "zero", "copy_previous": "copy", "uniform": "uniform", "frequency": "frequency"}
"""Names of the losses without a model, as the progress line says them."""


class Tick(NamedTuple):
    """The state of a run after a step."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    """Mean since the last line of metrics."""
    baselines: dict[str, float]
    """What predicting without a model costs on this data, by name; empty while not measured."""
    lr: float
    images_per_s: float
    data_wait: float
    """Share of the time spent waiting for images."""
    num_bad: int
    """Images that could not be read."""

    def text(self) -> str:
        """One line, without step and time."""
        compare = ", ".join(f"{WORDS.get(name, name)} {loss:.2f}" for name, loss in self.baselines.items())
        parts = [
            f"loss {self.loss:.4f}" + (f" ({compare})" if compare else ""),
            f"lr {self.lr:.1e}",
            f"{self.images_per_s:,.0f} images/s"
            if self.images_per_s >= 10
            else f"{self.images_per_s:.2f} images/s",
            f"data wait {self.data_wait:.0%}",
        ]
        if self.num_bad:
            parts.append(f"{self.num_bad} unreadable")
        return " · ".join(parts)


@runtime_checkable
class Reporter(Protocol):
    """Entered once a run, told what happens."""

    def __enter__(self) -> Reporter: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def begin(self, step: int, total_steps: int) -> None:
        """Tell where the run stands before its first step."""
        ...

    def update(self, tick: Tick) -> None:
        """Tell of a step."""
        ...

    def note(self, text: str) -> None:
        """Tell of anything else, a line."""
        ...


class _TwoLines(Progress):
    """Steps, bar and time in one line, what was measured below it, wrapped where the terminal is narrow."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["text"]:
                yield Text(_wrapped(task.fields["text"], self.console.width))


class ConsoleReporter:
    """A progress bar on a terminal, log records above it; elsewhere a line every ten seconds."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._log_streams: list[tuple[logging.StreamHandler[Any], Any]] = []
        self._task = TaskID(0)
        self._said_at_s = 0.0

    def __enter__(self) -> ConsoleReporter:
        if self.console.is_terminal:
            self._bar = _TwoLines(
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(bar_width=None),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=self.console,
                speed_estimate_period=120,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handler, stream in self._log_streams:
            handler.setStream(stream)
        self._log_streams = []
        if self._bar is not None:
            self._bar.stop()

    def begin(self, step: int, total_steps: int) -> None:
        """Show the bar."""
        self._started = (time.monotonic(), step)
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=total_steps, completed=step, text="")
            stderr = sys.stderr
            self._bar.start()  # puts in place of sys.stderr a stream that writes above the bar
            for handler in logging.getLogger().handlers:
                if isinstance(handler, logging.StreamHandler) and handler.stream is stderr:
                    self._log_streams.append((handler, stderr))
                    handler.setStream(sys.stderr)

    def update(self, tick: Tick) -> None:
        """Move the bar, or write a line if ten seconds have passed."""
        if self._bar is not None:
            self._bar.update(self._task, completed=tick.step, text=tick.text())
            return
        now_s = time.monotonic()
        if now_s - self._said_at_s < LINE_EVERY_S and tick.step < tick.total_steps:
            return
        self._said_at_s = now_s
        started_s, first = self._started
        left_s = (now_s - started_s) / max(1, tick.step - first) * (tick.total_steps - tick.step)
        self.note(
            f"step {tick.step}/{tick.total_steps} · epoch {tick.epoch:.1f} · {tick.text()} "
            f"· {_clock(left_s)} left"
        )

    def note(self, text: str) -> None:
        """Write a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _wrapped(text: str, width: int) -> str:
    """Lines of at most `width` characters, broken between the parts of a tick, not within them."""
    lines = [""]
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        if len(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(part)
    return "\n".join(lines)


def _clock(seconds: float) -> str:
    """A length of time in the two units that matter: "2 d 3 h", "5 min 10 s"."""
    units = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))
    rest, parts = round(seconds), []
    for name, length in units:
        count, rest = divmod(rest, length)
        if count or parts or name == "s":
            parts.append(f"{count} {name}")
    return " ".join(parts[:2])
