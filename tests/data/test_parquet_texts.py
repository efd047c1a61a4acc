"""Parquet's large pages are read a text at a time, with arrow's texts; damage is a named error in bounded memory."""

from __future__ import annotations

import gzip
import io
import random
import re
import subprocess
import sys
import tempfile
import tracemalloc

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import zstandard
from token_corpora import ROOT

from k2_megatron.data import parquet_rows, parquet_texts
from k2_megatron.data.block_formats import BlockFile
from k2_megatron.data.compiled import compiled
from k2_megatron.data.parquet_pages import DATA_PAGE_V2, Page, PageContent, open_page
from k2_megatron.data.parquet_texts import TextChunk, text_chunk, texts_of
from k2_megatron.data.readers import pieces
from k2_megatron.data.sources import find_sources

pytestmark = pytest.mark.skipif(compiled() is None, reason="k2_megatron._cpu is not built")

CODECS = ["none", "snappy", "gzip", "zstd", "lz4", "brotli"]
PARTS = ["the union ", "State of", "é", "日本語", "🙂", "\n", "x"]


def texts(seed: int, count: int, repeated: float, nulls: bool) -> list[str | None]:
    """Some of few that come again, some that come once; empty, short, and long ones."""
    draw = random.Random(seed)
    pool = ["".join(draw.choices(PARTS, k=draw.choice([0, 1, 3, 400]))) for _ in range(20)]
    pool += [None] * 8 if nulls else []
    return [draw.choice(pool) if draw.random() < repeated else str(draw.random()) * 20 for _ in range(count)]


def write(path, columns: dict[str, list[str | None]], **settings) -> None:
    """Small pages, many of them; several row groups."""
    fields = [arrow.field(name, arrow.string(), nullable=None in values) for name, values in columns.items()]
    settings = {"row_group_size": 150, "data_page_size": 4000, "write_batch_size": 16, **settings}
    parquet.write_table(arrow.table(columns, schema=arrow.schema(fields)), path, **settings)


def read(path, keys, monkeypatch, largest: int, first_shard: int = 0):
    """What the pieces hold, and their raw bytes; `largest`: of the pages that arrow still gets."""
    (source,) = find_sources([str(path)])
    asked = []
    monkeypatch.setattr(parquet_rows, "ARROW_PAGE_BYTES", largest)
    monkeypatch.setattr(parquet_rows, "_arrow_rows", lambda *call: asked.append(1) or ARROW_ROWS(*call))
    found = list(pieces(source, keys, 20_000, first_shard, None))
    assert bool(asked) == (largest > 0)
    facts = [(piece.shard, piece.lines, piece.rejected, piece.consumed) for piece in found]
    values = [[list(piece.texts[key]) for piece in found] for key in keys]
    return facts, values, b"".join(bytes(part) for piece in found for part in piece.raw)


ARROW_ROWS = parquet_rows._arrow_rows


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", CODECS)
def test_large_pages_give_arrows_pieces(tmp_path, monkeypatch, codec, version):
    """Dictionaries kept, given up for plain pages, and none; with nulls and required; one column and two."""
    columns = {
        "few": texts(0, 400, 1.0, nulls=True),
        "many": texts(1, 400, 0.5, nulls=True),
        "plain": texts(2, 400, 0.5, nulls=False),
    }
    path = tmp_path / "a.parquet"
    settings = {"compression": codec, "data_page_version": version, "dictionary_pagesize_limit": 3000}
    write(path, columns, use_dictionary=["few", "many"], **settings)
    for keys in (["few"], ["many"], ["plain"], ["plain", "many"]):
        ours = read(path, keys, monkeypatch, 0)
        assert ours == read(path, keys, monkeypatch, 1 << 30)
        assert ours[0][-1][0] > 1, "several shards"
        last = ours[0][-1][0]
        after = read(path, keys, monkeypatch, 0, last)
        assert after[0] == [facts for facts in ours[0] if facts[0] == last]
    assert [text for piece in read(path, ["plain"], monkeypatch, 0)[1][0] for text in piece] == columns["plain"]


def test_long_rows_are_pieces_of_their_own_under_one_key_and_two(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_rows, "LONG_TEXT_BYTES", 3000)
    monkeypatch.setattr(parquet_rows, "RUN_BYTES", 1000)
    monkeypatch.setattr(parquet_rows.sources, "MAX_DOCUMENT_BYTES", 9000)
    rows = ["a", "b" * 2000, "c" * 4000, "d", "e" * 10_000, "f" * 5000]
    write(tmp_path / "a.parquet", {"text": rows, "body": rows[::-1]})
    made = []
    for largest in (0, 1 << 30):
        for keys, lines in ((["text"], [2, 1, 2, 1]), (["text", "body"], [1, 1, 2, 1, 1])):
            facts, values, raw = read(tmp_path / "a.parquet", keys, monkeypatch, largest)
            assert sum(fact[1] for fact in facts) == 6
            made.append((keys, facts, values, raw))
            if len(keys) == 1:
                assert [fact[1] for fact in facts] == lines
                assert [(fact[1], reason) for fact in facts for _, reason in fact[2]] == [(2, "longer than 0 MiB")]
    assert made[:2] == made[2:]


@pytest.mark.parametrize(("codec", "rejected"), [("zstd", 1), ("gzip", 0)])
def test_in_a_zstandard_page_of_a_large_window_there_is_less_room_for_a_row(tmp_path, monkeypatch, codec, rejected):
    """Any window is large here; in a dictionary, which lies in memory or in a file, none is."""
    monkeypatch.setattr(parquet_rows.sources, "LARGE_WINDOW_BYTES", 1)
    monkeypatch.setattr(parquet_rows.sources, "MAX_BEHIND_LARGE_WINDOW_BYTES", 4096)
    rows = ["a", "b" * 5000, "c"]
    for dictionary in (False, True):
        write(tmp_path / "a.parquet", {"text": rows}, compression=codec, use_dictionary=dictionary)
        facts, _, _ = read(tmp_path / "a.parquet", ["text"], monkeypatch, 0)
        reasons = [reason for fact in facts for _, reason in fact[2]]
        assert [reason[:50] for reason in reasons] == (
            ["longer than 0 MiB, behind zstandard's window of 0 M"[:50]] * (0 if dictionary else rejected)
        )


@pytest.mark.parametrize("what", ["nested", "binary", "encoding", "codec", "too many texts"])
def test_what_is_not_read_here_stays_with_arrow(tmp_path, monkeypatch, what):
    path, values = tmp_path / "a.parquet", ["one", "two", None] * 50
    if what == "nested":
        parquet.write_table(arrow.table({"text": [[value] for value in values]}), path)
    elif what == "encoding":
        parquet.write_table(
            arrow.table({"text": values}), path, use_dictionary=False, column_encoding={"text": "DELTA_BYTE_ARRAY"}
        )
    else:
        kind = arrow.binary() if what == "binary" else arrow.string()
        parquet.write_table(arrow.table({"text": arrow.array(values, kind)}), path)
    if what == "codec":
        monkeypatch.setattr("k2_megatron.data.parquet_pages.compiled", lambda: None)
    if what == "too many texts":
        monkeypatch.setattr(parquet_texts, "LARGEST_DICTIONARY", 1)
    monkeypatch.setattr(parquet_rows, "ARROW_PAGE_BYTES", 0)
    with open(path, "rb") as raw, parquet.ParquetFile(path) as file:
        assert parquet_rows._large_chunks(file, raw, 0, ["text"]) == {}
    (source,) = find_sources([str(path)])
    (piece,) = pieces(source, ["text"], 1 << 30, 0, None)
    assert (len(piece.texts["text"]), len(piece.rejected)) == ((0, 150) if what in ("nested", "binary") else (100, 50))
    monkeypatch.setattr(parquet_rows, "REFUSED_PAGE_BYTES", 20)
    with pytest.raises(ValueError, match=r"a\.parquet: a page of 0 MiB in column text.*write the file anew"):
        list(pieces(source, ["text"], 1 << 30, 0, None))


def test_large_pages_that_are_read_here_or_not_asked_for_are_not_refused(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", {"text": ["one", "two"] * 500, "textual": ["three"] * 1000}, use_dictionary=False)
    monkeypatch.setattr(parquet_rows, "REFUSED_PAGE_BYTES", 1200)
    with parquet.ParquetFile(tmp_path / "a.parquet") as file, open(tmp_path / "a.parquet", "rb") as raw:
        with pytest.raises(ValueError, match="a page of 0 MiB in column textual"):
            parquet_rows._refuse_large_pages(file, raw, 0, ["textual"])
        parquet_rows._refuse_large_pages(file, raw, 0, ["text"])
    read(tmp_path / "a.parquet", ["textual"], monkeypatch, 0)


def test_columns_of_which_one_stays_with_arrow(tmp_path, monkeypatch):
    """The others' pages are too large for arrow, and are not refused for it."""
    path = tmp_path / "a.parquet"
    columns = {name: texts(seed, 400, 0.5, nulls=name != "text") for seed, name in enumerate(("text", "body"))}
    columns |= {name: [str(row) if row % step else None for row in range(400)] for name, step in (("id", 7), ("no", 9))}
    deltas = {"text": "PLAIN", "body": "PLAIN", "id": "DELTA_BYTE_ARRAY", "no": "DELTA_LENGTH_BYTE_ARRAY"}
    write(path, columns, use_dictionary=False, column_encoding=deltas)
    for keys in (["text", "id"], ["id", "body", "no", "text"], ["no", "text", "no"]):
        monkeypatch.setattr(parquet_rows, "REFUSED_PAGE_BYTES", 5000)
        ours = read(path, keys, monkeypatch, 0)
        monkeypatch.setattr(parquet_rows, "REFUSED_PAGE_BYTES", 1 << 30)
        assert ours == read(path, keys, monkeypatch, 1 << 30)
        assert ours[0][-1][0] > 1, "several shards"


def test_large_pages_of_a_codec_that_needs_the_compiled_module_are_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr("k2_megatron.data.parquet_pages.compiled", lambda: None)
    monkeypatch.setattr(parquet_rows, "REFUSED_PAGE_BYTES", 100)
    monkeypatch.setattr(parquet_rows, "ARROW_PAGE_BYTES", 0)
    table = arrow.table({"text": ["one", "two"] * 50})
    remedy = r'write_table\(pyarrow.parquet.read_table\(FILE\), NEW, compression="zstd"\)$'
    for encoding, message in (
        ("PLAIN", r"SNAPPY.* arrow reads where k2_megatron._cpu is not built, .* build it \(pip install -e \.\), or "),
        ("DELTA_LENGTH_BYTE_ARRAY", r"SNAPPY.* arrow reads, in up to eight times as much memory; "),
    ):
        settings = {"use_dictionary": False, "column_encoding": {"text": encoding}}
        parquet.write_table(table, tmp_path / "a.parquet", compression="snappy", **settings)
        with pytest.raises(ValueError, match=f"{message}write the file anew.*{remedy}"):
            list(pieces(find_sources([str(tmp_path / "a.parquet")])[0], ["text"], 1 << 30, 0, None))
    parquet.write_table(parquet.read_table(tmp_path / "a.parquet"), tmp_path / "b.parquet", compression="zstd")
    (piece,) = pieces(find_sources([str(tmp_path / "b.parquet")])[0], ["text"], 1 << 30, 0, None)
    assert list(piece.texts["text"]) == ["one", "two"] * 50


def test_a_row_that_is_not_utf8_is_rejected(tmp_path, monkeypatch):
    """Arrow does not look at the bytes of a string column."""
    path = tmp_path / "a.parquet"
    write(path, {"text": ["before", "no\x01text", "after"]}, use_dictionary=False, compression="none")
    path.write_bytes(path.read_bytes().replace(b"no\x01text", b"no\xfftext"))
    for largest in (0, 1 << 30):
        facts, values, _ = read(path, ["text"], monkeypatch, largest)
        assert values == [[["before", "after"]]]
        assert facts[0][2] == [(1, "not UTF-8: invalid start byte")]


@pytest.mark.parametrize("seed", range(40))
def test_damaged_pages_are_named_errors_within_bounded_memory(tmp_path, monkeypatch, seed):
    draw = random.Random(seed)
    path = tmp_path / "a.parquet"
    settings = {"compression": CODECS[seed % 6], "data_page_version": draw.choice(["1.0", "2.0"])}
    write(path, {"text": texts(seed, 300, 0.7, nulls=True)}, dictionary_pagesize_limit=3000, **settings)
    content = bytearray(path.read_bytes())
    end = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    end = end.data_page_offset + end.total_compressed_size // 2
    for _ in range(draw.randrange(1, 4)):
        content[draw.randrange(4, end)] = draw.choice([0, 0x7F, 0x80, 0xFF, draw.randrange(256)])
    path.write_bytes(content)
    monkeypatch.setattr(parquet_rows, "ARROW_PAGE_BYTES", 0)
    (source,) = find_sources([str(path)])
    said = f"{path}: cannot be read to its end ("
    tracemalloc.start()
    try:
        list(pieces(source, ["text"], 20_000, 0, None))
    except ValueError as error:
        said = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert said.startswith(f"{path}: cannot be read to its end (")
    assert peak < 32 << 20


def test_a_length_of_four_gigabytes_is_a_named_error(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write(path, {"text": ["before", "long text", "after"]}, use_dictionary=False, compression="none")
    content = path.read_bytes()
    for claimed in (b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"):
        path.write_bytes(content.replace(b"\x09\x00\x00\x00long text", claimed + b"long text"))
        (source,) = find_sources([str(path)])
        monkeypatch.setattr(parquet_rows, "ARROW_PAGE_BYTES", 0)
        with pytest.raises(
            ValueError, match=rf"a text of {int.from_bytes(claimed, 'little')} bytes where a page has 18 "
        ):
            list(pieces(source, ["text"], 1 << 30, 0, None))


def test_a_large_dictionary_lies_in_a_file(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    write(path, {"text": texts(3, 400, 1.0, nulls=True)})
    expected = read(path, ["text"], monkeypatch, 1 << 30)
    monkeypatch.setattr(parquet_texts, "DICTIONARY_IN_MEMORY_BYTES", 100)
    assert read(path, ["text"], monkeypatch, 0) == expected

    monkeypatch.delattr(tempfile.SpooledTemporaryFile, "readinto", raising=False)  # Python 3.10 has none
    assert read(path, ["text"], monkeypatch, 0) == expected


# As a full disk does, it fails where the file's buffer is full, when it is flushed, and once more when it is closed.
NO_ROOM = """
import resource, sys
from k2_megatron.data import parquet_rows, parquet_texts
from k2_megatron.data.readers import pieces
from k2_megatron.data.sources import find_sources
parquet_rows.ARROW_PAGE_BYTES, parquet_texts.DICTIONARY_IN_MEMORY_BYTES = 0, 1
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    list(pieces(find_sources([sys.argv[1]])[0], ["text"], 1 << 20, 0, None))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("size", "room", "found"),
    [(10, 4, "File too large"), (20_000, 4, "File too large"), (10, 0, "No usable temporary directory found in .*")],
)
def test_no_room_for_a_large_dictionary_is_told(tmp_path, size, room, found):
    """Room for 4 bytes is what Python asks of a temporary folder."""
    path = tmp_path / "a.parquet"
    write(path, {"text": ["a" * size, "b" * size] * 20})
    command = [sys.executable, "-c", NO_ROOM, str(path), str(room)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = rf"{path}: a large dictionary of texts cannot be written to .* \({found}\); make room .* in TMPDIR\n"
    assert re.fullmatch(said, done.stdout), done.stdout + done.stderr


def packed(name: str, content: bytes) -> bytes:
    return arrow.Codec({"SNAPPY": "snappy", "LZ4": "lz4_raw"}[name]).compress(content).to_pybytes()


@pytest.mark.parametrize("name", ["SNAPPY", "LZ4"])
@pytest.mark.parametrize("seed", range(12))
def test_blocks_are_unpacked_in_steps(monkeypatch, name, seed):
    """Read in steps that end anywhere, from reads that end anywhere; cut, it is found."""
    draw = random.Random(seed)
    monkeypatch.setattr("k2_megatron.data.block_formats.UNPACKED_BYTES", draw.choice([5, 70, 1000, 1 << 20]))
    monkeypatch.setattr("k2_megatron.data.block_formats.READ_BYTES", draw.choice([1, 5, 300, 1 << 18]))
    size = draw.choice([0, 1, 500, 80_000]) if seed > 3 else 80_000
    content = b"".join(draw.choice([draw.randbytes(9), b"a", b"abcd" * 30, b"\n"]) for _ in range(size // 9 + 1))[:size]
    block = packed(name, content)
    file = BlockFile(io.BytesIO(block), name)
    found = bytearray()
    while part := file.read(draw.choice([1, 100, 70_000])):
        found += part
    assert found == content
    if size:
        cut = BlockFile(io.BytesIO(block[: draw.randrange(1, len(block))]), name)
        with pytest.raises((ValueError, EOFError)):
            PageContent(io.BufferedReader(cut), size).exactly(size)


@pytest.mark.parametrize("tag", [b"\x0e\x05\x00", b"\x0e\x00\x00", b"\x0f\x05\x00\x01\x00"])
def test_a_copy_from_before_the_beginning_is_found(tag):
    with pytest.raises(ValueError, match="a copy from before its beginning"):
        BlockFile(io.BytesIO(b"\x08\x0cabcd" + tag), "SNAPPY").read()


def far_copy(length: int) -> tuple[bytes, bytes]:
    """A Snappy block that is to have `length` bytes: 200 KiB, then 64 of 150 KiB before; and its content."""
    literal = random.Random(0).randbytes(200 << 10)
    head = bytes([length & 127 | 128, length >> 7 & 127 | 128, length >> 14])
    block = head + b"\xf8" + (len(literal) - 1).to_bytes(3, "little") + literal
    return block + b"\xff" + (150 << 10).to_bytes(4, "little"), literal + literal[50 << 10 :][:64]


@pytest.mark.parametrize("unpacked", [5, 70_000, 1 << 20])
def test_a_copy_from_beyond_64_kib_is_left_to_arrow(monkeypatch, unpacked):
    """What came before it is not given twice."""
    monkeypatch.setattr("k2_megatron.data.block_formats.UNPACKED_BYTES", unpacked)
    block, content = far_copy((200 << 10) + 64)
    assert BlockFile(io.BytesIO(block), "SNAPPY").readall() == content


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (far_copy(200 << 10)[0], "a copy from further back than 64 KiB in a block that arrow refuses"),
        (far_copy((200 << 10) + 64)[0][:-1] + b"\x01", "a copy from before its beginning"),
        (b"\xff\xff\xff\xff\x7f" + far_copy(200 << 10)[0][3:], "a Snappy block of 204\\d+ bytes that says it becomes"),
    ],
    ids=["refused", "before the beginning", "length"],
)
def test_a_damaged_block_with_a_copy_from_beyond_64_kib_is_a_named_error(monkeypatch, block, said):
    monkeypatch.setattr("k2_megatron.data.block_formats.UNPACKED_BYTES", 1000)
    with pytest.raises(ValueError, match=said):
        BlockFile(io.BytesIO(block), "SNAPPY").readall()


def test_a_large_block_with_a_copy_from_beyond_64_kib_is_refused_with_what_to_do(monkeypatch):
    """It would be in memory whole."""
    monkeypatch.setattr("k2_megatron.data.block_formats.UNPACKED_BYTES", 1000)
    block, content = far_copy((200 << 10) + 64)
    monkeypatch.setattr("k2_megatron.data.block_formats.LARGEST_WHOLE_BYTES", len(block) + len(content) - 1)
    with pytest.raises(
        ValueError, match=r"refers back beyond 64 KiB.*write the file anew: pyarrow\.parquet\.write_table"
    ):
        BlockFile(io.BytesIO(block), "SNAPPY").readall()
    monkeypatch.setattr("k2_megatron.data.block_formats.LARGEST_WHOLE_BYTES", len(block) + len(content))
    assert BlockFile(io.BytesIO(block), "SNAPPY").readall() == content


def test_a_page_with_a_copy_from_beyond_64_kib(tmp_path, monkeypatch):
    """Behind other bytes in the file."""
    monkeypatch.setattr("k2_megatron.data.block_formats.UNPACKED_BYTES", 1000)
    block, content = far_copy((200 << 10) + 64)
    (tmp_path / "page").write_bytes(b"before" + block + b"after")
    with open(tmp_path / "page", "rb") as raw:
        page = Page(DATA_PAGE_V2, 6, len(block), len(content), 1, parquet_texts.PLAIN)
        _, values = open_page(raw.fileno(), page, "SNAPPY")
        assert values.exactly(len(content)) == content
        values.finish()


@pytest.mark.parametrize(
    ("codec", "frame"),
    [
        ("GZIP", gzip.compress(b"", mtime=0)),
        ("ZSTD", zstandard.compress(b"")),
        ("SNAPPY", b"\x00"),
        ("SNAPPY", b""),
        ("UNCOMPRESSED", b""),
    ],
)
def test_a_page_of_nothing_but_nulls_may_hold_an_empty_frame(tmp_path, codec, frame):
    """parquet-cpp-arrow 14.0.2 wrote such pages of version 2."""
    levels = b"\x0a\x00"  # five times 0
    (tmp_path / "page").write_bytes(levels + frame)
    with open(tmp_path / "page", "rb") as raw:
        page = Page(DATA_PAGE_V2, 0, len(levels + frame), len(levels), 5, parquet_texts.PLAIN, len(levels))
        chunk = TextChunk(raw.name, raw.fileno(), [page], codec, optional=True)
        assert list(texts_of(chunk)) == [None] * 5


@pytest.mark.parametrize("nulls", [True, False])
def test_levels_in_another_encoding_stay_with_arrow(tmp_path, nulls):
    """Those of a column without nulls take no bytes, whatever their encoding is."""
    path = tmp_path / "a.parquet"
    write(path, {"text": ["one", None if nulls else "two"] * 5}, use_dictionary=False, compression="none")
    content = path.read_bytes()
    header = b"\x15\x06\x15\x06"  # both levels: RLE (3, doubled); 4 is BIT_PACKED
    assert content.count(header) == 1
    path.write_bytes(content.replace(header, b"\x15\x08\x15\x06"))
    with open(path, "rb") as raw, parquet.ParquetFile(path) as file:
        chunk = text_chunk(raw, file.schema.column(0), file.metadata.row_group(0).column(0))
    assert (chunk is None) == nulls


def test_a_block_shorter_than_its_length_says_is_cut():
    with pytest.raises(EOFError, match="the block ends too early"):
        BlockFile(io.BytesIO(b"\x08\x0cabcd"), "SNAPPY").readall()


def test_the_checksum_behind_a_page_is_looked_at(tmp_path, monkeypatch):
    """All of its texts were there before."""
    path = tmp_path / "a.parquet"
    write(path, {"text": ["text"] * 10}, compression="gzip", use_dictionary=False)
    with open(path, "rb") as raw, parquet.ParquetFile(path) as file:
        (page,) = text_chunk(raw, file.schema.column(0), file.metadata.row_group(0).column(0)).pages
    content = bytearray(path.read_bytes())
    content[page.start + page.packed_bytes - 8] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(parquet_rows, "ARROW_PAGE_BYTES", 0)
    with pytest.raises(ValueError, match="CRC check failed"):
        list(pieces(find_sources([str(path)])[0], ["text"], 1 << 30, 0, None))


def test_numbers_of_every_width():
    draw = random.Random(0)
    for width in range(1, 33):
        numbers = [draw.getrandbits(width) for _ in range(43)]
        bits = np.array([number >> bit & 1 for number in numbers for bit in range(width)], dtype=np.uint8)
        run = b"\x06" + (numbers[0]).to_bytes(-(-width // 8), "little")  # three times the first
        content = run + b"\x0d" + np.packbits(bits, bitorder="little").tobytes()  # six groups, the last cut short
        found = parquet_texts._numbers(PageContent(io.BytesIO(content), len(content)), width, 46)
        assert list(found) == [numbers[0]] * 3 + numbers


def test_the_chunk_knows_its_largest_page_and_dictionary(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, {"text": ["a" * 1000, "b" * 1000] * 100}, row_group_size=200)
    with open(path, "rb") as raw, parquet.ParquetFile(path) as file:
        chunk = text_chunk(raw, file.schema.column(0), file.metadata.row_group(0).column(0))
        assert 2008 < chunk.largest_page < 2500
