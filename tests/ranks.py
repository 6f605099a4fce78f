"""Functions run by several processes that train together, on gloo, one thread each."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pkgutil
import signal
import socket
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import nextblock
from nextblock.data import DataError
from nextblock.launch import find_world
from nextblock.train import TrainResult, distributed, train
from nextblock.train.distributed import Group, process_group
from nextblock.visualize import predictions
from tiny_runs import CPU, TINY, After, Quiet, settings
from toy import ToySource

# A process that has imported torch and is forked for each rank: a rank starts in milliseconds.
CONTEXT = multiprocessing.get_context("forkserver")
PRELOADED = ("pretraining", "evaluate.monitors", "evaluate.compare", "evaluate.finetune.run")
CONTEXT.set_forkserver_preload(["ranks", "torchcodec.decoders", *(f"nextblock.{name}" for name in PRELOADED)])


class RankFailed(Exception):  # noqa: N818 - it says what happened
    """A rank raised this; the command says so unless another rank does."""

    def __init__(self, message: str, *, is_reported: bool = False) -> None:
        super().__init__(message)
        self.is_reported = is_reported


def run_ranks(
    world: int,
    function: Callable[..., Any],
    *args: Any,
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> list[Any]:
    """What `function(*args)` returns on each rank, or the exception it raised (`RankFailed`), or -signal."""
    with socket.socket() as listener:  # a free port
        listener.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    started = {}
    for rank in range(world):
        here, there = CONTEXT.Pipe(duplex=False)
        place = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
        own = {**place, **meeting, **(env or {})}
        process = CONTEXT.Process(target=_run, args=(there, own, function, args))
        process.start()
        there.close()
        started[rank] = (process, here)
    results = []
    for process, here in started.values():
        process.join(timeout)
        if process.is_alive():
            process.kill()
            process.join()
            results.append(RankFailed("it hangs"))
            continue
        try:
            results.append(here.recv())
        except EOFError:
            results.append(process.exitcode)
    return results


def _run(pipe: Connection, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        result = function(*args)
    except BaseException as error:
        traceback.print_exc()
        is_reported = getattr(error, "is_reported", False)
        result = RankFailed(f"{type(error).__name__}: {error}", is_reported=is_reported)
    pipe.send(result)
    pipe.close()


def train_together(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    sources: Mapping[str, Any] | None = None,
    monitors: tuple[Any, ...] = (),
) -> TrainResult:
    """Train the tiny model as one rank of however many the environment says."""
    return train_in_turn([(out, monitors)], changes, sources)[0]


def train_in_turn(
    turns: Sequence[tuple[Path, tuple[Any, ...]]],
    changes: Mapping[str, Any] | None = None,
    sources: Mapping[str, Any] | None = None,
) -> list[TrainResult]:
    """The same for several directories and their monitors, in one group: starting it takes the longest."""
    config = settings(changes)
    with process_group(find_world(), CPU, needed=config.train.strategy == "fsdp") as group:
        given = dict(sources or {"train": ToySource(40)})
        return [
            train(config, out, given, monitors=monitors, reporter=Quiet(), group=group)
            for out, monitors in turns
        ]


class SignalRank:
    """Sends one rank a signal after a step."""

    every = "1st"

    def __init__(self, step: int, rank: int, number: signal.Signals) -> None:
        self.step, self.rank, self.number = step, rank, number

    def __call__(self, model: Any, event: Any) -> dict[str, float]:
        if event.step == self.step and event.group.rank == self.rank:
            os.kill(os.getpid(), self.number)
        return {}


def train_and_die(
    out: Path, changes: Mapping[str, Any], sources: Mapping[str, Any], place: str, rank: int, after: int
) -> TrainResult:
    """Train; one rank, or all for -1, is killed at a place: the call number `after` of a function."""
    distributed.BEAT_S = 0.2  # so that others notice sooner
    function, calls = pkgutil.resolve_name(place), itertools.count(1)

    def killing(*args: Any, **options: Any) -> Any:
        if next(calls) == after and rank in (-1, find_world().rank):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)

    with patch(place, killing):
        return train_together(out, changes, sources)


def in_group(function: Callable[[Group], Any]) -> Any:
    """Call a function with the group of the environment."""
    with process_group(find_world(), CPU) as group:
        return function(group)


class FailingSource(ToySource):
    """Of which rank 1 can read no more than twelve images."""

    def _read(self, index: int) -> Any:
        if self.reads == 12 and find_world().rank == 1:
            raise DataError("the disk is gone")
        return super()._read(index)


def train_otherwise(out: Path, what: str) -> TrainResult:
    """Train with rank 1 in some way unlike the others."""
    changes, sources, monitors = {"train.batch_size": 10}, {"train": ToySource(40)}, ()
    is_odd = find_world().rank == 1
    distributed.BEAT_S = 1.0 if what == "bug" else 0.2  # how long a rank waits for others to notice
    if what in ("settings", "out"):
        own = {"optim.lr": 1.0} if is_odd and what == "settings" else {}
        place = out.with_name("other") if is_odd and what == "out" else out
        return nextblock.pretrain(TINY, out=place, reporter=Quiet(), **{"data.train": "digits", **own})
    if what == "version" and is_odd:
        distributed.__version__ = "0.0.1"
    elif what == "size" and is_odd:
        os.environ["WORLD_SIZE"] = "4"
    elif what == "images" and is_odd:
        sources = {"train": ToySource(40, seed=5)}
    elif what == "disk":
        sources = {"train": FailingSource(40)}
    elif what == "bug":
        monitors = (After(3, lambda *_: {}["surprise"] if is_odd else None),)
    elif what == "batch":
        changes = {"train.batch_size": 2}
    return train_together(out, changes, sources, monitors)


def train_and_draw(out: Path) -> list[str]:
    """Train with the monitor that draws; gives the pictures that this rank drew."""
    drawn: list[str] = []
    predictions.draw_sheet = lambda _look, path, _titles: drawn.append(path.name)
    images = torch.stack([ToySource(2).read(index) for index in range(2)])
    monitor = predictions.PredictionMonitor(images, [0.5] * 3, [0.5] * 3, every="2st")
    train_together(out, {"train.batch_size": 10, "train.duration": "4st"}, monitors=(monitor,))
    return drawn
