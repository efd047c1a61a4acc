"""Loads, stores and asynchronous copies to closures, as instructions.py does with the rest."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import operations
from machine import Active, Machine, Step
from memory import PENDING, READY, Access
from parse import BITS, Instruction, PtxError

Array = Any
HINTS = {"cs"}  # evicted first: says nothing about values
COPY = Access(16, 1)


def compile_memory(machine: Machine, instruction: Instruction) -> Step:
    if instruction.base == "cp":
        return _copy(machine, instruction)
    base, space, *parts = instruction.opcode.split(".")
    parts = [part for part in parts if part not in HINTS]
    count = int(parts.pop(0)[1:]) if parts[0] in ("v2", "v4") else 1
    if len(parts) != 1 or parts[0] not in operations.NUMPY or space not in ("global", "shared", "param"):
        raise PtxError(f"an instruction that is not known here: {instruction.opcode}")
    access = Access(BITS[parts[0]] // 8, count)
    place, values = instruction.operands if base == "st" else instruction.operands[::-1]
    names = [name.strip() for name in values.strip("{}").split(",")]
    addresses = _address(machine, place, "u32" if space == "shared" else "u64")
    if space == "param":
        if base == "st":
            raise PtxError("an instruction that is not known here: st.param")
        return _load_parameter(machine, instruction, access, addresses, names, parts[0])
    if base == "ld":
        return _load(machine, instruction, access, space, addresses, names, parts[0])
    return _store(machine, instruction, access, space, addresses, names)


def _address(machine: Machine, text: str, kind: str) -> Callable[[], Array]:
    """[register+offset] or [variable+offset], as int64"""
    from instructions import source

    found = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", text)
    if not found:
        raise PtxError(f"an address that is not understood: {text}")
    base, offset = source(machine, found[1].strip(), kind), int(found[2] or 0)
    return lambda: base().astype(np.int64) + offset


def _space(machine: Machine, instruction: Instruction, space: str) -> tuple[Any, Callable]:
    counters = machine.counters
    if space == "global":
        return machine.memory, counters.note_global
    return machine.shared, counters.note_shared


def _at(machine: Machine, instruction: Instruction, active: Active, act: Callable[[], Any]) -> Any:
    """act(), its error with the place in the code."""
    try:
        return act()
    except PtxError as error:
        raise machine.error(instruction, str(error), active.mask, error.lane) from None


def _writer(machine: Machine, names: list[str], kind: str) -> Callable[[Active, Array], None]:
    """Puts loaded elements into registers, which may be wider: filled up with the sign or with zeros."""
    registers = [machine.registers[name] for name in names]

    def put(active: Active, values: Array) -> None:
        for register, value in zip(registers, values, strict=True):
            wide = value.view(operations.NUMPY[kind])
            if wide.dtype.itemsize != register.dtype.itemsize:
                wide = wide.astype(f"{'i' if kind[0] == 's' else 'u'}{register.dtype.itemsize}")
            register[active.lanes] = wide.view(register.dtype)

    return put


def _load_parameter(machine: Machine, instruction: Instruction, access: Access, addresses: Callable[[], Array],
                    names: list[str], kind: str) -> Step:  # fmt: skip
    put, ranges = _writer(machine, names, kind), list(machine.parameter_addresses.values())

    def step(active: Active) -> None:
        at = np.broadcast_to(addresses(), machine.lanes)[active.lanes]
        inside = np.zeros(len(at), bool)
        for start, size in ranges:
            inside |= (at >= start) & (at + access.bytes <= start + size)
        if not inside.all() or (at % access.bytes).any():
            raise machine.error(instruction, "outside of the kernel's parameters, or misaligned", active.mask)
        part = machine.parameters[at + np.arange(access.bytes)[:, None]].T.copy().view(f"u{access.size}")
        put(active, np.ascontiguousarray(part.T))

    return step


def _load(machine: Machine, instruction: Instruction, access: Access, space: str, addresses: Callable[[], Array],
          names: list[str], kind: str) -> Step:  # fmt: skip
    memory, note = _space(machine, instruction, space)
    put = _writer(machine, names, kind)

    def step(active: Active) -> None:
        at = np.broadcast_to(addresses(), machine.lanes)[active.lanes]
        threads = machine.threads_of(active.lanes)
        put(active, _at(machine, instruction, active, lambda: memory.load(access, at, threads)))
        note(instruction, active.lanes, at, access.bytes)

    return step


def _store(machine: Machine, instruction: Instruction, access: Access, space: str, addresses: Callable[[], Array],
           names: list[str]) -> Step:  # fmt: skip
    from instructions import source

    memory, note = _space(machine, instruction, space)

    def taken(name: str) -> Callable[[], Array]:
        """The element that is stored: of a wider register its low bits."""
        held = machine.registers.get(name)
        wide = source(machine, name, f"b{8 * (held.dtype.itemsize if held is not None else access.size)}")
        return lambda: wide().astype(f"u{access.size}")

    sources = [taken(name) for name in names]

    def step(active: Active) -> None:
        at = np.broadcast_to(addresses(), machine.lanes)[active.lanes]
        values = np.stack([np.broadcast_to(take(), machine.lanes)[active.lanes] for take in sources])
        threads = machine.threads_of(active.lanes)
        _at(machine, instruction, active, lambda: memory.store(access, at, values, threads))
        note(instruction, active.lanes, at, access.bytes)

    return step


# ---- cp.async: complete, and visible to the thread that asked for it, when that has waited for its group
def _copy(machine: Machine, instruction: Instruction) -> Step:
    if instruction.opcode == "cp.async.commit_group":
        return lambda active: machine.close_copy_group(active.lanes)
    if instruction.opcode == "cp.async.wait_group":
        left = int(instruction.operands[0])
        return lambda active: _at(machine, instruction, active, lambda: _finish_copies(machine, active, left))
    if instruction.opcode != "cp.async.cg.shared.global" or instruction.operands[2] != "16":
        raise PtxError(f"an instruction that is not known here: {instruction.opcode}")
    to, of = _address(machine, instruction.operands[0], "u32"), _address(machine, instruction.operands[1], "u64")

    def step(active: Active) -> None:
        lanes = active.lanes
        target, origin = (np.broadcast_to(address(), machine.lanes)[lanes] for address in (to, of))
        threads = machine.threads_of(lanes)
        _at(machine, instruction, active, lambda: machine.memory.load(Access(8, 2), origin, threads))
        _at(machine, instruction, active, lambda: machine.shared.store(COPY, target, None, threads, after=PENDING))
        machine.copies.append((lanes, target, origin, machine.copy_group[lanes]))
        machine.counters.note_global(instruction, lanes, origin, 16)
        machine.counters.note_shared(instruction, lanes, target, 16)

    return step


def _finish_copies(machine: Machine, active: Active, groups_left: int) -> None:
    """Of the active threads, all copies but those of the last groups take place: as late as the hardware may."""
    kept = []
    for lanes, target, origin, group in machine.copies:
        done = active.mask[lanes] & (group + groups_left < machine.copy_group[lanes])
        if done.any():
            threads = machine.threads_of(lanes[done])
            values = machine.memory.load(Access(8, 2), origin[done], threads)
            machine.shared.finish_copy(COPY, target[done])
            machine.shared.store(Access(8, 2), target[done], values, threads, after=READY)
        if not done.all():
            kept.append((lanes[~done], target[~done], origin[~done], group[~done]))
    machine.copies = kept
