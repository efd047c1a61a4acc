"""The schedule: which plan position is trained at which row number, after the order of the chunks and all amendments.

In: the chunks in their order, and amendments. Out: `positions(first, count)`, a pure function. An amendment takes rows
out of what is still to come: `skip` drops them, `defer` moves them to the end. K2's cure of its two loss spikes, in the
words of this file: defer chunk 160, then chunk 186, from the row after checkpoint 160.

Rows are counted in the plan's own length L. With another model.sequence_length S, sample n is rows n S/L and on where L
divides S, or one of L/S parts of a row where S divides L; config/batch.py says where a run goes on after a change of S.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np

ENDLESS = 1 << 60  # rows of a feed that never ends

SKIP, DEFER = "skip", "defer"


@dataclass(frozen=True)
class Amendment:
    """From row `from_row` of the schedule on: take out the positions of a chunk, or of rows rows[0]..rows[1]-1 of the
    schedule as it stood before."""

    action: str
    from_row: int
    chunk: int | None = None
    rows: tuple[int, int] | None = None


class Schedule:
    """Runs of consecutive plan positions, end to end. `total` rows; immutable. Equal `runs` mean an equal order."""

    def __init__(self, runs: Sequence[tuple[int, int]]):
        """`runs`: (first position, length) of each run; those that follow on become one."""
        self.runs: list[tuple[int, int]] = []
        for first, length in runs:
            if self.runs and sum(self.runs[-1]) == first:
                first, length = self.runs[-1][0], self.runs.pop()[1] + length
            self.runs += [(first, length)] if length else []
        self.starts = [0, *accumulate(length for _, length in self.runs)]
        self.total = self.starts[-1]

    @classmethod
    def of_chunks(cls, order: Sequence[int], rows_per_chunk: int) -> Schedule:
        return cls([(chunk * rows_per_chunk, rows_per_chunk) for chunk in order])

    @classmethod
    def endless(cls) -> Schedule:
        return cls([(0, ENDLESS)])

    def positions(self, first: int, count: int) -> np.ndarray:
        """Plan positions int64 of rows first..first+count-1. ValueError past the end."""
        if first + count > self.total:
            raise ValueError(
                f"rows {first}..{first + count - 1} asked for, the plan has {self.total}; lower train.steps, or build "
                "a plan with more chunks or repeats"
            )
        parts = [np.zeros(0, dtype=np.int64)]
        number = bisect_right(self.starts, first) - 1
        while count:
            offset = first - self.starts[number]
            size = min(count, self.runs[number][1] - offset)
            start = self.runs[number][0] + offset
            parts.append(np.arange(start, start + size, dtype=np.int64))
            first, count, number = first + size, count - size, number + 1
        return np.concatenate(parts)

    def amended(self, amendment: Amendment, rows_per_chunk: int | None) -> Schedule:
        """The schedule after one more amendment. ValueError where it would change rows before its `from_row`."""
        start = amendment.from_row
        if not 0 <= start <= self.total:
            raise ValueError(f"from row {start}: the schedule has rows 0..{self.total - 1}")
        before, after = self._slice(0, start), self._slice(start, self.total)
        if amendment.rows is not None:
            first, end = amendment.rows
            if not start <= first < end <= self.total:
                raise ValueError(
                    f"rows {first}..{end - 1}: must lie between row {start}, from which the amendment holds, and the "
                    f"end, {self.total}; rows before it are trained already: roll back further first"
                )
            kept = self._slice(start, first) + self._slice(end, self.total)
            taken = self._slice(first, end)
        else:
            assert amendment.chunk is not None, "an amendment names a chunk or rows"
            if rows_per_chunk is None:
                raise ValueError("a chunk can only be amended in a plan; a prefix has none: amend samples")
            low = amendment.chunk * rows_per_chunk
            kept, taken = _split(after, low, low + rows_per_chunk)
            if not taken:
                raise ValueError(f"chunk {amendment.chunk}: none of its rows come at or after row {start}")
        if amendment.action == DEFER and self.total >= ENDLESS:
            raise ValueError("defer moves rows to the end, and this feed has none; skip them, or use a plan")
        return Schedule(before + kept + (taken if amendment.action == DEFER else []))

    def _slice(self, first: int, end: int) -> list[tuple[int, int]]:
        """Runs of rows first..end-1."""
        found = []
        for start, (position, length) in zip(self.starts, self.runs, strict=False):
            low, high = max(first, start), min(end, start + length)
            if low < high:
                found.append((position + low - start, high - low))
        return found


def _split(runs: list[tuple[int, int]], low: int, high: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """(runs outside, runs inside) of positions low..high-1."""
    kept: list[tuple[int, int]] = []
    taken: list[tuple[int, int]] = []
    for first, length in runs:
        end = first + length
        cuts = sorted({first, end, *(cut for cut in (low, high) if first < cut < end)})
        for start, stop in pairwise(cuts):
            (taken if low <= start < high else kept).append((start, stop - start))
    return kept, taken
