"""Randomness by name: a number is a function of the seed, of what it is for, and of which one it is.

Nothing here has a state, so a run may stop, skip, or divide its work among processes and still draw the same
numbers. The key is a hash (BLAKE2b), the generator counter-based (Philox): the same on every platform.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np

__all__ = ["keyed_permutation", "keyed_rng", "keyed_seed"]


def keyed_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed in [0, 2**63) for `purpose` and its numbers, such as ("augment", visit, sample)."""
    return int.from_bytes(_digest(seed, purpose, numbers)[:8], "little") >> 1


def keyed_rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A generator of its own for `purpose` and its numbers; two different keys share no numbers."""
    key = int.from_bytes(_digest(seed, purpose, numbers), "little")
    return np.random.Generator(np.random.Philox(key=key))


@lru_cache(maxsize=2)
def keyed_permutation(seed: int, length: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of range(length), read-only; the last two are remembered.

    Built from the raw bits, because numpy promises those to stay the same between its versions, and not what
    `Generator.permutation` makes of them.
    """
    key = int.from_bytes(_digest(seed, purpose, numbers), "little")
    order = np.argsort(np.random.Philox(key=key).random_raw(length), kind="stable")
    order.flags.writeable = False
    return order


def _digest(seed: int, purpose: str, numbers: tuple[int, ...]) -> bytes:
    # Decimal numbers between commas after a zero byte: no two keys have the same text.
    text = f"{purpose}\0{seed},{','.join(map(str, numbers))}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
