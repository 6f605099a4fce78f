"""Work done ahead in worker processes, in order; what becomes of a worker that is killed.

Training, `doctor` and `pack` hand their work out here. Ctrl-C and many a scheduler's SIGTERM reach every
process of the group: the main process finishes its step and saves, and needs its workers until then.
"""

from __future__ import annotations

import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import connection
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from nextblock.data.sources.base import DataError, Source

__all__ = ["Note", "WorkerError", "resolve_workers", "run_in_workers"]

T = TypeVar("T")
R = TypeVar("R")

# Called with the number of the image that is read next, so that a crash can name it.
Note = Callable[[int], None]


class WorkerError(DataError):
    """A worker process was killed."""


def resolve_workers(workers: int | None, source: Source) -> int:
    """Worker processes: as asked, else none for a source in memory, else a core each but one, up to 8."""
    if workers is not None:
        return workers
    if source.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores - 1)


def run_in_workers(
    function: Callable[[T, Note], R], items: Iterable[T], source: Source, workers: int, *, ahead: int = 2
) -> Iterator[R]:
    """`function(item, note)` of every item, in their order; each worker prepares `ahead` items in advance.

    Without workers the main process does it when asked for. `WorkerError` names the image that was read when
    a worker was killed; `DataError` the one for which there was no memory.
    """
    # One number a worker, shared: which image it reads.
    # A crash leaves no message behind; the number does outlive the worker.
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
    iterator = iter(loader)
    with _sigchld_only_while_waiting() as waiting:
        while True:
            try:
                with waiting():
                    if workers:
                        _check_alive(iterator)
                    result = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                # The frames of torch that raise a worker's error again hold the iterator. Left to the garbage
                # collector, the workers would be told to end too late, and each be waited for during 5 s.
                traceback.clear_frames(error.__traceback__)
                if workers and isinstance(error, OSError | EOFError):
                    _wait_for_death(iterator)
                dead = _dead(iterator) if workers else []
                if not dead:
                    raise
                raise _killed(dead[0], reading, source) from None
            yield result


class _Work(Dataset):
    """What a worker runs."""

    def __init__(self, function: Callable[[Any, Note], Any], reading: torch.Tensor, source: Source) -> None:
        self._function, self._reading, self._source = function, reading, source

    def __getitems__(self, item: Any) -> Any:
        worker = get_worker_info()
        place = 0 if worker is None else worker.id
        note = partial(self._reading.__setitem__, place)
        try:
            return self._function(item, note)
        except MemoryError as error:
            name = self._source.name(int(self._reading[place]))
            raise DataError(
                f"not enough memory to read {name} ({str(error) or 'MemoryError'}); the file may be good: "
                "use fewer --data.workers or a lower --data.max_pixels"
            ) from error


def _as_is(result: Any) -> Any:
    return result


def _start(worker: int) -> None:  # noqa: ARG001 - the loader passes the worker's number
    """Ignore the signals that ask a run to stop; obey SIGTERM only from the parent, if the system tells."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        # A blocked signal waits to be fetched together with its sender: torch ends workers by SIGTERM too.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


# ------------------------------------------------------------------------------------------ killed workers


@contextmanager
def _sigchld_only_while_waiting() -> Iterator[Callable[[], Any]]:
    """Let torch's handler of a worker's death raise while we wait for a result, and at no other time.

    It would raise anywhere in the main thread, also amid the optimizer's step, and leave weights that are
    half old, half new. It must raise while we wait: of a worker killed as it sent a large result, half a
    message has arrived, and the rest never will.
    """
    is_waiting = False
    outer: Any = signal.getsignal(signal.SIGCHLD)
    is_main = threading.current_thread() is threading.main_thread() and callable(outer)
    # Of two loaders (training and validation) the inner one finds the outer one's handler here. While the
    # inner one waits, torch's own must be called: the outer one's raises only while the outer one waits.
    of_torch = getattr(outer, "of_torch", outer)

    def on_child(number: int, frame: Any) -> None:
        if is_waiting:
            of_torch(number, frame)
        elif of_torch is not outer:
            outer(number, frame)

    @contextmanager
    def waiting() -> Iterator[None]:
        nonlocal is_waiting
        is_waiting = True
        try:
            yield
        finally:
            is_waiting = False

    if is_main:
        on_child.of_torch = of_torch  # type: ignore[attr-defined]
        signal.signal(signal.SIGCHLD, on_child)
    try:
        yield waiting
    finally:
        if is_main:
            signal.signal(signal.SIGCHLD, outer)


def _dead(iterator: Any) -> list[tuple[int, int]]:
    """Number and exit code of every worker that has ended by a signal."""
    return [(n, w.exitcode) for n, w in enumerate(iterator._workers) if (w.exitcode or 0) < 0]


def _wait_for_death(iterator: Any) -> None:
    """Wait a little for a worker that is dying: the memory of its results was to be fetched from it."""
    sentinels = {worker.sentinel: worker for worker in iterator._workers}
    for sentinel in connection.wait(list(sentinels), timeout=5):
        sentinels[sentinel].join(5)  # it closes its files before it has an exit code


def _check_alive(iterator: Any) -> None:
    if _dead(iterator):
        raise RuntimeError("a worker has been killed")


def _killed(dead: tuple[int, int], reading: torch.Tensor, source: Source) -> WorkerError:
    worker, code = dead
    sample = int(reading[worker])
    where = f" while it read {source.name(sample)}" if sample >= 0 else ""
    if -code == signal.SIGBUS:
        cause = "shared memory (/dev/shm) is full: give more of it (docker run --shm-size=2g), or use"
    else:
        cause = "most likely the machine ran out of memory: use"
    return WorkerError(
        f"a data worker was killed by {signal.Signals(-code).name}{where}; {cause} fewer --data.workers or a "
        "lower --data.max_pixels"
    )
