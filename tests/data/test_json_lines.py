"""The compiled scanner of JSON lines takes a line only with the text that orjson gives, and leaves it all others."""

from __future__ import annotations

import ctypes
import json
import os
import random
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_corpora import ROOT

from k2_megatron.data import json_lines, store
from k2_megatron.data.compiled import FUNCTIONS, compiled
from k2_megatron.data.json_lines import parse_every_line, scan_lines
from k2_megatron.data.texts import Texts
from k2_megatron.runtime.compiled import cpu_module

pytestmark = pytest.mark.skipif(compiled() is None, reason="k2_megatron._cpu is not built")

TEXTS = ["", "plain", 'two\nlines\t"quoted" \\ back / \b\f\r', "naïve 🙂 日本語 \x7f\x00\x1f", "<s> " * 40, "é" * 33]
VALUES = [None, True, False, 0, -5, 3.25, "other", [], {}, [1, [2, {"a": "b"}]], {"text": "inner"}, "x" * 100]
BYTES = [
    0,
    9,
    10,
    13,
    31,
    32,
    34,
    44,
    47,
    48,
    57,
    58,
    92,
    93,
    101,
    117,
    123,
    125,
    127,
    128,
    191,
    192,
    224,
    237,
    240,
    255,
]
UNUSUAL = [
    b'{"text": "a", "text": "b"}',
    b'{"te\\u0078t": "escaped key"}',
    b'{"text": "a", "n": 1e5}',
    b'{"text": "a", "n": 1E-05}',
    b'{"text": "a", "n": [0.1e+99, -1.5e-99, 1e100]}',
    b'{"text": "a", "n": 123456789012345678901234567890}',
    b'{"text": "a", "n": -0.12345678901234567890123e1}',
    b'{"text": "a", "n": ' + b"9" * 200 + b"e99}",
    b'{"text": "a", "n": ' + b"9" * 201 + b"}",
    b'{"text": 5, "text": "b"}',
    b'{"text": "a", "deep": ' + b"[" * 40 + b"]" * 40 + b"}",
]
BAD = [
    b'{"text": "cut',
    b'{"text": "a"} x',
    b'{"text": "a",}',
    b'{"text": "\\ud800"}',
    b'{"text": "\\ud800\\u0041"}',
    b'{"text": "\\udc00"}',
    b'{"text": "\\x41"}',
    b'{"text": "\\u00g0"}',
    b'{"text": "\x01"}',
    b'{"text": "\xc0\x80"}',
    b'{"text": "\xed\xa0\x80"}',
    b'{"text": "\xf4\x90\x80\x80"}',
    b'{"text": "\xe2\x82"}',
    b'{"text": "a", "n": 01}',
    b'{"text": "a", "n": 1.}',
    b'{"text": "a", "n": -}',
    b'{"text": "a", "n": 1e}',
    b'{"text": "a", "n": 1e+}',
    b'{"text": "a", "n": 1e5.5}',
    b'{"text": "a", "n": 1e999}',
    b'{"text": "a", "text": 5}',
    b'{"text": "a", "n": nul}',
    b'{"text": "a", "n": [1 2]}',
    b'{"text": "a", "n": {"x" 1}}',
    b'{"text": "a", "n": {"\tk": 1}}',
    b'{"text": "a", "n": {"x": 1, "\rk": 1}}',
    b'{"text": "a", "n": [{"\t": {"\r": 1}}]}',
    b'{"\ttext": "a", "text": "b"}',
    b'{"text": "a" "n": 1}',
    b'{"text": "a", "n": "\\q"}',
    b'\xef\xbb\xbf{"text": "a"}',
    b'{"text": 5}',
    b"[]",
    b"{}",
    b"null",
]


def assert_same(block: bytes, key: str = "text") -> int:
    """The scanner's piece is orjson's; the number of its documents."""
    fast, slow = scan_lines(compiled(), block, key, 7), parse_every_line(block, [key], 7)
    assert list(fast.texts[key]) == slow.texts[key], block
    assert (fast.blank, fast.rejected, fast.lines, fast.shard) == (slow.blank, slow.rejected, slow.lines, 7), block
    return len(fast.texts[key])


def random_line(draw: random.Random) -> bytes:
    """A record written in one of json's ways, a few of its bytes changed in half of the cases."""
    members = [(f"k{number}", draw.choice(VALUES)) for number in range(draw.randrange(4))]
    members.insert(draw.randrange(len(members) + 1), ("text", draw.choice(TEXTS) + "z" * draw.randrange(70)))
    space = draw.choice([(",", ":"), (", ", ": "), (" ,\t", " : ")])
    line = json.dumps(dict(members), ensure_ascii=draw.random() < 0.5, separators=space).encode()
    line = draw.choice([b"", b"  "]) + line + draw.choice([b"", b"\r", b" \t"])
    if draw.random() < 0.5:
        content = bytearray(line)
        for _ in range(draw.randrange(1, 4)):
            content[draw.randrange(len(content))] = draw.choice(BYTES)
        return bytes(content)
    return line


def random_block(seed: int) -> bytes:
    draw = random.Random(seed)
    return b"\n".join(random_line(draw) for _ in range(40)) + draw.choice([b"", b"\n", b"\n\n"])


@pytest.mark.parametrize("seed", range(60))
def test_records_in_every_form_whole_and_damaged(seed):
    assert_same(random_block(seed))


@settings(max_examples=300, deadline=None)
@given(block=st.lists(st.one_of(st.binary(max_size=40), st.sampled_from([*UNUSUAL, *BAD, b'{"text": "x"}']))))
def test_any_bytes(block):
    assert_same(b"\n".join(block))


@pytest.mark.parametrize("line", UNUSUAL)
def test_unusual_lines_are_documents_like_any_other(line):
    assert assert_same(b'{"text": "before"}\n' + line + b'\n{"text": "after"}') == 3


@pytest.mark.parametrize("line", BAD)
def test_bad_lines_are_left_to_orjson_and_rejected(line):
    assert assert_same(b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n') == 2


def test_ordinary_lines_never_reach_orjson(monkeypatch):
    lines = [json.dumps({"id": number, "text": text, "meta": VALUES}) for number, text in enumerate(TEXTS)]
    lines += [json.dumps({"text": text}, ensure_ascii=False) for text in TEXTS]
    lines += [json.dumps({"n": [1e-7, 2.5e99, 0.1234567890123456789, 10**30], "text": text}) for text in TEXTS]
    lines += [f'{{"text": "first", {json.dumps({"text": text})[1:]}' for text in TEXTS]
    monkeypatch.setattr(json_lines, "parse_every_line", None)
    piece = scan_lines(compiled(), "\n".join(lines).encode(), "text", 0)
    assert list(piece.texts["text"]) == TEXTS * 4


@pytest.mark.parametrize("at_end", [b"", b"\n"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_scanner_that_loses_or_doubles_a_document_is_found(monkeypatch, at_end, change):
    """The lines are counted apart from what the scanner says of them."""

    def json_texts(*arguments):
        compiled().json_texts(*arguments)
        ctypes.cast(arguments[6], ctypes.POINTER(ctypes.c_int64))[1] += change

    block = b'{"text": "one"}\n{"text": "two"}' + at_end
    assert json_lines.parse_lines(block, ["text"], 0).lines == 2
    monkeypatch.setattr(json_lines, "compiled", lambda: SimpleNamespace(json_texts=json_texts))
    with pytest.raises(RuntimeError, match=rf"2 lines in a block of shard 3 became {2 + change} documents, 0 rejected"):
        json_lines.parse_lines(block, ["text"], 3)


def test_without_the_scanner_orjson_reads_every_line(monkeypatch):
    """Not built, or built before it had one."""
    monkeypatch.setitem(sys.modules, "k2_megatron._cpu", SimpleNamespace(instruction_set="portable"))
    assert cpu_module.__wrapped__(*FUNCTIONS) is None
    monkeypatch.setitem(sys.modules, "k2_megatron._cpu", None)
    assert cpu_module.__wrapped__(*FUNCTIONS) is None
    block = random_block(1)
    expected = parse_every_line(block, ["text"], 0)
    monkeypatch.setattr(json_lines, "compiled", lambda: None)
    assert json_lines.parse_lines(block, ["text"], 0) == expected


def test_other_keys_and_empty_blocks():
    assert assert_same('{"größe": "x"}\n{"größe": "y"}'.encode(), "größe") == 2
    assert assert_same(b'{"": "x"}', "") == 1
    assert assert_same(b"") == 0


def test_the_portable_build_gives_the_same():
    code = "import test_json_lines as t; [t.assert_same(t.random_block(seed)) for seed in range(20)]"
    code += "; print(t.compiled().instruction_set)"
    settings = {"K2_CPU_INSTRUCTION_SET": "portable", "PYTHONPATH": f"{ROOT}:{ROOT}/tests/data"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, check=True)
    assert done.stdout == "portable\n"


def test_texts_are_a_sequence_of_strings():
    words = ["one", "", "zwölf"]
    content = np.frombuffer("".join(words).encode(), dtype=np.uint8)
    texts = Texts(content, np.array([0, 3, 3, 9]))
    assert (list(texts), texts[-1], texts[:2], len(texts)) == (words, "zwölf", ["one", ""], 3)
    with pytest.raises(IndexError):
        texts[3]


@pytest.mark.parametrize("dtype", ["<u2", "<i4"])
def test_ends_by_numpy_and_compiled_are_the_same(monkeypatch, dtype):
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 4, 200)
    ids = generator.integers(0, 1 << 16, lengths.sum()).astype(np.uint32)
    fast = store.with_ends(ids, lengths, 9, np.dtype(dtype))
    monkeypatch.setattr(store, "compiled", lambda: None)
    slow = store.with_ends(ids, lengths, 9, np.dtype(dtype))
    assert all(np.array_equal(one, other) and one.dtype == other.dtype for one, other in zip(fast, slow, strict=True))
    expected = [token for part in np.split(ids, np.cumsum(lengths)[:-1]) for token in [*part, 9][: 99 * len(part)]]
    assert fast[0].tolist() == expected
