"""The feed: sample n as token ids, for any n, a pure function of the data, the seed and the ledger's amendments.

In: a plan folder, the prefix of a .bin/.idx pair, or a blend file. Out: `Feed.tokens(first_sample, count)`, ids
[count, S + 1].
Samples are numbered from 0 over the whole run, whatever the layout, micro-batch or number of workers:

    sample -> row of the schedule (schedule.py) -> plan position -> row record (plan.py, or a permutation) -> tokens

A plan has its own order and its own seed; it ends. A prefix is cut into rows of the length that the run began with,
which are shuffled anew each epoch by the seed given here; it never ends.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from k2_megatron.data.amendments import amended
from k2_megatron.data.documents import DocumentSpan, describe_row
from k2_megatron.data.fim import FimRates, Segment, reorder, reordered_segments
from k2_megatron.data.order import Order
from k2_megatron.data.permutation import hash64
from k2_megatron.data.rows import RowStore, unpack
from k2_megatron.data.schedule import ENDLESS, Schedule


class Feed:
    """Samples of a plan or a prefix. `rows`: how many samples there are, None where they never end; `fingerprint`:
    changes with the data and its order, amendments aside; `seconds_waited`: time spent in `tokens` so far."""

    def __init__(
        self,
        order: Order,
        schedule: Schedule,
        store: RowStore,
        sequence_length: int,
        fingerprint: str,
        source_names: list[str],
        fim: dict[int, FimRates],
        fim_seed: int = 0,
    ):
        self.order, self.schedule, self.store = order, schedule, store
        self.sequence_length, self.fingerprint = sequence_length, fingerprint
        self.source_names, self._fim, self._fim_seed = source_names, fim, fim_seed
        self.earlier_fingerprint: str | None = None  # of a run that began when the files had no manifest
        self.seconds_waited = 0.0
        self._ahead: tuple[int, int, Future[np.ndarray]] | None = None
        length = store.row_length
        if sequence_length % length and length % sequence_length:
            whose, remedy = "the plan's", "build a plan for it with tools/build_plan.py"
            if order.rows_per_chunk is None:  # a prefix
                whose, remedy = "this run's first,", "begin a new run with checkpoint.start_from"
            raise ValueError(
                f"model.sequence_length {sequence_length} is neither a multiple nor a divisor of {whose} {length}; "
                f"{remedy}"
            )
        self.rows_a_sample = max(1, sequence_length // length)
        self.samples_a_row = max(1, length // sequence_length)
        total = schedule.total * self.samples_a_row // self.rows_a_sample
        self.rows: int | None = None if schedule.total >= ENDLESS >> 1 else total

    def tokens(self, first_sample: int, count: int) -> np.ndarray:
        """Samples first_sample..first_sample+count-1 as ids [count, S + 1], uint16 or int32.

        ValueError: past the last sample, or a file damaged since it was written (named, before its tokens are used).
        """
        start = time.monotonic()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[:2] == (first_sample, count):
            tokens = ahead[2].result()
        else:
            tokens = self._read(first_sample, count)
        self.seconds_waited += time.monotonic() - start
        return tokens

    def prefetch(self, first_sample: int, count: int) -> None:
        """Read the samples that the next call of `tokens` will ask for in the background."""
        if self.rows is None or first_sample + count <= self.rows:
            self._ahead = (first_sample, count, self._reader.submit(self._read, first_sample, count))

    @cached_property
    def _reader(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="prefetch")

    def _read(self, first_sample: int, count: int) -> np.ndarray:
        first_row, rows = self.row_range(first_sample, count)
        positions = self.schedule.positions(first_row, rows)
        records = self.order.records(positions)
        self._prefetch_next_chunk(first_row + rows)
        tokens = self.store.read(records)
        for number in np.flatnonzero(np.isin(unpack(records)[0], list(self._fim))) if self._fim else ():
            tokens[number] = reorder(tokens[number], *self._filling_in(*self._documents(records[number])))
        return self._cut(tokens, first_sample, count)

    def row_range(self, first_sample: int, count: int) -> tuple[int, int]:
        """(first row, rows) of the schedule that hold the samples."""
        if self.rows is not None and first_sample + count > self.rows:
            raise ValueError(
                f"samples {first_sample}..{first_sample + count - 1} asked for, the data has {self.rows}; lower "
                "train.steps, or build a plan with more chunks or repeats"
            )
        if self.rows_a_sample > 1:
            return first_sample * self.rows_a_sample, count * self.rows_a_sample
        first = first_sample // self.samples_a_row
        return first, -(-(first_sample + count) // self.samples_a_row) - first

    def _prefetch_next_chunk(self, row: int) -> None:
        if self.order.rows_per_chunk and row + self.order.rows_per_chunk < self.schedule.total:
            self.order.prefetch(int(self.schedule.positions(row + self.order.rows_per_chunk, 1)[0]))

    def _cut(self, rows: np.ndarray, first_sample: int, count: int) -> np.ndarray:
        """Rows [n, L + 1] to samples [count, S + 1] (see schedule.py)."""
        length, wanted = self.store.row_length, self.sequence_length
        if wanted == length:
            return rows
        if wanted > length:
            whole = rows[:, :length].reshape(count, wanted)
            return np.concatenate([whole, rows[self.rows_a_sample - 1 :: self.rows_a_sample, -1:]], axis=1)
        parts = np.stack([rows[:, part : part + wanted + 1] for part in range(0, length, wanted)], axis=1)
        return parts.reshape(-1, wanted + 1)[first_sample % self.samples_a_row :][:count]

    def _documents(self, record: np.uint64) -> tuple[int, list[DocumentSpan]]:
        """A row's source and its documents, before any is reordered."""
        source, number = (int(part[0]) for part in unpack(np.array([record])))
        return source, describe_row(self.store, source, number, self.source_names[source])

    def _filling_in(self, source: int, spans: list[DocumentSpan]) -> tuple[list[Segment], FimRates, int]:
        """What fim.py needs beside the tokens of a row."""
        segments = [Segment(span.document, span.first_token, span.start, span.end, span.ends) for span in spans]
        key = hash64(self._fim_seed, "fim", self.source_names[source], spans[0].file)
        return segments, self._fim[source], key

    def _trained_documents(self, record: np.uint64) -> list[DocumentSpan]:
        """A row's documents where they are trained; the last may reach beyond the row's end, or lie beyond it."""
        source, spans = self._documents(record)
        if source not in self._fim:
            return spans
        row = self.store.read(np.array([record]))[0]
        sizes = [len(part) for part in reordered_segments(row, *self._filling_in(source, spans))]
        starts = np.cumsum([0, *sizes]).tolist()
        return [
            replace(span, start=start, end=start + size, reordered=size > span.end - span.start)
            for span, start, size in zip(spans, starts, sizes, strict=False)
        ]

    def after(self, amendment: dict[str, Any]) -> Schedule:
        """The schedule that one more amendment would give. ValueError where it does not fit."""
        return amended(self.schedule, amendment, self.order.rows_per_chunk, self.store.row_length)

    def sample_records(self, first_sample: int, count: int) -> Iterable[bytes]:
        """What the ledger's chain hashes of each sample: its row records, and the part of the row where S < L."""
        first_row, rows = self.row_range(first_sample, count)
        records = self.order.records(self.schedule.positions(first_row, rows)).astype("<u8")
        if self.samples_a_row == 1:
            width = 8 * self.rows_a_sample
            content = records.tobytes()
            return (content[start : start + width] for start in range(0, len(content), width))
        samples, width = range(first_sample, first_sample + count), 1 if self.samples_a_row <= 256 else 4
        return (
            records[sample // self.samples_a_row - first_row].tobytes()
            + (sample % self.samples_a_row).to_bytes(width, "little")
            for sample in samples
        )

    def describe(self, sample: int) -> list[DocumentSpan]:
        """The documents that a sample holds, in order, with their places in its S + 1 tokens."""
        first_row, rows = self.row_range(sample, 1)
        records = self.order.records(self.schedule.positions(first_row, rows))
        length = min(self.sequence_length, self.store.row_length)  # of each row; of the last one token more
        first = sample % self.samples_a_row * self.sequence_length
        found = [
            span.within(first, first + length + (number == rows - 1), number * length)
            for number, record in enumerate(records)
            for span in self._trained_documents(record)
        ]
        return [span for span in found if span is not None]
