"""The fingerprint of a model's weights, as training takes it (model/initialize.py), over rows as they stream by.

    sum over all elements of mix(mix(index, key(name, layer)) xor bits, 0)   modulo 2^64
    mix(x, key) = the output function of splitmix64 at (x + 1) * golden ratio + key

The sum commutes, so files can be read in any order and by any number of processes; equal fingerprints mean that every
bit stands at its place under its name. csrc/cpu/fingerprint.cpp computes it; below it in numpy, the reference, which
also serves where the extension is not built.
"""

import ctypes
import hashlib

import numpy as np

from k2_megatron.runtime.compiled import cpu_module

_BLOCK = 1 << 15  # elements: four uint64 buffers of 256 KB
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def fingerprint_rows(name: str, layer: int | None, first_row: int, bits: np.ndarray) -> int:
    """The share of rows first_row ... of tensor `name` (stacked layer `layer`), given all its columns [R, C] as bits.

    bits: an integer array of 2, 4 or 8 bytes an element (else ValueError), its columns adjacent in memory.
    """
    _integer_of(name, bits)
    compiled = cpu_module("fingerprint")
    if compiled is None:
        return fingerprint_rows_reference(name, layer, first_row, bits)
    if bits.strides[1] != bits.itemsize or bits.strides[0] % bits.itemsize:
        bits = np.ascontiguousarray(bits)
    (rows, columns), total = bits.shape, ctypes.c_uint64(0)
    compiled.fingerprint(
        bits.ctypes.data,
        bits.itemsize,
        rows,
        columns,
        bits.strides[0] // bits.itemsize,
        first_row * columns,
        columns,
        _key(name, layer),
        ctypes.addressof(total),
        1,
    )
    return total.value


def _integer_of(name: str, bits: np.ndarray) -> np.dtype:
    """The signed integer with as many bits; the extension would read beyond elements of another size."""
    if bits.itemsize not in (2, 4, 8):
        raise ValueError(f"{name}: the fingerprint takes elements of 2, 4 or 8 bytes, not {bits.dtype}")
    return np.dtype(f"i{bits.itemsize}")


def fingerprint_rows_reference(name: str, layer: int | None, first_row: int, bits: np.ndarray) -> int:
    """What `fingerprint_rows` computes, in numpy, in blocks that stay in the second-level cache."""
    key = _key(name, layer)
    flat = np.ascontiguousarray(bits).reshape(-1)
    signed = flat.view(_integer_of(name, flat))
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
