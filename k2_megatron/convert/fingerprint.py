"""The fingerprint of a model's weights, as training takes it (train/checkpoint_state.py), over rows as they stream by.

    sum over all elements of mix(mix(index, key(name, layer)) xor bits, 0)   modulo 2^64
    mix(x, key) = the output function of splitmix64 at (x + 1) * golden ratio + key

The sum commutes, so files can be read in any order and by any number of processes; equal fingerprints mean that every
bit stands at its place under its name. Here in numpy, in blocks that stay in the second-level cache.
"""

import hashlib

import numpy as np

_BLOCK = 1 << 15  # elements: four uint64 buffers of 256 KB
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fingerprint_rows(name: str, layer: int | None, first_row: int, bits: np.ndarray) -> int:
    """The share of rows first_row ... of tensor `name` (stacked layer `layer`), given all its columns as bits."""
    key = _key(name, layer)
    flat = np.ascontiguousarray(bits).reshape(-1)
    signed = flat.view({2: np.int16, 4: np.int32}[flat.itemsize])
    start = first_row * bits.shape[1]
    steps = np.arange(_BLOCK, dtype=np.uint64) * np.uint64(_GOLDEN)  # (index + 1) * golden ratio, less its start
    z, shifted = np.empty(_BLOCK, np.uint64), np.empty(_BLOCK, np.uint64)
    total = 0
    for first in range(0, len(signed), _BLOCK):
        count = min(_BLOCK, len(signed) - first)
        a, b = z[:count], shifted[:count]
        np.add(steps[:count], np.uint64(((start + first + 1) * _GOLDEN + key) & _MASK), out=a)
        _finish_splitmix64(a, b)
        # As training does it, bits are sign-extended to 64.
        np.bitwise_xor(a, signed[first : first + count].astype(np.int64).view(np.uint64), out=a)
        np.add(a, np.uint64(1), out=a)
        np.multiply(a, np.uint64(_GOLDEN), out=a)
        _finish_splitmix64(a, b)
        total += int(a.sum(dtype=np.uint64))
    return total & _MASK


def as_text(total: int) -> str:
    return f"{total & _MASK:016x}"


def _finish_splitmix64(z: np.ndarray, scratch: np.ndarray) -> None:
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, None)):
        np.right_shift(z, np.uint64(shift), out=scratch)
        np.bitwise_xor(z, scratch, out=z)
        if factor is not None:
            np.multiply(z, np.uint64(factor), out=z)


def _key(name: str, layer: int | None) -> int:
    place = "" if layer is None else str(layer)
    digest = hashlib.sha256(f"fingerprint/{name}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "little")
