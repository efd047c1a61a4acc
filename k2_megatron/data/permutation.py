"""A shuffled order that is a formula: a keyed bijection of 0..n-1, so nothing is stored and any element is one call.

In: positions, n, a seed and a label for what is shuffled. Out: the permuted positions, the same on any machine.
A Feistel network over the next power of two with cycle walking (Black & Rogaway, "Ciphers with Arbitrary Finite
Domains", 2002): each round adds a hash of one half of the bits to the other, which is invertible whatever the hash;
results of n or more are permuted again until they fall inside.
"""

from __future__ import annotations

import hashlib

import numpy as np

ROUNDS = 8
SMALLEST_BITS = 6  # a network over fewer bits has too few distinct permutations; walking over 64 values is cheap
BLOCK = 1 << 14  # elements a pass: the temporaries stay in the second-level cache
FIRST_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
SECOND_MULTIPLIER = np.uint64(0xD6E8FEB86659FD93)


def hash64(*parts: object) -> int:
    """A 64-bit hash of the text of `parts`, stable across machines and versions: the source of every random choice."""
    text = "\x1f".join(str(part) for part in parts).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def hash64_of_numbers(key: int, numbers: np.ndarray) -> np.ndarray:
    """uint64 hash of each of `numbers` under `key` (splitmix64's finalizer, Steele et al. 2014)."""
    value = (numbers.astype(np.uint64) + np.uint64(1)) * FIRST_MULTIPLIER + np.uint64(key)
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


class Permutation:
    """A bijection of 0..size-1 drawn by `key` (see `hash64`)."""

    def __init__(self, size: int, key: int):
        assert size >= 1, f"a permutation of {size} elements"
        self.size = size
        bits = max(SMALLEST_BITS, (size - 1).bit_length())
        assert bits <= 62, f"{size} elements do not fit the network"
        self._low_bits = np.uint64((bits + 1) // 2)
        self._low_mask = np.uint64((1 << ((bits + 1) // 2)) - 1)
        self._high_mask = np.uint64((1 << (bits // 2)) - 1)
        self._keys = hash64_of_numbers(key, np.arange(ROUNDS))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """`positions` int [..] in 0..size-1 -> int64 array of the same shape."""
        return self._walk(positions, self._forward)

    def inverse(self, values: np.ndarray) -> np.ndarray:
        """The positions that `values` came from."""
        return self._walk(values, self._backward)

    def _walk(self, positions: np.ndarray, step) -> np.ndarray:
        positions = np.asarray(positions)
        flat = positions.reshape(-1)
        out = np.empty(flat.size, dtype=np.int64)
        for start in range(0, flat.size, BLOCK):
            values = step(flat[start : start + BLOCK].astype(np.uint64))
            outside = np.flatnonzero(values >= self.size)
            while outside.size:
                values[outside] = step(values[outside])
                outside = outside[values[outside] >= self.size]
            out[start : start + BLOCK] = values
        return out.reshape(positions.shape)

    def _round(self, half: np.ndarray, number: int) -> np.ndarray:
        mixed = (half + self._keys[number]) * FIRST_MULTIPLIER
        mixed ^= mixed >> np.uint64(32)
        mixed *= SECOND_MULTIPLIER
        mixed >>= np.uint64(33)
        return mixed

    def _forward(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self._low_bits, values & self._low_mask
        for number in range(0, ROUNDS, 2):
            high ^= self._round(low, number) & self._high_mask
            low ^= self._round(high, number + 1) & self._low_mask
        return (high << self._low_bits) | low

    def _backward(self, values: np.ndarray) -> np.ndarray:
        high, low = values >> self._low_bits, values & self._low_mask
        for number in reversed(range(0, ROUNDS, 2)):
            low ^= self._round(high, number + 1) & self._low_mask
            high ^= self._round(low, number) & self._high_mask
        return (high << self._low_bits) | low
