"""A batch of short texts, taken at once, gives what its rows give one by one; short rows take bounded memory."""

from __future__ import annotations

import random
import tracemalloc

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from k2_megatron.data import parquet_rows
from k2_megatron.data.readers import pieces
from k2_megatron.data.sources import find_sources

POOL = ["", "a", "é", "日本語", "🙂 x", "a longer one " * 10]
INSIDE, CUT = [b"no\xfftext"], [b"caf\xc3", b"\xa9"]  # CUT: one text in two rows, of which neither is UTF-8
REASONS = {
    None: "is NoneType, not a string",
    INSIDE[0]: "not UTF-8: invalid start byte",
    CUT[0]: "not UTF-8: unexpected end of data",
    CUT[1]: "not UTF-8: invalid start byte",
}


def column(values: list[bytes | None], kind: str) -> arrow.Array:
    """Arrow looks at no bytes of a string when they are seen as one."""
    if kind == "binary":
        return arrow.array(values, arrow.binary())
    if kind == "large_string":
        return arrow.array(values, arrow.large_binary()).view(arrow.large_string())
    if kind == "string":
        return arrow.array(values, arrow.binary()).view(arrow.string())
    different = sorted({value for value in values if value is not None})
    places = [None if value is None else different.index(value) for value in values]
    return arrow.DictionaryArray.from_arrays(arrow.array(places, arrow.int32()), column(different, "string"))


def drawn(seed: int, odd: list[bytes | None]) -> list[bytes | None]:
    """300 texts; about ten times what is odd."""
    draw = random.Random(seed)
    values: list[bytes | None] = []
    while len(values) < 300:
        values += odd if draw.random() < 0.03 else [draw.choice(POOL).encode()]
    return values


def read(path, keys):
    """The texts under each key, the rejected rows by their numbers in the file, and the raw bytes."""
    texts, rejected, raw, rows = {key: [] for key in keys}, [], b"", 0
    for piece in pieces(find_sources([str(path)])[0], keys, 1 << 30, 0, None):
        for key in keys:
            texts[key] += piece.texts[key]
        rejected += [(rows + row, reason) for row, reason in piece.rejected]
        raw += b"".join(bytes(part) for part in piece.raw)
        rows += piece.lines
    return texts, rejected, raw, rows


@pytest.mark.parametrize("odd", [[], [None], INSIDE, CUT], ids=["all texts", "nulls", "not UTF-8", "cut"])
@pytest.mark.parametrize("kinds", ["string", "large_string", "dictionary", "string dictionary", "binary"])
def test_batches_at_once_give_what_their_rows_give(tmp_path, monkeypatch, kinds, odd):
    values = [drawn(seed, odd)[:300] for seed in range(len(kinds.split()))]
    keys = ["text", "body"][: len(values)]
    columns = {key: column(*one) for key, one in zip(keys, zip(values, kinds.split(), strict=True), strict=True)}
    parquet.write_table(arrow.table(columns), tmp_path / "a.parquet", row_group_size=110)
    monkeypatch.setattr(parquet_rows, "DECODED_ROWS", 9)
    monkeypatch.setattr(parquet_rows, "PIECE_ROWS", 40)
    judged, arrow_value = [], parquet_rows._arrow_value
    monkeypatch.setattr(parquet_rows, "_arrow_value", lambda value: judged.append(1) or arrow_value(value))
    found = read(tmp_path / "a.parquet", keys)
    assert (len(judged) < 300 * len(keys)) == (kinds != "binary"), "no batch was taken at once"
    assert (not judged) == (kinds != "binary" and not odd)
    monkeypatch.setattr(parquet_rows, "_run_of", lambda columns: None)
    assert found == read(tmp_path / "a.parquet", keys)

    texts, rejected, raw, rows = found
    expected = []
    for number, row in enumerate(zip(*values, strict=True)):
        bad = [(key, value) for key, value in zip(keys, row, strict=True) if value in REASONS]
        if kinds == "binary":
            expected.append((number, f"'text' is {type(row[0]).__name__}, not a string"))
        elif bad:
            key, value = bad[0]
            expected.append((number, f"{key!r} " * (value is None) + REASONS[value]))
    assert rejected == expected
    left = [row for number, row in enumerate(zip(*values, strict=True)) if number not in dict(expected)]
    assert [[text.encode() for text in texts[key]] for key in keys] == [
        [row[number] for row in left] for number in range(len(keys))
    ]
    assert raw == b"".join(text for row in left for text in row)
    assert rows == 300


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("first", [0, 1, 7, 299, 300])
def test_an_array_that_begins_inside_its_buffers(kind, first):
    values = drawn(0, [])[:300]
    texts = parquet_rows._texts_at_once(column(values, kind)[first:])
    assert [text.encode() for text in texts] == values[first:]
    nulls = [None, *values[1:]]
    assert (parquet_rows._texts_at_once(column(nulls, kind)[first:]) is None) == (first == 0)


def test_a_category_that_is_a_long_text_is_not_copied_for_every_row():
    long = "long " * 800_000
    rows = arrow.DictionaryArray.from_arrays(arrow.array([0] * 128), arrow.array([long, "short"]))
    before = arrow.default_memory_pool().max_memory()
    assert parquet_rows._run_of([rows]) is None
    assert arrow.default_memory_pool().max_memory() - before < len(long)
    assert parquet_rows._arrow_value(rows[5]).size == len(long)


def test_columns_of_one_name_are_refused_where_they_are_asked_for(tmp_path):
    table = arrow.table([["a"], ["b"], ["c"]], names=["text", "text", "title"])
    parquet.write_table(table, tmp_path / "a.parquet")
    (source,) = find_sources([str(tmp_path)])
    with pytest.raises(ValueError, match=r"a\.parquet: 'text' names several columns; write the file anew"):
        list(pieces(source, ["title", "text"], 1 << 30, 0, None))
    assert [piece.lines for piece in pieces(source, ["title"], 1 << 30, 0, None)] == [1]


@pytest.mark.parametrize("kinds", [("", "ok"), ("", "ok", None), ("", "")])
def test_short_rows_take_bounded_memory(tmp_path, kinds):
    """Row by row they are read where there are nulls; nothing but the number of rows ends a piece of empty texts."""
    count = 60_000
    rows = list(kinds) * (count // len(kinds))
    parquet.write_table(arrow.table({"text": rows}), tmp_path / "a.parquet")
    (source,) = find_sources([str(tmp_path / "a.parquet")])
    found = 0
    tracemalloc.start()
    try:
        for piece in pieces(source, ["text"], 1 << 30, 0, None):
            found += piece.lines
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found == count
    assert peak < 8 << 20, f"{peak / 1e6:.1f} MB"
