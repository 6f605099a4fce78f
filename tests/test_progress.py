"""What a run shows on a terminal and off it, and how it answers signals."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
from rich.console import Console

from nextblock.train.logging import Reporter, StepOutcome, Tick, Window
from nextblock.train.runtime import stop_on_signals

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
    latest={"val_loss": 0.79, "knn/top1": 0.512},
)
SHOWN = (
    "epoch 1.5",
    "loss 0.8125 (zero 0.98, copy 1.50)",
    "val 0.7900",
    "kNN 51.2%",
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
    with Reporter(console) as reporter:
        reporter.begin(12_000, 100_000)
        reporter.update(TICK)
    lines = [line.rstrip() for line in written(console).splitlines()]
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    drawn = next(at for at in reversed(range(len(lines))) if lines[at].startswith("step"))
    assert re.fullmatch(r"step 12,345/100,000 \S+ \d:\d\d:\d\d \d+ s left", lines[drawn])
    parts = [part for line in lines[drawn + 1 :] for part in line.split(" · ")]
    assert parts == list(SHOWN), "none broken in two"


def test_a_run_of_a_million_steps_and_days_keeps_its_time_left(monkeypatch):
    console = terminal(80)
    with Reporter(console) as reporter:
        reporter.begin(0, 1_000_000)
        reporter._began_s -= 2 * 86_400
        reporter.within(500_000, 0.25)
    assert re.search(r"step 500,000.25/1,000,000 \S+ \d:\d\d:\d\d (2 d 0 h|1 d 23 h) left", written(console))


def test_log_records_come_out_above_the_bar(root_handler):
    console, before = terminal(80), root_handler.stream
    with Reporter(console) as reporter:
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
        with Reporter(terminal(80)) as reporter:
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


class Gone(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_that_is_gone_fails_nothing(is_terminal):
    with Reporter(Console(width=80, force_terminal=is_terminal, file=Gone())) as reporter:
        reporter.begin(0, 100_000)
        reporter.update(TICK)
        reporter.note("words")


# ---------------------------------------------------------------------------------------------- elsewhere


def test_off_a_terminal_a_step_is_one_line_with_everything():
    console = Console(width=80, force_terminal=False, file=io.StringIO())
    with Reporter(console) as reporter:
        reporter.begin(99_999, 100_000)
        reporter.update(TICK._replace(step=100_000))
    (line,) = written(console).splitlines()
    assert line.startswith("step 100000/100000 · epoch 1.5 · ")
    assert all(words in line for words in SHOWN)
    assert line.endswith("0 s left")


def test_off_a_terminal_only_a_long_step_tells_how_far_it_is():
    console = Console(width=80, force_terminal=False, file=io.StringIO())
    with Reporter(console) as reporter:
        reporter.begin(0, 2)
        reporter.within(0, 0.1)
        assert written(console) == ""
        reporter._began_s -= 100
        reporter._step_began_s -= 100
        reporter.within(0, 0.25)
    assert written(console) == "step 0/2 · 25% of step 1 · 11 min 40 s left\n"


def test_what_is_being_finished_is_told_with_about_how_long_it_takes():
    reporter = Reporter(Console(file=io.StringIO()))
    reporter.begin(0, 10)
    assert reporter.finishing() == "finishing step 1 (its length is not known yet; 0 s so far)"
    reporter._began_s -= 40
    reporter.update(TICK._replace(step=4, total_steps=10))
    assert reporter.finishing() == "finishing step 5, about 10 s"
    reporter.busy_with = "validation"
    assert reporter.finishing() == "finishing validation"


# ------------------------------------------------------------------------------------------------- windows


def test_a_window_averages_what_is_finite_and_counts_what_was_skipped():
    window = Window()
    outcomes = [(1.0, 2.0, 8), (float("nan"), float("nan"), 8), (3.0, float("inf"), 8), (0.0, 0.0, 0)]
    for outcome in outcomes:
        window.add(StepOutcome(*outcome), waited_s=1.0, elapsed_s=2.0)
    values = window.values()
    assert (values["loss"], values["grad_norm"], values["skipped"]) == (2.0, 2.0, 3)
    assert (values["images_per_s"], values["data_wait"]) == (3.0, 0.5)


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_noted_and_acknowledged_and_handlers_are_put_back(number, capfd):
    before = signal.getsignal(number)
    with stop_on_signals(lambda: "finishing step 5, about 10 s") as stop:
        assert not stop
        os.kill(os.getpid(), number)
        assert stop.signal is number
    shown = capfd.readouterr().err
    assert shown.startswith(f"{number.name}: finishing step 5, about 10 s; the run is then saved. Again to")
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_two_signals_at_once_are_one_request(capfd):
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGINT
    assert capfd.readouterr().err.count("SIG") == 1


def test_a_closed_standard_error_does_not_lose_the_request(monkeypatch):
    write = os.write

    def closed(descriptor: int, content: bytes) -> int:
        if descriptor == 2:
            raise BrokenPipeError
        return write(descriptor, content)

    monkeypatch.setattr(os, "write", closed)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.signal is signal.SIGINT


def test_a_sighup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop
    finally:
        signal.signal(signal.SIGHUP, before)


IN_A_KERNEL = """
import multiprocessing, sys, time, torch
from nextblock.train.runtime import stop_on_signals
torch.set_num_threads(1)
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
child.start()
with stop_on_signals():
    print(child.pid, flush=True)
    a = torch.randn(20_000, 20_000)
    while True:
        a @ a  # minutes without a bytecode
"""


def test_signals_are_answered_while_torch_computes_and_the_second_ends_all_processes():
    with subprocess.Popen(
        [sys.executable, "-c", IN_A_KERNEL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        child = int(process.stdout.readline())
        time.sleep(3)  # it is multiplying
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("SIGINT: finishing this step; the run is then saved")
        time.sleep(1.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 128 + signal.SIGINT
        assert process.stderr.readline() == "SIGINT: stopped without saving\n"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until init has buried it
            os.kill(child, 0)
            time.sleep(0.05)


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
