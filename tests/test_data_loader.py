"""A step depends on the seed and its number: not on workers, ranks, micro-batches or interruptions."""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from nextblock.config import DataConfig
from nextblock.data import (
    BadSample,
    ConcatSource,
    DataError,
    QuarantineLog,
    Source,
    Step,
    TooManyBadImages,
    TrainLoader,
    VisitOrder,
    eval_batches,
    keyed_rng,
    open_source,
    resolve_workers,
)
from nextblock.data import loader as loader_module
from nextblock.data.augment import eval_crop, train_crop
from nextblock.data.workers import WorkerError
from toy import ToySource, joined, take

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(color_jitter=(0.4, 0.4, 0.4, 0.1), val_resize_px=18)
SEED, BATCH = 5, 7
KINDS = ("one source", "mixture")


def case(kind: str) -> tuple[Source, DataConfig]:
    """A source of 25 images, or a mixture of 19 and 4, with two that cannot be read."""
    if kind == "one source":
        return ToySource(25, bad=(4, 20)), DATA
    mixed = DataConfig(color_jitter=DATA.color_jitter, val_resize_px=18, weights=(0.7, 0.3))
    return ConcatSource([ToySource(19, bad=(4, 12)), ToySource(4, seed=1)]), mixed


def loader(source: Source, data: DataConfig = DATA, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"image_size": 8, "seed": SEED, "batch_size": BATCH, "drop_path_draws": 3}
    return TrainLoader(source, data, **settings | options)


def of_world(kind: str, world_size: int, number: int, start: int = 0, **options: Any) -> list[list[Step]]:
    """The next `number` steps of every rank; each rank opens the source by itself."""
    ranks = []
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "start_step": start}
        ranks.append(take(loader(*case(kind), **place, **options), number))
    return [list(step) for step in zip(*ranks, strict=True)]


def assert_same(ours: list[list[Step]], expected: list[list[Step]]) -> None:
    assert len(ours) == len(expected)
    for ranks, (single,) in zip(ours, expected, strict=True):
        assert {step.index for step in ranks} == {single.index}
        one, other = joined(*ranks), joined(single)
        for name in ("images", "samples", "visits", "drop_path"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert one.bad == other.bad


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[list[Step]]]:
    """Nine steps, three epochs, of one process without workers."""
    return {kind: of_world(kind, 1, 9) for kind in KINDS}


def test_a_step_holds_the_samples_of_its_order_cropped_by_seed_visit_and_sample_except_for_the_bad() -> None:
    source, order = ToySource(25, bad=(4, 20)), VisitOrder(25, seed=SEED, batch_size=BATCH)
    bad = set()
    for step in take(loader(source), 7):
        epoch, visits, samples = order.keys(step.index)
        assert (step.keys.epoch, step.keys.samples.tolist()) == (epoch, samples.tolist())
        keys = [key for key in zip(visits.tolist(), samples.tolist(), strict=True) if key[1] not in (4, 20)]
        batch = joined(step)
        assert list(zip(batch.visits.tolist(), batch.samples.tolist(), strict=True)) == keys
        assert batch.images.dtype == torch.uint8
        for place, key in enumerate(keys):
            crop = train_crop(source.images[key[1]], 8, DATA, keyed_rng(SEED, "augment", *key))
            assert torch.equal(batch.images[place], crop)
            drawn = keyed_rng(SEED, "drop-path", *key).random(3).astype(np.float32)
            assert batch.drop_path[place].tolist() == drawn.tolist()
        assert len(batch.bad) == len(samples) - len(keys)
        bad |= set(batch.bad)
    assert bad == {BadSample(4, "toy-0[4]", "truncated"), BadSample(20, "toy-0[20]", "truncated")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_run_stopped_anywhere_and_resumed_by_any_number_of_ranks_sees_the_same(
    kind, world_size, uninterrupted
) -> None:
    rng = np.random.default_rng(world_size)
    for _ in range(4):
        stops = sorted(rng.integers(0, 10, 2).tolist())
        worlds = [world_size, *rng.integers(1, 5, 2).tolist()]
        seen = []
        for (start, end), ranks in zip(pairwise([0, *stops, 9]), worlds, strict=True):
            seen += of_world(kind, ranks, end - start, start, micro_batch_size=int(rng.integers(1, 9)))
        assert_same(seen, uninterrupted[kind])


@pytest.mark.parametrize(
    ("kind", "world_size", "workers", "start"), [("one source", 1, 3, 0), ("mixture", 2, 1, 5)]
)
def test_the_number_of_workers_and_of_chunks_changes_nothing(
    kind, world_size, workers, start, uninterrupted, monkeypatch
) -> None:
    monkeypatch.setattr(loader_module, "CHUNK", 2)
    seen = of_world(kind, world_size, 9 - start, start, workers=workers, micro_batch_size=3)
    assert_same(seen, uninterrupted[kind][start:])


@pytest.mark.parametrize("world_size", [1, 3, 9])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 100])
def test_ranks_share_a_batch_evenly_in_equally_many_micro_batches(world_size, micro_batch_size) -> None:
    options = {"world_size": world_size, "micro_batch_size": micro_batch_size}
    ranks = [take(loader(ToySource(25), rank=rank, **options), 1)[0] for rank in range(world_size)]
    sizes = [[len(batch.samples) for batch in step.micro_batches] for step in ranks]
    shares = [sum(share) for share in sizes]
    assert sum(shares) == BATCH
    assert max(shares) - min(shares) <= 1
    micro = min(micro_batch_size or BATCH, max(shares))
    assert {len(share) for share in sizes} == {-(-max(shares) // micro)}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_without_a_sample_gets_an_empty_micro_batch_of_the_right_shape(workers) -> None:
    options = {"batch_size": 2, "world_size": 3, "image_size": (8, 12), "workers": workers}
    (step,) = take(loader(ToySource(5), rank=0, **options), 1)
    (empty,) = step.micro_batches
    assert empty.images.shape == (0, 3, 8, 12)
    assert (empty.bad, len(empty.visits), empty.drop_path.shape) == ((), 0, (0, 3))


def test_only_what_is_asked_for_is_read_and_micro_batches_are_handed_out_as_they_arrive() -> None:
    source = ToySource(25)
    take(loader(source, rank=1, world_size=3, start_step=10**9), 1)
    assert source.reads == 2
    steps = iter(loader(source, micro_batch_size=2))
    first = next(steps)
    assert source.reads == 2
    next(first.micro_batches)
    assert source.reads == 4
    (second,) = take(steps, 1)  # what the first left is skipped
    expected = VisitOrder(25, seed=SEED, batch_size=BATCH).keys(1).samples
    assert joined(second).samples.tolist() == expected.tolist()


class Counted(ToySource):
    """Counts the reads of each image, those of workers too."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.counts = torch.zeros(count, dtype=torch.int64).share_memory_()

    def _read(self, index: int) -> Tensor:
        self.counts[index] += 1
        return self.images[index]


def test_workers_hold_a_whole_micro_batch_ready_while_a_step_computes() -> None:
    source = Counted(640)
    steps = iter(loader(source, batch_size=640, workers=2))
    list(next(steps).micro_batches)
    for _ in range(600):
        if source.counts.sum() >= 2 * 640:
            break
        time.sleep(0.05)
    assert 2 * 640 <= source.counts.sum() < 3 * 640


UNTOUCHED = """
import random, numpy, torch
from nextblock.config import DataConfig
from nextblock.data import TrainLoader, eval_batches, open_source
def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
source, data = open_source("digits", DataConfig()), DataConfig()
before = states()
for workers in (0, 1):
    loader = TrainLoader(source, data, image_size=16, seed=0, batch_size=4, workers=workers)
    next(next(iter(loader)).micro_batches)
    next(eval_batches(source, data, 16, 4, workers=workers))
    assert states() == before, workers
"""


def test_no_global_generator_is_touched() -> None:
    # In a process of its own, as the tests' type checker draws from python's generator.
    subprocess.run([sys.executable, "-W", "error", "-c", UNTOUCHED], check=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_in_order_or_that_asked_for_with_centre_crops_and_keeps_the_last_batch(
    workers,
) -> None:
    source = ToySource(11, bad=(4,))
    batches = list(eval_batches(source, DATA, 16, 4, workers=workers))
    assert [batch.samples.tolist() for batch in batches] == [[0, 1, 2, 3], [5, 6, 7], [8, 9, 10]]
    assert [batch.bad for batch in batches] == [(), (BadSample(4, "toy-0[4]", "truncated"),), ()]
    for batch in batches:
        assert batch.visits.tolist() == [0] * len(batch.samples)
        for image, sample in zip(batch.images, batch.samples.tolist(), strict=True):
            assert torch.equal(image, eval_crop(source.images[sample], 16, 18))
    for indices in ([7, 2, 2, 0], []):
        some = eval_batches(source, DATA, (16, 12), 3, indices=indices, workers=workers)
        assert [sample for batch in some for sample in batch.samples.tolist()] == indices


def test_every_bad_file_is_listed_once_over_epochs_and_restarts(tmp_path) -> None:
    path = tmp_path / "quarantine.jsonl"
    first, second = BadSample(3, "a/3.png", "empty"), BadSample(5, "ü/5.png", "truncated\nhere")
    quarantine = QuarantineLog(path, num_files=100, max_bad_fraction=0.02)
    for bad in (first, second, first):
        quarantine.add(bad)
    with path.open("a") as file:
        file.write('{"name": "2.p')  # as a crash leaves it
    again = QuarantineLog(path, num_files=100, max_bad_fraction=0.02)
    again.add(second)
    assert again.bad == (first, second)
    assert [json.loads(line)["sample"] for line in path.read_text().splitlines()] == [3, 5]
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"line 1, is damaged .* delete that file"):
        QuarantineLog(path, 100, 0.5)


@pytest.mark.parametrize(
    ("num_files", "fraction", "allowed"), [(1000, 0.011, 11), (50, 0.01, 1), (3, 0.0, 0), (3, 1.0, 3)]
)
def test_too_many_bad_files_stop_a_run_but_one_is_allowed_unless_none_is(
    tmp_path, num_files, fraction, allowed
) -> None:
    quarantine = QuarantineLog(tmp_path / "q.jsonl", num_files, fraction)
    for sample in range(allowed):
        quarantine.add(BadSample(sample, f"{sample}.png", f"reason {sample}"))
    if allowed < num_files:
        with pytest.raises(TooManyBadImages, match=f"{allowed + 1} of {num_files} files cannot be read") as e:
            quarantine.add(BadSample(allowed, "last.png", "empty"))
        assert ("reason 9" in str(e.value)) == (allowed > 9)


def test_workers_are_as_asked_or_none_in_memory_or_the_cores_but_one(tmp_path, monkeypatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    folder, memory = open_source(str(tmp_path), DATA), open_source("digits", DATA)
    assert resolve_workers(3, memory) == 3
    assert resolve_workers(0, folder) == resolve_workers(None, memory) == 0
    for cores, expected in ((1, 0), (4, 3), (64, 8)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=cores: set(range(n)), raising=False)
        assert resolve_workers(None, folder) == expected


class Failing(ToySource):
    """Image 3 fails in a way that is not its own fault."""

    def __init__(self, how: Exception | None) -> None:
        super().__init__(12)
        self.how = how

    def _read(self, index: int) -> Tensor:
        if index == 3 and self.how is None:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 3 and self.how is not None:
            raise self.how
        return self.images[index]


NO_MEMORY = MemoryError("4000 x 3000 pixels")
NO_ROOM = r"not enough memory to read toy-0\[3\] \(4000 x 3000 pixels\)"
KILLED = r"killed by SIGKILL while it read toy-0\[3\].*ran out of memory"


@pytest.mark.parametrize(
    ("how", "workers", "error", "message"),
    [
        *((RuntimeError("no disk"), workers, RuntimeError, "no disk") for workers in (0, 2)),
        *((NO_MEMORY, workers, DataError, NO_ROOM) for workers in (0, 2)),
        (None, 2, WorkerError, KILLED),
    ],
)
def test_an_error_that_is_no_images_fault_surfaces_and_leaves_no_worker(how, workers, error, message) -> None:
    before = set(multiprocessing.active_children())
    gc.disable()  # it ends them too late
    try:
        with pytest.raises(error, match=message):
            take(loader(Failing(how), workers=workers, micro_batch_size=2), 2)
        assert set(multiprocessing.active_children()) <= before
    finally:
        gc.enable()


def test_a_worker_that_dies_while_a_step_computes_interrupts_no_code_of_the_step() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGCHLD, lambda number, frame: heard.append(number))
    try:
        steps = iter(loader(ToySource(96), workers=1, batch_size=4))
        validation = eval_batches(ToySource(96), DATA, 16, 2, workers=1)
        list(next(steps).micro_batches)
        (worker,) = multiprocessing.active_children()
        next(validation)
        os.kill(worker.pid or 0, signal.SIGKILL)
        worker.join(20)
        for _ in range(1000):  # the signal of its death has arrived by now
            torch.ones(2).sum()
        assert heard  # by the handler of others
        next(validation)  # its own worker lives
        with pytest.raises(WorkerError, match="killed by SIGKILL"):
            list(next(steps).micro_batches)
    finally:
        signal.signal(signal.SIGCHLD, before)


PIPES = """
import logging
logging.basicConfig()
from nextblock.config import DataConfig
from nextblock.data import TrainLoader, open_source
source = open_source("digits", DataConfig())
options = {"image_size": 128, "seed": 0, "batch_size": 64}
steps = [iter(TrainLoader(source, DataConfig(), workers=workers, **options)) for workers in (0, 2)]
for _ in range(4):
    (alone,), (divided,) = (list(next(each).micro_batches) for each in steps)
    assert (alone.images == divided.images).all()
"""


@pytest.mark.skipif(not Path("/proc").exists() or os.getuid() != 0, reason="needs a mount namespace")
def test_images_go_through_pipes_if_shared_memory_is_full() -> None:
    script = f"mount -t tmpfs -o size=4m tmpfs /dev/shm || exit 77; exec {sys.executable} -c '{PIPES}'"
    command = ["unshare", "-m", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode == 77 or "unshare" in done.stderr[:20]:
        pytest.skip("no mount namespace here")
    assert done.returncode == 0, done.stderr
    assert "send images through pipes" in done.stderr


PROGRAM = """
import multiprocessing, os, signal, sys, time
from nextblock.config import DataConfig
from nextblock.data import TrainLoader, open_source
digits, data = open_source("digits", DataConfig()), DataConfig()
for ending in sys.argv[1:]:
    steps = iter(TrainLoader(digits, data, image_size=16, seed=0, batch_size=8, workers=1))
    list(next(steps).micro_batches)
    (worker,) = multiprocessing.active_children()
    time.sleep(0.2)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(worker.pid, number)
    if hasattr(signal, "sigwaitinfo"):  # a stranger's SIGTERM
        os.system(f"kill -TERM {worker.pid}")
    time.sleep(0.2)
    assert [next(steps).index for _ in range(50)] == list(range(1, 51))
    assert worker.is_alive()
    if ending == "close":
        steps.close()
    elif ending == "terminate":
        worker.terminate()
    if ending != "leave":
        worker.join(20)
        assert not worker.is_alive()
    if ending == "terminate":
        os._exit(0)
"""


@pytest.mark.parametrize("endings", [("close", "leave"), ("terminate",)])
def test_workers_outlive_the_signals_of_others_and_end_with_the_loader(endings) -> None:
    command = [sys.executable, "-c", PROGRAM, *endings]
    done = subprocess.run(command, timeout=60, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
