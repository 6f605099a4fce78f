"""Together the ranks see what one process sees, in its order and with its pixels, wherever a run was cut."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch

from nextblock.config import DataConfig
from nextblock.data import BadSample, Batch, ConcatSource, Source, Step, TrainLoader, open_source
from tiny_runs import write_images
from toy import ToySource

# A machine with few cores is warned of more workers than cores, which is what some tests want.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")

DATA = DataConfig(color_jitter=(0.4, 0.4, 0.4, 0.1))
MIXED = replace(DATA, weights=(0.7, 0.3))
SEED, BATCH = 3, 7

KINDS = ("one source", "mixture")


def case(kind: str) -> tuple[Source, DataConfig]:
    """A source of 25 images, or a mixture of 19 and 4, with two that cannot be read."""
    if kind == "one source":
        return ToySource(25, bad=(4, 20)), DATA
    return ConcatSource([ToySource(19, bad=(4, 12)), ToySource(4, seed=1)]), MIXED


def loader(source: Source, data: DataConfig = DATA, **options: Any) -> TrainLoader:
    settings: dict[str, Any] = {"image_size": 8, "seed": SEED, "batch_size": BATCH}
    return TrainLoader(source, data, **settings | options)


def joined(steps: Sequence[Step]) -> Batch:
    """The same step of some ranks, in the ranks' order, as one batch."""
    batches = [batch for step in steps for batch in step.micro_batches]
    return Batch(
        torch.cat([batch.images for batch in batches]),
        torch.cat([batch.samples for batch in batches]),
        tuple(bad for batch in batches for bad in batch.bad),
        torch.cat([batch.visits for batch in batches]),
    )


def of_world(kind: str, world_size: int, number: int, start: int = 0, **options: Any) -> list[list[Step]]:
    """Of `number` steps from `start`, what every rank gets; each rank opens the source by itself."""
    ranks = []
    for rank in range(world_size):
        source, data = case(kind)
        steps = loader(source, data, rank=rank, world_size=world_size, start_step=start, **options)
        ranks.append(list(islice(steps, number)))
    return [list(step) for step in zip(*ranks, strict=True)]


def assert_same(ours: list[list[Step]], expected: list[list[Step]]) -> None:
    assert len(ours) == len(expected)
    for ranks, (single,) in zip(ours, expected, strict=True):
        assert {(step.index, step.visit) for step in ranks} == {(single.index, single.visit)}
        one, other = joined(ranks), joined([single])
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.samples, other.samples)
        assert torch.equal(one.visits, other.visits)
        assert one.bad == other.bad


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, list[list[Step]]]:
    """Nine steps, three epochs, of one process without workers."""
    return {kind: of_world(kind, 1, 9) for kind in KINDS}


# ------------------------------------------------------------------------------------------- the property


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_run_cut_anywhere_and_gone_on_with_by_any_number_of_ranks_sees_the_same(
    kind, world_size, uninterrupted
):
    rng = np.random.default_rng(world_size)
    for _ in range(4):
        stops = sorted(rng.integers(0, 10, 2).tolist())
        worlds = [world_size, *rng.integers(1, 5, 2).tolist()]
        seen = []
        for (start, end), ranks in zip(pairwise([0, *stops, 9]), worlds, strict=True):
            micro = int(rng.integers(1, 9))
            seen += of_world(kind, ranks, end - start, start, micro_batch_size=micro)
        assert_same(seen, uninterrupted[kind])


@pytest.mark.parametrize(
    ("kind", "world_size", "workers", "start"),
    [
        ("one source", 1, 3, 0),
        ("one source", 2, 2, 4),
        ("one source", 4, 1, 8),
        ("mixture", 2, 1, 3),
        ("mixture", 3, 2, 5),
    ],
)
def test_the_number_of_workers_changes_nothing_on_any_rank(kind, world_size, workers, start, uninterrupted):
    seen = of_world(kind, world_size, 9 - start, start, workers=workers, micro_batch_size=2)
    assert_same(seen, uninterrupted[kind][start:])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_over_an_epoch_the_ranks_see_every_image_once_but_for_the_dropped_batch(world_size):
    whole = dict.fromkeys(range(25), 1)
    for epoch in range(3):
        ranks = of_world("one source", world_size, 3, 3 * epoch)
        seen = Counter(
            sample
            for step in ranks
            for sample in [*joined(step).samples.tolist(), *(bad.sample for bad in joined(step).bad)]
        )
        assert seen <= Counter(whole)
        assert seen.total() == 25 // BATCH * BATCH


@pytest.mark.parametrize("world_size", [2, 3])
def test_of_a_mixture_the_ranks_see_every_source_visit_by_visit(world_size):
    seen = Counter()
    for step in of_world("mixture", world_size, 30):
        batch = joined(step)
        seen.update(zip(batch.visits.tolist(), batch.samples.tolist(), strict=True))
    assert max(seen.values()) == 1
    for first, size, holes in ((0, 19, {4, 12}), (19, 4, set())):
        drawn = {key for key in seen if first <= key[1] < first + size}
        for visit in range(max(visit for visit, _ in drawn)):  # the last one is not over
            assert {sample for at, sample in drawn if at == visit} == {*range(first, first + size)} - holes


def test_files_read_from_a_disk_are_the_same_on_any_number_of_ranks(tmp_path):
    write_images(tmp_path, 9, broken=2)

    def seen(world_size: int, **options: Any) -> list[Batch]:
        ranks = [
            list(islice(loader(open_source(str(tmp_path), DATA), rank=rank, world_size=world_size), 3))
            for rank in range(world_size)
        ]
        return [joined(step) for step in zip(*ranks, strict=True)]

    for one, other in zip(seen(1), seen(3), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.bad == other.bad


# ---------------------------------------------------------------------------------------------- the shares


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 9])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 2, 5, 100])
def test_shares_differ_by_at_most_one_and_all_ranks_have_as_many_micro_batches(world_size, micro_batch_size):
    source = ToySource(25)
    ranks = [
        next(iter(loader(source, rank=rank, world_size=world_size, micro_batch_size=micro_batch_size)))
        for rank in range(world_size)
    ]
    sizes = [[len(batch.samples) for batch in step.micro_batches] for step in ranks]
    shares = [sum(share) for share in sizes]
    assert sum(shares) == BATCH
    assert max(shares) - min(shares) <= 1
    micro = min(micro_batch_size or BATCH, max(shares))
    assert {len(share) for share in sizes} == {-(-max(shares) // micro)}
    assert max(size for share in sizes for size in share) == micro


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_without_a_sample_gets_an_empty_micro_batch_of_the_right_shape(workers):
    options = {"batch_size": 2, "world_size": 3, "image_size": (8, 12), "workers": workers}
    steps = [list(islice(loader(ToySource(5), rank=rank, **options), 3)) for rank in range(3)]
    assert [[len(step.micro_batches[0].samples) for step in rank] for rank in steps] == [
        [0, 0, 0],
        [1, 1, 1],
        [1, 1, 1],
    ]
    assert [step.index for step in steps[0]] == [0, 1, 2]
    (empty,) = steps[0][0].micro_batches
    assert empty.images.shape == (0, 3, 8, 12)
    assert empty.images.dtype == torch.uint8
    assert (empty.bad, len(empty.visits)) == ((), 0)


def test_the_batch_is_the_global_one_on_every_rank():
    endless = [loader(ToySource(25), rank=rank, world_size=4) for rank in range(4)]
    assert {(one.batch_size, one.steps_per_epoch) for one in endless} == {(BATCH, 3)}


def test_a_hole_is_named_by_the_rank_that_would_have_had_the_image():
    steps = of_world("one source", 4, 3)
    bad = [bad for step in steps for rank in step for batch in rank.micro_batches for bad in batch.bad]
    assert len(bad) == len(set(bad))
    assert set(bad) <= {BadSample(4, "toy-0[4]", "truncated"), BadSample(20, "toy-0[20]", "truncated")}
    assert bad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"world_size": 0}, "world_size is 0; it must be at least 1"),
        ({"rank": -1}, "rank is -1; it must be at least 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of 2; ranks run from 0 to 1"),
    ],
)
def test_impossible_ranks_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        loader(ToySource(9), **options)


# ----------------------------------------------------------------------------------------- what is not read


@pytest.mark.parametrize("start", [0, 4, 10**9])
@pytest.mark.parametrize("world_size", [1, 3])
def test_going_on_at_any_step_reads_the_ranks_own_images_and_no_other(start, world_size):
    total = 0
    for rank in range(world_size):
        source = ToySource(25)
        step = next(iter(loader(source, rank=rank, world_size=world_size, start_step=start)))
        assert source.reads == len(step.micro_batches[0].samples)
        total += source.reads
    assert total == BATCH


def test_going_on_with_a_mixture_reads_nothing_of_what_came_before():
    source = ConcatSource([ToySource(19), ToySource(4, seed=1)])
    step = next(iter(loader(source, MIXED, rank=1, world_size=2, start_step=10**9)))
    reads = sum(part.reads for part in source.parts if isinstance(part, ToySource))
    assert reads == len(step.micro_batches[0].samples) == 4
