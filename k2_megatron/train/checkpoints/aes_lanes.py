"""aes_lanes, the hash of checkpoint files: 32 lanes of 128 bits take turns at the words, with a round of AES a word.

In:  bytes of any number, in pieces of any length.  Out: a digest of 128 bits, 32 hexadecimal digits.

    R(x)    = MixColumns(ShiftRows(SubBytes(x))) of FIPS 197: a round of AES without a key, byte i of x in row i % 4
    lane i  = R applied ten times to the 16 bytes (i + 1, 0, 0, ..., 0), i = 0 to 31
    for each stripe of 512 bytes, the last filled up with zeros:  lane i = R(lane i) xor bytes 16 i to 16 i + 15 of it
    fold    = the number of bytes, as 16 bytes, least significant first
    for i = 0 to 31:  fold = R(R(R(R(fold xor lane i))))
    digest  = fold

It finds damage, and is no defence against a person who wants a collision. R and every step of the fold are
bijections. So a change of any size within one word is always seen, and so are zeros at the end that lie within the
last stripe. Changes that meet no lane twice (any that lie within 497 bytes) leave lanes otherwise than they were,
which cancel in the fold, over four rounds each, with a chance of about 2^-128. What is left is a lane that two
changes meet, the later of which undoes what R made of the earlier: R spreads a byte over a column, so five bytes or
more must differ, in places that fit and by values that depend on all that the lane had taken.

Processors have R as an instruction (csrc/cpu/aes_lanes.cpp).
"""

from collections.abc import Callable
from functools import cache
from typing import Protocol

import numpy as np

from k2_megatron.runtime.compiled import cpu_module

_LANES, _WORD = 32, 16
_STRIPE = _LANES * _WORD
_START_ROUNDS, _FOLD_ROUNDS = 10, 4
# ShiftRows: which byte comes to each place
_SHIFTED = np.array([[4 * ((column + row) % 4) + row for row in range(4)] for column in range(4)]).reshape(-1)


class Hash(Protocol):
    """As hashlib's."""

    def update(self, data, /) -> None: ...

    def hexdigest(self) -> str: ...


def aes_lanes() -> Hash:
    """A new hash, compiled where k2_megatron._cpu is built."""
    return (compiled() or AesLanesReference)()


def compiled() -> Callable[[], Hash] | None:
    """None where k2_megatron._cpu is not built, or was before it had this hash."""
    module = cpu_module("AesLanes")
    return None if module is None else module.AesLanes


class AesLanesReference:
    """What `k2_megatron._cpu.AesLanes` computes, in numpy: 0.015 GB/s, some 500 times slower."""

    def __init__(self) -> None:
        self._lanes = np.zeros((_LANES, _WORD), np.uint8)
        self._lanes[:, 0] = np.arange(1, _LANES + 1)
        for _ in range(_START_ROUNDS):
            self._lanes = _round(self._lanes)
        self._rest = b""
        self._bytes = 0

    def update(self, data, /) -> None:
        """Take more bytes."""
        content = self._rest + memoryview(data).cast("B")
        self._bytes += len(content) - len(self._rest)
        whole = len(content) // _STRIPE * _STRIPE
        self._lanes = _absorb(self._lanes, content[:whole])
        self._rest = content[whole:]

    def hexdigest(self) -> str:
        """Of all that was taken."""
        lanes = _absorb(self._lanes, self._rest + bytes(-len(self._rest) % _STRIPE))
        fold = np.frombuffer(self._bytes.to_bytes(_WORD, "little"), np.uint8)
        for lane in lanes:
            fold = fold ^ lane
            for _ in range(_FOLD_ROUNDS):
                fold = _round(fold)
        return fold.tobytes().hex()


def _absorb(lanes: np.ndarray, stripes: bytes) -> np.ndarray:
    for stripe in np.frombuffer(stripes, np.uint8).reshape(-1, _LANES, _WORD):
        lanes = _round(lanes) ^ stripe
    return lanes


def _round(words: np.ndarray) -> np.ndarray:
    """R of each word: [..., 16] bytes."""
    columns = words[..., _SHIFTED].reshape(-1, 4)
    table = _table()
    mixed = table[0][columns[:, 0]]
    for row in range(1, 4):
        mixed ^= table[row][columns[:, row]]
    return mixed.view(np.uint8).reshape(words.shape)


@cache
def _table() -> np.ndarray:
    """[row, byte]: the column that MixColumns makes of SubBytes of a byte in that row, as one integer."""
    logarithm, power = {}, [1]
    for exponent in range(255):  # powers of 3
        logarithm[power[-1]] = exponent
        power.append(power[-1] ^ _doubled(power[-1]))
    column = np.zeros((4, 256, 4), np.uint8)
    for byte in range(256):
        inverse = power[255 - logarithm[byte]] if byte else 0
        twice = inverse * 0x101  # rotations are shifts of this
        once = 0x63 ^ (twice ^ twice >> 7 ^ twice >> 6 ^ twice >> 5 ^ twice >> 4) & 0xFF
        factors = [_doubled(once), once, once, once ^ _doubled(once)]
        for row in range(4):
            column[row, byte] = np.roll(factors, row)
    return column.view(np.uint32)[..., 0]


def _doubled(x: int) -> int:
    return (x << 1 ^ (0x11B if x & 0x80 else 0)) & 0xFF
