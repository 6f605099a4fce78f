"""What a run shows on a terminal and off it, how it answers signals, and that it keeps freed memory."""

import ctypes
import io
import logging
import math
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe, get_context

import pytest
import torch
from rich.console import Console

from nextblock.logs import muted
from nextblock.train import runtime
from nextblock.train.logging import Reporter, StepOutcome, Tick, Window, log_to_file
from nextblock.train.runtime import stop_on_signals

REFERENCES, LATEST = {"zero": 0.984, "copy_previous": 1.5}, {"val_loss": 0.79, "knn/top1": 0.512}
VALUES = {"loss": 0.8125, "images_per_s": 12_345.0, "data_wait": 0.12}
TICK = Tick(12_345, 1.5, 1.5e-3, VALUES, num_bad=7, baselines=REFERENCES, latest=LATEST)
SHOWN = (
    "epoch 1.5 · loss 0.8125 (zero 0.98, copy 1.50) · val 0.7900 · kNN 51.2% · lr 1.5e-03 · "
    "12,345 images/s · data wait 12% · 7 unreadable"
)


def console(width: int = 80, *, is_terminal: bool = False) -> Console:
    return Console(width=width, height=25, force_terminal=is_terminal, file=io.StringIO())


def written(console: Console) -> str:
    """What was written, without the codes of colours and of moving about."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.mark.parametrize("width", [80, 200])
def test_the_bar_loses_nothing_at_any_usual_width(width):
    shown = console(width, is_terminal=True)
    with Reporter(shown) as reporter:
        reporter.begin(12_000, 100_000)
        reporter.update(TICK)
    lines = [line.rstrip() for line in written(shown).splitlines()]
    assert all(len(line) <= width for line in lines)
    assert "…" not in "".join(lines)
    drawn = next(at for at in reversed(range(len(lines))) if lines[at].startswith("step"))
    assert re.fullmatch(r"step 12,345/100,000 \S+ \d:\d\d:\d\d \d+ s left", lines[drawn])
    parts = [part for line in lines[drawn + 1 :] for part in line.split(" · ")]
    assert " · ".join(parts) == SHOWN, "none broken in two"


def test_log_records_come_out_above_the_bar_and_handlers_are_restored_after_a_failure():
    handler, shown = logging.StreamHandler(sys.stderr), console(is_terminal=True)
    logging.getLogger().addHandler(handler)
    with pytest.raises(ArithmeticError), Reporter(shown) as reporter:
        reporter.begin(0, 10)
        reporter.update(TICK._replace(step=1))
        logging.getLogger("nextblock.test").warning("gradients of [step] 3 are not finite")
        raise ArithmeticError
    logging.getLogger().removeHandler(handler)
    assert handler.stream is sys.stderr
    lines = written(shown).splitlines()
    (told,) = [at for at, line in enumerate(lines) if "gradients of [step] 3 are not finite" in line]
    assert lines[told + 1].startswith("step "), "and the bar again below it"


class Gone(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(5, "Input/output error")


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_that_is_gone_fails_nothing(is_terminal):
    with Reporter(Console(width=80, force_terminal=is_terminal, file=Gone())) as reporter:
        reporter.begin(0, 100_000)
        reporter.update(TICK)
        reporter.note("words")


def test_off_a_terminal_a_step_is_told_whole_within_80_columns_and_only_a_long_one_tells_how_far_it_is():
    shown = console()
    with Reporter(shown) as reporter:
        reporter.begin(99_998, 100_000)
        reporter.within(99_998, 0.1)
        assert written(shown) == ""
        reporter._began_s -= 100
        reporter._step_began_s -= 100
        reporter.within(99_998, 0.25)
        reporter.update(TICK._replace(step=100_000))
    early, *lines = written(shown).splitlines()
    assert early == "step 99998/100000 · 25% of step 99999 · 11 min 40 s left"
    assert all(len(line) <= 80 for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
    parts = [part for line in lines for part in line.strip().split(" · ")]
    assert " · ".join(parts) == f"step 100000/100000 · 0 s left · {SHOWN}", "none broken in two"


def test_what_is_being_finished_is_told_with_about_how_long_it_takes():
    reporter = Reporter(console())
    reporter.begin(0, 10)
    saved = "; then the run is saved"
    assert reporter.finishing() == f"finishing step 1 (its duration is not known yet; 0 s so far){saved}"
    reporter._began_s -= 40
    reporter.update(TICK._replace(step=4))
    assert reporter.finishing() == f"finishing step 5, about 10 s{saved}"
    with reporter.busy("the validation", 4):
        assert reporter.finishing() == f"finishing the validation{saved}"
    assert reporter.finishing() == f"finishing step 5, about 10 s{saved}"
    with (reporter := Reporter(console())).busy("the monitors", 0):
        assert reporter.finishing() == "finishing the monitors; there is no step to save yet"


def test_a_measurement_shows_its_progress_if_it_takes_long():
    reporter = Reporter(shown := console())
    with reporter.busy("the monitors", 0):
        reporter.measuring("features", 10, 10_000)
        reporter._work_began_s -= 20
        reporter.measuring("features", 2_000, 10_000)
        reporter.measuring("features", 3_000, 10_000)  # the last line is not ten seconds old
    assert written(shown) == "measuring features · 2,000 of 10,000 images · 1 min 20 s left\n"
    reporter = Reporter(shown := console(is_terminal=True))
    with reporter:
        reporter.begin(0, 10)
        with reporter.busy("the monitors", 0):
            reporter._work_began_s -= 20
            reporter.measuring("features", 2_000, 10_000)
    assert "measuring features · 2,000 of 10,000 images" in written(shown)


def test_control_characters_of_a_name_do_not_reach_the_terminal():
    Reporter(shown := console()).note("complete: 3 steps, in y/e\x1b[31mvil")
    assert written(shown) == "complete: 3 steps, in y/e\\x1b[31mvil\n"


def test_a_window_averages_what_is_finite_and_counts_what_was_skipped():
    window = Window()
    for outcome in (1.0, 2.0, 8), (math.nan, math.nan, 8), (3.0, math.inf, 8), (0.0, 0.0, 0):
        window.add(StepOutcome(*outcome), waited_s=1.0, elapsed_s=2.0)
    values = window.values()
    assert (values["loss"], values["grad_norm"], values["skipped"]) == (2.0, 2.0, 3)
    assert (values["images_per_s"], values["data_wait"]) == (3.0, 0.5)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_is_noted_and_acknowledged_and_handlers_are_put_back(number, capfd):
    before = signal.getsignal(number)
    signal.signal(number, signal.default_int_handler)  # nohup ignores SIGHUP
    with stop_on_signals(lambda: "finishing step 5, about 10 s; then the run is saved") as stop:
        assert not stop
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is number
    shown = capfd.readouterr().err
    assert shown.startswith(f"{number.name}: finishing step 5, about 10 s; then the run is saved. Again")
    assert shown.count("SIG") == 1, "two at once are one request"
    assert signal.signal(number, before) is signal.default_int_handler
    assert signal.set_wakeup_fd(-1) == -1


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


def test_a_sighup_that_is_ignored_stays_so_and_outside_the_main_thread_signals_are_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop
    signal.signal(signal.SIGHUP, before)

    def look() -> object:
        with stop_on_signals():
            return signal.getsignal(signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(look).result() is signal.getsignal(signal.SIGINT)


def multiply(errors, pids) -> None:
    """With a child process, be deep in a kernel for minutes, without a bytecode."""
    os.dup2(errors, 2)
    child = get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    with stop_on_signals():
        matrix = torch.ones(12_000, 12_000)
        pids.send(child.pid)
        while True:
            torch.mm(matrix, matrix)


def test_signals_are_answered_while_torch_computes_and_the_second_ends_all_processes(monkeypatch):
    monkeypatch.setattr(runtime, "ONE_REQUEST_S", 0.1)
    (reader, errors), (there, here) = os.pipe(), Pipe()
    process = get_context("fork").Process(target=multiply, args=(errors, here))
    process.start()
    assert process.pid is not None
    os.close(errors)
    with os.fdopen(reader) as shown:
        child = there.recv()
        time.sleep(0.5)  # it is multiplying
        os.kill(process.pid, signal.SIGINT)
        assert shown.readline().startswith("SIGINT: finishing this step; then the run is saved")
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        assert process.exitcode == 128 + signal.SIGINT
        assert shown.readline() == "SIGINT: stopped without saving\n"
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until init has buried it
            os.kill(child, 0)
            time.sleep(0.05)


def test_lines_below_the_level_are_muted_and_levels_are_restored_even_after_an_error(caplog):
    one = logging.getLogger("of.one")
    with pytest.raises(KeyError), muted(logging.ERROR, "of.one"):
        one.warning("held")
        one.error("told")
        raise KeyError
    assert caplog.messages == ["told"]
    assert one.level == logging.NOTSET


MAPPED = """
import ctypes, torch
from nextblock.train.runtime import process_settings
class Memory(ctypes.Structure):  # the 10 numbers of mallinfo2 in glibc's malloc.h; the fifth is mapped memory
    _fields_ = [("numbers", ctypes.c_size_t * 10)]
mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Memory
def mapped(size):
    before = mallinfo2().numbers[4]
    tensor = torch.ones(size)
    return mallinfo2().numbers[4] - before
print(mapped(2**24))  # 64 MB
with process_settings(torch.device("cpu")):
    print(mapped(2**24))
print(mapped(2**26))  # larger than what the heap may still hold
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's malloc")
def test_tensors_come_from_the_heap_while_a_run_lasts():
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True)
    before, during, after = map(int, done.stdout.split())
    assert during == 0
    assert (before >= 2**26, after >= 2**28) == (True, True)


def test_another_ranks_log_file_is_made_by_its_first_record(tmp_path):
    path = tmp_path / "logs" / "rank_0001.log"
    path.parent.mkdir()
    with log_to_file(path):
        assert not path.exists()
        logging.getLogger("nextblock.train.loop").warning("step %d skipped", 3)
    logging.getLogger("nextblock.train.loop").warning("afterwards")
    assert re.fullmatch(r"\S+ \S+ step 3 skipped\n", path.read_text())
