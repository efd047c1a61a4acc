"""What a launch moves, counted while the interpreter runs it: sectors of global memory, wavefronts of shared memory.

A warp's access to global memory moves sectors of 32 bytes; the least possible is what its lanes' bytes fill. Shared
memory serves 32 words of 4 bytes from as many banks at once: a whole warp of 4-byte accesses, half of one of 8 bytes, a
quarter of one of 16; lanes that want different words of one bank take turns, each a wavefront.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from machine import WARP, Counters
from parse import Instruction

Array = Any
SECTOR, BANKS, WORD = 32, 32, 4


@dataclass
class Line:
    """What one line of the source moved, against the least possible."""

    moved: int = 0
    least: int = 0


@dataclass
class Traffic(Counters):
    loaded: Line = field(default_factory=Line)  # sectors
    stored: Line = field(default_factory=Line)
    wavefronts: Line = field(default_factory=Line)
    by_line: dict[str, Line] = field(default_factory=lambda: defaultdict(Line))  # sectors
    touched: dict[str, set[int]] = field(default_factory=lambda: {"ld": set(), "st": set()})

    def __post_init__(self) -> None:
        self.note_global, self.note_shared = self._global, self._shared

    def _global(self, instruction: Instruction, lanes: Array, addresses: Array, size: int) -> None:
        warps = lanes // WARP
        moved = len(np.unique(warps << 48 | addresses // SECTOR))
        distinct = np.unique(warps << 48 | addresses) >> 48  # lanes that ask for the same get it at once
        least = int((-(-np.unique(distinct, return_counts=True)[1] * size // SECTOR)).sum())
        store = instruction.base == "st"
        for line in (self.stored if store else self.loaded, self.by_line[instruction.source]):
            line.moved += moved
            line.least += least
        self.touched["st" if store else "ld"].update(np.unique(addresses // SECTOR).tolist())

    def _shared(self, _instruction: Instruction, lanes: Array, addresses: Array, size: int) -> None:
        words = max(1, size // WORD)
        turns = np.repeat(lanes // (WARP // words), words)
        wanted = (addresses[:, None] // WORD + np.arange(words)).ravel()
        each = np.unique(turns << 32 | wanted)  # one word is read by any number of lanes at once
        banks, counts = np.unique((each >> 32) * BANKS + (each & 0xFFFFFFFF) % BANKS, return_counts=True)
        worst: dict[int, int] = defaultdict(int)
        for turn, count in zip((banks // BANKS).tolist(), counts.tolist(), strict=True):
            worst[turn] = max(worst[turn], count)
        self.wavefronts.moved += sum(worst.values())
        self.wavefronts.least += len(worst)

    @property
    def bytes_touched(self) -> int:
        """Of memory that nothing holds yet: every sector that is read once, and every one that is written."""
        return SECTOR * (len(self.touched["ld"]) + len(self.touched["st"]))
