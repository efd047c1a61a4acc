"""Every format gives the same documents; shards are cut by the text alone; what cannot be read is named."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import random
import tracemalloc

import pyarrow as arrow
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from k2_megatron.data import sources
from k2_megatron.data.json_lines import parse_lines
from k2_megatron.data.readers import documents, pieces
from k2_megatron.data.sources import find_sources
from k2_megatron.data.xz_file import XzFile
from k2_megatron.data.zstandard_file import ZstandardFile

TEXTS = ["one", "", "two\nlines", "naïve 🙂 <s>", "x" * 500, "last"]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def compressed(folder):
    (folder / "a.jsonl").write_bytes(LINES)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(LINES))
    (folder / "c.jsonl.xz").write_bytes(lzma.compress(LINES))
    frames = zstandard.compress(LINES[:100]) + zstandard.compress(LINES[100:])  # several frames, as pzstd writes
    (folder / "d.jsonl.zst").write_bytes(frames)
    parquet.write_table(arrow.table({"text": TEXTS, "id": range(len(TEXTS))}), folder / "e.parquet", row_group_size=2)
    return folder


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.jsonl.zst", "e.parquet"])
def test_every_format_gives_the_same_documents(tmp_path, name):
    assert list(documents(find_sources([str(compressed(tmp_path) / name)]), "text")) == TEXTS


def test_a_text_file_is_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("whole\nfile\n", encoding="utf-8")
    assert list(documents(find_sources([str(tmp_path)]), "text")) == ["whole\nfile\n"]


def test_folders_globs_and_files_are_found_once_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    compressed(tmp_path / "sub")
    (tmp_path / "notes.md").write_text("not data", encoding="utf-8")
    by_folder = [source.name for source in find_sources([str(tmp_path)])]
    assert by_folder == ["sub/a.jsonl", "sub/b.jsonl.gz", "sub/c.jsonl.xz", "sub/d.jsonl.zst", "sub/e.parquet"]
    by_glob = find_sources([str(tmp_path / "sub" / "*.jsonl*"), str(tmp_path / "sub" / "a.jsonl")])
    assert [source.name for source in by_glob] == ["a.jsonl", "b.jsonl.gz", "c.jsonl.xz", "d.jsonl.zst"]
    with pytest.raises(ValueError, match=r"no text file there; give \.jsonl"):
        find_sources([str(tmp_path / "*.md")])


def test_a_pattern_of_two_stars_goes_to_every_depth(tmp_path):
    (tmp_path / "d/one/two").mkdir(parents=True)
    for folder in ("d", "d/one", "d/one/two"):
        (tmp_path / folder / "a.jsonl").write_bytes(LINES)
    found = find_sources([str(tmp_path / "d/**/*.jsonl")])
    assert [source.name for source in found] == ["a.jsonl", "one/a.jsonl", "one/two/a.jsonl"]


@pytest.mark.parametrize("name", ["q[1].jsonl", "what?.jsonl", "star*.jsonl"])
def test_a_file_whose_name_looks_like_a_pattern_is_found(tmp_path, name):
    folder = tmp_path / "d[0]"
    folder.mkdir()
    for file in (name, "star two.jsonl"):
        (folder / file).write_bytes(LINES)
    assert [source.name for source in find_sources([str(folder / name)])] == [name]


def test_two_files_of_one_name_are_refused(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match="have one name"):
        find_sources([str(tmp_path / "x"), str(tmp_path / "y")])


def names(folder, **inputs) -> list[str]:
    return [source.name for source in find_sources([str(folder)], **inputs)]


def test_linked_folders_are_entered_and_links_in_a_circle_end(tmp_path):
    for folder in ("d/one", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.jsonl").write_bytes(LINES)
    (tmp_path / "d/two").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "d/one")
    (tmp_path / "d/one/there").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/one/self").symlink_to(tmp_path / "d")
    below_one = ["one/a.jsonl", "one/there/a.jsonl"]
    assert names(tmp_path / "d") == [*below_one, "two/a.jsonl", "two/back/a.jsonl"]


def test_a_pattern_goes_through_links_and_not_in_a_circle(tmp_path, monkeypatch):
    """Python's glob follows a link to its own folder 40 times; and it says nothing of folders that it matches."""
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for folder in ("d", "d/sub", "elsewhere"):
        (tmp_path / folder / "a.jsonl").write_bytes(LINES)
    (tmp_path / "d/loop").symlink_to(".")
    (tmp_path / "d/linked").symlink_to(tmp_path / "elsewhere")
    expected = ["a.jsonl", "linked/a.jsonl", "sub/a.jsonl"]
    assert names(tmp_path / "d/**/*.jsonl") == expected
    monkeypatch.chdir(tmp_path / "d")
    assert names("**/*.jsonl") == expected
    told: list[str] = []
    assert names("*", announce=told.append) == ["a.jsonl"]
    assert told[0].startswith("1 text file (3 others passed over, first: ")


def test_a_folder_that_cannot_be_read_is_not_left_out(tmp_path, monkeypatch):
    """The tests may run as root, whom no mode keeps out."""
    for folder in ("open", "shut"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_bytes(LINES)
    scandir = os.scandir

    def refusing(folder):
        if str(folder).endswith("shut"):
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"shut: cannot be read \(Permission denied\).*have it readable"):
        find_sources([str(tmp_path)])


@pytest.mark.parametrize("asked", ["", "b.jsonl.gz", "*"])
def test_a_link_to_nothing_is_refused_where_it_is_named_like_a_text(tmp_path, asked):
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "notes").symlink_to(tmp_path / "gone")
    assert names(tmp_path) == ["a.jsonl"]
    (tmp_path / "b.jsonl.gz").symlink_to(tmp_path / "gone.jsonl.gz")
    with pytest.raises(ValueError, match=r"b\.jsonl\.gz: cannot be read \(No such file or directory\); put back"):
        find_sources([str(tmp_path / asked)])


def test_what_is_passed_over_in_a_folder_is_told(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.ndjson", "d.JSONL", "e.jsonl.bz2", "._a.jsonl", ".checkpoints/a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    os.mkfifo(tmp_path / "f.jsonl")
    told: list[str] = []
    assert names(tmp_path, announce=told.append) == ["a.jsonl", "b.jsonl"]
    assert names(tmp_path / "a.jsonl", announce=told.append) == ["a.jsonl"]
    assert names(tmp_path / "._a.jsonl") == ["._a.jsonl"], "what is named is taken"
    assert told == [f"2 text files (6 others passed over, first: {tmp_path}/c.ndjson)", "1 text file"]


@pytest.mark.parametrize("turned", [1, -1])
def test_inputs_that_overlap_are_refused(tmp_path, turned):
    (tmp_path / "d/sub").mkdir(parents=True)
    (tmp_path / "d/sub/a.jsonl").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"d/sub/a\.jsonl \(of .*d/sub/a\.jsonl \(of .*are one file.*leave out one"):
        find_sources([str(tmp_path / "d"), str(tmp_path / "d/sub")][::turned])
    (tmp_path / "d/b.jsonl").symlink_to("sub/a.jsonl")
    inside = [str(tmp_path / "d"), str(tmp_path / "d/b.jsonl")][::turned]
    assert [source.name for source in find_sources(inside[:1])] == (
        ["b.jsonl", "sub/a.jsonl"][: 2 if turned > 0 else 1]
    )
    assert [source.name for source in find_sources([inside[0], inside[0]])] == [
        s.name for s in find_sources(inside[:1])
    ]


def shards_of(path, shard_bytes, plain):
    """Texts of each shard, a plain file entered at each shard anew."""
    (source,) = find_sources([str(path)])
    found: dict[int, list[str]] = {}
    count = -(-source.size // shard_bytes)
    runs = [(shard, shard) for shard in range(count)] if plain else [(0, None)]
    for first, last in runs:
        for piece in pieces(source, ["text"], shard_bytes, first, last):
            found.setdefault(piece.shard, []).extend(piece.texts["text"])
    return {shard: texts for shard, texts in found.items() if texts}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=30),
    shard_bytes=st.integers(1, 200),
    piece_bytes=st.integers(1, 150),
    newline_at_end=st.booleans(),
)
def test_shards_are_cut_at_the_same_lines_whatever_the_compression(
    tmp_path_factory, lengths, shard_bytes, piece_bytes, newline_at_end
):
    folder = tmp_path_factory.mktemp("shards")
    texts = [chr(97 + number % 26) * length for number, length in enumerate(lengths)]
    content = "\n".join(json.dumps({"text": text}) for text in texts).encode() + b"\n" * newline_at_end
    (folder / "a.jsonl").write_bytes(content)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(content))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_BYTES", piece_bytes)
        plain = shards_of(folder / "a.jsonl", shard_bytes, plain=True)
        packed = shards_of(folder / "a.jsonl.gz", shard_bytes, plain=False)
    assert plain == packed
    assert [text for shard in sorted(plain) for text in plain[shard]] == texts


def test_parquet_is_entered_at_a_shard(tmp_path):
    parquet.write_table(arrow.table({"text": [str(n) for n in range(10)]}), tmp_path / "a.parquet", row_group_size=2)
    (source,) = find_sources([str(tmp_path / "a.parquet")])
    whole = [(piece.shard, list(piece.texts["text"])) for piece in pieces(source, ["text"], 1, 0, None)]
    assert whole == [(shard, [str(2 * shard), str(2 * shard + 1)]) for shard in range(5)]
    assert [(p.shard, list(p.texts["text"])) for p in pieces(source, ["text"], 1, 3, None)] == whole[3:]
    with pytest.raises(ValueError, match=r"no column 'body'; it has text \(--json-keys\)"):
        list(pieces(source, ["body"], 1, 0, None))


def test_parquet_pieces_are_bounded_by_bytes_and_too_long_rows_rejected(tmp_path, monkeypatch):
    texts = [chr(97 + number % 26) * 40_000 for number in range(1000)]  # all of one dictionary: small on disk
    texts[500] = "y" * 300_001
    parquet.write_table(arrow.table({"text": texts, "body": texts}), tmp_path / "a.parquet", use_dictionary=["body"])
    (source,) = find_sources([str(tmp_path / "a.parquet")])
    monkeypatch.setattr(sources, "PIECE_BYTES", 400_000)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 300_000)
    for key in ("text", "body"):
        found, line = [], 0
        for piece in pieces(source, [key], 1 << 30, 0, None):
            assert sum(map(len, piece.raw)) <= 440_000
            assert [line + row for row, _ in piece.rejected] == [500] * (line <= 500 < line + piece.lines)
            line += piece.lines
            found += piece.texts[key]
        assert line == 1000
        assert found == texts[:500] + texts[501:]


def test_bad_lines_are_listed_with_reasons():
    bad = [b"not json", b"[1]", b'{"body": "x"}', b'{"text": 5}', b'{"text": null}', b'{"text": "\xff"}']
    block = b'{"text": "good"}\n\n' + b"\n".join(bad) + b'\n{"text": "\\ud800"}\n{"text": "end"}'
    piece = parse_lines(block, ["text"], 0)
    assert list(piece.texts["text"]) == ["good", "end"]
    assert piece.blank == [1]
    assert [line for line, _ in piece.rejected] == [2, 3, 4, 5, 6, 7, 8]
    reasons = [reason for _, reason in piece.rejected]
    assert reasons[1:5] == [
        "not an object but list",
        "has no 'text'",
        "'text' is int, not a string",
        "'text' is NoneType, not a string",
    ]
    assert all(reason.startswith("not JSON") for reason in (reasons[0], *reasons[5:]))
    assert piece.lines == 10


@pytest.mark.parametrize("at_end", [False, True])
def test_a_line_without_end_is_rejected_within_bounds(tmp_path, monkeypatch, at_end):
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    monkeypatch.setattr(sources, "MAX_DOCUMENT_BYTES", 256)
    long = json.dumps({"text": "y" * 5000}).encode()
    after = b"" if at_end else b'\n{"text": "after"}\n'
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n' + long + after)
    (source,) = find_sources([str(tmp_path / "a.jsonl")])
    found = list(pieces(source, ["text"], 1 << 30, 0, None))
    assert [text for piece in found for text in piece.texts["text"]] == ["one"] + ["after"] * (not at_end)
    assert [reason[:12] for piece in found for _, reason in piece.rejected] == ["longer than "]
    assert sum(piece.lines for piece in found) == 3 - at_end


@pytest.mark.parametrize("begin", [10, 60, 100, 120])
def test_room_is_made_once_before_a_long_line_wherever_it_begins(tmp_path, monkeypatch, begin):
    """Of a block that is larger than what is read at once."""
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    monkeypatch.setattr(sources, "ROOM_BYTES", 64)
    before = json.dumps({"text": ""}).encode()
    before = before.replace(b'""', b'"' + b"x" * (begin - len(before) - 1) + b'"') + b"\n"
    (tmp_path / "a.jsonl").write_bytes(before + json.dumps({"text": "y" * 1000}).encode() + b"\n")
    (source,) = find_sources([str(tmp_path / "a.jsonl")])
    made = []
    found = list(pieces(source, ["text"], 1 << 30, 0, None, lambda: made.append(1), 128))
    assert sum(piece.lines for piece in found) == 2
    assert len(made) == 1


def test_documents_stops_at_a_bad_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\nbroken\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 2: not JSON"):
        list(documents(find_sources([str(tmp_path / "a.jsonl")]), "text"))


CUT = {".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", CUT)
@pytest.mark.parametrize("cut", [1, 0.5, 0])
def test_a_compressed_file_cut_short_is_never_taken_for_whole(tmp_path, suffix, cut):
    """Cut by its last byte, in the middle, or not at all; a second frame stays whole."""
    content = CUT[suffix](LINES * 50)
    end = len(content) - cut if cut != 0.5 else len(content) // 2
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(CUT[suffix](LINES) + content[:end])
    if cut == 0:
        assert list(documents(find_sources([str(path)]), "text")) == TEXTS * 51
        return
    with pytest.raises(ValueError, match=rf"a\.jsonl\{suffix}: cannot be read to its end \(EOFError.*make or fetch it"):
        list(documents(find_sources([str(path)]), "text"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt.zst"])
def test_a_compressed_file_of_no_bytes_is_never_taken_for_whole(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name}: cannot be read to its end \(EOFError: cut short: it has no bytes"):
        list(documents(find_sources([str(tmp_path)]), "text"))


XZ = lzma.compress(LINES)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (XZ + bytes(4) + XZ + bytes(8), None),
        (XZ + bytes(70_000) + XZ, None),  # over the edge of what is read at once
        (XZ + bytes([XZ[0] ^ 1]) + XZ[1:], "LZMAError"),
        (XZ + XZ[:1], "EOFError"),
        (XZ + XZ[:-1] + bytes([XZ[-1] ^ 1]), "LZMAError"),
        (XZ + bytes(3) + XZ, "ValueError: 3 zero bytes follow"),
        (XZ + bytes(4) + XZ + bytes(66_001), "ValueError: 66001 zero bytes follow"),
        (XZ + b"\n", "EOFError"),
        (XZ + b"what else a writer appended", "LZMAError"),
        (bytes(4) + XZ, "LZMAError"),
    ],
)
def test_every_stream_of_an_xz_file_is_read_or_the_file_is_refused(tmp_path, content, problem):
    (tmp_path / "a.jsonl.xz").write_bytes(content)
    if problem is None:
        assert list(documents(find_sources([str(tmp_path)]), "text")) == TEXTS * 2
        return
    with pytest.raises(ValueError, match=rf"a\.jsonl\.xz: cannot be read to its end \({problem}"):
        list(documents(find_sources([str(tmp_path)]), "text"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.txt.gz", "a.parquet"])
def test_a_file_of_another_kind_than_its_name_says_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(LINES)
    with pytest.raises(ValueError, match=rf"{name}: cannot be read to its end \(.*leave it out of --input"):
        list(documents(find_sources([str(tmp_path)]), "text"))


def zstandard_frames(content: bytes) -> bytes:
    """Frames of every make: with and without size, checksum, blocks; raw, repeated and compressed; skippable; empty."""
    parameters = zstandard.ZstdCompressionParameters
    makes = [(True, True, 17), (True, False, 17), (False, True, 10), (False, False, 10), (False, True, 22)]
    frames = [b"\x53\x2a\x4d\x18\x05\x00\x00\x00other"]
    for size, checksum, window in makes:
        settings = parameters(write_content_size=size, write_checksum=checksum, window_log=window)
        stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
        frames.append(stream.compress(content) + stream.flush())
    return b"".join([*frames, zstandard.compress(b""), zstandard.compress(content, 19)])


def test_zstandard_frames_of_every_make():
    noise, lines = random.Random(0).randbytes(300_000), LINES * 500
    content = lines + noise + b" " * 700_000
    file = ZstandardFile(io.BytesIO(zstandard_frames(content)))
    assert io.BufferedReader(file, 1000).read() == content * 6


@pytest.mark.parametrize("window", [27, 28])
def test_a_zstandard_window_beyond_128_mib_is_refused_with_what_to_do(tmp_path, window):
    settings = zstandard.ZstdCompressionParameters(window_log=window, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    (tmp_path / "a.jsonl.zst").write_bytes(stream.compress(LINES) + stream.flush())
    (source,) = find_sources([str(tmp_path)])
    if window == 27:
        assert (
            b"".join(bytes(raw) for piece in pieces(source, ["text"], 1 << 30, 0, None) for raw in piece.raw) == LINES
        )
        return
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: .*window is 256 MiB .*with 128 or less: zstd -d --long=31"):
        list(pieces(source, ["text"], 1 << 30, 0, None))


@pytest.mark.parametrize(("window", "taken"), [(26, ["y" * 5000, "after"]), (27, ["after"])])
@pytest.mark.parametrize("kind", ["jsonl", "txt"])
def test_behind_a_large_zstandard_window_there_is_less_room_for_a_document(tmp_path, monkeypatch, window, taken, kind):
    monkeypatch.setattr(sources, "PIECE_BYTES", 64)
    monkeypatch.setattr(sources, "MAX_BEHIND_LARGE_WINDOW_BYTES", 4096)
    lines = [json.dumps({"text": text}) for text in ("y" * 5000, "after")] if kind == "jsonl" else ["y" * 5000]
    settings = zstandard.ZstdCompressionParameters(window_log=window, write_content_size=False)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    content = stream.compress("\n".join(lines).encode()) + stream.flush()
    (tmp_path / f"a.{kind}.zst").write_bytes(content)
    (source,) = find_sources([str(tmp_path)])
    found = list(pieces(source, ["text"], 1 << 30, 0, None))
    assert [str(text) for piece in found for text in piece.texts["text"]] == (taken if kind == "jsonl" else taken[:-1])
    assert [reason for piece in found for _, reason in piece.rejected] == [
        "longer than 0 MiB, behind zstandard's window of 128 MiB: compress the file with a smaller one (zstd -19)"
    ] * (window == 27)


@pytest.mark.parametrize("seed", range(200))
def test_a_zstandard_file_cut_or_changed_anywhere_is_found(seed):
    draw = random.Random(seed)
    settings = zstandard.ZstdCompressionParameters(write_checksum=True)
    frame = zstandard.ZstdCompressor(compression_params=settings).compress(LINES * 40)
    whole = bytearray(frame + frame)
    if seed % 2:
        place = draw.randrange(len(whole))
        whole[place] ^= 1 << draw.randrange(8)
        error = (ValueError, EOFError)
    else:
        del whole[draw.choice([0, len(frame)]) + draw.randrange(1, len(frame)) :]
        error = EOFError
    try:
        content = ZstandardFile(io.BytesIO(whole)).readall()
    except error:
        return
    assert seed % 2, "cut and not found"
    assert content == LINES * 80  # of a header, bits that mean nothing or ask for a larger window


@pytest.mark.parametrize(("compress", "opened"), [(zstandard.compress, ZstandardFile), (lzma.compress, XzFile)])
def test_bounded_content_at_a_time(compress, opened):
    """16 KiB of zstandard may hold half a GiB, 64 KiB of xz 400 MiB."""
    packed = compress(bytes(32 << 20))
    assert len(packed) < 16 << 10
    tracemalloc.start()
    try:
        file = io.BufferedReader(opened(io.BytesIO(packed)), sources.READ_BYTES)
        assert file.read(3 << 20) == bytes(3 << 20)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 << 20
