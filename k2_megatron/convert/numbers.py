"""Numbers as bits: bfloat16, float16 and float32 as numpy arrays of unsigned integers, and rounding between them.

numpy has no bfloat16, and a conversion that must be exact is best said in bits: equal bits, or a counted rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2_megatron.convert.errors import ConversionError

BITS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<u4"), "bfloat16": np.dtype("<u2"), "float16": np.dtype("<u2")}
_CACHED = 1 << 17  # elements that stay in the second-level cache
SAFETENSORS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclass
class Rounding:
    """What a change of dtype did: elements that are not exactly representable, and the largest relative error."""

    values: int = 0
    largest: float = 0.0

    def add(self, other: "Rounding") -> None:
        self.values += other.values
        self.largest = max(self.largest, other.largest)


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The exact float32 values of `bits`."""
    if dtype == "float32":
        return bits.view(np.float32)
    if dtype == "float16":
        return bits.view(np.float16).astype(np.float32)
    return np.left_shift(bits, 16, dtype=np.uint32).view(np.float32)  # in one pass: numpy casts within the cache


def change_dtype(bits: np.ndarray, dtype: str, wanted: str, rounding: Rounding | None = None) -> np.ndarray:
    """`bits` as `wanted`, rounded to nearest even and counted in `rounding`, where there is one to count in.

    ConversionError past float16's range.
    """
    if dtype == wanted:
        return bits
    exact = to_float32(bits, dtype)
    if wanted == "float32":
        return exact.view(np.uint32)
    rounded = _bfloat16(exact) if wanted == "bfloat16" else _float16(exact)
    if rounding is None:
        return rounded
    back = to_float32(rounded, wanted)
    wrong = exact != back
    count = int(wrong.sum())
    if count:
        off = np.abs(back[wrong] - exact[wrong]) / np.abs(exact[wrong])
        rounding.add(Rounding(count, float(np.nan_to_num(off, nan=math.inf).max())))
    return rounded


def _cached_parts(array: np.ndarray) -> Iterator[np.ndarray]:
    flat = array.reshape(-1)
    return (flat[first : first + _CACHED] for first in range(0, len(flat), _CACHED))


def _bfloat16(exact: np.ndarray) -> np.ndarray:
    rounded = np.empty(exact.shape, np.uint16)
    for into, part in zip(_cached_parts(rounded), _cached_parts(exact), strict=True):
        into[...] = _rounded_part(part)
    return rounded


def _rounded_part(exact: np.ndarray) -> np.ndarray:
    bits = exact.view(np.uint32)
    upper = bits >> 16
    upper &= 1
    upper += 0x7FFF
    upper += bits
    upper >>= 16
    rounded, wrong = upper.astype(np.uint16), np.isnan(exact)
    if wrong.any():  # the sum may have carried a NaN to an infinity or to zero
        rounded[wrong] = (bits[wrong] >> 16) | 0x40
    return rounded


def _float16(exact: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float16)
    beyond = np.isinf(rounded) & np.isfinite(exact)
    if beyond.any():
        raise ConversionError(
            f"{int(beyond.sum())} values exceed float16's 65504 (largest {np.abs(exact).max():.4g}); convert to "
            "bfloat16 or float32"
        )
    return rounded.view(np.uint16)


def require_finite(bits: np.ndarray, dtype: str, what: str) -> None:
    """ConversionError when an element is infinite or not a number: all its exponent bits are set."""
    exponent = bits.dtype.type({"float32": 0x7F800000, "bfloat16": 0x7F80, "float16": 0x7C00}[dtype])
    count = sum(int(np.count_nonzero((part & exponent) == exponent)) for part in _cached_parts(bits))
    if count:
        raise ConversionError(f"{what} holds {count} infinite values or NaNs; use another checkpoint")
