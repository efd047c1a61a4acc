"""Two threads at the same bytes, at least one of them writing, without a barrier between them: a race.

Every two bytes (the least that a kernel here reads or writes) have a stamp of who wrote them last and one of who read
them: block, thread, and how many barriers the block had passed. Threads of one block are ordered by a barrier, threads
of different blocks of one launch by nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any
GRANULE = 2
EPOCH_BITS, THREAD_BITS = 24, 12
MANY = (1 << THREAD_BITS) - 1  # threads, in the place of one's number
MANY_BLOCKS = 1 << 38  # above any block's number
EPOCHS, THREADS = (1 << EPOCH_BITS) - 1, MANY << EPOCH_BITS
BLOCK_SHIFT = EPOCH_BITS + THREAD_BITS


@dataclass(frozen=True)
class Threads:
    """The threads that execute an instruction."""

    lanes: Array  # their places in the machine's registers
    stamps: Array

    @staticmethod
    def stamp(blocks: Array, threads: Array, epochs: Array) -> Array:
        """Never 0, which is nobody's."""
        return (blocks + 1) << BLOCK_SHIFT | threads << EPOCH_BITS | epochs


def _ordered(stamps: Array, mine: Array) -> Array:
    """Whether what the stamps tell of comes before what I do now, by program order or by a barrier."""
    difference = stamps ^ mine
    same_block, same_thread = difference >> BLOCK_SHIFT == 0, difference & THREADS == 0
    return (stamps == 0) | (same_block & (same_thread | (difference & EPOCHS != 0)))


class Races:
    def __init__(self, size: int) -> None:
        self.tracked = np.zeros(size // GRANULE, bool)
        self.writer = np.zeros(size // GRANULE, np.int64)
        self.reader = np.zeros(size // GRANULE, np.int64)

    def start(self, writable: Array) -> None:
        """Bytes that nobody may write cannot be raced for."""
        self.tracked = writable[::GRANULE]
        self.writer[:] = 0
        self.reader[:] = 0

    def _granules(self, offsets: Array, size: int, threads: Threads) -> tuple[Array, Array, Array] | None:
        """(granule, stamp, which of the accesses) of every granule that is tracked"""
        which = np.flatnonzero(self.tracked[offsets // GRANULE])
        if not len(which):
            return None
        count = max(1, size // GRANULE)
        granules = (offsets[which, None] // GRANULE + np.arange(count)).ravel()
        return granules, np.repeat(threads.stamps[which], count), np.repeat(which, count)

    def read(self, offsets: Array, size: int, threads: Threads) -> Array | None:
        """Which of the accesses race; None where none does."""
        found = self._granules(offsets, size, threads)
        if found is None:
            return None
        granules, mine, which = found
        wrong = ~_ordered(self.writer[granules], mine)
        self._note_readers(granules, mine)
        return self._of_accesses(wrong, which, len(offsets))

    def _note_readers(self, granules: Array, mine: Array) -> None:
        before = self.reader[granules]
        merged = self._together(before, mine)
        self.reader[granules] = merged
        after = self.reader[granules]  # of several that read the same in this instruction, one is left
        if (after != merged).any():
            self.reader[granules] = self._together(after, merged)

    @staticmethod
    def _together(before: Array, mine: Array) -> Array:
        """One stamp for both readers."""
        difference = before ^ mine
        other_block = (before != 0) & (difference >> BLOCK_SHIFT != 0)
        many = (difference >> BLOCK_SHIFT == 0) & (difference & EPOCHS == 0) & (difference & THREADS != 0)
        return np.where(other_block, MANY_BLOCKS << 24, np.where(many, mine | THREADS, mine))

    def write(self, offsets: Array, size: int, threads: Threads) -> Array | None:
        found = self._granules(offsets, size, threads)
        if found is None:
            return None
        granules, mine, which = found
        wrong = ~_ordered(self.writer[granules], mine) | ~_ordered(self.reader[granules], mine)
        self.writer[granules] = mine
        wrong |= self.writer[granules] != mine  # two threads in one instruction
        return self._of_accesses(wrong, which, len(offsets))

    @staticmethod
    def _of_accesses(wrong: Array, which: Array, count: int) -> Array | None:
        if not wrong.any():
            return None
        accesses = np.zeros(count, bool)
        accesses[which[wrong]] = True
        return accesses
