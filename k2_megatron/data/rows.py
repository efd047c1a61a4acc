"""Rows: the training sequences that token files are cut into, read by number.

In: token files and the spans of them that may be used. Out: row r as `row_length + 1` token ids.
The spans of one file, end to end, are its stream; row r of it is tokens r L .. r L + L of the stream (L + 1 of them:
neighbours share one, so each token but the first is once a label). A row never crosses into the next file; what is
left over at a file's end, less than one row, is not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from k2_megatron.data.manifest import CheckedTokenFile

SOURCE_SHIFT = np.uint64(48)  # a row record is one uint64: source number << 48 | row in the source
ROW_MASK = np.uint64((1 << 48) - 1)


def pack(source: int, rows: np.ndarray) -> np.ndarray:
    """Row records uint64 of rows of one source."""
    return rows.astype(np.uint64) | (np.uint64(source) << SOURCE_SHIFT)


def unpack(records: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(source numbers, rows) int64 of row records."""
    return (records >> SOURCE_SHIFT).astype(np.int64), (records & ROW_MASK).astype(np.int64)


class Stream:
    """Spans of one token file, end to end. `spans` int64 [n, 2]: first token and end token of each, ascending."""

    def __init__(self, open_file: Callable[[], CheckedTokenFile], spans: np.ndarray):
        """`open_file` is called when the first row is read: a plan may have thousands of files."""
        self._open_file = open_file
        self.starts = spans[:, 0]
        self.bounds = np.concatenate([[0], np.cumsum(spans[:, 1] - spans[:, 0])])
        self.length = int(self.bounds[-1])

    @cached_property
    def file(self) -> CheckedTokenFile:
        return self._open_file()

    def rows(self, row_length: int) -> int:
        return max(0, (self.length - 1) // row_length)

    def parts(self, position: int, count: int) -> list[tuple[int, int]]:
        """The token ranges (first, end) of the file that stream tokens position..position+count-1 are."""
        found = []
        span = int(np.searchsorted(self.bounds, position, side="right")) - 1
        while count:
            first = int(self.starts[span]) + position - int(self.bounds[span])
            size = min(count, int(self.bounds[span + 1]) - position)
            if size:
                found.append((first, first + size))
            position, count, span = position + size, count - size, span + 1
        return found

    def rows_of_tokens(self, start: int, end: int, row_length: int, source: int, first_row: int) -> list[int]:
        """Records of the rows that hold any of the file's tokens start..end-1; `first_row` is the stream's first."""
        rows: set[int] = set()
        for first, length, bound in zip(self.starts, np.diff(self.bounds), self.bounds[:-1], strict=True):
            low, high = max(start, int(first)), min(end, int(first + length))
            if low < high:
                position = int(bound) + low - int(first)
                # a row's last token is the next one's first
                rows.update(range(max(0, position - 1) // row_length, (position + high - low - 1) // row_length + 1))
        kept = np.array(sorted(row for row in rows if row < self.rows(row_length)), dtype=np.int64)
        return pack(source, kept + first_row).tolist()

    def read(self, position: int, out: np.ndarray) -> None:
        """Fill `out` [n] with the stream's tokens from `position` on, their blocks checked."""
        filled = 0
        for first, end in self.parts(position, len(out)):
            self.file.check_tokens(first, end)
            out[filled : filled + end - first] = self.file.tokens[first:end]
            filled += end - first
        assert filled == len(out), f"{self.file.bin_path}: read {filled} of {len(out)} tokens at {position}"


class RowStore:
    """The rows of several sources, each a list of streams."""

    def __init__(self, sources: Sequence[Sequence[Stream]], row_length: int, vocab_size: int, dtype: np.dtype):
        self.sources, self.row_length, self.vocab_size, self.dtype = sources, row_length, vocab_size, dtype
        self.row_bounds = [
            np.concatenate([[0], np.cumsum([stream.rows(row_length) for stream in streams])]).astype(np.int64)
            for streams in sources
        ]

    def rows(self, source: int) -> int:
        return int(self.row_bounds[source][-1])

    def locate(self, source: int, row: int) -> tuple[Stream, int]:
        """The stream a row lies in, and the row's position in it."""
        bounds = self.row_bounds[source]
        assert 0 <= row < bounds[-1], f"row {row} of source {source}, which has {bounds[-1]}"
        number = int(np.searchsorted(bounds, row, side="right")) - 1
        return self.sources[source][number], (row - int(bounds[number])) * self.row_length

    def read(self, records: np.ndarray) -> np.ndarray:
        """Row records uint64 [n] -> token ids [n, row_length + 1]. ValueError for damage and for ids out of range."""
        out = np.empty((len(records), self.row_length + 1), dtype=self.dtype)
        for number, (source, row) in enumerate(zip(*unpack(records), strict=True)):
            stream, position = self.locate(int(source), int(row))
            stream.read(position, out[number])
        if out.size and (int(out.max()) >= self.vocab_size or (self.dtype.kind == "i" and int(out.min()) < 0)):
            number = int(np.argmax(out.max(axis=1)))
            stream, position = self.locate(*(int(part[number]) for part in unpack(records)))
            raise ValueError(
                f"{stream.file.bin_path}: token id {int(out[number].max())} near stream position {position}, but "
                f"model.vocab_size is {self.vocab_size}; use the data's own tokenizer, or a larger vocab_size"
            )
        return out if out.itemsize <= 4 else out.astype("<i4")  # the ids are of the vocabulary
