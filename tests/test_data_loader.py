"""What a step holds depends on the seed and the step's number, and on nothing else."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nextblock.config import DataConfig
from nextblock.data import (
    BadImageError,
    BadSample,
    Batch,
    Source,
    Step,
    TrainLoader,
    eval_batches,
    eval_crop,
    keyed_permutation,
    keyed_rng,
    open_source,
    resolve_workers,
    step_samples,
    train_crop,
)

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(val_resize_px=18)


class ListSource(Source):
    """Images in a list; those that are None cannot be read."""

    in_memory = True
    spec = "list"

    def __init__(self, images: list[torch.Tensor | None]) -> None:
        self.images = images
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    @property
    def has_labels(self) -> bool:
        return False

    def _read(self, index: int) -> torch.Tensor:
        self.reads.append(index)
        image = self.images[index]
        if image is None:
            raise BadImageError(f"broken {index}")
        return image

    def _name(self, index: int) -> str:
        return f"image {index}"

    def _find_labels(self):
        raise NotImplementedError

    def _make_fingerprint(self) -> str:
        return "list"


class FailingSource(ListSource):
    """A source with a defect that is none of an image's."""

    def _read(self, index: int) -> torch.Tensor:
        raise RuntimeError(f"the disk is gone at {index}")


def source_of(number: int, broken: tuple[int, ...] = ()) -> ListSource:
    rng = np.random.default_rng(0)
    shapes = rng.integers(10, 30, (number, 2)).tolist()
    images = [torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8)) for h, w in shapes]
    return ListSource([None if index in broken else image for index, image in enumerate(images)])


def loader(source: Source, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"image_size": 16, "seed": 5, "batch_size": 4}
    return TrainLoader(source, DATA, **settings | options)


def steps(source: Source, number: int, **options) -> list[Step]:
    return list(islice(loader(source, **options), number))


def joined(step: Step) -> Batch:
    """A step as one batch."""
    return Batch(
        torch.cat([batch.images for batch in step.micro_batches]),
        torch.cat([batch.samples for batch in step.micro_batches]),
        tuple(bad for batch in step.micro_batches for bad in batch.bad),
        torch.cat([batch.visits for batch in step.micro_batches]),
    )


def assert_same_steps(ours: list[Step], theirs: list[Step]) -> None:
    assert [(step.index, step.visit) for step in ours] == [(step.index, step.visit) for step in theirs]
    for one, other in zip(map(joined, ours), map(joined, theirs), strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.samples, other.samples)
        assert torch.equal(one.visits, other.visits)
        assert one.bad == other.bad


# ---------------------------------------------------------------------------------------------- order


def test_every_visit_sees_each_image_once_but_for_the_remainder_in_an_order_of_its_own() -> None:
    seen = {}
    for step in range(6):
        visit, samples = step_samples(0, 11, 3, step)
        seen.setdefault(visit, []).extend(samples.tolist())
    assert list(seen) == [0, 1]
    assert all(len(set(samples)) == 9 for samples in seen.values())
    assert seen[0] != seen[1]


def test_the_step_samples_are_slices_of_the_visits_order() -> None:
    order = keyed_permutation(3, 20, "order", 1)
    for place in range(5):
        visit, samples = step_samples(3, 20, 4, 5 + place)
        assert visit == 1
        assert np.array_equal(samples, order[4 * place : 4 * place + 4])


def test_a_batch_larger_than_the_source_is_no_step() -> None:
    with pytest.raises(ValueError, match="a batch of 5 out of 4 images; use 1 to 4"):
        step_samples(0, 4, 5, 0)


def test_the_loader_follows_step_samples_and_crops_by_seed_visit_and_sample() -> None:
    source = source_of(11)
    for step in steps(source, 7):
        visit, samples = step_samples(5, 11, 4, step.index)
        batch = joined(step)
        assert step.visit == visit == step.index // 2
        assert batch.samples.tolist() == samples.tolist()
        assert batch.visits.tolist() == [visit] * 4
        assert batch.samples.dtype == batch.visits.dtype == torch.int64
        assert batch.images.dtype == torch.uint8
        for image, sample in zip(batch.images, samples.tolist(), strict=True):
            expected = train_crop(source.images[sample], 16, DATA, keyed_rng(5, "augment", visit, sample))
            assert torch.equal(image, expected)


def test_another_seed_gives_another_order_and_other_crops() -> None:
    source = source_of(40)
    one, other = (joined(steps(source, 1, seed=seed, batch_size=40)[0]) for seed in (0, 1))
    assert not torch.equal(one.samples, other.samples)
    assert not torch.equal(one.images[one.samples.argsort()], other.images[other.samples.argsort()])


# --------------------------------------------------------------------------------------- independence


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(workers) -> None:
    source = source_of(13, broken=(2, 7))
    assert_same_steps(steps(source, 7), steps(source, 7, workers=workers, micro_batch_size=3))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 3, 4])
def test_the_size_of_the_micro_batches_changes_nothing(micro_batch_size) -> None:
    source = source_of(13)
    assert_same_steps(steps(source, 7), steps(source, 7, micro_batch_size=micro_batch_size))


@pytest.mark.parametrize(("size", "expected"), [(None, [10]), (4, [4, 4, 2]), (5, [5, 5]), (99, [10])])
def test_micro_batches_have_the_asked_size_and_the_last_the_rest(size, expected) -> None:
    (step,) = steps(source_of(10), 1, batch_size=10, micro_batch_size=size)
    assert [len(batch.images) for batch in step.micro_batches] == expected


@pytest.mark.parametrize("start_step", [1, 3, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_starting_at_any_step_continues_as_if_never_stopped(start_step, workers) -> None:
    source = source_of(13)
    expected = steps(source, start_step + 3)[start_step:]
    assert_same_steps(steps(source, 3, start_step=start_step, workers=workers), expected)


def test_starting_late_reads_nothing_of_what_came_before() -> None:
    source = source_of(13)
    (step,) = steps(source, 1, start_step=10**9)
    assert step.index == 10**9
    assert source.reads == joined(step).samples.tolist()


def test_chunks_of_large_batches_are_joined_in_order() -> None:
    source = source_of(150)
    options = {"batch_size": 150, "micro_batch_size": 140}
    assert_same_steps(steps(source, 1, **options), steps(source, 1, workers=2, **options))
    (step,) = steps(source, 1, workers=2, **options)
    assert [len(batch.images) for batch in step.micro_batches] == [140, 10]


def test_every_iteration_begins_at_the_start() -> None:
    endless = loader(source_of(13), start_step=2)
    assert_same_steps(list(islice(endless, 2)), list(islice(endless, 2)))


UNTOUCHED = """
import random, numpy, torch
from nextblock.config import DataConfig
from nextblock.data import TrainLoader, eval_batches, open_source
def states():
    return random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
source, data = open_source("digits", DataConfig()), DataConfig()
before = states()
for workers in (0, 1):
    next(iter(TrainLoader(source, data, image_size=16, seed=0, batch_size=4, workers=workers)))
    next(eval_batches(source, data, 16, 4, workers=workers))
    assert states() == before, workers
"""


def test_no_global_generator_is_touched() -> None:
    # In a process of its own, as the tests' type checker draws from python's generator.
    subprocess.run([sys.executable, "-W", "error", "-c", UNTOUCHED], check=True)


# ---------------------------------------------------------------------------------------------- sizes


def test_the_last_partial_batch_is_dropped() -> None:
    endless = loader(source_of(11))
    assert (endless.batch_size, endless.steps_per_epoch) == (4, 2)


def test_a_source_smaller_than_a_batch_becomes_the_batch_with_a_warning(caplog) -> None:
    with caplog.at_level(logging.WARNING, logger="nextblock"):
        small = loader(source_of(3), batch_size=8)
    assert (small.batch_size, small.steps_per_epoch) == (3, 1)
    assert "list has 3 images, fewer than the batch of 8" in caplog.text
    assert sorted(joined(next(iter(small))).samples.tolist()) == [0, 1, 2]


def test_images_may_have_unequal_sides() -> None:
    (step,) = steps(source_of(5), 1, image_size=(8, 24))
    assert joined(step).images.shape == (4, 3, 8, 24)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size is 0; it must be at least 1"),
        ({"start_step": -1}, "start_step is -1; it must be at least 0"),
        ({"workers": -1}, "workers is -1; it must be at least 0"),
    ],
)
def test_impossible_numbers_are_refused(option, message) -> None:
    with pytest.raises(ValueError, match=message):
        loader(source_of(5), **option)


# ------------------------------------------------------------------------------------- what is broken


def test_a_broken_image_leaves_a_hole_and_is_named() -> None:
    source = source_of(8, broken=(1, 6))
    found = [joined(step) for step in steps(source, 2)]
    assert sorted(sample for batch in found for sample in batch.samples.tolist()) == [0, 2, 3, 4, 5, 7]
    bad = sorted(bad for batch in found for bad in batch.bad)
    assert bad == [BadSample(1, "image 1", "broken 1"), BadSample(6, "image 6", "broken 6")]
    assert all(len(batch.images) == len(batch.samples) for batch in found)


def test_the_other_images_are_what_they_would_be_without_the_hole() -> None:
    (whole,), (holed,) = (steps(source_of(8, broken=broken), 1, batch_size=8) for broken in ((), (1, 6)))
    keep = [sample not in (1, 6) for sample in joined(whole).samples.tolist()]
    assert torch.equal(joined(whole).images[keep], joined(holed).images)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_broken_images_is_empty_and_keeps_its_shape(workers) -> None:
    (step,) = steps(source_of(4, broken=(0, 1, 2, 3)), 1, workers=workers, image_size=(16, 8))
    batch = joined(step)
    assert batch.images.shape == (0, 3, 16, 8)
    assert len(batch.bad) == 4


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_that_is_no_images_surfaces(workers) -> None:
    with pytest.raises(RuntimeError, match="the disk is gone at"):
        steps(FailingSource(source_of(8).images), 1, workers=workers)


# ----------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_goes_in_order_with_centre_crops_and_keeps_the_last_batch(workers) -> None:
    source = source_of(11, broken=(4,))
    batches = list(eval_batches(source, DATA, 16, 4, workers=workers))
    assert [len(batch.images) for batch in batches] == [4, 3, 3]
    assert [batch.samples.tolist() for batch in batches] == [[0, 1, 2, 3], [5, 6, 7], [8, 9, 10]]
    assert [batch.bad for batch in batches] == [(), (BadSample(4, "image 4", "broken 4"),), ()]
    assert [batch.visits.tolist() for batch in batches] == [[0] * 4, [0] * 3, [0] * 3]
    for batch in batches:
        for image, sample in zip(batch.images, batch.samples.tolist(), strict=True):
            assert torch.equal(image, eval_crop(source.images[sample], 16, 18))


@pytest.mark.parametrize("indices", [[7, 2, 2, 0], np.array([7, 2, 2, 0])])
def test_evaluation_of_some_images_goes_in_the_order_asked_for(indices) -> None:
    batches = list(eval_batches(source_of(9), DATA, (16, 12), 3, indices=indices))
    assert [batch.samples.tolist() for batch in batches] == [[7, 2, 2], [0]]
    assert batches[0].images.shape == (3, 3, 16, 12)


def test_evaluation_of_nothing_is_nothing() -> None:
    assert list(eval_batches(source_of(9), DATA, 16, 3, indices=[])) == []


def test_chunks_of_large_evaluation_batches_are_joined_in_order() -> None:
    (batch,) = eval_batches(source_of(150), DATA, 16, 200, workers=2)
    assert batch.samples.tolist() == list(range(150))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"indices": [0, 9]}, "indices run from 0 to 9, the source's from 0 to 8"),
        ({"indices": [-1]}, "indices run from -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_impossible_evaluations_are_refused_at_once(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        eval_batches(source_of(9), DATA, 16, **({"batch_size": 3} | options))


# -------------------------------------------------------------------------------------------- workers


def test_workers_are_as_asked_or_none_in_memory_or_the_cores_but_one(tmp_path, monkeypatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "1.png")
    folder, memory = open_source(str(tmp_path), DATA), open_source("digits", DATA)
    assert resolve_workers(3, memory) == resolve_workers(3, folder) == 3
    assert resolve_workers(0, folder) == 0
    assert resolve_workers(None, memory) == 0
    for cores, expected in ((1, 0), (4, 3), (64, 8)):
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda process, cores=cores: set(range(cores)), raising=False
        )
        assert resolve_workers(None, folder) == expected


def test_a_folder_of_images_is_loaded_by_workers(tmp_path) -> None:
    for number in range(6):
        Image.new("RGB", (20, 12), (40 * number, 0, 0)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "6.jpg").write_bytes(b"not an image")
    source = open_source(str(tmp_path), DATA)
    assert_same_steps(steps(source, 3, batch_size=7), steps(source, 3, batch_size=7, workers=2))
    assert joined(steps(source, 1, batch_size=7, workers=1)[0]).bad[0].name == "6.jpg"


PROGRAM = """
import multiprocessing, os, signal, sys, time
from nextblock.config import DataConfig
from nextblock.data import TrainLoader, open_source
digits, data = open_source("digits", DataConfig()), DataConfig()
steps = iter(TrainLoader(digits, data, image_size=16, seed=0, batch_size=8, workers=1))
next(steps)
(worker,) = multiprocessing.active_children()
time.sleep(0.2)
os.kill(worker.pid, signal.SIGINT)
if hasattr(signal, "sigwaitinfo"):  # a stranger's SIGTERM
    os.system(f"kill -TERM {worker.pid}")
time.sleep(0.2)
assert [next(steps).index for _ in range(50)] == list(range(1, 51))
assert worker.is_alive()
if sys.argv[1] == "close":
    steps.close()
    worker.join(20)
    assert not worker.is_alive()
elif sys.argv[1] == "terminate":
    worker.terminate()
    worker.join(20)
    assert not worker.is_alive()
    os._exit(0)
"""


@pytest.mark.parametrize("ending", ["leave", "close", "terminate"])
def test_workers_outlive_the_signals_of_others_and_end_with_the_loader(ending) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, ending], timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
