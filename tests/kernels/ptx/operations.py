"""What instructions compute, by opcode: functions of the operands' values, each an array with one element a lane.

An instruction's last type names its operands' type; where the result is of another, the table says so.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import arithmetic as a
import numpy as np
from parse import BITS, PtxError

Array = Any
NUMPY = {"pred": np.dtype(bool)} | {
    f"{kind}{bits}": np.dtype(f"{letter}{bits // 8}")
    for kind, letter in (("s", "i"), ("u", "u"), ("b", "u"), ("f", "f"))
    for bits in (8, 16, 32, 64)
    if (kind, bits) != ("f", 8)
}
WIDE = {"s32": "s64", "u32": "u64"}
FLOATS = ("f16", "f32", "f64")


@dataclass(frozen=True)
class Operation:
    result: str  # type of the destination
    operands: tuple[str, ...]  # types of the sources
    compute: Callable[..., Array]


def _compare(name: str, kind: str) -> Operation:
    """Ordered: false where one is a NaN, but ne; the names with u: true there."""
    plain = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(name, name)
    unordered = kind in FLOATS and len(plain) == 3 and plain[-1] == "u"
    test = getattr(operator, plain[:2] if unordered else plain, None)
    if test is None or kind == "pred":
        raise KeyError(name)

    def compute(x: Array, y: Array) -> Array:
        if kind not in FLOATS:
            return test(x, y)
        nan = np.isnan(x) | np.isnan(y)
        return test(x, y) | nan if unordered else test(x, y) & ~nan

    return Operation("pred", (kind, kind), compute)


def _shift(name: str, kind: str) -> Operation:
    """PTX clamps the amount at the width; numpy's result beyond it is undefined."""
    bits, dtype = BITS[kind], NUMPY[kind]

    def compute(value: Array, amount: Array) -> Array:
        inside = np.minimum(amount, bits - 1).astype(dtype)
        shifted = value << inside if name == "shl" else value >> inside
        return shifted if name == "shr" and kind[0] == "s" else np.where(amount < bits, shifted, dtype.type(0))

    return Operation(kind, (kind, "u32"), compute)


def _insert_bits(source: Array, into: Array, position: Array, length: Array) -> Array:
    """bfi.b32"""
    mask = np.where(length >= 32, np.uint32(0xFFFFFFFF), (np.uint32(1) << np.minimum(length, 31)) - np.uint32(1))
    mask = np.where(position >= 32, np.uint32(0), mask << np.minimum(position, 31))
    return into & ~mask | (source << np.minimum(position, 31)) & mask


def _both_halves(function: Callable, unpack: Callable, repack: Callable) -> Callable[..., Array]:
    def compute(x: Array, y: Array) -> Array:
        pairs = zip(a.halves(x), a.halves(y), strict=True)
        low, high = (repack(function(unpack(one), unpack(other))) for one, other in pairs)
        return a.pack(high, low)

    return compute


def _saturated(x: Array) -> Array:
    """cvt.sat.f32.f32: into [0, 1]; a NaN becomes 0."""
    return np.where(np.isnan(x), np.float32(0), np.clip(x, np.float32(0), np.float32(1)))


def _multiply_wide(x: Array, y: Array) -> Array:
    wide = np.int64 if x.dtype == np.int32 else np.uint64
    return x.astype(wide) * y.astype(wide)


# Opcodes whose types do not follow from the last part of their name.
_EXACT: dict[str, Operation] = {
    "cvt.f32.f16": Operation("f32", ("b16",), a.f32_of_f16),
    "cvt.f32.bf16": Operation("f32", ("b16",), a.f32_of_bf16),
    "cvt.rn.f16.f32": Operation("b16", ("f32",), a.f16_of),
    "cvt.rn.bf16.f32": Operation("b16", ("f32",), a.bf16_of),
    "cvt.rn.f16x2.f32": Operation("b32", ("f32", "f32"), lambda high, low: a.pack(a.f16_of(high), a.f16_of(low))),
    "cvt.rn.bf16x2.f32": Operation("b32", ("f32", "f32"), lambda high, low: a.pack(a.bf16_of(high), a.bf16_of(low))),
    "max.f16x2": Operation("b32", ("b32", "b32"), _both_halves(a.greater, a.f32_of_f16, a.f16_of)),
    "max.bf16x2": Operation("b32", ("b32", "b32"), _both_halves(a.greater, a.f32_of_bf16, a.bf16_of)),
    "cvt.sat.f32.f32": Operation("f32", ("f32",), _saturated),
    "cvt.f64.f32": Operation("f64", ("f32",), lambda x: x.astype(np.float64)),
    "bfi.b32": Operation("b32", ("b32", "b32", "u32", "u32"), _insert_bits),
    "fma.rm.f32": Operation("f32", ("f32", "f32", "f32"), a.fma_down_f32),
    "fma.rn.f32": Operation("f32", ("f32", "f32", "f32"), a.fma_f32),
    "fma.rn.f64": Operation("f64", ("f64", "f64", "f64"), a.fma_f64),
    "sqrt.rn.f32": Operation("f32", ("f32",), np.sqrt),
    "rcp.rn.f32": Operation("f32", ("f32",), lambda x: np.float32(1) / x),
    "div.rn.f32": Operation("f32", ("f32", "f32"), operator.truediv),
    "max.f32": Operation("f32", ("f32", "f32"), a.greater),
}
_TWO = {"add": operator.add, "sub": operator.sub, "mul": operator.mul, "mul.lo": operator.mul, "div": a.divide,
        "min": np.minimum, "max": np.maximum, "and": operator.and_, "or": operator.or_,
        "xor": operator.xor}  # fmt: skip
_INTEGER_ONLY = {"mul.lo", "div", "min", "max", "and", "or", "xor"}
_ONE = {"neg": operator.neg, "abs": np.abs, "not": operator.invert, "mov": lambda x: x, "cvta.to.global": lambda x: x}


def _converted(kinds: list[str]) -> Operation:
    """cvt between integers, and from integers to floating point to nearest."""
    result, source = kinds[-2:]
    if source[0] not in "su" or (result[0] == "f") != (kinds[0] == "rn") or result[0] == "b":
        raise KeyError(kinds)
    return Operation(result, (source,), lambda x: x.astype(NUMPY[result]))


def find(opcode: str, approximation: a.Approximation) -> Operation:
    """What the opcode computes; an error that names it where that is not known here."""
    if opcode in _EXACT:
        return _EXACT[opcode]
    name, _, kind = opcode.rpartition(".")
    base, *parts = opcode.split(".")
    try:
        if opcode == "ex2.approx.ftz.f32":
            return Operation("f32", ("f32",), approximation.ex2)
        if opcode == "rcp.approx.ftz.f32":
            return Operation("f32", ("f32",), approximation.rcp)
        if base == "setp" and len(parts) == 2:
            return _compare(*parts)
        if base in ("shl", "shr") and len(parts) == 1:
            return _shift(base, kind)
        if base == "cvt":
            return _converted(parts)
        if name == "selp":
            return Operation(kind, (kind, kind, "pred"), lambda yes, no, condition: np.where(condition, yes, no))
        if name == "mul.wide":
            return Operation(WIDE[kind], (kind, kind), _multiply_wide)
        if name == "mad.lo" and kind[0] != "f":
            return Operation(kind, (kind, kind, kind), lambda x, y, z: x * y + z)
        if name in _TWO and not (name in _INTEGER_ONLY and kind[0] == "f") and kind in NUMPY:
            return Operation(kind, (kind, kind), _TWO[name])
        return Operation(kind, (kind,), _ONE[name])
    except KeyError:
        raise PtxError(f"an instruction that is not known here: {opcode}") from None
