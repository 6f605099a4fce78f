"""What is predicted and how far off it is: the pixels of the next block, normalised or raw, MSE or L1.

Pure functions. Everything is computed in fp32 whatever the precision around it. The loss of several
micro-batches or processes is a sum over kept elements divided by their number in the whole batch; so block
losses and counts come apart here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from nextblock.blocks import patchify

__all__ = [
    "baseline_losses",
    "block_losses",
    "block_targets",
    "combine",
    "kept_rows",
    "normalize_blocks",
]

NORMALIZE_EPS = 1e-6


def normalize_blocks(pixels: Float[Tensor, "*b p"]) -> Float[Tensor, "*b p"]:
    """Subtract each block's mean, divide by its deviation (unbiased variance, eps 1e-6 inside the root)."""
    variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True, correction=1)
    return (pixels - mean) * torch.rsqrt(variance + NORMALIZE_EPS)


def block_targets(
    images: Float[Tensor, "b c h w"],
    order: Int64[Tensor, " k"],
    size_px: tuple[int, int],
    *,
    normalize: bool,
    start: int = 1,
) -> Float[Tensor, "b steps p"]:
    """The true pixels of the blocks at positions `start`, start+1, ... of the order."""
    pixels = patchify(images.float(), size_px).index_select(1, order[start:])
    return normalize_blocks(pixels) if normalize else pixels


def block_losses(
    predictions: Float[Tensor, "*b p"], targets: Float[Tensor, "*b p"], loss: Literal["mse", "l1"]
) -> Float[Tensor, "*b"]:
    """Mean over a block's pixel values of the squared or absolute difference, in fp32."""
    difference = predictions.float() - targets.float()
    return (difference.square() if loss == "mse" else difference.abs()).mean(-1)


def kept_rows(
    batch: int, steps: int, distance: int, prefix_lengths: Int64[Tensor, " b"] | None
) -> Bool[Tensor, "b steps"]:
    """Which rows count: row i predicts position i + distance, which must not lie in the prefix.

    On the device of the lengths; on the CPU where there are none.
    """
    if prefix_lengths is None:
        return torch.ones(batch, steps, dtype=torch.bool, device="cpu")
    positions = torch.arange(distance, steps + distance, device=prefix_lengths.device)
    return positions[None] >= prefix_lengths[:, None]


def combine(
    losses: Sequence[Float[Tensor, "b _"]], divisors: Sequence[int | Float[Tensor, ""]]
) -> Float[Tensor, ""]:
    """Sum block losses, divide them, and average over the predicted distances: the loss of a part of a batch.

    Rows that are not kept hold zero. `divisors` are numbers of kept rows, one a distance: those of this part
    for its own mean, those of the global batch for its share of the batch's loss.
    """
    means = [part.sum() / divisor for part, divisor in zip(losses, divisors, strict=True)]
    return torch.stack(means).mean()


def baseline_losses(
    targets: Float[Tensor, "b steps p"], first_block: Float[Tensor, "b p"], loss: Literal["mse", "l1"]
) -> dict[str, Float[Tensor, " b"]]:
    """What an image's loss would be without a model: predicting zero, and copying the previous block.

    `targets` as the loss sees them; `first_block` in the same normalisation. Under normalised pixels and MSE
    the zero prediction costs about 1 (exactly (p-1)/p on a block that is not flat).
    """
    previous = torch.cat([first_block[:, None], targets[:, :-1]], dim=1)
    return {
        "zero": block_losses(torch.zeros_like(targets), targets, loss).mean(1),
        "copy_previous": block_losses(previous, targets, loss).mean(1),
    }
