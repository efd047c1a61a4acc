"""The interpreter's arithmetic against exact arithmetic in fractions, and against torch's and numpy's conversions."""

from __future__ import annotations

from fractions import Fraction

import arithmetic
import numpy as np
import operations
import pytest
import torch
from arithmetic import Approximation
from parse import PtxError

F32 = np.float32
EXACT = Approximation("exact")


def floats(count: int, seed: int) -> np.ndarray:
    """Of all exponents, subnormal ones included, many with few bits set: their products end in the middle of an ulp."""
    random = np.random.default_rng(seed)
    bits = random.integers(0, 1 << 32, count, dtype=np.uint32)
    few = bits & np.uint32(0xFF8000FF) & ~np.uint32(0x40000000) | np.uint32(0x30000000)
    values = np.where(random.random(count) < 0.5, bits, few).astype(np.uint32).view(F32)
    return np.where(np.isfinite(values), values, F32(1.5))


def nearest(exact: Fraction) -> F32:
    """Of the three fp32 numbers about it the nearest to a fraction, the even one of two."""
    if abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103:
        return F32(np.inf if exact > 0 else -np.inf)
    guess = F32(float(exact))
    if not np.isfinite(guess):
        guess = np.copysign(np.finfo(F32).max, guess)
    around = [np.nextafter(guess, F32(-np.inf)), guess, np.nextafter(guess, F32(np.inf))]
    around = [value for value in around if np.isfinite(value)]
    return min(around, key=lambda value: (abs(Fraction(float(value)) - exact), int(value.view(np.uint32)) & 1))


def exact_sum(a: F32, b: F32, c: F32) -> Fraction:
    return Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))


def test_fma_rounds_once():
    """Of any numbers, and of sums that lie by 2^-70 beside the middle of two fp32 numbers: fp64 rounds them to it."""
    random = np.random.default_rng(1)
    c = random.uniform(1, 2, 1000).astype(F32)
    a = F32(2.0**-12) * (F32(1) + F32(2.0**-23))
    b = F32(2.0**-12) * (F32(1) - F32(2.0**-23)) * random.choice(F32([-1, 1]), 1000)
    beside = (np.full(1000, a), b, c)
    in_two_roundings = (beside[0].astype(np.float64) * b + c).astype(F32)
    with np.errstate(all="ignore"):
        for given, from_two in ((beside, in_two_roundings), ([floats(3000, seed) for seed in (1, 2, 3)], None)):
            exact = [exact_sum(*numbers) for numbers in zip(*given, strict=True)]
            expected = np.array([*map(nearest, exact)], F32)
            assert np.array_equal(arithmetic.fma_f32(*given), expected)
            assert from_two is None or not np.array_equal(from_two, expected), "the case must tell the two apart"


def test_fma_towards_minus_infinity():
    a, b, c = floats(500, 4), floats(500, 5), floats(500, 6)
    with np.errstate(all="ignore"):
        results = arithmetic.fma_down_f32(a, b, c)
    for x, y, z, found in zip(a, b, c, results, strict=True):
        exact = exact_sum(x, y, z)
        if abs(exact) < Fraction(10) ** 38:
            assert Fraction(float(found)) <= exact
            assert Fraction(float(np.nextafter(found, F32(np.inf)))) > exact


def test_fma_of_wide_numbers_is_refused():
    with pytest.raises(PtxError, match="not exact"):
        arithmetic.fma_f64(np.array([1 / 3]), np.array([1 / 3]), np.array([0.0]))


def test_conversions_are_torchs():
    values = np.concatenate([floats(20_000, 7), F32([np.inf, -np.inf, 0.0, -0.0, 65520.0, 2.0**-25])])
    given = torch.from_numpy(values.copy())
    for dtype, to, back in (
        (torch.bfloat16, arithmetic.bf16_of, arithmetic.f32_of_bf16),
        (torch.float16, arithmetic.f16_of, arithmetic.f32_of_f16),
    ):
        expected = given.to(dtype)
        with np.errstate(all="ignore"):
            rounded = to(values)
        assert np.array_equal(rounded, expected.view(torch.int16).numpy().view(np.uint16))
        assert np.array_equal(back(rounded), expected.float().numpy())
    nan = np.array([np.nan], F32)
    assert arithmetic.bf16_of(nan) == arithmetic.f16_of(nan) == 0x7FFF


def compute(opcode: str, *operands) -> np.ndarray:
    with np.errstate(all="ignore"):
        return operations.find(opcode, EXACT).compute(*(np.atleast_1d(operand) for operand in operands))


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        ("shl.b32", (np.uint32(1), np.uint32(32)), 0),
        ("shr.u32", (np.uint32(1 << 31), np.uint32(31)), 1),
        ("shr.u32", (np.uint32(1 << 31), np.uint32(40)), 0),
        ("shr.s32", (np.int32(-8), np.uint32(40)), -1),
        ("div.s32", (np.int32(-7), np.int32(2)), -3),
        ("div.u32", (np.uint32(0xFFFFFFFF), np.uint32(2)), 0x7FFFFFFF),
        ("mul.wide.s32", (np.int32(-(2**31)), np.int32(2)), -(2**32)),
        ("mul.wide.u32", (np.uint32(2**31), np.uint32(2)), 2**32),
        ("setp.gtu.f32", (F32(np.nan), F32(1)), True),
        ("setp.gt.f32", (F32(np.nan), F32(1)), False),
        ("setp.lt.u32", (np.uint32(0xFFFFFFFF), np.uint32(1)), False),
        ("setp.lt.s32", (np.int32(-1), np.int32(1)), True),
        ("max.f32", (F32(np.nan), F32(1)), 1.0),
        ("max.bf16x2", (np.uint32(0x7FC03F80), np.uint32(0xC0004000)), 0xC0004000),
        ("max.f16x2", (np.uint32(0x3C00FC00), np.uint32(0xBC00C000)), 0x3C00C000),
        ("cvt.rn.bf16x2.f32", (F32(1), F32(-2)), 0x3F80C000),
        ("cvt.rn.f32.s32", (np.int32(2**24 + 1),), 2.0**24),
        ("cvt.s64.s32", (np.int32(-5),), -5),
        ("cvt.u32.u64", (np.uint64(2**32 + 7),), 7),
        ("cvt.sat.f32.f32", (F32(np.nan),), 0.0),
        ("bfi.b32", (np.uint32(5), np.uint32(0xFFFFFFFF), np.uint32(8), np.uint32(4)), 0xFFFFF5FF),
        ("ex2.approx.ftz.f32", (F32(-126.5),), 0.0),
        ("ex2.approx.ftz.f32", (F32(-np.inf),), 0.0),
        ("ex2.approx.ftz.f32", (F32(2**-130),), 1.0),
        ("rcp.approx.ftz.f32", (F32(2**-130),), np.inf),
    ],
)
def test_operations(opcode, operands, expected):
    assert compute(opcode, *operands)[0] == expected


@pytest.mark.parametrize(
    "opcode", ["div.full.f32", "setp.lt.and.f32", "cvt.rzi.s32.f32", "and.f32", "add.sat.s32", "x"]
)
def test_what_is_not_known_is_named(opcode):
    with pytest.raises(PtxError, match=f"not known here: {opcode}"):
        operations.find(opcode, EXACT)


@pytest.mark.parametrize(("name", "most"), [("ex2", arithmetic.EX2_ULPS), ("rcp", arithmetic.RCP_ULPS)])
def test_approximations_err_by_what_is_documented(name, most):
    x = np.linspace(0.5, 60, 5000, dtype=F32)
    right = getattr(EXACT, name)(x).view(np.int32)
    away = {kind: getattr(Approximation(kind), name)(x).view(np.int32) - right for kind in ("high", "low", "random")}
    assert (away["high"] == most).all()
    assert (away["low"] == -most).all()
    assert set(away["random"]) == set(range(-most, most + 1))
