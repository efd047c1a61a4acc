"""Parquet files to documents: one a row, under the columns asked for.

In: a parquet file. Out: `Piece`s of about 2 MiB, smaller where rows are short, each long row one of its own. Shards are
runs of row groups, closed where their uncompressed size reaches the shard's. A batch of short texts is taken at once: a
Python object a row costs more than such a text. Arrow decodes pages whole, and how large they are is the file's
writer's choice (arrow's own: of 1 MiB, but of no fewer rows than it was given at once, at most 1,024): where they are
large, the texts are read one at a time by parquet_texts.py.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import IO, Any

import numpy as np
import pyarrow
import pyarrow.parquet as parquet

from k2_megatron.data import sources
from k2_megatron.data.block_formats import FORMATS
from k2_megatron.data.json_lines import Piece, not_a_string
from k2_megatron.data.long_texts import LONG_TEXT_BYTES
from k2_megatron.data.parquet_pages import can_stream, first_byte, pages_of
from k2_megatron.data.parquet_texts import Text, TextChunk, text_chunk, texts_of
from k2_megatron.data.sources import READ_BYTES, Source, why_not_utf8
from k2_megatron.data.texts import Texts

DECODED_BYTES, DECODED_ROWS = 2 << 20, 128  # at once: bytes by the mean of a row group, at most so many rows
ARROW_PAGE_BYTES = 8 << 20  # of all columns together; arrow holds a page up to three times
REFUSED_PAGE_BYTES = 8 << 20  # of a kind that is arrow's alone: eight rows of 12 MB as deltas took 335 MB
RUN_BYTES = 256 << 10  # of a column's batch that is taken at once; of longer texts a Python object each costs little
PIECE_ROWS = 1 << 14  # each may take some hundred bytes beside its text
COPIED_BYTES = 4 << 10  # shorter texts take less memory as bytes of their own than as views of arrow's
TEXT_SCALARS = (pyarrow.StringScalar, pyarrow.LargeStringScalar)
Row = Sequence[Any]  # a `Text` a column, or what stands there instead


@dataclass(frozen=True)
class Run:
    """Rows of nothing but short texts: each column's, and the bytes of all, row after row."""

    texts: Sequence[Texts]
    raw: bytes | memoryview


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
        twice = [key for key in keys if file.schema_arrow.names.count(key) > 1]
        if twice:
            raise ValueError(
                f"{source.path}: {twice[0]!r} names several columns; write the file anew with names of their own"
            )
        shard, filled = 0, 0
        for group in range(file.num_row_groups):
            if filled >= shard_bytes:
                shard, filled = shard + 1, 0
            filled += file.metadata.row_group(group).total_byte_size
            if shard < first_shard:
                continue
            for piece in _pieces_of_rows(_rows_of(file, raw, group, keys), keys, shard, make_room):
                piece.consumed = source.size * (group + 1) // file.num_row_groups
                yield piece


def _rows_of(file: Any, raw: IO[bytes], group: int, keys: Sequence[str]) -> Iterable[Row | Run]:
    """The rows of a row group: columns of large pages a text at a time, the others by arrow."""
    chunks = _large_chunks(file, raw, group, keys)
    _refuse_large_pages(file, raw, group, [key for key in keys if key not in chunks])
    if not chunks:
        return _arrow_rows(file, group, keys)
    columns = [texts_of(chunks[key]) if key in chunks else _arrow_column(file, group, key) for key in keys]
    return zip(*columns, strict=True)


def _large_chunks(file: Any, raw: IO[bytes], group: int, keys: Sequence[str]) -> dict[str, TextChunk]:
    """The columns' chunks that can be read without arrow where their pages are too large for it, else none."""
    facts = file.metadata.row_group(group)
    found = {}
    for key in keys:
        numbers = [n for n in range(facts.num_columns) if facts.column(n).path_in_schema == key]
        if len(numbers) == 1 and _is_text(file.schema_arrow.field(key).type):
            found[key] = file.schema.column(numbers[0]), facts.column(numbers[0])
    if sum(chunk.total_uncompressed_size for _, chunk in found.values()) <= ARROW_PAGE_BYTES:
        return {}
    readable = {key: text_chunk(raw, *one) for key, one in found.items() if can_stream(one[1].compression)}
    chunks = {key: chunk for key, chunk in readable.items() if chunk is not None}
    return chunks if sum(chunk.largest_page for chunk in chunks.values()) > ARROW_PAGE_BYTES else {}


def _refuse_large_pages(file: Any, raw: IO[bytes], group: int, keys: Sequence[str]) -> None:
    """ValueError where arrow would decode a page that takes more memory than a worker may have."""
    facts = file.metadata.row_group(group)
    for number in range(facts.num_columns):
        column = facts.column(number)
        wanted = any(f"{column.path_in_schema}.".startswith(f"{key}.") for key in keys)
        if not wanted or column.total_uncompressed_size <= REFUSED_PAGE_BYTES:
            continue
        try:
            largest = max(
                (page.bytes for page in pages_of(raw.fileno(), first_byte(column), column.num_values)), default=0
            )
        except ValueError:
            continue  # arrow says what it is
        if largest > REFUSED_PAGE_BYTES:
            lacking = _lacks_module_alone(raw, file.schema.column(number), column)
            raise ValueError(
                f"{raw.name}: a page of {largest >> 20} MiB in column {column.path_in_schema} "
                f"({', '.join(column.encodings)}; {column.compression}), of a kind that only arrow reads"
                f"{' where k2_megatron._cpu is not built' if lacking else ''}, in up to eight times as much memory; "
                f"{'build it (pip install -e .), or ' if lacking else ''}write the file anew, its texts in no list and "
                "not as deltas: "
                'pyarrow.parquet.write_table(pyarrow.parquet.read_table(FILE), NEW, compression="zstd")'
            )


def _lacks_module_alone(raw: IO[bytes], column: Any, facts: Any) -> bool:
    """Whether a column chunk could be read without arrow were the compiled module built."""
    if can_stream(facts.compression) or facts.compression not in FORMATS:
        return False
    return text_chunk(raw, column, facts) is not None


def _is_text(kind: Any) -> bool:
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    return pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)


def _arrow_rows(file: Any, group: int, keys: Sequence[str]) -> Iterator[Row | Run]:
    for batch in file.iter_batches(_rows_at_a_time(file, group, keys), row_groups=[group], columns=list(keys)):
        columns = [batch.column(key) for key in keys]
        run = _run_of(columns)
        if run is not None:
            yield run
            continue
        for row in zip(*columns, strict=True):
            yield [_arrow_value(value) for value in row]


def _arrow_column(file: Any, group: int, key: str) -> Iterator[Any]:
    """The column's part of each row."""
    for batch in file.iter_batches(_rows_at_a_time(file, group, [key]), row_groups=[group], columns=[key]):
        yield from map(_arrow_value, batch.column(key))


def _run_of(columns: Sequence[Any]) -> Run | None:
    """A batch as a run; None where its rows must be judged one by one."""
    found: list[Texts] = []
    for column in columns:
        texts = _texts_at_once(column)
        if texts is None:
            return None
        found.append(texts)
    if len(found) == 1:
        return Run(found, found[0].content.data)
    rows = zip(*map(_parts_of, found), strict=True)
    return Run(found, b"".join(chain.from_iterable(rows)))


def _parts_of(texts: Texts) -> Iterator[bytes]:
    content = texts.content.tobytes()
    return (content[start:end] for start, end in pairwise(texts.offsets.tolist()))


def _texts_at_once(column: Any) -> Texts | None:
    """A copy of arrow's array as texts; None where it may hold a null or something else than text, or is long."""
    if pyarrow.types.is_dictionary(column.type):
        if column.dictionary.nbytes * len(column) > ARROW_PAGE_BYTES:  # all rows may be its longest text
            return None
        column = column.dictionary_decode()
    if column.null_count or not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
        return None
    width = np.dtype(np.int32 if pyarrow.types.is_string(column.type) else np.int64)
    _, places, buffer = column.buffers()
    places = np.frombuffer(places, width, len(column) + 1, column.offset * width.itemsize)
    start, end = places[[0, -1]].tolist()
    if end - start > RUN_BYTES:
        return None
    content = buffer.slice(start, end - start).to_pybytes() if end > start else b""
    texts = Texts(np.frombuffer(content, dtype=np.uint8), places.astype(np.int64) - start)
    return texts if content.isascii() or _is_utf8(texts) else None


def _is_utf8(texts: Texts) -> bool:
    """Whether each text is: where all of them are and none begins inside a character."""
    first_bytes = texts.content[texts.offsets[texts.offsets < len(texts.content)]]
    return not (first_bytes & 0xC0 == 0x80).any() and not why_not_utf8(texts.content.data)


def _arrow_value(value: Any) -> Any:
    if isinstance(value, pyarrow.DictionaryScalar):
        value = value.value  # its own as_py() fails where the text is not UTF-8
    content = value.as_buffer() if isinstance(value, TEXT_SCALARS) else None
    if content is not None:
        return Text(content.size, content.to_pybytes if content.size < COPIED_BYTES else lambda: memoryview(content))
    found = value.as_py()
    return Text(len(text := found.encode()), lambda: text) if isinstance(found, str) else found


def _rows_at_a_time(file: Any, group: int, keys: Sequence[str]) -> int:
    """How many rows of a row group arrow may decode at once; it counts in rows only."""
    facts = file.metadata.row_group(group)
    columns = [facts.column(number) for number in range(facts.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
    return max(1, min(DECODED_ROWS, DECODED_BYTES * facts.num_rows // max(1, size)))


def _pieces_of_rows(
    rows: Iterable[Row | Run], keys: Sequence[str], shard: int, make_room: Callable[[], None]
) -> Iterator[Piece]:
    """Pieces of about `sources.PIECE_BYTES` of text, or of PIECE_ROWS; a long row is one of its own."""
    gathered = _Rows(keys, shard)
    for row in rows:
        long = False
        if isinstance(row, Run):
            gathered.take_run(row)
        else:
            size = sum(value.size for value in row if isinstance(value, Text))
            too_long = _too_long(row, size)
            long = size > LONG_TEXT_BYTES and not too_long
            if long:
                if gathered.lines:
                    yield gathered.piece()
                gathered = _Rows(keys, shard)
                if size > sources.ROOM_BYTES:
                    make_room()
            gathered.take(row, size, too_long)
        if long or gathered.bytes >= sources.PIECE_BYTES or gathered.lines >= PIECE_ROWS:
            yield gathered.piece()
            gathered = _Rows(keys, shard)
    if gathered.lines:
        yield gathered.piece()


def _too_long(row: Row, size: int) -> str:
    """Why a row of so many bytes is rejected; nothing where there is room for it."""
    pages = [value.page for value in row if isinstance(value, Text)]
    return next((sources.too_long(page) for page in pages if size > sources.longest_document(page)), "")


class _Rows:
    """The rows of a piece so far."""

    def __init__(self, keys: Sequence[str], shard: int):
        self._keys, self._shard = keys, shard
        self.lines, self.bytes = 0, 0
        self._parts: list[list[Any]] = [[] for _ in keys]  # what each column's texts are joined of
        self._lengths = [array("q") for _ in keys]
        self._raw: list[Any] = []
        self._rejected: list[tuple[int, str]] = []

    def take(self, row: Row, size: int, too_long: str) -> None:
        texts: list[Any] = []
        others = [not_a_string(*one) for one in zip(self._keys, row, strict=True) if not isinstance(one[1], Text)]
        reason = too_long or (others[0] if others else "")
        for value in () if reason else row:
            texts.append(value.read())
            reason = reason or why_not_utf8(texts[-1])
        self.lines += 1
        if reason:
            self._rejected.append((self.lines - 1, reason))
            return
        for parts, lengths, text in zip(self._parts, self._lengths, texts, strict=True):
            parts.append(text)
            lengths.append(len(text))
        self._raw += texts
        self.bytes += size

    def take_run(self, run: Run) -> None:
        for parts, lengths, texts in zip(self._parts, self._lengths, run.texts, strict=True):
            parts.append(texts.content)
            lengths.frombytes(np.diff(texts.offsets).tobytes())
        self._raw.append(run.raw)
        self.bytes += len(run.raw)
        self.lines += len(run.texts[0])

    def piece(self) -> Piece:
        columns = map(_joined, self._parts, self._lengths)
        texts = dict(zip(self._keys, columns, strict=True))
        return Piece(self._shard, texts, self.lines, rejected=self._rejected, raw=self._raw)


def _joined(parts: Sequence[Any], lengths: array[int]) -> Texts:
    """One part stays where it lies."""
    content = parts[0] if len(parts) == 1 else b"".join(parts)
    return Texts(np.frombuffer(content, dtype=np.uint8), np.cumsum([0, *lengths], dtype=np.int64))
