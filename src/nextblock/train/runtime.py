"""Process-wide state of a run: device and precision, seeds, memory, signals.

A library call must not change its caller's process, so every change made here is undone at the end.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch

from nextblock.config import ModelConfig
from nextblock.errors import UsageError
from nextblock.plan import peak_tflops, step_flops

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

# ------------------------------------------------------------------------------------ device and precision


def choose_device(name: str) -> torch.device:
    """The named device, or for "auto" the best one; `ValueError` if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(kind for kind, is_available in available.items() if is_available))
    if not available[name]:
        usable = ", ".join(kind for kind, is_available in available.items() if is_available)
        raise UsageError(
            f"device {name!r} is not available to this torch ({torch.__version__}); available: {usable}"
        )
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Name of the device; for a CPU, with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else device.type


def device_use(
    device: torch.device, images_per_s: float, model: ModelConfig | None, processes: int
) -> dict[str, float]:
    """Peak memory of this process (GPU memory on a GPU), and the model's TFLOP/s on all devices together.

    If the device's 16-bit peak is known, also its model-FLOPs utilisation (`mfu`).
    """
    peak = None
    if device.type == "cuda":
        memory, peak = torch.cuda.max_memory_allocated(device), peak_tflops(device_name(device))
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if model is None:
        return {"memory_gb": memory / 1e9}
    tflops = images_per_s * step_flops(model) / 1e12
    share = {} if peak is None else {"mfu": tflops / (processes * peak)}
    return {"memory_gb": memory / 1e9, "tflops": tflops, **share}


def free_memory() -> int:
    """Free memory in bytes of this machine, or of its container if that has less."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    with suppress(OSError, ValueError):  # "max" if there is no limit
        limit, used = (int(Path("/sys/fs/cgroup", f"memory.{one}").read_text()) for one in ("max", "current"))
        free = min(free, limit - used)
    return free


def is_native(precision: str, device: torch.device) -> bool:
    """Whether the device supports this precision; if not, torch emulates it, up to 48x slower on a CPU."""
    if precision == "fp32" or device.type == "mps":
        return True
    if device.type == "cuda":
        return precision == "fp16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 and later; "bf16" is ARM's name
        has = torch.cpu.get_capabilities()
        return precision == "bf16" and any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return precision == "bf16" and torch.cpu._is_avx512_bf16_supported()


def native_precision(device: torch.device) -> str:
    """The precision of `train.precision auto`: bf16 if the device supports it, else fp32."""
    return "bf16" if is_native("bf16", device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast context for forward passes; `ValueError` for fp16 on a CPU."""
    if precision == "auto":
        precision = native_precision(device)
    if precision == "fp16" and device.type == "cpu":
        raise UsageError("train.precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    dtype = DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


# ----------------------------------------------------------------------------------- process-wide settings


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
MMAP_MAX, TRIM_THRESHOLD = 65_536, 128 * 1024  # glibc's defaults


@contextmanager
def process_settings(device: torch.device, *, deterministic: bool = False) -> Iterator[None]:
    """Configure memory, algorithms and generators of the process for one run; restore them at the end."""
    libc = ctypes.CDLL(None) if device.type == "cpu" and sys.platform.startswith("linux") else None
    with ExitStack() as stack:
        cuda = [torch.cuda.current_device()] if device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices=cuda))
        stack.enter_context(warnings.catch_warnings())
        # FSDP2 warns about in-place operations on a sharded model's outputs; there are none.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
        # DDP warns about gradients with axes of length 1 (a class token's), whose strides do not matter.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        if libc is not None and hasattr(libc, "mallopt"):  # musl has none
            # By default glibc maps each large tensor and unmaps it when freed. The kernel then clears its
            # pages at first touch, which takes a tenth of a training step or more on a CPU. With the heap for
            # all sizes and no trimming, a step reuses the memory of the previous one; the peak is the same.
            libc.mallopt(M_MMAP_MAX, 0)
            libc.mallopt(M_TRIM_THRESHOLD, -1)
            stack.callback(libc.malloc_trim, 0)  # callbacks run in reverse order
            stack.callback(libc.mallopt, M_TRIM_THRESHOLD, TRIM_THRESHOLD)
            stack.callback(libc.mallopt, M_MMAP_MAX, MMAP_MAX)
        if deterministic:
            stack.callback(
                torch.use_deterministic_algorithms,
                torch.are_deterministic_algorithms_enabled(),
                warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
            )
            stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
            if "CUBLAS_WORKSPACE_CONFIG" not in os.environ:
                os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
                stack.callback(os.environ.pop, "CUBLAS_WORKSPACE_CONFIG", None)
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        yield


# ------------------------------------------------------------------------------------------------- signals


class StopRequest:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __bool__(self) -> bool:
        return self.signal is not None


ONE_REQUEST_S = 1.0
"""Signals within this time are one request: Ctrl-C reaches a launcher and its child, to which the launcher
forwards it."""


@contextmanager
def stop_on_signals(
    doing: Callable[[], str] = lambda: "finishing this step; then the run is saved", *, is_quiet: bool = False
) -> Iterator[StopRequest]:
    """Record a stop signal instead of exiting; a second signal ends the process within seconds.

    The signals are SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2, as schedulers differ. `doing` describes the
    current work and its remaining time; with `is_quiet` nothing is printed. Does nothing outside the main
    thread, where Python handles no signals, and leaves an ignored SIGHUP (nohup) ignored.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _: object) -> None:
        request.signal = request.signal or signal.Signals(number)

    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    # Python runs handlers between bytecodes of the main thread, so possibly minutes later if torch is
    # computing. The wakeup descriptor receives the signal's number at once, from C, and a thread reads it.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, note) for number in numbers}
    watcher = threading.Thread(
        target=_watch, args=(reader, numbers, request, None if is_quiet else doing), daemon=True
    )
    watcher.start()
    try:
        yield request
    finally:
        signal.set_wakeup_fd(wakeup_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.write(writer, b"\0")  # ends the watcher; closing would not, as workers inherited this end
        watcher.join()
        os.close(writer)
        os.close(reader)


def _watch(
    reader: int, numbers: list[signal.Signals], request: StopRequest, doing: Callable[[], str] | None
) -> None:
    first_s: float | None = None
    while True:
        for number in os.read(reader, 64):
            if number == 0:
                return
            if number not in numbers:  # SIGCHLD of a worker
                continue
            name = signal.Signals(number).name
            if first_s is None:
                first_s = time.monotonic()
                request.signal = request.signal or signal.Signals(number)
                if doing is not None:
                    _say(f"{name}: {doing()}. Again: stop at once, unsaved")
            elif time.monotonic() - first_s > ONE_REQUEST_S:
                # No exception reaches a main thread that is inside a kernel, so exit here. Files that it was
                # writing have temporary names. Workers would survive for seconds, so they are killed.
                _say(f"{name}: stopped without saving")
                for child in multiprocessing.active_children():
                    child.kill()
                os._exit(128 + number)


def _say(text: str) -> None:
    """Write to stderr without Python's buffers, as the main thread may hold their lock."""
    with suppress(OSError):  # a closed terminal must not prevent the run from being saved
        # The progress bar erases two or three lines when it redraws, so leave empty lines below the text. It
        # also hides the cursor, so show it again.
        os.write(2, (f"\n{text}\x1b[?25h\n\n\n" if os.isatty(2) else f"{text}\n").encode())
