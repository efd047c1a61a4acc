"""A long line of JSON to its texts, so that memory holds the line and the texts and little else.

In: one line. Out: a `Piece`, as parse_lines gives. What the compiled scanner leaves orjson would take apart into
objects of up to four times the text, and an error of it holds the line once more. So it gets the line with a mark in
place of each long string, which is as good JSON as the line if the strings are good, and the strings part by part.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import orjson

from k2_megatron.data.compiled import compiled
from k2_megatron.data.gigatoken_encoder import release_freed_memory
from k2_megatron.data.json_lines import SPARE_BYTES, Piece, address, take_texts
from k2_megatron.data.sources import ROOM_BYTES, why_not_utf8
from k2_megatron.data.texts import Texts

LONG_LINE_BYTES = 2 << 20
LONG_STRING_BYTES = 64 << 10
PART_BYTES = 1 << 20  # of a long string, at once
OUTLINE_BYTES = 8 << 20  # of a line without its long strings; orjson's objects take four to twenty times as much
# Not to be cut: an escape, and two of which the first is the upper half of a pair.
ESCAPE = re.compile(rb"\\(?:u(?:[dD][89abAB]..\\u)?....|.)", re.DOTALL)
PAIR_BYTES = 12
LEAST_LEFT_BYTES = 16  # of a string where it is cut: an escape and a character that reach over PART_BYTES
SCANNED_BYTES = 64 << 10  # at once for quotes, each of which takes 8 bytes
NOT_UTF8 = "str is not valid UTF-8: surrogates not allowed"  # orjson's words, who looks for that first
Fault = tuple[int, str]  # the character of a line, counted from 0, and what is wrong there


@dataclass(frozen=True)
class LongString:
    """Bytes places[0]..places[-1] of a line, which may be cut at the others."""

    places: Sequence[int]
    mark: bytes  # that stands for it


def parse_long_line(line: memoryview, keys: Sequence[str], shard: int) -> Piece:
    """The document of one line, with its newline or without; rejected or blank where it has none, with the reason that
    orjson gives (nearly, where the line is cut in an escape)."""
    if len(line) > ROOM_BYTES:
        release_freed_memory()  # that of the line while it grew
    piece = Piece(shard, {key: [] for key in keys}, lines=1, raw=(line,))
    line = line[: len(line) - (line[-1:] == b"\n")]  # orjson's reasons count to the end of it
    found = _scanned(line, keys) or _read_in_parts(line, keys)
    if not isinstance(found, str):
        piece.texts = found
    elif re.search(rb"\S", line) is None:
        piece.blank.append(0)
    else:
        piece.rejected.append((0, found))
    return piece


def _scanned(line: memoryview, keys: Sequence[str]) -> dict[str, Texts] | None:
    """The texts that the compiled scanner gives, if it does."""
    scanner = compiled()
    if scanner is None:
        return None
    found: dict[str, Texts] = {}
    for key in keys:
        name = key.encode()
        content = np.empty(len(line) + SPARE_BYTES, dtype=np.uint8)
        offsets, cursor = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
        results = (content.ctypes.data, offsets.ctypes.data, cursor.ctypes.data)
        scanner.json_texts(address(line), len(line), address(name), len(name), *results, 1)
        if not cursor[1]:
            return None
        found[key] = Texts(content[: offsets[1]], offsets)
    return found


def _read_in_parts(line: memoryview, keys: Sequence[str]) -> dict[str, Texts] | str:
    """The text under each key, or why there is none."""
    if why_not_utf8(line):
        return _not_json([(0, NOT_UTF8)])
    strings = _long_strings(line)
    beside = len(line) - sum(string.places[-1] - string.places[0] for string in strings)
    if beside > OUTLINE_BYTES and compiled() is not None:
        return (
            f"more than {OUTLINE_BYTES >> 20} MiB beside its long strings, not plain enough to be read without objects"
        )
    outline = _outline(line, strings)
    texts: dict[str, list[str]] = {key: [] for key in keys}
    try:
        reason = take_texts(orjson.loads(outline), keys, texts)
    except orjson.JSONDecodeError as error:
        end = _fault_in_line(line, strings, error.pos)
        return _not_json([(end, error.msg), *_faults_in_strings(line, strings)])
    faults = _faults_in_strings(line, strings)
    if faults or reason:
        return _not_json(faults) if faults else reason
    marks = {string.mark.decode(): string for string in strings}
    return {key: _one_text(_unescaped(line, marks.get(text), text)) for key in keys for text in texts[key]}


def _not_json(faults: Sequence[Fault]) -> str:
    """The first counts."""
    place, message = min(faults)
    return f"not JSON: {message}: line 1 column {place + 1} (char {place})"


def _long_strings(line: memoryview) -> list[LongString]:
    """The long strings of a line; the last may have no end."""
    mark = secrets.token_hex(16)  # that no string of the line begins with
    found: list[LongString] = []

    def add(begin: int, end: int) -> None:
        if end - begin > LONG_STRING_BYTES:
            found.append(LongString(_places(line, begin, end), f"{mark}{len(found)}".encode()))

    opened = np.empty(0, dtype=np.int64)  # the quote that has begun a string
    for quotes in _quotes(line):
        quotes = np.concatenate((opened, quotes))
        begins, ends = quotes[:-1:2] + 1, quotes[1::2]
        for number in np.flatnonzero(ends - begins > LONG_STRING_BYTES):
            add(int(begins[number]), int(ends[number]))
        opened = quotes[len(quotes) & ~1 :]
    for quote in opened:
        add(int(quote) + 1, len(line))
    return found


def _quotes(line: memoryview) -> Iterator[np.ndarray]:
    """Where the quotes are that begin and end strings, a block of the line at a time; by numpy, as a step of Python for
    every escape takes many times what orjson does. A backslash outside strings is a fault, and the first counts."""
    escaped = False  # the first byte of the block
    for first in range(0, len(line), SCANNED_BYTES):
        block = np.frombuffer(line[first : first + SCANNED_BYTES], dtype=np.uint8)
        quotes, slashes = np.flatnonzero(block == ord('"')), np.flatnonzero(block == ord("\\"))
        if escaped or len(slashes):
            after = np.zeros(len(block) + 1, dtype=bool)  # behind a backslash that escapes it
            after[0] = escaped
            slashes = slashes[~after[slashes]]
            runs = np.flatnonzero(np.diff(slashes, prepend=-2) > 1)  # of backslashes, of which every other one escapes
            in_run = np.arange(len(slashes)) - np.repeat(runs, np.diff(runs, append=len(slashes)))
            after[slashes[in_run % 2 == 0] + 1] = True
            quotes, escaped = quotes[~after[quotes]], bool(after[-1])
        yield quotes + first


def _places(line: memoryview, begin: int, end: int) -> list[int]:
    """Where a string may be cut: every PART_BYTES or a few more, between characters, not in an escape or a pair."""
    places = [begin]
    while end - places[-1] > PART_BYTES + LEAST_LEFT_BYTES:
        places.append(_place_from(line, places[-1], places[-1] + PART_BYTES))
    return [*places, end]


def _place_from(line: memoryview, begin: int, place: int) -> int:
    """The first place from `place` on where a string may be cut that may be cut at `begin`."""
    before = bytes(line[begin:place])
    near = max(0, len(before) - PAIR_BYTES)  # what begins sooner ends before `place`
    at = before.find(b"\\", near)
    if at == near:
        run = len(before[:at].rstrip(b"\\"))
        at -= (at - run) % 2
    while 0 <= at < len(before):
        escape = ESCAPE.match(line, begin + at)
        assert escape is not None, "a backslash and a byte are an escape"
        place = max(place, escape.end())
        at = before.find(b"\\", escape.end() - begin)
    while line[place] & 0xC0 == 0x80:
        place += 1
    return place


def _outline(line: memoryview, strings: Sequence[LongString]) -> bytes:
    """The line with the marks in place of the long strings."""
    parts: list[bytes | memoryview] = []
    behind = 0
    for string in strings:
        parts += [line[behind : string.places[0]], string.mark]
        behind = string.places[-1]
    return b"".join([*parts, line[behind:]])


def _fault_in_line(line: memoryview, strings: Sequence[LongString], place: int) -> int:
    """Which character of the line is character `place` of its outline."""
    behind = 0
    for string in strings:
        before, end = _characters(line, behind, string.places[0]), string.places[-1]
        if place <= before:
            break
        place -= before + len(string.mark)
        behind = end
    return _characters(line, 0, behind) + place


def _faults_in_strings(line: memoryview, strings: Sequence[LongString]) -> list[Fault]:
    """The first fault of the long strings."""
    for string in strings:
        for first, end in zip(string.places, string.places[1:], strict=False):
            try:
                _part(line, first, end)
            except orjson.JSONDecodeError as error:
                return [(_characters(line, 0, first) + error.pos - 1, error.msg)]
    return []


def _part(line: memoryview, first: int, end: int) -> str:
    return orjson.loads(b"".join((b'"', line[first:end], b'"')))


def _unescaped(line: memoryview, string: LongString | None, text: str) -> np.ndarray:
    """The UTF-8 of a text that is a long string, or of the text itself."""
    if string is None:
        return np.frombuffer(text.encode(), dtype=np.uint8)
    content = np.empty(string.places[-1] - string.places[0], dtype=np.uint8)  # what grows leaves holes behind
    size = 0
    for first, end in zip(string.places, string.places[1:], strict=False):
        part = np.frombuffer(_part(line, first, end).encode(), dtype=np.uint8)
        content[size : size + len(part)] = part
        size += len(part)
    return content[:size]


def _characters(line: memoryview, first: int, end: int) -> int:
    """How many characters begin in bytes first..end-1."""
    content = np.frombuffer(line, dtype=np.uint8)
    parts = (content[at : min(end, at + PART_BYTES)] for at in range(first, end, PART_BYTES))
    return sum(int(np.count_nonzero(part & 0xC0 != 0x80)) for part in parts)


def _one_text(content: np.ndarray) -> Texts:
    return Texts(content, np.array([0, len(content)], dtype=np.int64))
