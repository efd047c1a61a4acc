"""Text files to documents: JSON lines (plain, .gz, .zst, .xz), parquet, and plain text (one document a file).

In: paths, folders and globs. Out: `Piece`s of about 8 MiB, each of whole documents of one shard.
A shard is a fixed range of a source's uncompressed bytes: a line belongs to the shard in which its first byte lies.
Shards therefore depend on the sources and the shard size alone, never on workers, parts of a job, or compression.
"""

from __future__ import annotations

import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from k2_megatron.data.json_lines import Piece, parse_lines, take_texts

PIECE_BYTES = 8 << 20
READ_BYTES = 1 << 20
PARQUET_BYTES, PARQUET_ROWS = 4 << 20, 128  # decoded at once: bytes by the mean of a row group, at most so many rows
MAX_DOCUMENT_BYTES = 64 << 20  # a longer line is rejected, so that a worker's memory stays bounded
KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".parquet": "parquet", ".txt": "txt"}
COMPRESSIONS = (".gz", ".zst", ".xz")


@dataclass(frozen=True)
class Source:
    """One input file. `name` is its path below what was asked for: the same on every machine."""

    name: str
    path: str
    kind: str  # "jsonl", "parquet" or "txt"
    compression: str  # "", ".gz", ".zst" or ".xz"
    size: int  # bytes on disk
    modified_ns: int  # when its content last changed, as the file system tells

    @property
    def splittable(self) -> bool:
        """Whether a worker can start in the middle of it."""
        return self.kind == "jsonl" and not self.compression


def find_sources(inputs: Sequence[str], output_prefix: str | None = None) -> list[Source]:
    """Every text file that `inputs` (files, folders, globs) name, in the order of their names; what a job writes under
    `output_prefix` is none, should it lie among them. ValueError where there is no text file."""
    found: dict[str, Source] = {}
    for asked in inputs:
        folder, paths = _files_of(asked)
        paths = [path for path in paths if not (output_prefix and _is_output(path, output_prefix))]
        sources = [_source(path, os.path.relpath(path, folder or ".")) for path in paths]
        chosen = [source for source in sources if source is not None]
        if not chosen:
            raise ValueError(
                f"{asked}: no text file there; give .jsonl, .parquet or .txt files (.gz, .zst, .xz compressed or not)"
            )
        for source in chosen:
            other = found.setdefault(source.name, source)
            if os.path.realpath(other.path) != os.path.realpath(source.path):
                raise ValueError(f"{other.path} and {source.path} have one name; give the folder that holds both")
    return [found[name] for name in sorted(found)]


def _files_of(asked: str) -> tuple[str, list[str]]:
    """(the folder below which sources are named, the files there); a name that exists is no pattern."""
    if os.path.isdir(asked):
        folder, paths = asked, sorted(str(path) for path in Path(asked).rglob("*"))
    elif os.path.exists(asked):
        folder, paths = os.path.dirname(asked), [asked]
    else:
        wildcards = [asked.index(mark) for mark in "*?[" if mark in asked]
        folder, paths = os.path.dirname(asked[: min(wildcards, default=None)]), glob.glob(asked, recursive=True)
    return folder, [path for path in paths if os.path.isfile(path)]


def _is_output(path: str, prefix: str) -> bool:
    """Whether preprocessing under `prefix` writes a file of this name that looks like text."""
    name, begin = os.path.realpath(path), os.path.join(os.path.realpath(os.path.dirname(prefix)), "")
    begin += os.path.basename(prefix)
    manifest = name.startswith(begin + "_") and name.endswith("_document.manifest.json")
    return manifest or name == begin + ".rejects.jsonl" or name.startswith(os.path.join(begin + ".shards", ""))


def _source(path: str, name: str) -> Source | None:
    base, suffix = os.path.splitext(path)
    compression = suffix if suffix in COMPRESSIONS else ""
    kind = KINDS.get(os.path.splitext(base)[1] if compression else suffix)
    if kind is None or (kind == "parquet" and compression):
        return None
    facts = os.stat(path)
    return Source(name, path, kind, compression, facts.st_size, facts.st_mtime_ns)


def decompressed(source: Source, raw: IO[bytes]) -> IO[bytes]:
    """The uncompressed bytes of a source whose file is open as `raw`."""
    if source.compression == ".gz":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if source.compression == ".xz":
        return lzma.open(raw, "rb")
    if source.compression == ".zst":
        from k2_megatron.data.zstandard_file import ZstandardFile

        return cast(IO[bytes], io.BufferedReader(ZstandardFile(raw), READ_BYTES))
    return raw


def pieces(
    source: Source, keys: Sequence[str], shard_bytes: int, first_shard: int, last_shard: int | None
) -> Iterator[Piece]:
    """The pieces of shards first_shard..last_shard (None: to the end) of one source, in order.

    ValueError where the file cannot be read to its end: cut short, damaged, or of another kind than its name says.
    """
    try:
        yield from _pieces(source, keys, shard_bytes, first_shard, last_shard)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # arrow's are ValueErrors
        if str(error).startswith(source.path):
            raise
        raise ValueError(
            f"{source.path}: cannot be read to its end ({type(error).__name__}: {error}); make or fetch it again, "
            "or leave it out of --input"
        ) from error


def _pieces(source: Source, keys: Sequence[str], shard_bytes: int, first_shard: int, last_shard: int | None):
    if source.kind == "jsonl":
        return _line_pieces(source, keys, shard_bytes, first_shard, last_shard)
    assert last_shard is None, f"{source.path} cannot be entered in the middle"
    if source.kind == "parquet":
        return _parquet_pieces(source, keys, shard_bytes, first_shard)
    return _text_pieces(source, keys)


class LineReader:
    """Whole lines of a stream in blocks of about `PIECE_BYTES`; `position` is the offset of the next line."""

    def __init__(self, file: IO[bytes], position: int):
        self.file, self.position = file, position
        if position:  # the line that `position` cuts belongs to the shard before
            self._skip_to(position - 1)
            self.position += self._drop_line() - 1

    def _skip_to(self, offset: int) -> None:
        try:
            self.file.seek(offset)
        except (OSError, io.UnsupportedOperation):  # zstandard's stream only reads forward
            while offset:
                skipped = self.file.read(min(offset, PIECE_BYTES))
                if not skipped:
                    return
                offset -= len(skipped)

    def _drop_line(self) -> int:
        """Read to the end of the line; how many bytes that were."""
        dropped = 0
        while True:
            part = self.file.readline(PIECE_BYTES)
            dropped += len(part)
            if not part or part.endswith(b"\n"):
                return dropped

    def read_block(self, limit: int) -> tuple[bytes, bool]:
        """(lines that begin before offset `limit`, whether a line after them was dropped for its length).

        (b"", False) where no more lines begin before `limit`.
        """
        block = self.file.read(max(0, min(PIECE_BYTES, limit - self.position)))
        self.position += len(block)
        if not block or block.endswith(b"\n"):
            return block, False
        rest = self.file.readline(MAX_DOCUMENT_BYTES)
        self.position += len(rest)
        last_line = block.rfind(b"\n") + 1
        if len(block) - last_line + len(rest) <= MAX_DOCUMENT_BYTES:
            return block + rest, False
        if not rest.endswith(b"\n"):
            self.position += self._drop_line()
        return block[:last_line], True


def _line_pieces(source: Source, keys, shard_bytes: int, first_shard: int, last_shard: int | None) -> Iterator[Piece]:
    with open(source.path, "rb") as raw:
        reader = LineReader(decompressed(source, raw), first_shard * shard_bytes)
        shard = first_shard
        while last_shard is None or shard <= last_shard:
            block, dropped = reader.read_block((shard + 1) * shard_bytes)
            if not block and not dropped:
                if reader.position < (shard + 1) * shard_bytes:
                    return  # the end of the file
                shard += 1
                continue
            piece = parse_lines(block, keys, shard)
            if dropped:
                piece.rejected.append((piece.lines, f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"))
                piece.lines += 1
            piece.consumed = raw.tell() if source.compression else reader.position
            block = b""  # of a long document: in memory often enough
            yield piece


def _parquet_pieces(source: Source, keys: Sequence[str], shard_bytes: int, first_shard: int) -> Iterator[Piece]:
    """Shards of a parquet file are runs of row groups, closed where their uncompressed size reaches `shard_bytes`."""
    import pyarrow.parquet as parquet

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
            for piece in _row_pieces(batches, keys, shard):
                piece.consumed = source.size * (group + 1) // file.num_row_groups
                yield piece


def _rows_at_a_time(file: Any, group: int, keys: Sequence[str]) -> int:
    """How many rows of a row group arrow may decode at once; it counts in rows only."""
    facts = file.metadata.row_group(group)
    columns = [facts.column(number) for number in range(facts.num_columns)]
    size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema in keys)
    return max(1, min(PARQUET_ROWS, PARQUET_BYTES * facts.num_rows // max(1, size)))


def _row_pieces(batches: Iterable[Any], keys: Sequence[str], shard: int) -> Iterator[Piece]:
    """Pieces of about `PIECE_BYTES` of text out of arrow's batches of rows."""
    texts, raw, piece, size = _empty_piece(keys, shard)
    for row in (row for batch in batches for row in zip(*(batch.column(key) for key in keys), strict=True)):
        record = dict(zip(keys, (value.as_py() for value in row), strict=True))
        encoded = [value.encode() for value in record.values() if isinstance(value, str)]
        if sum(map(len, encoded)) > MAX_DOCUMENT_BYTES:
            reason = f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"
        else:
            reason = take_texts(record, keys, texts)
        if reason:
            piece.rejected.append((piece.lines, reason))
        else:
            raw += encoded
            size += sum(map(len, encoded))
        piece.lines += 1
        if size >= PIECE_BYTES:
            yield piece
            texts, raw, piece, size = _empty_piece(keys, shard)
    if piece.lines:
        yield piece


def _empty_piece(keys: Sequence[str], shard: int) -> tuple[dict[str, list[str]], list[bytes], Piece, int]:
    """(its texts, what was read of it, the piece that holds both, bytes so far)."""
    texts: dict[str, list[str]] = {key: [] for key in keys}
    raw: list[bytes] = []
    return texts, raw, Piece(shard, texts, lines=0, raw=raw), 0


def _text_pieces(source: Source, keys: Sequence[str]) -> Iterator[Piece]:
    with open(source.path, "rb") as raw:
        content = decompressed(source, raw).read(MAX_DOCUMENT_BYTES + 1)
    texts: dict[str, list[str]] = {key: [] for key in keys}
    piece = Piece(0, texts, lines=1, raw=(content,), consumed=source.size)
    if len(content) > MAX_DOCUMENT_BYTES:
        piece.rejected.append((0, f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"))
    else:
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            piece.rejected.append((0, f"not UTF-8: {error}"))
        else:
            for key in keys:
                texts[key].append(text)
    yield piece


def documents(sources: Sequence[Source], key: str) -> Iterator[str]:
    """Every document's text, one after another. ValueError at the first that is not one."""
    for source in sources:
        line = 0
        for piece in pieces(source, [key], 1 << 62, 0, None):
            if piece.rejected:
                number, reason = piece.rejected[0]
                raise ValueError(
                    f"{source.path}, line {line + number + 1}: {reason}; correct the line, or name another key"
                )
            line += piece.lines
            yield from piece.texts[key]
