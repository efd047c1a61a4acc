"""A long line read in parts is what orjson makes of it whole: texts, and the reasons of rejected ones."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc

import pytest
from test_json_lines import BAD, UNUSUAL, random_line

from k2_megatron.data import json_lines, long_lines, readers
from k2_megatron.data.compiled import compiled
from k2_megatron.data.json_lines import parse_every_line
from k2_megatron.data.long_lines import parse_long_line
from k2_megatron.data.readers import pieces
from k2_megatron.data.sources import find_sources

ESCAPED = b"\\ud83d\\ude42\\u00e9\\n"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Nearly every string is a long one, in parts of a few bytes; without the scanner."""
    monkeypatch.setattr(long_lines, "LONG_STRING_BYTES", 9)
    monkeypatch.setattr(long_lines, "PART_BYTES", 7)
    monkeypatch.setattr(long_lines, "SCANNED_BYTES", 5)
    monkeypatch.setattr(long_lines, "compiled", lambda: None)


def assert_same(line: bytes) -> None:
    for keys in (["text"], ["text", "k0"]):
        ours, whole = parse_long_line(memoryview(bytearray(line)), keys, 7), parse_every_line(line, keys, 7)
        assert {key: list(ours.texts[key]) for key in keys} == whole.texts, line
        assert (ours.lines, ours.blank, ours.rejected) == (1, whole.blank, whole.rejected), line


@pytest.mark.parametrize("seed", range(20))
def test_lines_in_every_form_whole_and_damaged(seed):
    draw = random.Random(seed)
    for _ in range(100):
        line = random_line(draw).replace(b"\n", b"").replace(b"other", ESCAPED * draw.randrange(9))
        assert_same(line or b" ")


@pytest.mark.parametrize("line", [*UNUSUAL, *BAD, b" \t ", b'{"text": "cut off in a long string'])
def test_unusual_and_bad_lines(line):
    assert_same(line)


@pytest.mark.parametrize("seed", range(10))
def test_escapes_of_every_form_wherever_the_parts_end(monkeypatch, seed):
    """Runs of backslashes, pairs, halves of pairs, escapes that a quote ends, characters of several bytes."""
    draw = random.Random(seed)
    forms = [b"\\\\", b'\\"', b"\\n", b"\\u00e9", b"\\ud83d\\ude42", "🙂".encode(), "é".encode(), b"x", b"xyz" * 9]
    faults = [b"\\u12", b"\\ud83d", b"\\ude42", b"\\x", b"\t", b'"', b"\\u1\xc3\xa9"]
    for number in range(200):
        monkeypatch.setattr(long_lines, "PART_BYTES", draw.choice([7, 29]))
        parts = draw.choices(forms, [draw.choice([1, 30]) for _ in forms], k=draw.randrange(60))
        if number % 2:
            parts.insert(draw.randrange(len(parts) + 1), draw.choice(faults))
        assert_same(b'{"k0": "a", "text": "' + b"".join(parts) + b'", "n": 1e5}')


def test_no_step_of_python_for_an_escape_or_a_quote(monkeypatch):
    for name in ("LONG_STRING_BYTES", "PART_BYTES", "SCANNED_BYTES"):
        monkeypatch.setattr(long_lines, name, 1 << 16)
    line = b'{"text": "' + b'\\n\\"\\u00e9' * 20_000 + b'", "n": ["a"' + b', "b"' * 20_000 + b"]}"
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1

    sys.setprofile(count)
    try:
        piece = parse_long_line(memoryview(line), ["text"], 0)
    finally:
        sys.setprofile(None)
    assert list(piece.texts["text"]) == ['\n"é' * 20_000]
    assert steps < 4000


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize(
    "line", [*BAD, b'{"text": "cut off in a long string', b'{"text": "ended by the end", "k0"', b"[1]"]
)
def test_the_newline_is_no_part_of_the_line_in_its_reason(tmp_path, monkeypatch, line, end):
    """As it is not for the lines before."""
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 2)
    (tmp_path / "a.jsonl").write_bytes(line + end)
    (piece,) = pieces(find_sources([str(tmp_path)])[0], ["text", "k0"], 1 << 20, 0, None)
    assert piece.rejected == json_lines.parse_every_line(line + end, ["text", "k0"], 0).rejected
    assert b"".join(bytes(raw) for raw in piece.raw) == line + end


MANY_VALUES = b'{"text": "long enough to be marked", "k0": "", "n": [' + b"1e100," * 20 + b"0]}"


@pytest.mark.skipif(compiled() is None, reason="k2_megatron._cpu is not built")
def test_a_line_of_much_that_would_become_objects_is_rejected(monkeypatch):
    monkeypatch.setattr(long_lines, "compiled", compiled)
    monkeypatch.setattr(long_lines, "OUTLINE_BYTES", len(MANY_VALUES) - len("long enough to be marked"))
    assert_same(MANY_VALUES)
    assert_same(MANY_VALUES[:-1])
    assert_same(b" " * 500)
    ((_, reason),) = parse_long_line(memoryview(MANY_VALUES.replace(b"0]", b"10]")), ["text"], 0).rejected
    assert reason.endswith("beside its long strings, not plain enough to be read without objects")


def test_without_the_scanner_it_is_read_whatever_it_takes(monkeypatch):
    monkeypatch.setattr(long_lines, "OUTLINE_BYTES", 20)
    assert_same(MANY_VALUES)


@pytest.mark.skipif(compiled() is None, reason="k2_megatron._cpu is not built")
def test_two_keys_of_a_plain_line_never_reach_orjson(monkeypatch):
    monkeypatch.setattr(long_lines, "compiled", compiled)
    monkeypatch.setattr(long_lines, "_read_in_parts", None)
    line = b'{"k0": "one", "n": [1e5, {"k0": 2}], "text": "\\u00e9", "more": "", "text": "last"}'
    piece = parse_long_line(memoryview(line), ["text", "k0"], 0)
    assert {key: list(texts) for key, texts in piece.texts.items()} == {"text": ["last"], "k0": ["one"]}


@pytest.mark.parametrize("keys", [["text"], ["text", "body"]])
@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_long_last_line_is_a_piece_of_its_own(tmp_path, monkeypatch, keys, end):
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 100)
    short, long = b'{"text": "a", "body": "b"}\n', b'{"text": "%s", "n": 1e5, "body": "c"}' % (b"x" * 200)
    (tmp_path / "a.jsonl").write_bytes(short * 3 + long + end)
    found = list(pieces(find_sources([str(tmp_path)])[0], keys, 1 << 20, 0, None))
    assert [piece.lines for piece in found] == [3, 1]
    assert [list(piece.texts["text"]) for piece in found] == [["a"] * 3, ["x" * 200]]
    assert b"".join(bytes(raw) for piece in found for raw in piece.raw) == short * 3 + long + end


@pytest.mark.parametrize("what", ["texts", "cut", "without the key"])
def test_memory_beside_a_long_line_and_its_texts_is_bounded(monkeypatch, what):
    """A character beyond ASCII would make every other one of a str take four bytes."""
    for name in ("LONG_STRING_BYTES", "PART_BYTES", "SCANNED_BYTES"):
        monkeypatch.setattr(long_lines, name, 1 << 16)
    size = 8 << 20
    line = json.dumps({"text": "x" * size + "🙂", "body": "y" * size}, ensure_ascii=False)
    line = line[:-2] if what == "cut" else line.replace("text", "other") if what == "without the key" else line
    given = memoryview(line.encode())
    tracemalloc.start()
    try:
        piece = parse_long_line(given, ["text", "body"], 0)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(piece.rejected) == (what != "texts")
    assert peak < (2 * size if what == "texts" else 0) + (8 << 20)
    assert json_lines.parse_every_line(bytes(given), ["text", "body"], 0).rejected == piece.rejected
