"""The feed: sample n as token ids, for any n, a pure function of the data, the seed and the ledger's amendments.

In: a plan folder, the prefix of a .bin/.idx pair, or a blend file. Out: `Feed.tokens(first_sample, count)`, ids
[count, S + 1].
Samples are numbered from 0 over the whole run, whatever the layout, micro-batch or number of workers:

    sample -> row of the schedule (schedule.py) -> plan position -> row record (plan.py, or a permutation) -> tokens

A plan has its own order and its own seed; it ends. A prefix is cut into rows of the length that the run began with,
which are shuffled anew each epoch by the seed given here; it never ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from k2_megatron.data.amendments import amended, amended_by
from k2_megatron.data.documents import DocumentSpan, describe_row
from k2_megatron.data.fim import FimRates, Segment, reorder, reordered_segments
from k2_megatron.data.held_out import complement, held_out_spans
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.manifest import CheckedTokenFile, open_token_files
from k2_megatron.data.order import EpochOrder, Order
from k2_megatron.data.permutation import hash64
from k2_megatron.data.plan import Plan
from k2_megatron.data.rows import RowStore, Stream, unpack
from k2_megatron.data.schedule import ENDLESS, Schedule

if TYPE_CHECKING:
    from k2_megatron.data.blended import BlendedFeed

PARTS = ("all", "train", "held_out")
INDEX_BYTES_CHECKED_AT_START = 256 << 20  # more would take a noticeable time; verify reads them


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


AnyFeed = Union[Feed, "BlendedFeed"]  # what training reads; rows, a schedule and amendments are asked of a Feed alone


def open_feed(
    path: str | os.PathLike,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    row_length: int | None = None,
    part: str = "all",
    held_out_fraction: float = 0.02,
    ledger: Ledger | None = None,
) -> AnyFeed:
    """Open a plan folder, the prefix of token files, or a blend file (blended.py).

    For a prefix, `part` "train" or "held_out" splits it by document: each is held out with probability
    `held_out_fraction`, by a hash of seed and document number; "all" is everything. A plan is split when it is built.
    `row_length`: the sequence length that the run began with, where it has changed since; a plan has one of its own.
    `ledger`: its amendments are followed, and its chain is of this feed.
    ValueError: a file missing, cut or damaged, an .idx that disagrees with its .bin, ids beyond the vocabulary.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r}: one of {', '.join(PARTS)}")
    if os.fspath(path).endswith(".toml"):
        from k2_megatron.data.blended import open_blend  # brings pydantic

        if row_length not in (None, sequence_length):
            raise ValueError(
                f"{path}: this run began with model.sequence_length {row_length}, and mcore cuts and shuffles blended "
                f"datasets anew for {sequence_length}: what was trained on cannot be found again. Build a plan "
                "(tools/build_plan.py) and begin a new run with checkpoint.start_from, or keep the length"
            )
        feed: AnyFeed = open_blend(
            Path(path), ledger, sequence_length=sequence_length, seed=seed, vocab_size=vocab_size
        )
    elif os.path.isdir(path):
        feed = _plan_feed(Path(path), sequence_length, vocab_size, ledger)
    else:
        rows = (sequence_length, row_length or sequence_length)
        feed = _prefix_feed(os.fspath(path), *rows, seed, vocab_size, part, held_out_fraction, ledger)
    if ledger is not None:
        ledger.attach(feed)
    return feed


def _plan_feed(folder: Path, sequence_length: int, vocab_size: int, ledger: Ledger | None) -> Feed:
    plan = Plan(folder)
    check_vocabulary(folder, plan.content["tokenizer"], vocab_size)
    streams = plan.streams()
    entries = [file["entry"] for source in plan.sources for file in source["files"]]
    if sum(entry["idx_bytes"] for entry in entries) <= INDEX_BYTES_CHECKED_AT_START:
        for stream in (stream for of_source in streams for stream in of_source):
            stream.file.check_whole_index()
    pieces, fim_tokenizer = plan.content["fim"], plan.fim_tokenizer()
    fim = {
        number: FimRates(source["fim_psm"], source["fim_spm"], **pieces, tokenizer=fim_tokenizer)
        for number, source in enumerate(plan.sources)
        if source["fim_psm"] or source["fim_spm"]
    }
    for token in (pieces or {}).values():
        if token >= vocab_size:
            raise ValueError(f"{folder}: fill-in-the-middle piece {token}, model.vocab_size is {vocab_size}; raise it")
    store = RowStore(streams, plan.row_length, vocab_size, _widest(entries, (pieces or {}).values()))
    schedule = Schedule.of_chunks(plan.chunk_order, plan.rows_per_chunk)
    schedule = amended_by(schedule, ledger, plan.rows_per_chunk, plan.row_length)
    names = [source["name"] for source in plan.sources]
    return Feed(plan, schedule, store, sequence_length, plan.fingerprint, names, fim, plan.content["recipe"]["seed"])


def _prefix_feed(
    prefix: str,
    sequence_length: int,
    row_length: int,
    seed: int,
    vocab_size: int,
    part: str,
    fraction: float,
    ledger: Ledger | None,
) -> Feed:
    files, manifest = open_token_files(prefix)
    check_vocabulary(prefix, (manifest or {}).get("tokenizer"), vocab_size)
    if sum(file.idx_path.stat().st_size for file in files) <= INDEX_BYTES_CHECKED_AT_START:
        for file in files:
            file.check_whole_index()
    key = hash64(seed, "held out")
    streams = [Stream(partial(_itself, file), document_spans(file, part, fraction, key)) for file in files]
    dtype = _widest([{"dtype": file.dtype.name} for file in files])
    store = RowStore([streams], row_length, vocab_size, dtype)
    if store.rows(0) == 0:
        raise ValueError(
            f"{prefix}: the {part} part has {sum(stream.length for stream in streams)} tokens, too few for one row of "
            f"{row_length + 1}; give more text, a shorter model.sequence_length, or another held-out fraction"
        )
    sizes = [str(file.token_count) for file in files]
    hashes = [file.entry["bin_xxh3"] if file.entry else size for file, size in zip(files, sizes, strict=True)]
    fingerprint, before = (f"{hash64('prefix', *x, row_length, seed, part, fraction):016x}" for x in (hashes, sizes))
    schedule = amended_by(Schedule.endless(), ledger, None, row_length)
    order = EpochOrder(store.rows(0), seed)
    feed = Feed(order, schedule, store, sequence_length, fingerprint, [os.path.basename(files[0].prefix)], {})
    if not (manifest or {}).get("sources"):  # it came after the files
        feed.earlier_fingerprint = before
    return feed


def _itself(file: CheckedTokenFile) -> CheckedTokenFile:
    return file


def _widest(entries: list[dict[str, Any]], pieces: Iterable[int] = ()) -> np.dtype:
    """What holds the ids of all files and the pieces. Of eight bytes: damage must not be cut to a good id."""
    found = {entry["dtype"] for entry in entries}
    if "int64" in found:
        return np.dtype("<i8")
    return np.dtype("<u2") if found <= {"uint8", "uint16"} and max(pieces, default=0) < 1 << 16 else np.dtype("<i4")


def document_spans(file: CheckedTokenFile, part: str, fraction: float, key: int) -> np.ndarray:
    """Token spans int64 [n, 2] of a file's documents that belong to `part`."""
    if part == "all":
        return np.array([[0, file.token_count]], dtype=np.int64)
    spans = held_out_spans(file, 0, file.documents, fraction, key)
    return spans if part == "held_out" else complement(spans, 0, file.token_count)


def check_vocabulary(path: str | Path, tokenizer: dict[str, Any] | None, vocab_size: int) -> None:
    """ValueError where the tokenizer that made the tokens has more pieces than the model."""
    made_with = (tokenizer or {}).get("vocab_size")
    if made_with is not None and made_with > vocab_size:
        raise ValueError(
            f"{path}: made with a tokenizer of {made_with} pieces, model.vocab_size is {vocab_size}; "
            f"set vocab_size to at least {made_with}, or make the tokens with another tokenizer"
        )
