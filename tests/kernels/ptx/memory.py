"""Memory whose every access is checked: bounds to the byte, alignment, values that nobody wrote, races.

Global memory is what an operation was given (ops.h): regions, each with its element size, strides and use. Their host
memory is copied into one arena, where each byte knows whether it belongs to a tensor, holds a value and may be written.
A block's shared memory is the same, without values at first, with gaps between its arrays.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from parse import PtxError, Variable
from races import Races, Threads

Array = Any
NAMED, READY, WRITABLE, PENDING = 1, 2, 4, 8  # of a tensor; holds a value; may be written; a copy into it is under way
SLOT, GAP = 256, 512  # arenas keep addresses modulo SLOT, and leave GAP bytes between what is apart
SHARED_BASE, SHARED_GAP = 256, 128


@dataclass(frozen=True)
class Access:
    """What an instruction does with memory: `count` elements of `size` bytes, which lie together, a thread."""

    size: int
    count: int

    @property
    def bytes(self) -> int:
        return self.size * self.count


@dataclass(frozen=True)
class Region:
    """A tensor of an operation: sizes and strides in elements, use "in", "out" (no values yet) or "inout"."""

    name: str
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    use: str

    @property
    def span(self) -> int:
        """Bytes from the first element to the end of the last; 0 of an empty tensor."""
        if 0 in self.sizes:
            return 0
        reach = sum((n - 1) * stride for n, stride in zip(self.sizes, self.strides, strict=True))
        return (reach + 1) * self.itemsize

    def mark(self, flags: Array) -> None:
        """Sets the flags of this region's bytes; `flags` begins at its address."""
        bits = {"in": NAMED | READY, "out": NAMED | WRITABLE, "inout": NAMED | READY | WRITABLE}[self.use]
        steps = (*(stride * self.itemsize for stride in self.strides), 1)
        view = as_strided(flags, (*self.sizes, self.itemsize), steps)
        view |= np.uint8(bits)


class Space:
    """An arena with its flags; typed views of both give and take whole elements."""

    def __init__(self, size: int) -> None:
        size += -size % 16
        self.data = np.zeros(size, np.uint8)
        self.flags = np.zeros(size, np.uint8)
        self.races = Races(size)

    def check(self, access: Access, offsets: Array, addresses: Array, wanted: int, verb: str) -> None:
        """Of accesses inside of the arena: alignment, and the flags of their bytes."""
        self.refuse(addresses % access.bytes != 0, addresses, f"misaligned: {access.bytes} bytes {verb}")
        flags = self.flags[offsets[:, None] + np.arange(access.bytes)]
        self.refuse((flags & NAMED == 0).any(1), addresses, f"out of bounds: {access.bytes} bytes {verb}")
        self.refuse((flags & PENDING != 0).any(1), addresses, f"{verb} while an asynchronous copy is under way")
        missing = "never written before" if wanted == READY else "an input, which is written"
        self.refuse((flags & wanted == 0).any(1), addresses, f"{access.bytes} bytes {verb}: {missing}")

    def fine(self, access: Access, offsets: Array, addresses: Array, allowed: int, wanted: int) -> bool:
        """The same at once, for the usual case that there is nothing to report."""
        if (addresses % access.bytes != 0).any():
            return False
        kind = f"u{min(access.bytes, 8)}"
        seen, step = self.flags.view(kind), np.dtype(kind).itemsize
        mask, right = (np.frombuffer(bytes([bits]) * step, kind)[0] for bits in (allowed, wanted))
        places = offsets // step
        return all(bool(((seen[places + i] & mask) == right).all()) for i in range(max(1, access.bytes // step)))

    def places(self, access: Access, addresses: Array) -> Array:
        raise NotImplementedError

    def name(self, address: int) -> str:
        raise NotImplementedError

    def refuse(self, wrong: Array, addresses: Array, problem: str) -> None:
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            raise PtxError(f"{problem} at {self.name(int(addresses[lane]))}", lane)

    def load(self, access: Access, addresses: Array, threads: Threads) -> Array:
        """[count, lanes] unsigned"""
        offsets = self.places(access, addresses)
        if not self.fine(access, offsets, addresses, NAMED | READY | PENDING, NAMED | READY):
            self.check(access, offsets, addresses, READY, "read")
        self.raced(self.races.read(offsets, access.bytes, threads), addresses, "read")
        return self.data.view(f"u{access.size}")[offsets // access.size + np.arange(access.count)[:, None]]

    def store(self, access: Access, addresses: Array, values: Array, threads: Threads, after: int = READY) -> None:
        offsets = self.places(access, addresses)
        if not self.fine(access, offsets, addresses, NAMED | WRITABLE | PENDING, NAMED | WRITABLE):
            self.check(access, offsets, addresses, WRITABLE, "written")
        self.raced(self.races.write(offsets, access.bytes, threads), addresses, "written")
        if after == READY:
            places = offsets // access.size + np.arange(access.count)[:, None]
            self.data.view(f"u{access.size}")[places] = values
        self.mark(access, offsets, after)

    def mark(self, access: Access, offsets: Array, bits: int) -> None:
        self.flags[offsets[:, None] + np.arange(access.bytes)] |= np.uint8(bits)

    def finish_copy(self, access: Access, addresses: Array) -> None:
        """What is copied there may be stored now."""
        self.flags[self.places(access, addresses)[:, None] + np.arange(access.bytes)] &= np.uint8(~PENDING & 0xFF)

    def raced(self, wrong: Array | None, addresses: Array, verb: str) -> None:
        if wrong is not None:
            self.refuse(wrong, addresses, f"race: {verb} by one thread, written or read by another, no barrier between")


class GlobalMemory(Space):
    """The tensors of one operation. Regions that overlap (q and k of one buffer) share a segment of the arena."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = sorted((r for r in regions if r.span), key=lambda region: region.address)
        segments: list[list[int]] = []
        for region in self.regions:
            if segments and region.address < segments[-1][1]:
                segments[-1][1] = max(segments[-1][1], region.address + region.span)
            else:
                segments.append([region.address, region.address + region.span])
        bases, size = [], 0
        for start, end in segments:
            bases.append(size + (start - size) % SLOT)
            size = bases[-1] + end - start + GAP
        super().__init__(size + GAP)
        self.starts, self.ends = (np.array([s[i] for s in segments], np.int64) for i in (0, 1))
        self.bases = np.array(bases, np.int64)
        for region in self.regions:
            at = self.bases[np.searchsorted(self.starts, region.address, "right") - 1]
            at += region.address - self.starts[np.searchsorted(self.starts, region.address, "right") - 1]
            region.mark(self.flags[at : at + region.span])
        for start, end, base in zip(self.starts, self.ends, self.bases, strict=True):
            self.data[base : base + end - start] = _host(int(start), int(end - start))

    def start_launch(self) -> None:
        """What earlier launches did is done."""
        writable = np.zeros(len(self.data), bool)
        for start, end, base in zip(self.starts, self.ends, self.bases, strict=True):
            part = slice(base, base + end - start)
            writable[part] = (self.flags[part] & WRITABLE).any()
        self.races.start(writable)

    def write_back(self) -> None:
        """Into the host's memory, what the kernels may write and have written, and nothing else."""
        for start, end, base in zip(self.starts, self.ends, self.bases, strict=True):
            part = slice(base, base + end - start)
            written = self.flags[part] & (READY | WRITABLE) == READY | WRITABLE
            _host(int(start), int(end - start))[written] = self.data[part][written]

    def require_complete(self) -> None:
        """Every output is written when the operation is done."""
        for segment, base in enumerate(self.bases):
            part = self.flags[base : base + self.ends[segment] - self.starts[segment]]
            missing = np.flatnonzero(part & (NAMED | READY) == NAMED)
            if len(missing):
                where = self.name(int(self.starts[segment] + missing[0]))
                raise PtxError(f"{len(missing)} bytes of the outputs are never written, the first at {where}")

    def places(self, access: Access, addresses: Array) -> Array:
        segment = np.maximum(np.searchsorted(self.starts, addresses, "right") - 1, 0)
        inside = (addresses >= self.starts[segment]) & (addresses + access.bytes <= self.ends[segment])
        if not inside.all():
            self.refuse(~inside & (addresses % access.bytes != 0), addresses, f"misaligned: {access.bytes} bytes")
            self.refuse(~inside, addresses, f"out of bounds: {access.bytes} bytes")
        return addresses - self.starts[segment] + self.bases[segment]

    def name(self, address: int) -> str:
        nearest = min(self.regions, key=lambda r: max(r.address - address, address - (r.address + r.span - 1), 0))
        return f"{nearest.name} + {address - nearest.address} bytes (it has {nearest.span})"


class SharedMemory(Space):
    """The shared memory of every block that runs at the time; addresses count from each block's own start."""

    def __init__(self, variables: list[Variable], dynamic_bytes: int, blocks: int) -> None:
        self.addresses: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        end = SHARED_BASE
        for variable in sorted(variables, key=lambda variable: variable.size == 0):  # what is dynamic comes last
            end += -end % max(variable.align, 16)
            self.addresses[variable.name] = end
            self.sizes[variable.name] = variable.size or dynamic_bytes
            end += self.sizes[variable.name] + SHARED_GAP
        self.segment = end + -end % SLOT
        super().__init__(self.segment * blocks)
        self.blocks = blocks
        self.slots: Array = np.zeros(0, np.int64)  # of the active lanes

    def start_blocks(self) -> None:
        self.data[:], self.flags[:] = 0xFF, 0
        flags = self.flags.reshape(self.blocks, self.segment)
        for name, address in self.addresses.items():
            flags[:, address : address + self.sizes[name]] = NAMED | WRITABLE
        self.races.start(np.ones(len(self.data), bool))

    def places(self, access: Access, addresses: Array) -> Array:
        inside = (addresses >= 0) & (addresses + access.bytes <= self.segment)
        self.refuse(~inside, addresses, f"out of bounds: {access.bytes} bytes")
        return addresses + self.slots * self.segment

    def name(self, address: int) -> str:
        if not self.addresses:
            return f"shared address {address} of a kernel without shared memory"
        before = [name for name, start in self.addresses.items() if start <= address] or list(self.addresses)[:1]
        name = max(before, key=lambda one: self.addresses[one])
        return f"shared {name} + {address - self.addresses[name]} bytes (it has {self.sizes[name]})"


def _host(address: int, size: int) -> Array:
    """The bytes of this process at an address, to read and to write."""
    return np.frombuffer((ctypes.c_ubyte * size).from_address(address), np.uint8)
