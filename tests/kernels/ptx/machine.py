"""Runs a kernel: some blocks at once, all their threads in lockstep, each thread with a program counter of its own.

Of the threads that can move, those with the smallest program counter execute one run of instructions: paths that
parted meet again where the code does. A thread that reaches a barrier or a warp collective waits there; who waits for
whom in vain is an error that says so. Registers begin as all ones, a NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from arithmetic import Approximation
from memory import GlobalMemory, SharedMemory
from parse import Instruction, Kernel, PtxError
from races import Threads

Array = Any
WARP = 32
GONE = np.iinfo(np.int64).max
LANES = 4096  # of the blocks that run at once
PARAMETER_GAP = 64


@dataclass(frozen=True)
class Launch:
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    arguments: tuple[bytes, ...]
    order: Any = None  # numbers of the blocks; in their natural order without it

    @property
    def threads(self) -> int:
        return self.block[0] * self.block[1] * self.block[2]

    @property
    def blocks(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2]


class Active:
    """The lanes that execute an instruction: as a mask, as numbers, and whether they are all."""

    def __init__(self, mask: Array) -> None:
        self.mask = mask
        self.lanes = np.flatnonzero(mask)
        self.all = len(self.lanes) == len(mask)
        self.few = 4 * len(self.lanes) < len(mask)


Step = Callable[[Active], None]


@dataclass
class Counters:
    """Who is told of every access: the instruction, the lanes, their addresses, bytes a lane (traffic.py)."""

    note_global: Callable[[Instruction, Array, Array, int], None] = lambda *_: None
    note_shared: Callable[[Instruction, Array, Array, int], None] = lambda *_: None


class Machine:
    """One launch of one kernel."""

    def __init__(self, kernel: Kernel, launch: Launch, memory: GlobalMemory, approximation: Approximation,
                 counters: Counters | None = None, lanes: int = LANES) -> None:  # fmt: skip
        self.kernel, self.launch, self.memory, self.approximation = kernel, launch, memory, approximation
        self.counters = counters or Counters()
        if not 0 < launch.threads <= kernel.most_threads:
            raise PtxError(f"{launch.threads} threads a block; the kernel is compiled for {kernel.most_threads}")
        self.block_lanes = launch.threads + -launch.threads % WARP
        self.slots = max(1, min(launch.blocks, lanes // self.block_lanes))
        self.lanes = self.slots * self.block_lanes
        self.thread = np.tile(np.arange(self.block_lanes), self.slots)
        self.slot = np.repeat(np.arange(self.slots), self.block_lanes)
        self.shared = SharedMemory(kernel.shared, launch.shared_bytes, self.slots)
        self.parameters, self.parameter_addresses = self._place_arguments()
        self.registers = {
            name: np.empty(self.lanes, bool if bits == 1 else f"u{bits // 8}")
            for name, bits in kernel.registers.items()
        }
        self.runs = kernel.blocks()
        first = {run.start: number for number, run in enumerate(self.runs)}
        self.run_of_label = {label: first.get(index, GONE) for label, index in kernel.labels.items()}
        self.steps: list[list[Step] | None] = [None] * len(self.runs)

    def _place_arguments(self) -> tuple[Array, dict[str, tuple[int, int]]]:
        """The parameters' bytes, with gaps, and for each its address and size."""
        kernel, given = self.kernel, self.launch.arguments
        if [len(argument) for argument in given] != [parameter.size for parameter in kernel.parameters]:
            raise PtxError(f"{kernel.name} takes {[p.size for p in kernel.parameters]} bytes, not {[*map(len, given)]}")
        space, addresses = bytearray(PARAMETER_GAP), {}
        for parameter, argument in zip(kernel.parameters, given, strict=True):
            space += bytes(-len(space) % 16)
            addresses[parameter.name] = (len(space), parameter.size)
            space += argument + bytes(PARAMETER_GAP)
        return np.frombuffer(bytes(space), np.uint8), addresses

    def run(self) -> None:
        order = np.arange(self.launch.blocks) if self.launch.order is None else np.asarray(self.launch.order)
        self.memory.start_launch()
        with np.errstate(all="ignore"):
            for start in range(0, len(order), self.slots):
                self._run_wave(order[start : start + self.slots])

    def _run_wave(self, blocks: Array) -> None:
        present = np.concatenate([blocks, np.zeros(self.slots - len(blocks), np.int64)])
        self.block = np.repeat(present, self.block_lanes)
        self.epoch = np.zeros(self.lanes, np.int64)
        self.absent = (self.thread >= self.launch.threads) | (self.slot >= len(blocks))
        self.next_run = np.where(self.absent, GONE, 0)
        self.waiting = np.zeros(self.lanes, bool)
        self.copies: list[tuple[Array, Array, Array, Array]] = []  # lanes, targets, origins, groups
        self.copy_group = np.zeros(self.lanes, np.int64)
        self.stamps = Threads.stamp(self.block, self.thread, self.epoch)
        self.shared.start_blocks()
        for register in self.registers.values():
            register.view(np.uint8)[:] = 1 if register.dtype == bool else 0xFF
        while True:
            ready = np.where(self.waiting, GONE, self.next_run)
            run = int(ready.min())
            if run == GONE:
                break
            self._execute(run, ready == run)
        if self.waiting.any():
            self._report_deadlock()

    def _execute(self, run: int, active: Array) -> None:
        steps = self.steps[run]
        if steps is None:
            from instructions import compile_run

            steps = self.steps[run] = compile_run(self, run)
        self.next_run[active] = run + 1 if run + 1 < len(self.runs) else GONE
        lanes = Active(active)
        for step in steps:
            step(lanes)

    def threads_of(self, lanes: Array) -> Threads:
        self.shared.slots = self.slot[lanes]
        return Threads(lanes, self.stamps[lanes])

    def close_copy_group(self, lanes: Array) -> None:
        self.copy_group[lanes] += 1

    # ---- Waiting
    def arrive_at_barrier(self, mask: Array, run: int, instruction: Instruction) -> None:
        """bar.sync 0: all threads of the block, none of which may have left, at one barrier of the code."""
        self.waiting |= mask
        self.next_run[mask] = run
        blocks = (self.slots, self.block_lanes)
        here = (self.waiting & (self.next_run == run) | self.absent).reshape(blocks)
        gone = ((self.next_run == GONE) & ~self.absent).reshape(blocks)
        elsewhere = (self.waiting & (self.next_run != run)).reshape(blocks)
        arrived = mask.reshape(blocks).any(1)
        for wrong, what in ((gone, "have left the kernel"), (elsewhere, "wait at another barrier or collective")):
            count = wrong[arrived].sum(1)
            if count.any():
                raise self.error(instruction, f"a barrier of all threads, of which {count.max()} {what}", mask)
        released = np.repeat(here.all(1) & arrived, self.block_lanes) & ~self.absent
        self.waiting[released] = False
        self.next_run[released] = run + 1
        self.epoch[released] += 1
        self.stamps = Threads.stamp(self.block, self.thread, self.epoch)

    def arrive_at_collective(self, mask: Array, members: Array, run: int, instruction: Instruction) -> Array:
        """Which lanes go on: those whose warp has all the members that the instruction names, and they agree on."""
        lane = np.arange(self.lanes) % WARP
        named = members >> lane.astype(np.uint32) & np.uint32(1) == 1
        if (mask & ~named).any():
            raise self.error(instruction, "a collective that does not name the lane that executes it", mask & ~named)
        self.waiting |= mask
        self.next_run[mask] = run
        here = (self.waiting & (self.next_run == run)).reshape(-1, WARP)
        bits = (here * (np.uint32(1) << np.arange(WARP, dtype=np.uint32))).sum(1, dtype=np.uint32)
        warp_members = np.where(here, members.reshape(-1, WARP), 0).max(1)
        disagree = here & (members.reshape(-1, WARP) != warp_members[:, None])
        if disagree.any():
            raise self.error(instruction, "a collective whose lanes name different members", disagree.ravel())
        complete = (bits & warp_members == warp_members) & here.any(1)
        released = (complete[:, None] & here).ravel()
        self.waiting[released] = False
        self.next_run[released] = run + 1
        return released

    def _report_deadlock(self) -> None:
        lane = int(np.flatnonzero(self.waiting)[0])
        places: dict[str, int] = {}
        for run in self.next_run[(self.slot == self.slot[lane]) & ~self.absent]:
            place = "have left" if run == GONE else f"wait at {self.kernel.instructions[self.runs[run].start]}"
            places[place] = places.get(place, 0) + 1
        text = ", ".join(f"{count} threads {place}" for place, count in places.items())
        raise PtxError(f"deadlock in {self.kernel.name}, block {self.block[lane]}: {text}")

    def error(self, instruction: Instruction, problem: str, mask: Array, nth: int = 0) -> PtxError:
        """`problem`, with the place in the code and the thread: the nth of those in the mask."""
        lanes = np.flatnonzero(mask)
        lane = int(lanes[nth]) if len(lanes) else 0
        where = f"thread {self.thread[lane]} of block {self.block[lane]}"
        return PtxError(f"{instruction}: {problem}; {where}, kernel {self.kernel.name}")
