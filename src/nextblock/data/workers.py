"""How a worker process starts: deaf to ctrl-C and to SIGTERM from strangers.

Ctrl-C and many a scheduler's SIGTERM reach every process of the group. The main process finishes its step and
writes a checkpoint; its workers are needed until then, and go when it goes or tells them to.
"""

from __future__ import annotations

import os
import signal
import threading

__all__ = ["start_worker"]


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
