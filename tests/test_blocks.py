"""Orders, cutting and putting together against loops (blocks of patches and masks: test_next_block.py)."""

import pytest
import torch

from nextblock.blocks import block_orders, patchify, unpatchify


def walk_inwards(rows, columns):
    """A step at a time from the top left: down, right, up, left; turn at the edge or at a visited block."""
    place, ahead, walked = (0, 0), 0, [(0, 0)]
    while len(walked) < rows * columns:
        step = [(1, 0), (0, 1), (-1, 0), (0, -1)][ahead]
        there = (place[0] + step[0], place[1] + step[1])
        if 0 <= there[0] < rows and 0 <= there[1] < columns and there not in walked:
            place = there
            walked.append(place)
        else:
            ahead = (ahead + 1) % 4
    return walked


def draws_with_each_first_block_once(k, generator):
    orders = []
    while len(orders) < k:
        drawn = torch.randperm(k, generator=generator).tolist()
        if all(drawn[0] != order[0] for order in orders):
            orders.append(drawn)
    return orders


@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 1), (2, 2), (3, 4), (4, 3), (6, 2)])
@pytest.mark.parametrize("seed", [3, 11])
def test_every_order_is_that_of_its_slow_definition_and_leaves_the_global_generator_alone(grid, seed):
    rows, columns = grid
    k, generator, before = rows * columns, torch.Generator(), torch.get_rng_state()
    by_row = [row * columns + column for row in range(rows) for column in range(columns)]
    by_column = [row * columns + column for column in range(columns) for row in range(rows)]
    drawn = torch.randperm(k, generator=generator.manual_seed(seed)).tolist()
    expected = {
        "raster": [by_row],
        "reverse": [by_row[::-1]],
        "column": [by_column],
        "reverse_column": [by_column[::-1]],
        "spiral": [[row * columns + column for row, column in reversed(walk_inwards(rows, columns))]],
        "checkerboard": [sorted(by_row, key=lambda n: (n // columns + n % columns) % 2)],
        "fixed_random": [drawn],
        "per_image": [drawn],
        "random": draws_with_each_first_block_once(k, generator.manual_seed(seed)),
    }
    assert {kind: block_orders(kind, grid, seed).tolist() for kind in expected} == expected
    assert torch.equal(torch.get_rng_state(), before)


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
