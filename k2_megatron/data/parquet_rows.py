"""Parquet files to documents: one a row, under the columns asked for.

In: a parquet file. Out: `Piece`s of about 2 MiB. Shards are runs of row groups, closed where their uncompressed size
reaches the shard's. Arrow decodes whole pages, which hold a row at least: what it takes is the file's writer's choice
(arrow's own writer: pages of 1 MiB, but of no fewer rows than it was given at once, at most 1,024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as parquet

from k2_megatron.data import sources
from k2_megatron.data.json_lines import Piece, take_texts
from k2_megatron.data.long_texts import LONG_TEXT_BYTES
from k2_megatron.data.sources import READ_BYTES, Source, why_not_text
from k2_megatron.data.texts import Texts

DECODED_BYTES, DECODED_ROWS = 2 << 20, 128  # at once: bytes by the mean of a row group, at most so many rows


def parquet_pieces(
    source: Source, keys: Sequence[str], shard_bytes: int, first_shard: int, make_room: Callable[[], None]
) -> Iterator[Piece]:
    """The pieces from `first_shard` on. `make_room` is called before a long row becomes a document."""
    with parquet.ParquetFile(source.path, buffer_size=READ_BYTES) as file:
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
            batches = file.iter_batches(_rows_at_a_time(file, group, keys), row_groups=[group], columns=list(keys))
            for piece in _pieces_of_batches(batches, keys, shard, make_room):
                piece.consumed = source.size * (group + 1) // file.num_row_groups
                yield piece


def _rows_at_a_time(file: Any, group: int, keys: Sequence[str]) -> int:
    """How many rows of a row group arrow may decode at once; it counts in rows only."""
    facts = file.metadata.row_group(group)
    columns = [facts.column(number) for number in range(facts.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
    return max(1, min(DECODED_ROWS, DECODED_BYTES * facts.num_rows // max(1, size)))


def _pieces_of_batches(
    batches: Iterable[Any], keys: Sequence[str], shard: int, make_room: Callable[[], None]
) -> Iterator[Piece]:
    """Pieces of about `sources.PIECE_BYTES` of text out of batches of rows; a long row is one of its own where it has
    but one column."""
    texts, raw, piece, size = _empty_piece(keys, shard)
    for row in (row for batch in batches for row in zip(*(batch.column(key) for key in keys), strict=True)):
        row_bytes = sum(map(_bytes_of, row))
        if LONG_TEXT_BYTES < row_bytes <= sources.MAX_DOCUMENT_BYTES and len(keys) == 1:
            if piece.lines:
                yield piece
            make_room()
            yield _long_row(keys[0], row[0], shard)
            texts, raw, piece, size = _empty_piece(keys, shard)
            continue
        if row_bytes > sources.MAX_DOCUMENT_BYTES:
            reason = f"longer than {sources.MAX_DOCUMENT_BYTES >> 20} MiB"
        else:
            record = {key: value.as_py() for key, value in zip(keys, row, strict=True)}
            reason = take_texts(record, keys, texts)
        if reason:
            piece.rejected.append((piece.lines, reason))
        else:
            raw += [record[key].encode() for key in keys]
            size += row_bytes
        piece.lines += 1
        if size >= sources.PIECE_BYTES:
            yield piece
            texts, raw, piece, size = _empty_piece(keys, shard)
    if piece.lines:
        yield piece


def _bytes_of(value: Any) -> int:
    content = value.as_buffer() if hasattr(value, "as_buffer") else None
    return 0 if content is None else content.size


def _long_row(key: str, value: Any, shard: int) -> Piece:
    """A row as a piece of its own, in arrow's memory; rejected where it is no text."""
    content = memoryview(value.as_buffer())
    problem = why_not_text(content)
    if problem:
        return Piece(shard, {key: []}, lines=1, rejected=[(0, problem)])
    offsets = np.array([0, len(content)], dtype=np.int64)
    return Piece(shard, {key: Texts(np.frombuffer(content, dtype=np.uint8), offsets)}, lines=1, raw=(content,))


def _empty_piece(keys: Sequence[str], shard: int) -> tuple[dict[str, list[str]], list[bytes], Piece, int]:
    """(its texts, what was read of it, the piece that holds both, bytes so far)."""
    texts: dict[str, list[str]] = {key: [] for key in keys}
    raw: list[bytes] = []
    return texts, raw, Piece(shard, texts, lines=0, raw=raw), 0
