"""The arithmetic of PTX in numpy, to the bit; approximate instructions within NVIDIA's documented error, and disturbed.

numpy's own float32 and float64 add, subtract, multiply, divide and square root are IEEE's, rounded once, with
subnormals: what .rn means and what instructions without .ftz do. What numpy has not is here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from parse import PtxError

Array = Any  # numpy arrays of one lane each, or a scalar
F32, F64 = np.float32, np.float64
SMALLEST_NORMAL = F32(2.0**-126)
# PTX ISA 9.1, sections ex2 and rcp: ulps from the correctly rounded result over the full range of inputs.
EX2_ULPS, RCP_ULPS = 2, 1


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b rounded, and exactly what was rounded away (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma_f32(a: Array, b: Array, c: Array) -> Array:
    """round(a * b + c), once. The product is exact in fp64; the sum is rounded there to odd, which a second rounding
    to nearest does not notice (Boldo & Melquiond 2008: two bits more than fp32 would do, fp64 has 29)."""
    total, rest = two_sum(a.astype(F64) * b.astype(F64), np.asarray(c, F32).astype(F64))
    bits = np.atleast_1d(total).view(np.int64)
    inexact = np.isfinite(rest) & (rest != 0) & (bits & 1 == 0)
    toward = np.where((rest > 0) == (total > 0), 1, -1)
    return (bits + np.where(inexact, toward, 0)).view(F64).astype(F32)


def fma_down_f32(a: Array, b: Array, c: Array) -> Array:
    """fma.rm: rounded towards minus infinity."""
    total, rest = two_sum(a.astype(F64) * b.astype(F64), np.asarray(c, F32).astype(F64))
    nearest = np.atleast_1d(total).astype(F32)
    too_great = (nearest > total) | ((nearest == total) & (rest < 0))
    return np.where(too_great, np.nextafter(nearest, F32(-np.inf)), nearest)


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """Where the product is exact, which that of two numbers with 26 bits each is; else this cannot tell."""
    narrow = (a == a.astype(F32)) & (b == b.astype(F32)) | ~np.isfinite(a) | ~np.isfinite(b)
    if not np.all(narrow):
        raise PtxError("fma.rn.f64 of numbers that fp32 does not hold: their product is not exact in fp64")
    return a * b + c


def bf16_of(x: Array) -> Array:
    """cvt.rn.bf16.f32: to nearest even; any NaN is 0x7FFF."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def f16_of(x: Array) -> Array:
    """cvt.rn.f16.f32; any NaN is 0x7FFF."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x, F32).astype(np.float16).view(np.uint16))


def f32_of_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(F32)


def f32_of_f16(bits: Array) -> Array:
    return np.ascontiguousarray(bits).view(np.float16).astype(F32)


def greater(a: Array, b: Array) -> Array:
    """max.f32: of a number and a NaN the number; of the zeros the positive one."""
    return np.where((a == 0) & (b == 0), a + b, np.fmax(a, b))


def pack(high: Array, low: Array) -> Array:
    return high.astype(np.uint32) << np.uint32(16) | low.astype(np.uint32)


def halves(words: Array) -> tuple[Array, Array]:
    """(low, high) of 32 bits"""
    return (words & np.uint32(0xFFFF)).astype(np.uint16), (words >> np.uint32(16)).astype(np.uint16)


def divide(a: Array, b: Array) -> Array:
    """Towards zero, as C does; numpy's rounds down."""
    quotient = a // b
    return quotient + ((a % b != 0) & ((a < 0) != (b < 0))).astype(a.dtype)


def flushed(x: Array) -> Array:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F32(0), x), x)


@dataclass(frozen=True)
class Approximation:
    """How an approximate instruction errs. "exact": not at all; "high", "low": by all that is documented, always in one
    direction; "random": by as many ulps as the argument's bits and the seed pick, the same for the same argument."""

    kind: str = "random"
    seed: int = 0

    def ulps(self, argument: Array, most: int) -> Array:
        if self.kind != "random":
            return np.int32({"exact": 0, "high": most, "low": -most}[self.kind])
        h = np.ascontiguousarray(argument).view(np.uint32) ^ np.uint32(self.seed * 0x9E3779B9 & 0xFFFFFFFF)
        h = (h ^ h >> np.uint32(16)) * np.uint32(0x7FEB352D)
        h = (h ^ h >> np.uint32(15)) * np.uint32(0x846CA68B)
        return ((h >> np.uint32(16)) % np.uint32(2 * most + 1)).astype(np.int32) - np.int32(most)

    def disturbed(self, exact: Array, argument: Array, most: int) -> Array:
        """The nearest fp32 number, moved; infinity, NaN and what is flushed stay."""
        nearest = exact.astype(F32)
        fixed = ~np.isfinite(nearest) | (np.abs(nearest) < SMALLEST_NORMAL)
        moved = (np.atleast_1d(nearest).view(np.int32) + self.ulps(argument, most)).view(F32)
        return np.where(fixed, nearest, moved)

    def ex2(self, x: Array) -> Array:
        """ex2.approx.ftz.f32; 1 at zero."""
        x = flushed(x)
        return flushed(np.where(x == 0, F32(1), self.disturbed(np.exp2(x.astype(F64)), x, EX2_ULPS)))

    def rcp(self, x: Array) -> Array:
        """rcp.approx.ftz.f32"""
        x = flushed(x)
        return flushed(self.disturbed(1.0 / x.astype(F64), x, RCP_ULPS))
