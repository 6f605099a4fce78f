"""The geometry of blocks: the patches of a block, the order of blocks, and attention masks.

Pure functions. A *block* is a rectangle of patches; blocks and patches are numbered in raster order; an
*order* is a permutation of the blocks, from position in the sequence to block.
A 4x4 grid of patches in 2x2 blocks:

    patches                blocks
     0  1 |  2  3           0 0 | 1 1
     4  5 |  6  7           0 0 | 1 1
    ------+------          -----+-----
     8  9 | 10 11           2 2 | 3 3
    12 13 | 14 15           2 2 | 3 3
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from nextblock.errors import UsageError

NORMALIZE_EPS = 1e-6


def patches_of_blocks(grid: tuple[int, int], block: tuple[int, int]) -> Int64[Tensor, "k m"]:
    """The patches in every block, both in raster order; `grid` and `block` are (rows, columns) of patches."""
    # Number the patches in raster order, then cut the grid: rows become (r i), columns (c j), and each (r, c)
    # is a block. No arithmetic on indices, so height and width cannot be mixed up.
    patches = torch.arange(grid[0] * grid[1], dtype=torch.int64).view(grid)
    return rearrange(patches, "(r i) (c j) -> (r c) (i j)", i=block[0], j=block[1])


def block_orders(kind: str, block_grid: tuple[int, int], seed: int) -> Int64[Tensor, "o k"]:
    """Return the orders of a kind: one, except for "random"; only random kinds use `seed`."""
    k = block_grid[0] * block_grid[1]
    if kind == "random":
        return random_orders(k, seed)
    if kind in ("fixed_random", "per_image"):  # per_image: for features; training draws its own
        # A separate CPU generator: the same order on every device, independent of other draws.
        return torch.randperm(k, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")[None]
    if kind == "spiral":
        return spiral_order(block_grid)[None]
    if kind == "checkerboard":
        return checkerboard_order(block_grid)[None]
    blocks = torch.arange(k, dtype=torch.int64)
    blocks = blocks.view(block_grid).T.flatten() if "column" in kind else blocks
    return (blocks.flip(0) if "reverse" in kind else blocks)[None]


def check_order(order: Shaped[Tensor, "*k"], num_blocks: int, batch: int | None = None) -> None:
    """Raise `ValueError` unless `order` is a permutation of the blocks, or one for each image of a batch.

    Values are checked on the CPU only.
    """
    # Reading values would wait for a GPU and break a compiled graph; shapes are always known.
    wrong = tuple(order.shape) not in ((num_blocks,), (batch, num_blocks))
    if not wrong and not torch.compiler.is_compiling() and order.device.type == "cpu":
        wrong = bool((order.sort(-1).values != torch.arange(num_blocks)).any())
    if wrong:
        raise UsageError(
            f"block_order must be a permutation of 0..{num_blocks - 1}, got "
            f"{order.tolist() if order.device.type == 'cpu' else tuple(order.shape)}"
        )


def spiral_order(block_grid: tuple[int, int]) -> Int64[Tensor, " k"]:
    """From the centre out: a spiral that goes in from the top left, down first, walked backwards (AIM).

    Positions on 3x4 blocks:

        11  2  3  4
        10  1  0  5
         9  8  7  6
    """
    blocks = torch.arange(block_grid[0] * block_grid[1], dtype=torch.int64).view(block_grid)
    # Peel off the left column, rotate the rest so that the next side is on the left, and repeat. Read
    # backwards, the spiral starts in the middle.
    inward = []
    while blocks.numel():
        inward.append(blocks[:, 0])
        blocks = blocks[:, 1:].rot90(-1)  # the bottom row becomes the left column, read downwards
    return torch.cat(inward).flip(0)


def checkerboard_order(block_grid: tuple[int, int]) -> Int64[Tensor, " k"]:
    """Blocks whose row and column are both even or both odd, then the others, both in raster order (AIM)."""
    rows, columns = torch.meshgrid(*map(torch.arange, block_grid), indexing="ij")
    # A stable sort keeps each colour's blocks in raster order.
    return torch.argsort((rows + columns).flatten() % 2, stable=True)


def random_orders(num_blocks: int, seed: int) -> Int64[Tensor, "k k"]:
    """One pseudo-random order per block, each starting with a different block.

    Validation and features use the first; training draws one per step for the whole batch.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    orders: dict[int, Tensor] = {}
    while len(orders) < num_blocks:
        order = torch.randperm(num_blocks, generator=generator, device="cpu")
        # As in XTRA's official set, an order whose first block is taken is drawn again. Dicts keep insertion
        # order, so the set depends on the seed alone.
        orders.setdefault(int(order[0]), order)
    return torch.stack(list(orders.values()))


def take(
    values: Shaped[Tensor, "#b n *d"], index: Int64[Tensor, " s"] | Int64[Tensor, "b s"]
) -> Shaped[Tensor, "b s *d"]:
    """Select rows of each image by index: the same for all images, or per image."""
    if index.ndim == 1:
        return values.index_select(1, index)
    return torch.take_along_dim(values, index.view(*index.shape, *[1] * (values.ndim - 2)), dim=1)


def may_attend(
    positions: Int64[Tensor, " n"], prefix_lengths: Int64[Tensor, " b"] | None = None
) -> Bool[Tensor, "n n"] | Bool[Tensor, "b 1 n n"]:
    """Which token (row) may attend to which (column): its own block, earlier blocks, and the prefix.

    `positions` holds the position in the order of each token's block. `prefix_lengths` holds how many blocks
    along the order all tokens of an image may attend to. A prefix of 0 equals 1: all see the first block
    anyway. (XTRA's block-causal mask; with a prefix, AIM's section 4.2.)
    """
    # Rows are queries, columns are keys. All tokens of a block share a position, so `>=` lets them see each
    # other and makes the mask a staircase of blocks.
    causal = positions[:, None] >= positions[None, :]
    if prefix_lengths is None:
        return causal
    # Every row may attend to the prefix's columns. Its length differs by image, so the mask gets a batch
    # axis, and an axis of size 1 for all heads.
    in_prefix = positions[None, :] < prefix_lengths[:, None]
    return causal | rearrange(in_prefix, "b n -> b 1 1 n")


def raster_mask(patches_of_blocks: Int64[Tensor, "k m"], order: Int64[Tensor, " k"]) -> Bool[Tensor, "n n"]:
    """`may_attend` without a prefix, over all patches in raster order, whatever the order of the blocks."""
    # Invert the order: each patch of the t-th block gets position t, stored at the patch's raster index.
    positions = torch.empty(patches_of_blocks.numel(), dtype=torch.int64, device=order.device)
    positions[patches_of_blocks[order]] = torch.arange(len(order), device=order.device)[:, None]
    return may_attend(positions)


def patchify(images: Shaped[Tensor, "b c h w"], size_px: tuple[int, int]) -> Shaped[Tensor, "b k p"]:
    """Cut images into rectangles of `size_px` (height, width), in raster order, each as (c h w)."""
    # Rectangles in raster order, and pixels within one as channel, row, column: `unpatchify` and the official
    # pixel order depend on it.
    return rearrange(images, "b c (r h) (q w) -> b (r q) (c h w)", h=size_px[0], w=size_px[1])


def unpatchify(
    pieces: Shaped[Tensor, "b k p"], grid: tuple[int, int], size_px: tuple[int, int]
) -> Shaped[Tensor, "b c h w"]:
    """Undo `patchify`; `grid` is the number of pieces along the image, (rows, columns)."""
    return rearrange(
        pieces, "b (r q) (c h w) -> b c (r h) (q w)", r=grid[0], q=grid[1], h=size_px[0], w=size_px[1]
    )


def normalize_blocks(pixels: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Subtract each row's mean, divide by its deviation (unbiased variance, eps 1e-6 inside the root)."""
    # Per block, so the target is the structure of a block and not its brightness. Official XTRA and MAE
    # use the unbiased variance, with eps inside the root.
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=1)
    return (pixels - mean) * torch.rsqrt(variance + NORMALIZE_EPS)


def denormalize_blocks(pixels: Float[Tensor, "*b p"], true: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Give normalised rows the mean and deviation of the true ones."""
    variance, mean = torch.var_mean(true, dim=-1, keepdim=True, correction=1)
    return pixels * torch.sqrt(variance + NORMALIZE_EPS) + mean
