"""The processes of a run: rendezvous, agreement between ranks, and detection of failed ranks.

A single process is a group of size one, at no cost. Ranks meet in a `TCPStore` of torch. There they compare
versions before any of them computes, send a heartbeat once a second, and report failures. Per-step agreement
uses gloo on the CPU, even if gradients use NCCL.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import platform
import random
import re
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from nextblock.errors import UsageError
from nextblock.launch import LaunchError, World
from nextblock.version import __version__

log = logging.getLogger(__name__)

JOIN_TIMEOUT = timedelta(minutes=10)
"""Maximum wait for other ranks at the start."""
WAIT_NOTICE = timedelta(seconds=15)
"""Rank 0 logs after this time which rank it is waiting for."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""Maximum wait for ranks that are alive; they may be writing a checkpoint or drawing pictures."""
SILENT_S = 60.0
"""A rank without a heartbeat for this long counts as dead, and the others exit."""
BEAT_S = 1.0
FAILURE = "failure"


class DistributedError(LaunchError):
    """Processes of a run cannot find each other, do not match, or one of them failed."""


def _reported(error: Exception) -> Exception:
    """Mark an error as reported by rank 0, so that other ranks stay silent."""
    error.is_reported = True  # type: ignore[attr-defined]
    return error


def meeting_point(world: World, env: Mapping[str, str]) -> tuple[str, int, str]:
    """Host and port of the store, and a name that tells this launch from others on the same port."""
    host, port = env.get("MASTER_ADDR"), env.get("MASTER_PORT")
    # Ranks started by hand share no other name: even the program's path may differ between hosts.
    launch = "by hand"
    if world.launcher == "torchrun":
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        launch = "/".join([env[name] for name in names if name in env] or [launch])
    elif world.launcher == "slurm":
        if "SLURM_JOB_ID" not in env:
            raise DistributedError("SLURM_PROCID is set, but not SLURM_JOB_ID; unset it, or start with srun")
        launch = (
            f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_STEP_ID', 0)}-{env.get('SLURM_RESTART_COUNT', 0)}"
        )
        if host is None:
            # The first of "gpu[07-09,12],big1" is gpu07. Not from scontrol, which containers lack.
            nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST", "localhost")
            host = re.sub(r"\[(\d+)[^]]*\]", r"\1", nodes).split(",")[0]
    elif world.launcher == "mpi":
        launch = f"mpi-{env.get('PMIX_NAMESPACE') or env.get('LSB_JOBID') or launch}"
        if host is None and env.get("OMPI_COMM_WORLD_LOCAL_SIZE") == str(world.size):
            host = "localhost"
        if host is None and "LSB_MCPU_HOSTS" in env:
            # "HOST SLOTS HOST SLOTS ..."; jsrun starts ranks from the first host but runs none there.
            host = env["LSB_MCPU_HOSTS"].split()[2 if "JSM_NAMESPACE_RANK" in env else 0]
    if host is None:
        raise DistributedError(
            f"{world.size} processes were started, but MASTER_ADDR does not say where they meet; set it to "
            "the host of rank 0, or start through torchrun"
        )
    if port is not None and not port.isdecimal():
        raise DistributedError(f"MASTER_PORT is {port!r}; set it to the number of a free port")
    # Every rank derives the same port from the launch's name. Linux uses ports from 32768 on for outgoing
    # connections, so they are avoided.
    return host, int(port) if port else random.Random(launch).randint(20_000, 32_000), launch


class Group:
    """The ranks of a run and their collective operations. All ranks must make the same calls."""

    def __init__(self, world: World, peers: Sequence[dict[str, Any]] = (), processes: Any = None) -> None:
        self.processes = processes
        """torch's process group; None: the default one."""
        self.world, self.rank, self.size, self._peers = world, world.rank, world.size, peers
        # Ranks allowed on the same cores share them. A scheduler may instead bind each rank to its own cores.
        nearby = [peer["cores"] for peer in peers if peer["host"] == peers[self.rank]["host"]]
        self.on_this_host = len(nearby) or 1
        self.sharing_cores = nearby.count(peers[self.rank]["cores"]) if peers else 1
        self.step = 0
        """The current step, named in the message if a rank fails."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, the only rank that prints and writes."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sums over ranks, in fp64 and in rank order, so all ranks get identical bits."""
        if self.size == 1:
            return list(values)
        mine = torch.tensor(values, dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.processes)
        return torch.stack(parts).sum(0).tolist()

    def any(self, value: object) -> bool:
        """Whether `value` is true on any rank."""
        return bool(self.sum([bool(value)])[0])

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, on all ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.processes)
        return values

    def broadcast(self, value: Any) -> Any:
        """The value of rank 0, on all ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self.processes, device=torch.device("cpu"))
        return values[0]

    def name(self, rank: int) -> str:
        """Name of a rank with its host, for messages."""
        return f"rank {rank} on {self._peers[rank]['host']}" if self._peers else f"rank {rank}"

    def twin(self) -> Group:
        """The same ranks with separate connections, for another thread. All ranks must call this."""
        if self.size == 1:
            return self
        return Group(self.world, self._peers, dist.new_group(backend="gloo"))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise on all ranks if the block fails on one: ranks without an error raise `DistributedError`.

        Ranks must not wait for each other inside the block, as they would wait for a failed one.
        """
        if self.size == 1:
            yield
            return
        mine: Exception | None = None
        try:
            yield
        except Exception as error:
            mine = error
        errors = self.gather(None if mine is None else str(mine) or type(mine).__name__)
        failed = next((rank for rank, message in enumerate(errors) if message is not None), None)
        if failed is not None:
            error = mine or DistributedError(f"{self.name(failed)}: {errors[failed]}")
            raise _reported(error)

    def check_same(self, values: Mapping[str, Any]) -> None:
        """Raise `DistributedError` if any rank has another value than rank 0."""
        first, *rest = self.gather(dict(values))
        for rank, others in enumerate(rest, start=1):
            for name, value in first.items():
                if others.get(name) != value:
                    problem = (
                        f"{self.name(rank)} has {name} {others.get(name)!r}, {self.name(0)} has {value!r}"
                    )
                    raise _reported(DistributedError(f"{problem}; all processes of a run need the same"))


ALONE = Group(World())
"""The group of a single-process run."""


@contextmanager
def process_group(world: World, device: torch.device, *, needed: bool = False) -> Iterator[Group]:
    """Join the other processes of a run; with `needed`, make a process group even for a single process.

    Raises `DistributedError` if they do not meet within `JOIN_TIMEOUT`, their versions differ, or one of them
    fails or stops responding; the message then names rank, host and step.
    """
    if world.size == 1 and not (needed and world.launcher):
        if needed:
            raise UsageError("train.strategy fsdp needs several processes: --devices N, torchrun or srun")
        yield ALONE
        return
    if dist.is_initialized():
        raise DistributedError("this process already is in a torch process group; leave it first")
    store, peers = _meet(world)
    # gloo for agreement between ranks, on the CPU; NCCL for gradients on GPUs.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("torch", store),  # nested in the prefix of this meeting
        rank=world.rank,
        world_size=world.size,
        timeout=COLLECTIVE_TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    group = Group(world, peers)
    watch = _Watch(group, store)
    watch.start()
    try:
        yield group
    except Exception as error:
        if getattr(error, "is_reported", False):
            if not group.is_main:
                time.sleep(BEAT_S)  # a launcher ends all ranks when the first exits: let rank 0 report first
            raise
        cause = watch.cause_of(error)
        if cause is None:
            error.where = f"{group.name(group.rank)}, step {group.step}"  # type: ignore[attr-defined]
            raise
        lost = DistributedError(cause)
        raise (lost if _is_reporter(group, cause) else _reported(lost)) from error
    else:
        with suppress(RuntimeError):  # rank 0 may host the store: no rank exits before all are done
            dist.barrier()
    finally:
        watch.stop()
        with suppress(RuntimeError):
            dist.destroy_process_group()


_MEETINGS = itertools.count()


@functools.cache
def _tcp_store(host: str, port: int, *, is_master: bool) -> dist.Store:
    # Cached until the process ends, as a second store could not use the same port.
    return dist.TCPStore(host, port, is_master=is_master, timeout=JOIN_TIMEOUT, wait_for_workers=False)


def _meet(world: World) -> tuple[dist.Store, list[dict[str, Any]]]:
    """Wait for all ranks in a store, which outlives a broken process group; refuse different versions.

    Returns the store, and what each rank reports about itself.
    """
    host, port, launch = meeting_point(world, os.environ)
    here, where = socket.gethostname(), f"{host}:{port}"
    # torchrun's agent already hosts a store.
    is_master = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        socket.getaddrinfo(host, port)  # torch would try again for minutes
        tcp = _tcp_store(host, port, is_master=is_master)
    except (RuntimeError, ValueError, OSError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            problem = f"port {port} of {host} is in use, perhaps by another run; set MASTER_PORT to another"
        else:
            problem = (
                f"rank {world.rank} on {here} cannot reach {where}, where the processes of this run meet "
                f"({str(error).splitlines()[0]}); set MASTER_ADDR to the host of rank 0"
            )
        raise DistributedError(problem) from error
    # A command may join its processes several times: each meeting has its own prefix.
    store = dist.PrefixStore(f"nextblock/{launch}/{next(_MEETINGS)}", tcp)
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = {"nextblock": __version__, "torch": torch.__version__, "python": platform.python_version()}
    hello = {"host": here, "cores": cores, "versions": versions, "size": world.size}
    store.set(f"hello/{world.rank}", json.dumps(hello))
    peers: list[dict[str, Any]] = []
    deadline_s = time.monotonic() + JOIN_TIMEOUT.seconds
    for rank in range(world.size):
        while not store.check([f"hello/{rank}"]):
            try:
                store.wait([f"hello/{rank}"], WAIT_NOTICE)
            except dist.DistStoreError:
                who = f"rank {rank} of {world.size}"
                if time.monotonic() > deadline_s:
                    raise DistributedError(
                        f"{who} did not join at {where} within {JOIN_TIMEOUT.seconds // 60} minutes; "
                        "check its log and the number of processes"
                    ) from None
                if world.rank == 0:
                    log.warning("waiting for %s at %s", who, where)
        peers.append(json.loads(store.get(f"hello/{rank}")))
        problem = _mismatch(rank, peers[-1], peers[0]) or _mismatch(world.rank, hello, peers[0])
        if problem is not None:
            # Others find it as well, unless the store ends with this process too early.
            time.sleep(3 * BEAT_S)
            raise DistributedError(problem)
    return store, peers


def _mismatch(rank: int, peer: dict[str, Any], first: dict[str, Any]) -> str | None:
    """Why a rank cannot train with rank 0, or None."""
    if peer["size"] != first["size"]:
        return (
            f"rank {rank} on {peer['host']} was started as one of {peer['size']} processes, rank 0 "
            f"on {first['host']} as one of {first['size']}; is another run meeting at the same port?"
        )
    for name, version in peer["versions"].items():
        if version != first["versions"][name]:
            return (
                f"rank {rank} on {peer['host']} has {name} {version}, rank 0 on {first['host']} has "
                f"{first['versions'][name]}; install the same everywhere"
            )
    return None


def is_lost(error: BaseException) -> bool:
    """Whether an error means that another process is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def _is_reporter(group: Group, problem: str) -> bool:
    """Whether this rank reports a problem of another rank: rank 0 does, or all if rank 0 died."""
    return group.is_main or problem.startswith(f"{group.name(0)} died")


class _Watch(threading.Thread):
    """Sends a heartbeat once a second, and ends the process if another rank has died."""

    def __init__(self, group: Group, store: dist.Store) -> None:
        super().__init__(daemon=True)
        # A second connection, as a thread that waits on a connection blocks it.
        self._group, self._store = group, store.clone()
        self._ended = threading.Event()
        self._problem: str | None = None
        self._beats = 0
        self._heard: dict[int, tuple[str, float]] = {}

    def run(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._problem = self._problem or self._look()
            if self._problem is None:
                continue
            # The main thread may be waiting for the lost rank and notice it (gloo does at once). Otherwise
            # it is in a kernel that cannot be interrupted. Checkpoints are always whole, so exit.
            if not self._ended.wait(10 * BEAT_S):
                if _is_reporter(self._group, self._problem):
                    os.write(2, f"nextblock pretrain: {self._problem}\n".encode())
                os._exit(1)

    def _look(self, silent_s: float = SILENT_S) -> str | None:
        """Send a heartbeat and return the problem of another rank, or None."""
        group, now_s = self._group, time.monotonic()
        self._beats += 1
        try:
            self._store.set(f"beat/{group.rank}", f"{self._beats} {group.step}")
            if self._store.check([FAILURE]):
                return self._store.get(FAILURE).decode()
            for rank in range(group.size):
                beat = self._store.get(f"beat/{rank}").decode() if self._store.check([f"beat/{rank}"]) else ""
                if rank not in self._heard or self._heard[rank][0] != beat:
                    self._heard[rank] = (beat, now_s)
                elif now_s - self._heard[rank][1] > silent_s:
                    step = beat.split()[1] if beat else "0"
                    return f"{group.name(rank)} died or hangs; it was last heard of in step {step}"
        except RuntimeError:  # the store is gone, and with it the process that hosts it
            holder = "the launcher" if "TORCHELASTIC_RUN_ID" in os.environ else group.name(0)
            return f"{holder} died; the same command resumes from the last checkpoint"
        return None

    def cause_of(self, error: Exception) -> str | None:
        """Return why another rank was lost, or None if this rank failed; report it to the others."""
        group, problem = self._group, None
        lost = is_lost(error)
        # A connection broke. The lost rank is the one without a heartbeat for five seconds.
        deadline_s = time.monotonic() + 8 * BEAT_S
        while lost and problem is None and time.monotonic() < deadline_s:
            problem = self._problem or self._look(5 * BEAT_S)
            time.sleep(BEAT_S)
        message = problem or f"{group.name(group.rank)}, step {group.step}: {error}"
        with suppress(RuntimeError):
            self._store.compare_set(FAILURE, "", message)
            if group.is_main:
                time.sleep(3 * BEAT_S)  # the store may end with this process: let the others read it first
        return problem

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()


def find_device(device: torch.device, world: World) -> torch.device:
    """Device of this rank; raises `ValueError` if this host has more processes than GPUs."""
    if world.size == 1 and (device.type != "cuda" or not world.launcher):
        return device  # no process group: only that needs a numbered GPU
    if device.type == "mps":
        raise UsageError("train.device mps is one device; use train.device cpu, or one process")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count()
    # A scheduler that assigns one GPU per task makes it the only visible one.
    index = 0 if count == 1 and world.launcher != "torchrun" else world.local_rank
    if index >= count:
        raise UsageError(
            f"rank {world.rank} on {socket.gethostname()} is process {world.local_rank + 1} of this machine, "
            f"which has {count} GPUs; start one process for each GPU"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
