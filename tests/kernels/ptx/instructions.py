"""Instructions to Python closures that execute them on a machine's registers, for the lanes that are active.

Computations are operations.py's; here are operands, control flow and what threads do together. Loads, stores and
asynchronous copies are in instructions_memory.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import instructions_memory
import numpy as np
import operations
from machine import GONE, WARP, Active, Machine, Step
from parse import BITS, Instruction, PtxError

Array = Any
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.([xyz])")
STRICT = ("fma.rn.f64", "div.s32", "div.u32", "div.s64")  # what must not see the values of lanes that do not execute it


def compile_run(machine: Machine, run: int) -> list[Step]:
    return [_compile(machine, run, machine.kernel.instructions[i]) for i in machine.runs[run]]


def _compile(machine: Machine, run: int, instruction: Instruction) -> Step:
    base = instruction.base
    if instruction.guard and base in ("bar", "shfl"):
        raise machine.error(instruction, "a guarded barrier or collective is not known here", np.zeros(1))
    try:
        if base == "bra":
            step = _branch(machine, machine.run_of_label[instruction.operands[0]])
        elif base in ("ret", "exit"):
            step = _branch(machine, GONE)
        elif base == "bar":
            step = _barrier(machine, run, instruction)
        elif base == "shfl":
            step = _shuffle(machine, run, instruction)
        elif base in ("ld", "st", "cp"):
            step = instructions_memory.compile_memory(machine, instruction)
        elif base == "mov" and "{" in "".join(instruction.operands):
            step = _move_parts(machine, instruction)
        else:
            step = _compute(machine, instruction)
    except PtxError as error:
        raise PtxError(f"{instruction}: {error}, kernel {machine.kernel.name}") from None
    return _guarded(machine, instruction, step) if instruction.guard else step


def _guarded(machine: Machine, instruction: Instruction, step: Step) -> Step:
    predicate, negated = machine.registers[instruction.guard], instruction.negated

    def guarded(active: Active) -> None:
        chosen = Active(active.mask & (predicate ^ negated))
        if len(chosen.lanes):
            step(chosen)

    return guarded


# ---- Operands
def immediate(text: str, kind: str) -> Array | None:
    """A number as PTX writes it (0f3F800000 are a float's bits); None for what is none."""
    bits = BITS[kind]
    if found := re.fullmatch(r"0[fd]([0-9A-Fa-f]+)", text):
        value = int(found[1], 16)
    elif re.fullmatch(r"-?\d+", text) or re.fullmatch(r"0[xX][0-9A-Fa-f]+", text):
        value = int(text, 0)
    else:
        return None
    if kind == "pred":
        return np.bool_(value)
    return np.dtype(f"u{bits // 8}").type(value & ((1 << bits) - 1)).view(operations.NUMPY[kind])


def register(machine: Machine, name: str, kind: str) -> Array:
    """A view of the register as that type; the widths must agree."""
    held = machine.registers.get(name)
    if held is None:
        raise PtxError(f"an operand that is not known here: {name}")
    dtype = operations.NUMPY[kind]
    if held.dtype.itemsize != dtype.itemsize:
        raise PtxError(f"{name} is not {kind}'s width")
    return held if kind == "pred" else held.view(dtype)


def source(machine: Machine, text: str, kind: str) -> Callable[[], Array]:
    value = immediate(text, kind)
    if value is None and text in machine.shared.addresses:
        value = operations.NUMPY[kind].type(machine.shared.addresses[text])
    if value is None and text in machine.parameter_addresses:
        value = operations.NUMPY[kind].type(machine.parameter_addresses[text][0])
    if value is None and (special := SPECIAL.fullmatch(text)):
        return _special(machine, *special.groups())
    if value is None:
        value = register(machine, text, kind)
    return lambda: value


def _special(machine: Machine, name: str, axis: str) -> Callable[[], Array]:
    grid, block, i = machine.launch.grid, machine.launch.block, "xyz".index(axis)
    if name in ("ntid", "nctaid"):
        value = np.uint32((block if name == "ntid" else grid)[i])
        return lambda: value
    sizes = block if name == "tid" else grid
    below = int(np.prod(sizes[:i]))
    return lambda: ((machine.thread if name == "tid" else machine.block) // below % sizes[i]).astype(np.uint32)


# ---- Computation
def _compute(machine: Machine, instruction: Instruction) -> Step:
    operation = operations.find(instruction.opcode, machine.approximation)
    to, *given = instruction.operands
    if len(given) != len(operation.operands):
        raise PtxError(f"{len(operation.operands)} source operands are known here")
    result = register(machine, to, operation.result)
    sources = [source(machine, text, kind) for text, kind in zip(given, operation.operands, strict=True)]
    compute, strict = operation.compute, instruction.opcode in STRICT

    def step(active: Active) -> None:
        values = [take() for take in sources]
        if active.few or (strict and not active.all):
            lanes = active.lanes
            result[lanes] = compute(*(value[lanes] if np.ndim(value) else value for value in values))
        elif active.all:
            result[:] = compute(*values)
        else:
            np.copyto(result, compute(*values), where=active.mask)

    return step


def _move_parts(machine: Machine, instruction: Instruction) -> Step:
    """mov.b64 {low, high}, whole, and the other way round."""
    whole_kind = instruction.opcode.removeprefix("mov.")
    half_bits = BITS[whole_kind] // 2
    half_kind, dtype = f"b{half_bits}", operations.NUMPY[whole_kind]
    to, given = instruction.operands
    if given.startswith("{"):
        low, high = (source(machine, part.strip(), half_kind) for part in given[1:-1].split(","))
        result = register(machine, to, whole_kind)

        def join(active: Active) -> None:
            joined = low().astype(dtype) | high().astype(dtype) << dtype.type(half_bits)
            result[active.lanes] = joined[active.lanes]

        return join
    whole = source(machine, given, whole_kind)
    parts = [register(machine, part.strip(), half_kind) for part in to[1:-1].split(",")]

    def split(active: Active) -> None:
        for i, part in enumerate(parts):
            part[active.lanes] = (whole()[active.lanes] >> dtype.type(i * half_bits)).astype(part.dtype)

    return split


# ---- Control flow, and what threads do together
def _branch(machine: Machine, target: int) -> Step:
    def step(active: Active) -> None:
        machine.next_run[active.lanes] = target

    return step


def _barrier(machine: Machine, run: int, instruction: Instruction) -> Step:
    if (instruction.opcode, instruction.operands) != ("bar.sync", ("0",)):
        raise PtxError("a barrier that is not known here")
    return lambda active: machine.arrive_at_barrier(active.mask, run, instruction)


def _shuffle(machine: Machine, run: int, instruction: Instruction) -> Step:
    """shfl.sync.bfly.b32 to|inside, from, distance, clamp, members"""
    if instruction.opcode != "shfl.sync.bfly.b32":
        raise PtxError(f"an instruction that is not known here: {instruction.opcode}")
    to, _, inside = instruction.operands[0].partition("|")
    result = register(machine, to, "b32")
    within = register(machine, inside, "pred") if inside else None
    given, distance, clamp, members = (source(machine, text, "u32") for text in instruction.operands[1:])
    lane = np.arange(machine.lanes)

    def step(active: Active) -> None:
        named = np.broadcast_to(members(), machine.lanes)
        released = machine.arrive_at_collective(active.mask, named, run, instruction)
        if not released.any():
            return
        control = clamp().astype(np.int64)
        segment = control >> 8 & (WARP - 1)
        own = lane % WARP
        last = own & segment | control & (WARP - 1) & ~segment
        wanted = own ^ (distance().astype(np.int64) & (WARP - 1))
        exists = wanted <= last
        read = lane - own + np.where(exists, wanted, own)
        if (strangers := released & ~released[read]).any():
            raise machine.error(instruction, "a collective reads a lane that does not take part", strangers)
        values = np.broadcast_to(given(), machine.lanes)[read]
        result[released] = values[released]
        if within is not None:
            within[released] = exists[released]

    return step
