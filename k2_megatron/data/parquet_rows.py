"""Parquet files to documents: one a row, under the columns asked for.

In: a parquet file. Out: `Piece`s of about 2 MiB, each long row one of its own. Shards are runs of row groups, closed
where their uncompressed size reaches the shard's. Arrow decodes pages whole, and how large they are is the file's
writer's choice (arrow's own: of 1 MiB, but of no fewer rows than it was given at once, at most 1,024): where they are
large, the texts are read one at a time by parquet_texts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from k2_megatron.data import sources
from k2_megatron.data.json_lines import Piece, not_a_string
from k2_megatron.data.long_texts import LONG_TEXT_BYTES
from k2_megatron.data.parquet_texts import Text, TextChunk, text_chunk, texts_of
from k2_megatron.data.sources import READ_BYTES, Source, why_not_text
from k2_megatron.data.texts import Texts

DECODED_BYTES, DECODED_ROWS = 2 << 20, 128  # at once: bytes by the mean of a row group, at most so many rows
ARROW_PAGE_BYTES = 8 << 20  # of all columns together; arrow holds a page up to three times
Row = Sequence[Any]  # a `Text` a column, or what stands there instead


def parquet_pieces(
    source: Source, keys: Sequence[str], shard_bytes: int, first_shard: int, make_room: Callable[[], None]
) -> Iterator[Piece]:
    """The pieces from `first_shard` on. `make_room` is called before a long row is held in memory."""
    with open(source.path, "rb") as raw, parquet.ParquetFile(source.path, buffer_size=READ_BYTES) as file:
        missing = [key for key in keys if key not in file.schema_arrow.names]
        if missing:
            raise ValueError(
                f"{source.path}: no column {missing[0]!r}; it has {', '.join(file.schema_arrow.names)} (--json-keys)"
            )
        shard, filled = 0, 0
        for group in range(file.num_row_groups):
            if filled >= shard_bytes:
                shard, filled = shard + 1, 0
            filled += file.metadata.row_group(group).total_byte_size
            if shard < first_shard:
                continue
            chunks = _large_chunks(file, raw, group, keys)
            rows = zip(*map(texts_of, chunks), strict=True) if chunks else _arrow_rows(file, group, keys)
            for piece in _pieces_of_rows(rows, keys, shard, make_room):
                piece.consumed = source.size * (group + 1) // file.num_row_groups
                yield piece


def _large_chunks(file: Any, raw: IO[bytes], group: int, keys: Sequence[str]) -> list[TextChunk]:
    """The columns' chunks where their pages are too large for arrow and can be read without it, else none."""
    facts = file.metadata.row_group(group)
    found = []
    for key in keys:
        numbers = [n for n in range(facts.num_columns) if facts.column(n).path_in_schema == key]
        if len(numbers) != 1 or not _is_text(file.schema_arrow.field(key).type):
            return []
        found.append((file.schema.column(numbers[0]), facts.column(numbers[0])))
    if sum(chunk.total_uncompressed_size for _, chunk in found) <= ARROW_PAGE_BYTES:
        return []
    chunks = [chunk for one in found if (chunk := text_chunk(raw, *one)) is not None]
    large = sum(chunk.largest_page for chunk in chunks) > ARROW_PAGE_BYTES
    return chunks if large and len(chunks) == len(keys) else []


def _is_text(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _arrow_rows(file: Any, group: int, keys: Sequence[str]) -> Iterator[Row]:
    for batch in file.iter_batches(_rows_at_a_time(file, group, keys), row_groups=[group], columns=list(keys)):
        for row in zip(*(batch.column(key) for key in keys), strict=True):
            yield [_arrow_value(value) for value in row]


def _arrow_value(value: Any) -> Any:
    content = value.as_buffer() if isinstance(value, pyarrow.StringScalar | pyarrow.LargeStringScalar) else None
    if content is not None:
        return Text(content.size, lambda: memoryview(content))
    found = value.as_py()
    return Text(len(text := found.encode()), lambda: text) if isinstance(found, str) else found


def _rows_at_a_time(file: Any, group: int, keys: Sequence[str]) -> int:
    """How many rows of a row group arrow may decode at once; it counts in rows only."""
    facts = file.metadata.row_group(group)
    columns = [facts.column(number) for number in range(facts.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
    return max(1, min(DECODED_ROWS, DECODED_BYTES * facts.num_rows // max(1, size)))


def _pieces_of_rows(
    rows: Iterable[Row], keys: Sequence[str], shard: int, make_room: Callable[[], None]
) -> Iterator[Piece]:
    """Pieces of about `sources.PIECE_BYTES` of text; a long row is one of its own."""
    gathered = _Rows(keys, shard)
    for row in rows:
        size = sum(value.size for value in row if isinstance(value, Text))
        long = LONG_TEXT_BYTES < size <= sources.MAX_DOCUMENT_BYTES
        if long:
            if gathered.lines:
                yield gathered.piece()
            gathered = _Rows(keys, shard)
            if size > sources.ROOM_BYTES:
                make_room()
        gathered.take(row, size)
        if long or gathered.bytes >= sources.PIECE_BYTES:
            yield gathered.piece()
            gathered = _Rows(keys, shard)
    if gathered.lines:
        yield gathered.piece()


class _Rows:
    """The rows of a piece so far."""

    def __init__(self, keys: Sequence[str], shard: int):
        self._keys, self._shard = keys, shard
        self.lines, self.bytes = 0, 0
        self._texts: list[list[Any]] = []  # of each document, under each key
        self._rejected: list[tuple[int, str]] = []

    def take(self, row: Row, size: int) -> None:
        texts: list[Any] = []
        others = [not_a_string(*one) for one in zip(self._keys, row, strict=True) if not isinstance(one[1], Text)]
        reason = others[0] if others else ""
        if size > sources.MAX_DOCUMENT_BYTES:
            reason = f"longer than {sources.MAX_DOCUMENT_BYTES >> 20} MiB"
        for value in () if reason else row:
            texts.append(value.read())
            reason = reason or why_not_text(texts[-1])
        if reason:
            self._rejected.append((self.lines, reason))
        else:
            self._texts.append(texts)
            self.bytes += size
        self.lines += 1

    def piece(self) -> Piece:
        texts = {key: _joined([row[number] for row in self._texts]) for number, key in enumerate(self._keys)}
        raw = list(chain.from_iterable(self._texts))
        return Piece(self._shard, texts, self.lines, rejected=self._rejected, raw=raw)


def _joined(texts: Sequence[Any]) -> Texts:
    """One text stays where it lies."""
    content = texts[0] if len(texts) == 1 else b"".join(texts)
    return Texts(np.frombuffer(content, dtype=np.uint8), np.cumsum([0, *map(len, texts)], dtype=np.int64))
