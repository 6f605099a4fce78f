"""How worker processes start, deaf to ctrl-C and to SIGTERM from strangers, and how they end after an error.

Ctrl-C and many a scheduler's SIGTERM reach every process of the group. The main process finishes its step and
writes a checkpoint; its workers are needed until then, and go when it goes or tells them to.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Iterator
from typing import TypeVar

from torch.utils.data import DataLoader

__all__ = ["from_workers", "start_worker"]

T = TypeVar("T")


def start_worker(worker: int) -> None:  # noqa: ARG001 - the loader passes the worker's number
    """Ignore ctrl-C; obey SIGTERM only from the parent process, where the system tells who sent it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def from_workers(loader: DataLoader[T]) -> Iterator[T]:
    """What a loader gives; when one of its workers fails, all of them end before the error is raised.

    The frames of torch that raise it again hold the error, which holds the frames. Left to the garbage
    collector, the workers would be told to end too late to hear it, and each be waited for during 5 s.
    """
    try:
        yield from loader
    except Exception as error:
        if loader.num_workers:
            traceback.clear_frames(error.__traceback__)
        raise
