"""The texts of a parquet column chunk one at a time, however large its pages are.

In: the chunk's pages. Out: for each row None, or a `Text`: how long it is, and its bytes where they are asked for. Of
byte arrays, PLAIN or by dictionary, of a column that is not nested; everything else is arrow's. A large dictionary lies
in a temporary file meanwhile, because its texts are asked for in any order.
Reference: apache/parquet-format: Encodings.md.
"""

from __future__ import annotations

import io
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import IO, Any, cast

import numpy as np

from k2_megatron.data.parquet_pages import (
    DATA_PAGE,
    DATA_PAGE_V2,
    DICTIONARY_PAGE,
    Page,
    PageContent,
    first_byte,
    open_page,
    pages_of,
)
from k2_megatron.data.sources import READ_BYTES

PLAIN, PLAIN_DICTIONARY, RLE, RLE_DICTIONARY = 0, 2, 3, 8  # parquet.thrift: Encoding
DICTIONARY_IN_MEMORY_BYTES = 4 << 20
LARGEST_DICTIONARY = 2_000_000  # texts, of which the places take 16 bytes each; more are arrow's
LEVEL_BYTES = 16 << 20  # of a page: which of its rows are null
UNPACKED_GROUPS = 512  # of eight packed numbers, at once


@dataclass(frozen=True)
class Text:
    """A text of so many bytes; `read` before the next row is asked for, or never. `page`: what it is read from, unless
    it is in memory or in a file of its own."""

    size: int
    read: Callable[[], bytes | bytearray | memoryview]
    page: IO[bytes] | None = None


@dataclass(frozen=True)
class TextChunk:
    """A column chunk that can be read here."""

    path: str
    descriptor: int  # of the open file
    pages: Sequence[Page]
    codec: str
    optional: bool

    @property
    def largest_page(self) -> int:
        """Its bytes uncompressed, and those of the dictionary, which arrow holds at once."""
        kinds = {page.kind for page in self.pages}
        return sum(max(page.bytes for page in self.pages if page.kind == kind) for kind in kinds)


def text_chunk(file: IO[bytes], column: Any, facts: Any) -> TextChunk | None:
    """What arrow tells of a column and of its chunk in a row group as a chunk that can be read here, if it can. (Where
    its codec can: `can_stream`.)"""
    if column.physical_type != "BYTE_ARRAY" or column.max_repetition_level or column.max_definition_level > 1:
        return None
    try:
        pages = list(pages_of(file.fileno(), first_byte(facts), facts.num_values))
    except ValueError:
        return None  # arrow says what it is
    optional = column.max_definition_level == 1
    if not all(_is_known(page, number, optional) for number, page in enumerate(pages)):
        return None
    return TextChunk(file.name, file.fileno(), pages, facts.compression, optional)


def _is_known(page: Page, number: int, optional: bool) -> bool:
    if page.kind == DATA_PAGE and optional and page.level_encoding != RLE:
        return False
    if page.kind in (DATA_PAGE, DATA_PAGE_V2):
        return page.encoding in (PLAIN, PLAIN_DICTIONARY, RLE_DICTIONARY)
    dictionary = page.encoding in (PLAIN, PLAIN_DICTIONARY) and page.values <= LARGEST_DICTIONARY
    return page.kind != DICTIONARY_PAGE or (dictionary and number == 0)


def texts_of(chunk: TextChunk) -> Iterator[Text | None]:
    """ValueError or EOFError where a page is damaged, or a dictionary finds no room on the disk."""
    dictionary: _Dictionary | None = None
    try:
        for page in chunk.pages:
            levels, content = open_page(chunk.descriptor, page, chunk.codec)
            if page.kind == DICTIONARY_PAGE:
                dictionary = _Dictionary(content, page.values, chunk.path)
            elif page.kind in (DATA_PAGE, DATA_PAGE_V2):
                present = _present(chunk, page, levels, content)
                if page.encoding == PLAIN:
                    yield from _plain_texts(content, present)
                elif dictionary is None:
                    raise ValueError("a page of a dictionary that the file does not have")
                else:
                    yield from _dictionary_texts(dictionary, content, present, page.values)
            else:
                continue
            content.finish()
    finally:
        if dictionary is not None:
            dictionary.close()


def _present(chunk: TextChunk, page: Page, levels: PageContent, content: PageContent) -> Iterator[int]:
    """1 for each text of a page, 0 for each null, in order."""
    if not chunk.optional:
        return repeat(1, page.values)
    if page.kind == DATA_PAGE:
        size = int.from_bytes(content.exactly(4), "little")
        levels = content
    else:
        size = page.level_bytes
    if size > LEVEL_BYTES:
        raise ValueError(f"{size} bytes to say which rows of a page are null")
    return _numbers(PageContent(io.BytesIO(levels.exactly(size)), size), 1, page.values)


def _numbers(content: PageContent, width: int, count: int) -> Iterator[int]:
    """So many numbers of `width` bits out of runs of one number and runs of packed ones."""
    while count > 0:
        head = _unsigned(content)
        if not head & 1:
            number = int.from_bytes(content.exactly(-(-width // 8)), "little")
            yield from repeat(number, min(count, head >> 1))
            count -= head >> 1
            continue
        groups = head >> 1
        while groups and count > 0:
            taken = min(groups, UNPACKED_GROUPS)
            wanted = -(
                -min(count, 8 * taken) * width // 8
            )  # of its last group a writer may leave out what nobody asks for
            packed = content.exactly(max(wanted, min(taken * width, content.left)))
            yield from _unpacked(packed, width, min(count, 8 * taken))
            groups, count = groups - taken, count - 8 * taken


def _unpacked(packed: bytearray, width: int, count: int) -> list[int]:
    if not width:
        return [0] * count
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=count * width, bitorder="little")
    return (bits.reshape(count, width) @ (1 << np.arange(width, dtype=np.int64))).tolist()


def _unsigned(content: PageContent) -> int:
    value = shift = 0
    while (byte := content.exactly(1)[0]) & 0x80:
        value |= (byte & 0x7F) << shift
        shift += 7
        if shift > 63:
            raise ValueError("the length of a run is beyond 64 bits")
    return value | byte << shift


def _plain_texts(content: PageContent, present: Iterator[int]) -> Iterator[Text | None]:
    for level in present:
        if not level:
            yield None
            continue
        size = int.from_bytes(content.exactly(4), "little")
        behind = content.left - size
        if behind < 0:
            raise ValueError(f"a text of {size} bytes where a page has {content.left} left")
        yield Text(size, partial(content.exactly, size), content.file)
        content.skip(content.left - behind)


def _dictionary_texts(
    dictionary: _Dictionary, content: PageContent, present: Iterator[int], values: int
) -> Iterator[Text | None]:
    width = content.exactly(1)[0] if content.left else 0  # nothing but nulls
    if width > 32:
        raise ValueError(f"numbers of {width} bits for the texts of a dictionary")
    numbers = _numbers(content, width, values)
    for level in present:
        yield dictionary.text(next(numbers)) if level else None


class _Dictionary:
    """The texts of a dictionary page, in memory where they are few bytes, else in a temporary file."""

    def __init__(self, content: PageContent, count: int, path: str):
        self._path = path
        self._file: IO[bytes] = io.BytesIO()
        self._places = array("q", [0])
        try:
            for _ in range(count):
                size = int.from_bytes(content.exactly(4), "little")
                self._places.append(self._places[-1] + size)
                while size:
                    part = content.exactly(min(size, READ_BYTES))
                    self._write(part)
                    size -= len(part)
            self._write(b"")
        except BaseException:
            with suppress(OSError):  # of what could not be written: closing tries once more
                self.close()
            raise

    def _write(self, part: bytes | bytearray) -> None:
        """Nothing: that was all."""
        try:
            if isinstance(self._file, io.BytesIO) and self._file.tell() + len(part) > DICTIONARY_IN_MEMORY_BYTES:
                in_memory = self._file
                self._file = cast(IO[bytes], tempfile.TemporaryFile())
                self._file.write(in_memory.getbuffer())
            self._file.write(part)
            if not part:
                self._file.flush()
        except OSError as error:
            raise _no_room(self._path, error) from error

    def text(self, number: int) -> Text:
        if not 0 <= number < len(self._places) - 1:
            raise ValueError(f"text {number} of a dictionary of {len(self._places) - 1}")
        start, end = self._places[number : number + 2]
        return Text(end - start, partial(self._read, start, end - start))

    def _read(self, start: int, size: int) -> bytearray:
        self._file.seek(start, os.SEEK_SET)
        return PageContent(self._file, size).exactly(size)

    def close(self) -> None:
        self._file.close()


def _no_room(path: str, error: OSError) -> ValueError:
    where = tempfile.tempdir or "any folder"  # gettempdir() fails once more where none has room
    return ValueError(
        f"{path}: a large dictionary of texts cannot be written to {where} meanwhile "
        f"({error.strerror}); make room there, or name another folder in TMPDIR"
    )
