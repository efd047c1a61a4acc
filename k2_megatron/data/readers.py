"""Text files to documents: JSON lines (plain, .gz, .zst, .xz), parquet, and plain text (one document a file).

In: paths, folders and globs. Out: `Piece`s of about 2 MiB, each of whole documents of one shard.
A shard is a fixed range of a source's uncompressed bytes: a line belongs to the shard in which its first byte lies.
Shards therefore depend on the sources and the shard size alone, never on workers, parts of a job, or compression.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from k2_megatron.data.json_lines import Piece, parse_lines
from k2_megatron.data.texts import Texts

PIECE_BYTES = 2 << 20  # smaller ones cost no time, larger ones leave less memory to the encoder's words
READ_BYTES = 1 << 20
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
        sources = [source_at(path, os.path.relpath(path, folder or ".")) for path in paths]
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


def source_at(path: str, name: str) -> Source | None:
    """One file as a source; None where its name is not that of a text."""
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
    `PIECE_BYTES`).

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
        self._piece_bytes = piece_bytes or PIECE_BYTES
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
        block = b""
        while not lines.endswith(b"\n"):
            part = self.file.readline(PIECE_BYTES)
            self.position += len(part)
            if not part:
                break  # the file ends without a newline
            if len(part) == PIECE_BYTES and len(lines) - last_line <= PIECE_BYTES:
                self._make_room()
            lines += part
            if len(lines) - last_line > MAX_DOCUMENT_BYTES:
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
            piece = parse_lines(block, keys, shard)
            if dropped:
                piece.rejected.append((piece.lines, f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"))
                piece.lines += 1
            piece.consumed = raw.tell() if source.compression else reader.position
            block = b""  # of a long document: in memory often enough
            yield piece


def _text_pieces(source: Source, keys: Sequence[str], make_room: Callable[[], None]) -> Iterator[Piece]:
    if source.size > PIECE_BYTES:
        make_room()
    with open(source.path, "rb") as raw:
        content = decompressed(source, raw).read(MAX_DOCUMENT_BYTES + 1)
    piece = Piece(0, {key: [] for key in keys}, lines=1, raw=(content,), consumed=source.size)
    problem = why_not_text(content)
    if problem:
        piece.rejected.append((0, problem))
    else:
        offsets = np.array([0, len(content)], dtype=np.int64)
        piece.texts = {key: Texts(np.frombuffer(content, dtype=np.uint8), offsets) for key in keys}
    yield piece


def why_not_text(content: bytes | memoryview) -> str:
    """ "" where the content is the text of one document, not too long."""
    if len(content) > MAX_DOCUMENT_BYTES:
        return f"longer than {MAX_DOCUMENT_BYTES >> 20} MiB"
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for first in range(0, len(content) + 1, READ_BYTES):  # a string of the whole could take four bytes a character
            part = content[first : first + READ_BYTES]
            decoder.decode(part, final=first + READ_BYTES > len(content))
    except UnicodeDecodeError as error:
        return f"not UTF-8: {error.reason}"
    return ""


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
