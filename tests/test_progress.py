"""What a run tells on a terminal and off it, and how it answers signals."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import threading
import time

import pytest
from rich.console import Console

from nextblock.train.progress import ConsoleReporter, Tick
from nextblock.train.signals import stop_on_signals

TICK = Tick(
    step=12_345,
    total_steps=100_000,
    epoch=1.5,
    loss=0.8125,
    baselines={"zero": 0.984, "copy_previous": 1.5},
    lr=1.5e-3,
    images_per_s=12_345.0,
    data_wait=0.12,
    num_bad=7,
)
TOLD = (
    "loss 0.8125 (zero 0.98, copy 1.50)",
    "lr 1.5e-03",
    "12,345 images/s",
    "data wait 12%",
    "7 unreadable",
)


def terminal(width: int) -> Console:
    return Console(width=width, height=25, force_terminal=True, file=io.StringIO())


def written(console: Console) -> str:
    """What was written, without the codes of colours and of moving about."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.fixture
def root_handler():
    """A handler on standard error, as `logging.basicConfig` makes it."""
    handler = logging.StreamHandler(sys.stderr)
    logging.getLogger().addHandler(handler)
    yield handler
    logging.getLogger().removeHandler(handler)


# ------------------------------------------------------------------------------------------- on a terminal


@pytest.mark.parametrize("width", [80, 120, 200])
def test_the_bar_loses_nothing_at_any_usual_width(width):
    console = terminal(width)
    with ConsoleReporter(console) as reporter:
        reporter.begin(12_000, 100_000)
        reporter.update(TICK)
    lines = [line.rstrip() for line in written(console).splitlines()]
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    drawn = next(at for at in reversed(range(len(lines))) if lines[at].startswith("step"))
    assert re.fullmatch(r"step 12,345/100,000 \S+ \d:\d\d:\d\d left [-\d]+:[-\d]{2}:[-\d]{2}", lines[drawn])
    assert len(lines) - drawn <= 3
    parts = [part for line in lines[drawn + 1 :] for part in line.split(" · ")]
    assert parts == list(TOLD), "none broken in two"


def test_a_run_of_a_million_steps_and_days_keeps_its_time_left():
    console = terminal(80)
    with ConsoleReporter(console) as reporter:
        reporter.begin(0, 1_000_000)
        assert reporter._bar is not None
        reporter._bar.tasks[0].start_time = time.monotonic() - 2 * 86_400
        reporter.update(TICK._replace(step=500_000, total_steps=1_000_000, baselines={}))
    assert re.search(r"step 500,000/1,000,000 \S+ 2 days, \d:\d\d:\d\d left \S+\s*\n", written(console))


def test_log_records_come_out_above_the_bar(root_handler):
    console, before = terminal(80), root_handler.stream
    with ConsoleReporter(console) as reporter:
        reporter.begin(0, 10)
        reporter.update(TICK._replace(step=1, total_steps=10))
        logging.getLogger("nextblock.test").warning("gradients of [step] 3 are not finite")
    assert root_handler.stream is before
    lines = written(console).splitlines()
    told = [at for at, line in enumerate(lines) if "gradients of [step] 3 are not finite" in line]
    assert len(told) == 1, "once, and whole"
    assert lines[told[0] + 1].startswith("step "), "and the bar again below it"


def test_handlers_of_the_log_are_restored_after_a_failure_and_files_left_alone(root_handler, tmp_path):
    file_handler = logging.FileHandler(tmp_path / "log")
    logging.getLogger().addHandler(file_handler)
    before, file_before = root_handler.stream, file_handler.stream

    def fail() -> None:
        with ConsoleReporter(terminal(80)) as reporter:
            reporter.begin(0, 10)
            assert root_handler.stream is not before
            assert file_handler.stream is file_before
            raise ArithmeticError

    try:
        with pytest.raises(ArithmeticError):
            fail()
        assert root_handler.stream is before
    finally:
        logging.getLogger().removeHandler(file_handler)
        file_handler.close()


# ---------------------------------------------------------------------------------------------- elsewhere


def test_off_a_terminal_a_step_is_one_line_with_everything():
    console = Console(width=80, force_terminal=False, file=io.StringIO())
    with ConsoleReporter(console) as reporter:
        reporter.begin(99_999, 100_000)
        reporter.update(TICK._replace(step=100_000))
    (line,) = written(console).splitlines()
    assert line.startswith("step 100000/100000 · epoch 1.5 · ")
    assert all(words in line for words in TOLD)
    assert line.endswith("0 s left")


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_acknowledged_at_once(number, capfd):
    with stop_on_signals() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop.signal is number
        told = capfd.readouterr().err
    assert told == (
        f"{number.name}: finishing this step, then saving; again to stop at once without saving\n"
    )


def test_a_second_signal_stops_at_once(capfd):
    def twice() -> None:
        with stop_on_signals():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        twice()
    assert capfd.readouterr().err.count("SIGINT") == 1


def test_a_closed_standard_error_does_not_lose_the_request(monkeypatch):
    def closed(*_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", closed)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is signal.SIGINT


def test_outside_the_main_thread_signals_are_left_alone():
    handlers = []

    def look() -> None:
        with stop_on_signals() as stop:
            handlers.append((signal.getsignal(signal.SIGINT), bool(stop)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [(before, False)]
