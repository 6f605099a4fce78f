"""Geometry against loops: which patch lies in which block, orders, masks, cutting and putting together."""

from __future__ import annotations

import pytest
import torch

from nextblock.blocks import (
    block_orders,
    checkerboard_order,
    may_attend,
    patches_of_blocks,
    patchify,
    random_orders,
    spiral_order,
    unpatchify,
)

# (grid, block), both in (rows, columns) of patches
GEOMETRIES = [
    ((4, 4), (2, 2)),
    ((4, 4), (1, 1)),
    ((4, 4), (4, 4)),
    ((2, 6), (2, 3)),
    ((6, 4), (3, 1)),
    ((3, 5), (1, 5)),
    ((1, 4), (1, 2)),
    ((8, 6), (2, 3)),
]


def block_of_patch(row, column, grid, block):
    return (row // block[0]) * (grid[1] // block[1]) + column // block[1]


# ---------------------------------------------------------------------------------------------------- patches


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
def test_the_patches_of_a_block_are_those_that_lie_in_it_in_raster_order(grid, block):
    expected = {}
    for row in range(grid[0]):
        for column in range(grid[1]):
            number = block_of_patch(row, column, grid, block)
            expected.setdefault(number, []).append(row * grid[1] + column)
    assert patches_of_blocks(grid, block).tolist() == [expected[k] for k in sorted(expected)]


# ------------------------------------------------------------------------------------------------------ masks


def loop_mask(positions, prefix):
    """May query q attend to key t? By the definition, one pair at a time."""
    n = len(positions)
    mask = torch.zeros(n, n, dtype=torch.bool)
    for q in range(n):
        for t in range(n):
            mask[q, t] = positions[t] <= positions[q] or positions[t] < prefix
    return mask


def raster_positions(grid, block, order):
    """Position in the order of the block of every patch, in raster order."""
    at = {number: position for position, number in enumerate(order)}
    return [
        at[block_of_patch(row, column, grid, block)] for row in range(grid[0]) for column in range(grid[1])
    ]


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_token_may_attend_to_its_block_and_earlier_ones(grid, block, shuffled):
    k = patches_of_blocks(grid, block).shape[0]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(1)).tolist() if shuffled else range(k)
    positions = raster_positions(grid, block, order)
    assert torch.equal(may_attend(torch.tensor(positions)), loop_mask(positions, prefix=0))


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
def test_every_token_may_attend_to_its_images_prefix(grid, block):
    k = patches_of_blocks(grid, block).shape[0]
    positions = raster_positions(grid, block, range(k))
    lengths = torch.arange(k)
    mask = may_attend(torch.tensor(positions), lengths)
    assert mask.shape == (k, 1, len(positions), len(positions))
    for image, length in enumerate(lengths.tolist()):
        assert torch.equal(mask[image, 0], loop_mask(positions, length))


# ----------------------------------------------------------------------------------------------------- orders


GRIDS = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (4, 3), (5, 5), (6, 2)]
KINDS = ["raster", "spiral", "checkerboard", "fixed_random", "random"]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_order_is_a_permutation_of_the_blocks(kind, grid):
    orders = block_orders(kind, grid, seed=3)
    assert len(orders) == (grid[0] * grid[1] if kind == "random" else 1)
    for order in orders:
        assert sorted(order.tolist()) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize("grid", GRIDS)
def test_the_spiral_is_a_walk_inwards_from_the_top_left_backwards(grid):
    """One step at a time: down, right, up, left; turn where the edge or a visited block is."""
    rows, columns = grid
    place, ahead, walked = (0, 0), 0, [(0, 0)]
    while len(walked) < rows * columns:
        step = [(1, 0), (0, 1), (-1, 0), (0, -1)][ahead]
        there = (place[0] + step[0], place[1] + step[1])
        if 0 <= there[0] < rows and 0 <= there[1] < columns and there not in walked:
            place = there
            walked.append(place)
        else:
            ahead = (ahead + 1) % 4
    assert spiral_order(grid).tolist() == [row * columns + column for row, column in reversed(walked)]


@pytest.mark.parametrize("grid", GRIDS)
def test_the_checkerboard_takes_blocks_of_equal_parity_first(grid):
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    first = [r * grid[1] + c for r, c in places if r % 2 == c % 2]
    rest = [r * grid[1] + c for r, c in places if r % 2 != c % 2]
    assert checkerboard_order(grid).tolist() == first + rest


def test_the_fixed_random_order_is_that_of_its_seed_and_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = block_orders("fixed_random", (4, 4), seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, block_orders("fixed_random", (4, 4), seed=0))
    assert not torch.equal(first, block_orders("fixed_random", (4, 4), seed=1))


@pytest.mark.parametrize("num_blocks", [1, 2, 6, 16])
def test_there_are_as_many_random_orders_as_blocks_each_with_its_own_first(num_blocks):
    orders = random_orders(num_blocks, seed=3)
    assert orders.shape == (num_blocks, num_blocks)
    assert all(sorted(order) == list(range(num_blocks)) for order in orders.tolist())
    assert sorted(orders[:, 0].tolist()) == list(range(num_blocks))


def test_random_orders_are_the_draws_of_the_seed_less_those_whose_first_block_is_taken():
    generator, expected = torch.Generator().manual_seed(11), []
    while len(expected) < 6:
        drawn = torch.randperm(6, generator=generator).tolist()
        if all(drawn[:length] != e[:length] for e in expected for length in range(1, 7)):
            expected.append(drawn)
    assert random_orders(6, seed=11).tolist() == expected


def test_random_orders_are_those_of_their_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = random_orders(16, seed=0)
    torch.rand(3)
    assert torch.equal(first, random_orders(16, seed=0))
    assert not torch.equal(first, random_orders(16, seed=1))
    torch.set_rng_state(before)
    random_orders(16, seed=2)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------- cutting


@pytest.mark.parametrize(
    ("size", "piece"), [((8, 8), (4, 4)), ((6, 12), (3, 2)), ((4, 6), (4, 6)), ((4, 6), (1, 1))]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_patchify_cuts_what_loops_cut(size, piece, channels):
    images = torch.arange(2 * channels * size[0] * size[1]).view(2, channels, *size)
    expected = [
        [
            [
                images[b, c, top + i, left + j].item()
                for c in range(channels)
                for i in range(piece[0])
                for j in range(piece[1])
            ]
            for top in range(0, size[0], piece[0])
            for left in range(0, size[1], piece[1])
        ]
        for b in range(2)
    ]
    assert patchify(images, piece).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_unpatchify_puts_together_what_patchify_cut(dtype):
    images = torch.randint(256, (2, 3, 12, 20), generator=torch.Generator().manual_seed(0)).to(dtype)
    assert torch.equal(unpatchify(patchify(images, (6, 4)), (2, 5), (6, 4)), images)
