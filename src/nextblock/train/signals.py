"""Stopping on request: ctrl-C and SIGTERM let the step in hand finish and the run be saved."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

__all__ = ["StopRequest", "stop_on_signals"]


class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGINT and SIGTERM, and say so, instead of dying of them; a second one ends the process at once.

    Outside the main thread, where Python handles no signals, nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)
        _acknowledge(request.signal)

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _acknowledge(number: signal.Signals) -> None:
    """Say so on standard error, past Python's buffers: the signal may have interrupted a write to them."""
    text = f"{number.name}: finishing this step, then saving; again to stop at once without saving\n"
    with suppress(OSError):  # the terminal may have gone, which must not keep the run from being saved
        # A progress bar of two or three lines erases as many when it is next drawn: those below the text.
        os.write(2, (f"\n{text}\n\n" if os.isatty(2) else text).encode())
