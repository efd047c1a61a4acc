"""Text files to documents: JSON lines (plain, .gz, .zst, .xz), parquet, and plain text (one document a file).

In: sources. Out: `Piece`s of 2 to 4 MiB, each of whole documents of one shard.
A shard is a fixed range of a source's uncompressed bytes: a line belongs to the shard in which its first byte lies.
Shards therefore depend on the sources and the shard size alone, never on workers, parts of a job, or compression.
"""

from __future__ import annotations

import io
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import IO

import numpy as np

from k2_megatron.data import sources
from k2_megatron.data.json_lines import Piece, parse_lines
from k2_megatron.data.long_lines import LONG_LINE_BYTES, parse_long_line
from k2_megatron.data.sources import Source, decompressed, why_not_utf8
from k2_megatron.data.texts import Texts


def pieces(
    source: Source,
    keys: Sequence[str],
    shard_bytes: int,
    first_shard: int,
    last_shard: int | None,
    make_room: Callable[[], None] = lambda: None,
    piece_bytes: int = 0,
) -> Iterator[Piece]:
    """The pieces of shards first_shard..last_shard (None: to the end) of one source, in order. `make_room` is called
    before a long document is held in memory. Lines come in pieces of `piece_bytes` (0:
    `sources.PIECE_BYTES`).

    ValueError where the file cannot be read to its end: cut short, damaged, or of another kind than its name says.
    """
    try:
        yield from _pieces(source, keys, shard_bytes, first_shard, last_shard, make_room, piece_bytes)
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:  # arrow's are ValueErrors
        if str(error).startswith(source.path):
            raise
        raise ValueError(
            f"{source.path}: cannot be read to its end ({type(error).__name__}: {error}); make or fetch it again, "
            "or leave it out of --input"
        ) from error


def _pieces(
    source: Source,
    keys: Sequence[str],
    shard_bytes: int,
    first_shard: int,
    last_shard: int | None,
    make_room: Callable[[], None],
    piece_bytes: int,
):
    if source.kind == "jsonl":
        return _line_pieces(source, keys, shard_bytes, first_shard, last_shard, make_room, piece_bytes)
    assert last_shard is None, f"{source.path} cannot be entered in the middle"
    if source.kind == "parquet":
        from k2_megatron.data.parquet_rows import parquet_pieces  # brings pyarrow

        return parquet_pieces(source, keys, shard_bytes, first_shard, make_room)
    return _text_pieces(source, keys, make_room)


class LineReader:
    """Whole lines of a stream in blocks of about `piece_bytes`; `position` is the offset of the next line."""

    def __init__(
        self,
        file: IO[bytes],
        position: int,
        make_room: Callable[[], None] = lambda: None,
        piece_bytes: int = 0,
    ):
        """`make_room` is called before a long line is held in memory."""
        self.file, self.position, self._make_room = file, position, make_room
        self._piece_bytes = piece_bytes or sources.PIECE_BYTES
        if position:  # the line that `position` cuts belongs to the shard before
            self._skip_to(position - 1)
            self.position += self._drop_line() - 1

    def _skip_to(self, offset: int) -> None:
        try:
            self.file.seek(offset)
        except (OSError, io.UnsupportedOperation):  # zstandard's stream only reads forward
            while offset:
                skipped = self.file.read(min(offset, sources.PIECE_BYTES))
                if not skipped:
                    return
                offset -= len(skipped)

    def _drop_line(self) -> int:
        """Read to the end of the line; how many bytes that were."""
        dropped = 0
        while True:
            part = self.file.readline(sources.PIECE_BYTES)
            dropped += len(part)
            if not part or part.endswith(b"\n"):
                return dropped

    def read_block(self, limit: int) -> tuple[bytes | bytearray, bool]:
        """(lines that begin before offset `limit`, whether a line after them was dropped for its length).

        (b"", False) where no more lines begin before `limit`.
        """
        block = self.file.read(max(0, min(self._piece_bytes, limit - self.position)))
        self.position += len(block)
        if not block or block.endswith(b"\n"):
            return block, False
        last_line = block.rfind(b"\n") + 1
        lines = bytearray(block)  # grows where it lies, unlike bytes
        block, has_room = b"", False
        while not lines.endswith(b"\n"):
            part = self.file.readline(sources.PIECE_BYTES)
            self.position += len(part)
            if not part:
                break  # the file ends without a newline
            lines += part
            if len(lines) - last_line > sources.ROOM_BYTES and not has_room:
                self._make_room()
                has_room = True
            if len(lines) - last_line > sources.longest_document(self.file):
                if not part.endswith(b"\n"):
                    self.position += self._drop_line()
                del lines[last_line:]
                return lines, True
        return lines, False


def _line_pieces(
    source: Source,
    keys: Sequence[str],
    shard_bytes: int,
    first_shard: int,
    last_shard: int | None,
    make_room: Callable[[], None],
    piece_bytes: int,
) -> Iterator[Piece]:
    with open(source.path, "rb") as raw:
        reader = LineReader(decompressed(source, raw), first_shard * shard_bytes, make_room, piece_bytes)
        shard = first_shard
        while last_shard is None or shard <= last_shard:
            block, dropped = reader.read_block((shard + 1) * shard_bytes)
            if not block and not dropped:
                if reader.position < (shard + 1) * shard_bytes:
                    return  # the end of the file
                shard += 1
                continue
            found = _pieces_of_block(block, keys, shard)
            block = b""  # of a long document: in memory often enough
            for piece in chain(found, [_dropped_line(reader.file, keys, shard)] if dropped else []):
                piece.consumed = raw.tell() if source.compression else reader.position
                yield piece


def _pieces_of_block(block: bytes | bytearray, keys: Sequence[str], shard: int) -> Iterator[Piece]:
    """One, or two where the last line is long; the block is kept no longer than the pieces are."""
    last_line = block.rfind(b"\n", 0, max(0, len(block) - 1)) + 1
    line = memoryview(block)[last_line:] if len(block) - last_line > LONG_LINE_BYTES else memoryview(b"")
    if len(block) > len(line):
        piece = parse_lines(block[:last_line] if line else block, keys, shard)
        if not line:
            del block
        yield piece
    if line:
        del block
        piece = parse_long_line(line, keys, shard)
        del line
        yield piece


def _dropped_line(file: IO[bytes], keys: Sequence[str], shard: int) -> Piece:
    return Piece(shard, {key: [] for key in keys}, lines=1, rejected=[(0, sources.too_long(file))])


def _text_pieces(source: Source, keys: Sequence[str], make_room: Callable[[], None]) -> Iterator[Piece]:
    if source.size > sources.PIECE_BYTES:
        make_room()
    with open(source.path, "rb") as raw:
        file = decompressed(source, raw)
        content = file.read(1)
        content += file.read(sources.longest_document(file))
        problem = sources.too_long(file) if len(content) > sources.longest_document(file) else ""
    piece = Piece(0, {key: [] for key in keys}, lines=1, raw=(content,), consumed=source.size)
    problem = problem or why_not_utf8(content)
    if problem:
        piece.rejected.append((0, problem))
    else:
        offsets = np.array([0, len(content)], dtype=np.int64)
        piece.texts = {key: Texts(np.frombuffer(content, dtype=np.uint8), offsets) for key in keys}
    yield piece


def documents(files: Sequence[Source], key: str) -> Iterator[str]:
    """Every document's text, one after another. ValueError at the first that is not one."""
    for source in files:
        line = 0
        for piece in pieces(source, [key], 1 << 62, 0, None):
            if piece.rejected:
                number, reason = piece.rejected[0]
                raise ValueError(
                    f"{source.path}, line {line + number + 1}: {reason}; correct the line, or name another key"
                )
            line += piece.lines
            yield from piece.texts[key]
