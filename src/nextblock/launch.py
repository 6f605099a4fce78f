"""Start the processes of a run: read a launcher's environment, and run `--devices`.

Imports torch only inside functions, so that commands start fast.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from nextblock.errors import UsageError


class LaunchError(RuntimeError):
    """The environment describes an impossible set of processes."""


class World(NamedTuple):
    """Rank of this process and number of processes, as reported by the launcher."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    launcher: str | None = None
    """torchrun, slurm or mpi; None if started alone."""


def find_world(env: Mapping[str, str] = os.environ) -> World:
    """Read the ranks that torchrun, SLURM (`srun`), or Open MPI and LSF (`mpirun`, `jsrun`) set.

    Raises `LaunchError` if they contradict each other.
    """
    # Every process below a job step inherits SLURM's variables, so they are checked last. (mpirun starts its
    # daemons on other nodes in a job step of its own.) A shell inside an allocation also has SLURM_NTASKS,
    # but only a step of several tasks has SLURM_STEP_NUM_TASKS > 1.
    names = {
        "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        "mpi": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    }
    for launcher, (rank_name, size_name, local_name) in names.items():
        if rank_name not in env or size_name not in env:
            continue
        values = [env.get(name, "0") for name in (rank_name, size_name, local_name)]
        if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
            given = ", ".join(
                f"{name}={env[name]}" for name in (rank_name, size_name, local_name) if name in env
            )
            raise LaunchError(
                f"the environment has {given}; a rank is a number from 0 to {size_name} - 1: unset them to "
                "start one process, or start through torchrun, srun or mpirun"
            )
        rank, size, local_rank = map(int, values)
        if launcher != "torchrun" and size == 1:
            continue
        return World(rank, size, local_rank, launcher)
    return World()


def available_cores() -> int:
    """The cores that this process may use: containers and schedulers often limit them."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"
SHUTDOWN_TIMEOUT_S = 24 * 3600
"""A rank that is asked to stop finishes its step first, however long that takes; a second signal ends it."""


def launch(verb: str, argv: Sequence[str], devices: int, device: str) -> int:
    """Run `nextblock VERB ARGV` in several processes on this machine with torch's elastic launcher.

    Returns the run's exit status. Raises `UsageError` if the machine has fewer GPUs or cores, or if a
    launcher started this process.
    """
    launcher = find_world().launcher
    if launcher is not None:
        raise UsageError(f"--devices {devices} starts processes, but {launcher} has done so; leave it out")
    words = [word for word in argv if not word.startswith("--devices=")]
    if "--devices" in words:
        place = words.index("--devices")
        del words[place : place + 2]
    words += ["--debug"] * ("--debug" in sys.argv)  # no longer in `argv`
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    is_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    cores = available_cores()
    limit, unit = (torch.cuda.device_count(), "GPU") if is_cuda else (cores, "CPU core")
    if devices > limit:
        raise UsageError(
            f"--devices {devices}, but {socket.gethostname()} has {limit} {unit}{'s' * (limit != 1)}; "
            f"use at most --devices {limit}"
        )
    options = [f"--nproc-per-node={devices}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    parser = get_args_parser()
    # Later releases of torch let workers finish; earlier ones kill them 30 s after a signal.
    known = {option for action in parser._actions for option in action.option_strings}
    later = {"--signals-to-handle": SIGNALS, "--shutdown-timeout": SHUTDOWN_TIMEOUT_S}
    options += [f"{name}={value}" for name, value in later.items() if name in known]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // devices)))
    logging.disable(logging.ERROR)  # the launcher's errors; each process reports its own
    numbers = [getattr(signal, name) for name in SIGNALS.split(",")]
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        run(parser.parse_args([*options, "-m", "nextblock", verb, *words]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:  # the process has reported why
            return failure.exitcode
        killer = signal.Signals(-failure.exitcode).name
        sys.stderr.write(
            f"nextblock: rank {rank} on {socket.gethostname()} was killed by {killer}"
            + (", perhaps for lack of memory" if killer == "SIGKILL" else "")
            + "; the same command resumes from the last checkpoint\n"
        )
        return 128 - failure.exitcode
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
        # The launcher leaves its own handlers. Processes forked later would inherit them and ignore SIGTERM.
        for number, handler in before.items():
            signal.signal(number, handler)
    return 0


def requeue_job(env: Mapping[str, str] = os.environ) -> str:
    """Requeue this SLURM job; return a line that says so, or a warning that says why not."""
    job = env.get("SLURM_JOB_ID")
    if job is None:
        return "WARNING: checkpoint.requeue is set, but this is not a SLURM job; restart it yourself"

    def ask(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    try:
        # A job ended by `scancel` must stay ended, and SLURM itself requeues a pre-empted one. Both are
        # COMPLETING by now. So is a job at its time limit, which SLURM does not restart.
        state = ask("squeue", "--noheader", f"--jobs={job}", "--format=%T %r").strip()
        if state.startswith("COMPLETING") and "TimeLimit" not in state:
            return f"job {job} was cancelled or pre-empted: SLURM decides whether it restarts"
        ask("scontrol", "requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        why = (getattr(error, "stderr", None) or str(error)).strip()
        return f"WARNING: job {job} is not back in the queue: {why}; `scontrol requeue {job}` may do it"
    return f"job {job} is back in the queue and resumes when it starts again"


def ignore_sigterm() -> None:
    """Keep this process's own exit status: SLURM sends SIGTERM to a requeued job."""
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
