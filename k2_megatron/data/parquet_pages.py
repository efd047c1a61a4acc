"""The pages of a parquet file as streams, so that no page is ever whole in memory.

In: an open file and where a column chunk lies in it. Out: the `Page`s of the chunk, by their headers (Thrift's compact
protocol), and the content of each, decompressed as it is read.
Reference: apache/parquet-format: README.md, Compression.md and parquet.thrift.
"""

from __future__ import annotations

import gzip
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, cast

from k2_megatron.data.block_formats import BlockFile
from k2_megatron.data.compiled import compiled
from k2_megatron.data.sources import READ_BYTES
from k2_megatron.data.zstandard_file import ZstandardFile

DATA_PAGE, DICTIONARY_PAGE, DATA_PAGE_V2 = 0, 2, 3  # parquet.thrift: PageType
HEADER_BYTES = (1 << 10, 1 << 16, 16 << 20)  # tried in turn: one may hold the least and the greatest text of its page
STOP, TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(13)  # Thrift's types
DEEPEST = 8  # structures in one another


@dataclass(frozen=True)
class Page:
    """`values` counts nulls; `level_bytes` of its content lie uncompressed before the values (version 2);
    `level_encoding` is that of the definition levels (version 1)."""

    kind: int
    start: int  # of the content in the file
    packed_bytes: int
    bytes: int
    values: int
    encoding: int
    level_bytes: int = 0
    compressed: bool = True
    level_encoding: int | None = None


def can_stream(codec: str) -> bool:
    """Whether pages compressed by `codec` (arrow's name) can be read here."""
    return codec in ("UNCOMPRESSED", "GZIP", "ZSTD", "BROTLI") or (
        codec in ("SNAPPY", "LZ4") and compiled() is not None
    )


def first_byte(chunk: Any) -> int:
    """Of a column chunk's first page, by what arrow tells of the chunk."""
    if chunk.dictionary_page_offset:
        return min(chunk.data_page_offset, chunk.dictionary_page_offset)
    return chunk.data_page_offset


def pages_of(descriptor: int, start: int, values: int) -> Iterator[Page]:
    """The pages from byte `start` on, until the data pages hold so many values. ValueError where a header is none."""
    while values > 0:
        page = _page_at(descriptor, start)
        if page.kind in (DATA_PAGE, DATA_PAGE_V2):
            values -= page.values
        yield page
        start = page.start + page.packed_bytes


def _page_at(descriptor: int, start: int) -> Page:
    for size in HEADER_BYTES:
        content = os.pread(descriptor, size, start)
        try:
            header = _Thrift(content)
            fields = header.structure()
        except IndexError:
            if len(content) < size:
                break
            continue
        try:
            return _page(fields, start + header.at)
        except (KeyError, TypeError, ValueError):
            break
    raise ValueError(f"no page header at byte {start}")


def _page(fields: dict[int, Any], start: int) -> Page:
    kind, size, packed = fields[1], fields[2], fields[3]
    if kind == DATA_PAGE_V2:
        facts = fields[8]
        values, encoding, level_bytes = facts[1], facts[4], facts[5] + facts[6]
        page = Page(kind, start, packed, size, values, encoding, level_bytes, facts.get(7, True))
    else:
        facts = fields.get({DATA_PAGE: 5, DICTIONARY_PAGE: 7}.get(kind, 0), {1: 0, 2: 0})
        page = Page(kind, start, packed, size, facts[1], facts[2], level_encoding=facts.get(3))
    if min(page.packed_bytes - page.level_bytes, page.bytes - page.level_bytes, page.level_bytes, page.values) < 0:
        raise ValueError("a size below zero")
    return page


class _Thrift:
    """A reader of one structure of Thrift's compact protocol. IndexError where the content ends first."""

    def __init__(self, content: bytes):
        self._content, self.at = content, 0

    def structure(self, depth: int = 0) -> dict[int, Any]:
        """Numbers, truths and structures by the numbers of their fields; None for all else."""
        if depth > DEEPEST:
            raise ValueError("structures too deep in one another")
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            kind, step = head & 15, head >> 4
            number = number + step if step else self._integer()
            fields[number] = kind == TRUE if kind in (TRUE, FALSE) else self._value(kind, depth)
        return fields

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 0x80:
            value |= (byte & 0x7F) << shift
            shift += 7
            if shift > 63:
                raise ValueError("a number beyond 64 bits")
        return value | byte << shift

    def _integer(self) -> int:
        zigzag = self._unsigned()
        return zigzag >> 1 ^ -(zigzag & 1)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (I16, I32, I64):
            return self._integer()
        if kind == STRUCT:
            return self.structure(depth + 1)
        if kind not in (BYTE, DOUBLE, BINARY):
            raise ValueError(f"type {kind}, which no page header has")
        size = {BYTE: 1, DOUBLE: 8}.get(kind) or self._unsigned()
        self.at += size
        return None


class PageContent:
    """The content of a page, or of what else has a known size: so many bytes at a time, `left` of them. ValueError
    where more is asked for than there is."""

    def __init__(self, file: IO[bytes], size: int):
        self.file, self.left = file, size

    def exactly(self, size: int) -> bytearray:
        if size > self.left:
            raise ValueError(f"{size} bytes where a page has {self.left} left")
        content = bytearray(size)
        view = memoryview(content)
        while view:
            count = cast(Any, self.file).readinto(view[:READ_BYTES])
            if not count:
                raise EOFError("a page ends too early")
            view = view[count:]
        self.left -= size
        return content

    def skip(self, size: int) -> None:
        while size:
            size -= len(self.exactly(min(size, READ_BYTES)))

    def finish(self) -> None:
        """Read what is left, so that its checksum is seen."""
        self.skip(self.left)
        if self.file.read(1):
            raise ValueError("a page is longer than its header says")


def open_page(descriptor: int, page: Page, codec: str) -> tuple[PageContent, PageContent]:
    """(the levels that lie before it in version 2, the values with the levels of version 1). Where the values take no
    bytes (nothing but nulls), what lies in the file is not looked at: nothing, or an empty frame of the codec."""
    levels = PageContent(_part(descriptor, page.start, page.level_bytes), page.level_bytes)
    start, packed = page.start + page.level_bytes, page.packed_bytes - page.level_bytes
    size = page.bytes - page.level_bytes
    if not size:
        return levels, PageContent(io.BytesIO(), 0)
    raw = _part(descriptor, start, packed)
    return levels, PageContent(_decompressed(raw, codec if page.compressed else "UNCOMPRESSED"), size)


def _decompressed(raw: IO[bytes], codec: str) -> IO[bytes]:
    if codec == "GZIP":
        return cast(IO[bytes], gzip.open(raw, "rb"))
    if codec == "BROTLI":
        import pyarrow

        return cast(IO[bytes], pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "brotli"))
    if codec == "UNCOMPRESSED":
        return raw
    unpacked = ZstandardFile(raw) if codec == "ZSTD" else BlockFile(raw, codec)
    return cast(IO[bytes], io.BufferedReader(unpacked, READ_BYTES))


def _part(descriptor: int, start: int, size: int) -> IO[bytes]:
    return cast(IO[bytes], io.BufferedReader(_FilePart(descriptor, start, size), READ_BYTES))


class _FilePart(io.RawIOBase):
    """Bytes start..start + size of an open file, whose own position stays."""

    def __init__(self, descriptor: int, start: int, size: int):
        self._descriptor, self._start, self._at, self._end = descriptor, start, start, start + size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: self._start, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        return self._at - self._start

    def readinto(self, buffer: Any) -> int:
        content = os.pread(self._descriptor, min(len(buffer), self._end - self._at), self._at)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
