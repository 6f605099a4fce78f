"""Geometry against loops: which patch lies in which block, orders, masks, cutting and putting together."""

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
    ((3, 5), (1, 5)),
    ((8, 6), (2, 3)),
]
GRIDS = [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (4, 3), (6, 2)]


def block_of_each_patch(grid, block):
    """In raster order."""
    rows, columns = grid
    return [
        (row // block[0]) * (columns // block[1]) + column // block[1]
        for row in range(rows)
        for column in range(columns)
    ]


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
def test_the_patches_of_a_block_are_those_that_lie_in_it_in_raster_order(grid, block):
    of_patch = block_of_each_patch(grid, block)
    expected = [[n for n, b in enumerate(of_patch) if b == number] for number in range(max(of_patch) + 1)]
    assert patches_of_blocks(grid, block).tolist() == expected


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
def test_a_token_may_attend_to_its_block_to_earlier_ones_and_to_its_images_prefix(grid, block):
    of_patch = block_of_each_patch(grid, block)
    k = max(of_patch) + 1
    at = torch.randperm(k, generator=torch.Generator().manual_seed(1)).tolist()
    positions = [at[number] for number in of_patch]
    expected = torch.tensor(
        [[[t <= q or t < length for t in positions] for q in positions] for length in range(k)]
    )
    assert torch.equal(may_attend(torch.tensor(positions)), expected[0])
    assert torch.equal(may_attend(torch.tensor(positions), torch.arange(k)), expected[:, None])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("kind", ["spiral", "checkerboard", "fixed_random", "random", "per_image"])
def test_every_order_is_a_permutation_of_the_blocks(kind, grid):
    orders, k = block_orders(kind, grid, seed=3), grid[0] * grid[1]
    assert [sorted(order) for order in orders.tolist()] == [list(range(k))] * (k if kind == "random" else 1)
    if kind == "random":
        assert sorted(orders[:, 0].tolist()) == list(range(k)), "each has its own first block"


@pytest.mark.parametrize("grid", GRIDS)
def test_rows_and_columns_are_read_forwards_or_backwards(grid):
    rows, columns = grid
    by_row = [row * columns + column for row in range(rows) for column in range(columns)]
    by_column = [row * columns + column for column in range(columns) for row in range(rows)]
    orders = {"raster": by_row, "reverse": by_row[::-1]}
    orders |= {"column": by_column, "reverse_column": by_column[::-1]}
    assert {kind: block_orders(kind, grid, seed=3).tolist() for kind in orders} == {
        kind: [order] for kind, order in orders.items()
    }


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
    rows, columns = grid
    expected = sorted(range(rows * columns), key=lambda n: (n // columns + n % columns) % 2)
    assert checkerboard_order(grid).tolist() == expected


@pytest.mark.parametrize("kind", ["fixed_random", "random"])
def test_drawn_orders_are_those_of_their_seed_and_leave_the_global_generator_alone(kind):
    before = torch.get_rng_state()
    first = block_orders(kind, (4, 4), seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, block_orders(kind, (4, 4), seed=0))
    assert not torch.equal(first, block_orders(kind, (4, 4), seed=1))


def test_random_orders_are_the_draws_of_the_seed_less_those_whose_first_block_is_taken():
    generator, expected = torch.Generator().manual_seed(11), []
    while len(expected) < 6:
        drawn = torch.randperm(6, generator=generator).tolist()
        if all(drawn[0] != e[0] for e in expected):
            expected.append(drawn)
    assert random_orders(6, seed=11).tolist() == expected


@pytest.mark.parametrize(
    ("size", "piece"), [((8, 8), (4, 4)), ((6, 12), (3, 2)), ((4, 6), (4, 6)), ((4, 6), (1, 1))]
)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_patchify_cuts_what_loops_cut_and_unpatchify_puts_it_together(size, piece, dtype):
    (height, width), (rows, columns) = size, piece
    images = torch.arange(2 * 3 * height * width).view(2, 3, height, width).to(dtype)
    pieces = [
        images[:, :, top : top + rows, left : left + columns].flatten(1)
        for top in range(0, height, rows)
        for left in range(0, width, columns)
    ]
    cut = patchify(images, piece)
    assert torch.equal(cut, torch.stack(pieces, dim=1))
    assert torch.equal(unpatchify(cut, (height // rows, width // columns), piece), images)
