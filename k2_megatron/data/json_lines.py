"""JSON lines to texts: by the compiled scanner (csrc/cpu/json_lines.cpp) where it is built and sure, else by orjson.

In: a block of whole lines and the keys. Out: a `Piece`: the texts, and which lines were blank or bad. The scanner takes
only lines that orjson would take, with the same text; whatever it leaves (bad lines, exponents, a key twice) orjson
judges. It makes no Python object a line, which is what reading costs beside a fast encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import numpy as np
import orjson

from k2_megatron.data.compiled import compiled
from k2_megatron.data.texts import Texts

SPARE_BYTES = 32  # that the scanner may write behind the last text
COUNTED_BYTES = 1 << 18  # at once; they stay in the cache
SHORTEST_LINE = 8  # bytes of a line that holds a text: {"":""} and its end


@dataclass
class Piece:
    """Some documents of one shard: `texts[key]` are parallel lists; `rejected` holds (line in the shard, reason)."""

    shard: int
    texts: Mapping[str, Sequence[str]]
    lines: int  # lines (rows, files) read, blank and rejected ones included
    blank: list[int] = field(default_factory=list)  # line numbers in the piece, from 0
    rejected: list[tuple[int, str]] = field(default_factory=list)
    raw: Sequence[bytes | bytearray | memoryview] = ()  # what was read, for the hash of the source
    consumed: int = 0  # bytes of the file on disk read so far, for the progress bar


def parse_lines(block: bytes | bytearray, keys: Sequence[str], shard: int) -> Piece:
    """The documents of a block of JSON lines; what is not an object with a string under every key is rejected.

    RuntimeError where documents, rejected and blank lines are not the lines of the block, counted on their own.
    """
    scanner = compiled()
    if scanner is not None and len(keys) == 1:
        piece = scan_lines(scanner, block, keys[0], shard)
    else:
        piece = parse_every_line(block, keys, shard)
    lines = _newlines(block) + (block[-1:] not in (b"", b"\n"))
    for key in keys:
        found = (len(piece.texts[key]), len(piece.rejected), len(piece.blank))
        if sum(found) != lines or piece.lines != lines:
            raise RuntimeError(
                f"{lines} lines in a block of shard {shard} became {found[0]} documents, {found[1]} rejected and "
                f"{found[2]} blank lines: a fault of this program; please report it with the file"
            )
    return piece


def _newlines(block: bytes | bytearray) -> int:
    """`block.count(b"\\n")` in a third of the time, without a second array of the size of a long line."""
    content = np.frombuffer(block, dtype=np.uint8)
    parts = (content[first : first + COUNTED_BYTES] for first in range(0, len(content), COUNTED_BYTES))
    return sum(int(np.count_nonzero(part == ord("\n"))) for part in parts)


def scan_lines(scanner: ModuleType, block: bytes | bytearray, key: str, shard: int) -> Piece:
    """`parse_lines` for one key: the scanner from line to line, orjson for each line at which it stops."""
    name = key.encode()
    content = np.empty(len(block) + SPARE_BYTES, dtype=np.uint8)
    offsets = np.empty(len(block) // SHORTEST_LINE + 2, dtype=np.int64)
    offsets[0] = 0
    cursor = np.zeros(2, dtype=np.int64)  # the next line's first byte, documents so far
    blank: list[int] = []
    rejected: list[tuple[int, str]] = []
    while True:
        results = (content.ctypes.data, offsets.ctypes.data, cursor.ctypes.data)
        scanner.json_texts(address(block), len(block), address(name), len(name), *results, 1)
        position, documents = (int(value) for value in cursor)
        line = documents + len(blank) + len(rejected)
        if position >= len(block):
            texts = Texts(content[: offsets[documents]], offsets[: documents + 1])
            return Piece(shard, {key: texts}, line, blank, rejected, raw=(block,))
        end = block.find(b"\n", position) + 1 or len(block)
        judged = parse_every_line(block[position:end], [key], shard)
        blank += [line] * len(judged.blank)
        rejected += [(line, reason) for _, reason in judged.rejected]
        for text in judged.texts[key]:  # one, or none
            utf8 = np.frombuffer(text.encode(), dtype=np.uint8)
            start = offsets[documents]
            content[start : start + len(utf8)] = utf8
            documents += 1
            offsets[documents] = start + len(utf8)
        cursor[:] = end, documents


def address(content: bytes | bytearray | memoryview) -> int:
    return np.frombuffer(content, dtype=np.uint8).ctypes.data if content else 0


def parse_every_line(block: bytes | bytearray, keys: Sequence[str], shard: int) -> Piece:
    """`parse_lines` by orjson alone."""
    lines: Sequence[bytes | bytearray] = block.split(b"\n")
    if not lines[-1]:
        lines = lines[:-1]
    texts: dict[str, list[str]] = {key: [] for key in keys}
    piece = Piece(shard, texts, lines=len(lines), raw=(block,))
    loads = orjson.loads
    for number, line in enumerate(lines):
        try:
            record = loads(line)
        except orjson.JSONDecodeError as error:
            if not line.strip():
                piece.blank.append(number)
            else:
                piece.rejected.append((number, f"not JSON: {error}"))
            continue
        reason = take_texts(record, keys, texts)
        if reason:
            piece.rejected.append((number, reason))
    return piece


def take_texts(record: object, keys: Sequence[str], texts: dict[str, list[str]]) -> str:
    """Append the texts of one record; the reason why not, if not."""
    if not isinstance(record, dict):
        return f"not an object but {type(record).__name__}"
    for key in keys:
        if type(record.get(key)) is not str:
            return not_a_string(key, record[key]) if key in record else f"has no {key!r}"
    for key in keys:
        texts[key].append(record[key])
    return ""


def not_a_string(key: str, value: object) -> str:
    return f"{key!r} is {type(value).__name__}, not a string"
