"""How many blocks of an image all its tokens may attend to while training: AIM's prefix (section 4.2).

An image's prefix length is uniform on 1 .. k-1 and a function of (seed, visit, sample), so it hangs on no
worker, rank or micro-batch; and it is known before the forward pass, and with it what the loss is divided by.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Int64
from torch import Tensor

from nextblock.data import keyed_seed

__all__ = ["count_kept_rows", "draw_prefix_lengths"]


def draw_prefix_lengths(
    seed: int, visits: Iterable[int], samples: Iterable[int], num_blocks: int
) -> Int64[Tensor, " b"]:
    """One length from 1 to num_blocks - 1 for each (visit, sample).

    63 random bits modulo k-1: the lengths' probabilities differ by at most 2**-63, a negligible bias.
    """
    keys = zip(visits, samples, strict=True)
    lengths = [1 + keyed_seed(seed, "prefix", visit, sample) % (num_blocks - 1) for visit, sample in keys]
    return torch.tensor(lengths, dtype=torch.int64)


def count_kept_rows(prefix_lengths: Int64[Tensor, " b"], num_blocks: int, distance: int) -> int:
    """Blocks that images with these prefixes predict at a distance.

    Row i, of 0 .. k-1-distance, predicts the block at position i + distance of the order and is kept where
    that lies after the prefix S: k - distance rows, or k - S where these are fewer.
    """
    return int((num_blocks - prefix_lengths).clamp(max=num_blocks - distance).sum())
