"""Random orders that take no memory and are the same everywhere: a keyed permutation of numbers."""

import functools

import numpy as np
from numpy.typing import NDArray

from text.split import Ints

FEISTEL_ROUNDS = 6  # even


def mix(x: NDArray[np.uint64], key: int) -> NDArray[np.uint64]:
    """A well-mixed 64-bit hash of each number (splitmix64's finaliser), keyed."""
    x = x + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


@functools.lru_cache(maxsize=64)
def key_of(*numbers: int) -> int:
    """One 64-bit key from several numbers."""
    key = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        key = mix(key, (number + 0x9E3779B97F4A7C15) % 2**64)
    return int(key[0])


def permute(positions: Ints, n: int, key: int) -> Ints:
    """Where a random permutation of range(n), chosen by `key`, sends each position.

    A Feistel network permutes the smallest 2^bits >= n; results of n or more are sent on until
    they fall below n (cycle walking), which keeps it a permutation of range(n). O(1) memory.
    """
    bits = max(2, (n - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = np.uint64(2 ** (bits // 2) - 1), np.uint64(2 ** (bits - bits // 2) - 1)
    keys = [key_of(key, i) for i in range(FEISTEL_ROUNDS)]

    def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        low, high = x & low_mask, x >> low_bits
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            high ^= mix(low, even) & high_mask
            low ^= mix(high, odd) & low_mask
        x = (high << low_bits) | low
        return x

    x = scramble(positions.astype(np.uint64))
    while (outside := x >= n).any():
        x[outside] = scramble(x[outside])
    return x.astype(np.int64)
