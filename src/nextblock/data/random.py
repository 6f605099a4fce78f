"""Random numbers as functions of the seed, a purpose, and numbers such as (visit, sample).

Nothing here has state: a run can stop, skip or split its work among processes, and still draw the same
numbers. The key is a hash (BLAKE2b) and the generator is counter-based (Philox), the same on every platform.
"""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Int64, UInt64

# Permutations up to this length are tables; ImageNet-21k fits.
MAX_TABLE = 2**24
FEISTEL_ROUNDS = 8


def keyed_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A seed in [0, 2**63) for `purpose` and its numbers, such as ("augment", visit, sample)."""
    return _key(seed, purpose, numbers) % 2**64 >> 1


def keyed_rng(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A separate generator for `purpose` and its numbers; different keys give independent streams."""
    return np.random.Generator(np.random.Philox(key=_key(seed, purpose, numbers)))


def keyed_permutation(seed: int, length: int, purpose: str, *numbers: int) -> np.ndarray:
    """A permutation of range(length)."""
    # Built from raw bits: numpy keeps those stable across versions, but not the result of
    # Generator.permutation.
    bits = np.random.Philox(key=_key(seed, purpose, numbers)).random_raw(length)
    return np.argsort(bits, kind="stable")


class Permutation:
    """`keyed_permutation` of any length: `permutation[positions]` are the numbers at these positions.

    Up to `MAX_TABLE` numbers it stores a table, which takes 20 bytes per number to build. Above that, a
    Feistel network computes each number from its position alone.
    """

    def __init__(self, seed: int, length: int, purpose: str, *numbers: int) -> None:
        self._length = length
        self._table = keyed_permutation(seed, length, purpose, *numbers) if length <= MAX_TABLE else None
        self._round_keys = np.random.Philox(key=_key(seed, purpose, numbers)).random_raw(FEISTEL_ROUNDS)

    def __getitem__(self, positions: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
        if self._table is not None:
            return self._table[positions]
        # The network permutes all numbers of an even number of bits, a range up to four times as long as
        # ours. A result outside our range is permuted again until it falls inside ("cycle walking", Black
        # and Rogaway, Ciphers with Arbitrary Finite Domains, 2002). Every cycle that leaves our range comes
        # back, so the walk ends, and no two positions end at the same number: it is a permutation.
        half = np.uint64(-(-(self._length - 1).bit_length() // 2))
        values = _feistel(positions.astype(np.uint64), half, self._round_keys)
        while (outside := values >= self._length).any():
            values[outside] = _feistel(values[outside], half, self._round_keys)
        return values.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, " b"], half: np.uint64, round_keys: UInt64[np.ndarray, " rounds"]
) -> UInt64[np.ndarray, " b"]:
    """Permute the numbers of twice `half` bits."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for round_key in round_keys:
        # The finalizer of SplitMix64 (Steele, Lea, Flood, 2014): every bit depends on every bit.
        mixed = right ^ round_key
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        # A round is invertible for any mixing function, because it keeps the half that it mixes in. So no
        # two inputs collide.
        left, right = right, left ^ (mixed & mask)
    return left << half | right


def _key(seed: int, purpose: str, numbers: tuple[int, ...]) -> int:
    # Decimal numbers between commas after a zero byte: different keys have different text.
    text = f"{purpose}\0{seed},{','.join(map(str, numbers))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
