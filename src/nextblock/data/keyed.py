"""Randomness by name: a number is a function of the seed, of what it is for, and of which one it is.

Nothing here has a state, so a run may stop, skip, or divide its work among processes and still draw the same
numbers. The key is a hash (BLAKE2b), the generator counter-based (Philox): the same on every platform.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, UInt64

__all__ = ["keyed_permutation", "keyed_rng", "keyed_seed", "permuted"]

MAX_TABLE = 2**24
"""Elements up to which a permutation is made whole, ImageNet-21k among them."""
FEISTEL_ROUNDS = 8


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


def permuted(
    seed: int, length: int, positions: Int64[np.ndarray, " b"], purpose: str, *numbers: int
) -> Int64[np.ndarray, " b"]:
    """What stands at some positions of a permutation of range(length).

    Up to `MAX_TABLE` it is `keyed_permutation`'s, whose table costs 20 bytes an element to make. Beyond, no
    table is made: a Feistel network shuffles the next power of four, and what falls outside the range walks
    on until it is inside (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    if length <= MAX_TABLE:
        return keyed_permutation(seed, length, purpose, *numbers)[positions]
    half = -(-(length - 1).bit_length() // 2)
    key = int.from_bytes(_digest(seed, purpose, numbers), "little")
    round_keys = np.random.Philox(key=key).random_raw(FEISTEL_ROUNDS)
    values = _feistel(positions.astype(np.uint64), np.uint64(half), round_keys)
    while (outside := values >= length).any():
        values[outside] = _feistel(values[outside], np.uint64(half), round_keys)
    return values.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, " b"], half: np.uint64, round_keys: UInt64[np.ndarray, " rounds"]
) -> UInt64[np.ndarray, " b"]:
    """Shuffle numbers of twice `half` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mixed(right ^ round_key) & mask)
    return left << half | right


def _mixed(values: UInt64[np.ndarray, " b"]) -> UInt64[np.ndarray, " b"]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014): every bit depends on every bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _digest(seed: int, purpose: str, numbers: tuple[int, ...]) -> bytes:
    # Decimal numbers between commas after a zero byte: no two keys have the same text.
    text = f"{purpose}\0{seed},{','.join(map(str, numbers))}"
    return hashlib.blake2b(text.encode(), digest_size=16).digest()
