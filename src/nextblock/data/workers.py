"""Run work ahead in worker processes, in order, and report workers that are killed.

Training, `doctor` and `pack` use this. Ctrl-C and many schedulers' SIGTERM reach every process of the group,
but the main process needs its workers until it has finished its step and saved.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from multiprocessing import connection
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils.signal_handling import _remove_worker_pids

from nextblock.data.sources.base import DataError, Source
from nextblock.launch import available_cores

T = TypeVar("T")
R = TypeVar("R")

# Called with the number of the next image to read, so that a crash can name it.
Note = Callable[[int], None]


class WorkerError(DataError):
    """A worker process was killed."""


def resolve_workers(workers: int | None, source: Source, sharing: int = 1) -> int:
    """The number of workers: as given; 0 for a source in memory; else the cores minus one, at most 8.

    `sharing` processes, including this one, share the cores.
    """
    if workers is not None:
        return workers
    if source.in_memory:
        return 0
    return min(8, max(0, available_cores() // sharing - 1))


def run_in_workers(
    function: Callable[[T, Note], R], items: Iterable[T], source: Source, workers: int, *, ahead: int = 2
) -> Generator[R, None, None]:
    """Yield `function(item, note)` for every item, in order; each worker prepares `ahead` items in advance.

    Without workers the main process computes each result on demand. `WorkerError` names the image that a
    killed worker was reading, `DataError` the one for which there was no memory.
    """
    # The image that each worker reads. A killed worker leaves no message, but shared memory outlives it.
    reading = torch.full((max(1, workers),), -1, dtype=torch.int64)
    if workers:
        reading.share_memory_()
    loader: DataLoader[R] = DataLoader(
        _Work(function, reading, source),
        batch_sampler=items,  # type: ignore[arg-type] # any iterable of items will do
        collate_fn=_as_is,
        num_workers=workers,
        prefetch_factor=ahead if workers else None,
        worker_init_fn=_start if workers else None,
        generator=torch.Generator(),  # without its own it draws from the global one
    )
    iterator: Any = iter(loader)
    if workers:
        # torch's SIGCHLD handler would raise anywhere in the main thread, even within the optimizer's step,
        # and leave the weights half updated. So it must not watch these workers; `_noticing_deaths` does.
        _remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    while True:
        try:
            with _noticing_deaths(iterator) if workers else nullcontext():
                result = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            # torch's frames, which re-raise a worker's error, hold the iterator. Left to the garbage
            # collector, the workers would be stopped late, after a wait of 5 s each.
            traceback.clear_frames(error.__traceback__)
            if not workers:
                raise
            if isinstance(error, OSError | EOFError):
                # Fetching shared memory from a worker that is just dying failed: wait a little.
                sentinels = {worker.sentinel: worker for worker in iterator._workers}
                for sentinel in connection.wait(list(sentinels), timeout=5):
                    sentinels[sentinel].join(5)  # it closes its files before it has an exit code
            killed = _killed_workers(iterator)
            if not killed:
                raise
            (worker, code), cause = killed[0], "most likely the machine ran out of memory: use"
            if -code == signal.SIGBUS:  # raised by a write when shared memory is full
                cause = "shared memory (/dev/shm) is full: give more (docker run --shm-size=2g), or use"
            sample = int(reading[worker])
            where = f" while it read {source.name(sample)}" if sample >= 0 else ""
            raise WorkerError(
                f"a data worker was killed by {signal.Signals(-code).name}{where}; {cause} fewer "
                "--data.workers or a lower --data.max_pixels"
            ) from None
        yield result


@contextmanager
def _noticing_deaths(iterator: Any) -> Iterator[None]:
    """While we wait for a result, raise as soon as a worker is killed."""
    # If a worker is killed while it sends a large result, the rest of the message never arrives, and reading
    # it would wait forever.
    outer: Any = signal.getsignal(signal.SIGCHLD) or signal.SIG_DFL

    def notice(number: int, frame: Any) -> None:
        if callable(outer):
            outer(number, frame)
        if _killed_workers(iterator):
            raise RuntimeError("a worker was killed")

    is_main = threading.current_thread() is threading.main_thread()  # only it may have handlers
    if is_main:
        signal.signal(signal.SIGCHLD, notice)
    try:
        # One that died while nobody waited may have left half a message too.
        if _killed_workers(iterator):
            raise RuntimeError("a worker was killed")
        yield
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, outer)


def _killed_workers(iterator: Any) -> list[tuple[int, int]]:
    """Number and exit code of every worker killed by a signal."""
    return [(n, w.exitcode) for n, w in enumerate(iterator._workers) if (w.exitcode or 0) < 0]


class _Work(Dataset):
    """What a worker runs."""

    def __init__(self, function: Callable[[Any, Note], Any], reading: torch.Tensor, source: Source) -> None:
        self._function, self._reading, self._source = function, reading, source

    # torch prefers this to __getitem__, and passes whatever the batch sampler yields.
    def __getitems__(self, item: Any) -> Any:
        worker = get_worker_info()
        place = 0 if worker is None else worker.id
        # Running out of memory is not the image's fault: it must not become a hole in the data.
        try:
            return self._function(item, partial(self._reading.__setitem__, place))
        except MemoryError as error:
            name = self._source.name(int(self._reading[place]))
            raise DataError(
                f"not enough memory to read {name} ({str(error) or 'MemoryError'}); the file may be good: "
                "use fewer --data.workers or a lower --data.max_pixels"
            ) from error


# Not a lambda: it is pickled if workers are spawned.
def _as_is(result: Any) -> Any:
    return result


def _start(worker: int) -> None:  # noqa: ARG001 - the loader passes the worker's number
    """Ignore the signals that stop a run; obey SIGTERM only from the parent, if the system can tell."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # sigwaitinfo fetches a blocked signal with its sender: torch too ends workers with SIGTERM.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
