"""Token files: Megatron's bytes, whatever the workers, parts, kills and bad lines on the way."""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from token_corpora import make_job, outputs, write_jsonl
from tokenizers import Tokenizer

from k2_megatron.data import gigatoken_encoder, long_texts, readers, shards, store
from k2_megatron.data.documents import line_of_document
from k2_megatron.data.long_texts import UNBROKEN_BYTES
from k2_megatron.data.manifest import manifest_of_foreign_files, manifest_path, open_token_files, read_manifest
from k2_megatron.data.preprocess import preprocess
from k2_megatron.data.shards import ShardMaker
from k2_megatron.data.source_check import check_sources
from k2_megatron.data.store import TokenWriter


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, speeches) -> Path:
    """A folder of three files: plain lines with blank and bad ones between, compressed lines, and an empty document."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "a.jsonl", speeches[:20])
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b'\n{"text": ""}\nnot json\n{"text": "the last <s> of a"}')
    lines = [json.dumps({"text": text}) for text in speeches[20:]]
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, '{"body": 1}', lines[0]]).encode(), mtime=0))
    (folder / "c.txt").write_text(speeches[5], encoding="utf-8")
    return folder


def run(corpus, tokenizer, prefix, *, workers=1, part=(0, 1), merge_only=False, **changes):
    job = make_job([corpus], tokenizer, prefix, **changes)
    return preprocess(job, workers=workers, max_bad_fraction=0.1, part=part, merge_only=merge_only)


def test_output_is_byte_identical_to_megatrons_procedure(tmp_path, speeches, hugging_face_twin):
    """Megatron's tool: tokenize each document, append the end where there are ids, add_document, finalize."""
    texts = [*speeches, "", "a <s> literal", " ", speeches[0]]
    run(write_jsonl(tmp_path / "in.jsonl", texts), hugging_face_twin, tmp_path / "ours")
    tokenizer = Tokenizer.from_file(hugging_face_twin)
    tokenizer.encode_special_tokens = True
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint16)
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        ids = [*ids, 2] if ids else ids
        builder.add_document(torch.tensor(ids), [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"ours_text_document{suffix}").read_bytes()
        assert ours == (tmp_path / f"theirs{suffix}").read_bytes()


def test_sentencepiece_and_its_twin_give_the_same_files(tmp_path, corpus, sentencepiece_model, hugging_face_twin):
    for name, tokenizer in (("one", sentencepiece_model), ("other", hugging_face_twin)):
        run(corpus, tokenizer, tmp_path / name / "x")
    for suffix in (".bin", ".idx", ".xxh3"):
        one, other = (tmp_path / name / f"x_text_document{suffix}" for name in ("one", "other"))
        assert one.read_bytes() == other.read_bytes()


def test_counts_rejects_and_where_documents_came_from(tmp_path, corpus, toy_tokenizer, speeches):
    totals = run(corpus, toy_tokenizer, tmp_path / "x")
    files, manifest = open_token_files(tmp_path / "x_text_document")
    assert (totals["documents"], totals["rejected"]) == (len(speeches) + 4, 2)
    assert files[0].documents == totals["documents"]
    assert files[0].token_count == totals["tokens"] == manifest["tokens"]
    rejects = [json.loads(line) for line in (tmp_path / "x.rejects.jsonl").read_text().splitlines()]
    assert [(reject["file"], reject["line"]) for reject in rejects] == [("a.jsonl", 23), ("b.jsonl.gz", 21)]
    assert [source["documents"] for source in manifest["sources"]] == [22, 21, 1]
    name = "x_text_document"
    expected = {0: ("a.jsonl", 1), 19: ("a.jsonl", 20), 20: ("a.jsonl", 22), 21: ("a.jsonl", 24)}
    expected |= {22: ("b.jsonl.gz", 1), 41: ("b.jsonl.gz", 20), 42: ("b.jsonl.gz", 22), 43: ("c.txt", 1)}
    assert {document: line_of_document(manifest, name, document) for document in expected} == expected


def test_workers_shards_and_compression_do_not_change_the_tokens(tmp_path, corpus, toy_tokenizer):
    run(corpus, toy_tokenizer, tmp_path / "one" / "x")
    small = {"shard_bytes": 9000}
    run(corpus, toy_tokenizer, tmp_path / "two" / "x", workers=2, **small)
    run(corpus, toy_tokenizer, tmp_path / "three" / "x", workers=1, **small)
    one, two, three = (outputs(tmp_path / name) for name in ("one", "two", "three"))
    assert two == three
    tokens = [name for name in one if name.endswith((".bin", ".idx", ".xxh3", ".rejects.jsonl"))]
    assert len(tokens) == 4
    assert all(one[name] == two[name] for name in tokens)


def test_the_parent_of_workers_loads_no_encoder(tmp_path, corpus, toy_tokenizer, monkeypatch):
    """What encodes is told once, by the first worker that knows."""

    def make_encoder(*_):
        raise AssertionError("the parent made an encoder")

    monkeypatch.setattr(shards, "make_encoder", make_encoder)
    said = []
    job = make_job([corpus], toy_tokenizer, tmp_path / "x", shard_bytes=20_000)
    preprocess(job, workers=2, max_bad_fraction=0.1, announce=said.append)
    assert said == ["encoder: gigatoken (gives the same ids as tokenizers)"]


def test_a_file_goes_to_the_disk_while_it_is_written(tmp_path, monkeypatch):
    """Each byte once, in order, but for the last few that the commit waits for."""
    handed_over = []
    monkeypatch.setattr(store, "WRITE_BACK_BYTES", 1000)
    monkeypatch.setattr(store, "start_writing_back", lambda _, first, size: handed_over.append((first, size)))
    file = store.HashedWriter(tmp_path / "x.bin")
    for size in (999, 1, 2500, 10, 995):
        file.write(bytes(size))
    assert handed_over == [(0, 1000), (1000, 2500), (3500, 1005)]
    monkeypatch.undo()
    file.hand_over()  # the system's own call
    file.commit(durable=True)
    assert (tmp_path / "x.bin").stat().st_size == 4505


def test_parts_do_not_change_the_shards(tmp_path, corpus, toy_tokenizer):
    """3 parts in any order, then a merge, against one run: the same files, manifest included."""
    settings = {"one_file": False, "shard_bytes": 9000}
    run(corpus, toy_tokenizer, tmp_path / "whole" / "x", **settings)
    for index in (2, 0):
        assert run(corpus, toy_tokenizer, tmp_path / "parts" / "x", part=(index, 3), **settings) is None
    with pytest.raises(ValueError, match="is not done; run the same command"):
        run(corpus, toy_tokenizer, tmp_path / "parts" / "x", merge_only=True, **settings)
    run(corpus, toy_tokenizer, tmp_path / "parts" / "x", part=(1, 3), **settings)
    run(corpus, toy_tokenizer, tmp_path / "parts" / "x", merge_only=True, **settings)
    whole = outputs(tmp_path / "whole")
    assert len([name for name in whole if name.endswith(".bin")]) > 5
    assert outputs(tmp_path / "parts") == whole


def test_outputs_below_the_input_are_not_read(tmp_path, corpus, toy_tokenizer):
    """Records, rejects and manifests are named like text; they are there when the second part and the merge begin."""
    folder = shutil.copytree(corpus, tmp_path / "in")
    settings = {"one_file": False, "shard_bytes": 9000}
    run(corpus, toy_tokenizer, tmp_path / "clean" / "x", **settings)
    for index in range(2):
        run(folder, toy_tokenizer, folder / "tokens" / "x", part=(index, 2), **settings)
    run(folder, toy_tokenizer, folder / "tokens" / "x", merge_only=True, **settings)
    totals = run(folder, toy_tokenizer, folder / "tokens" / "x", **settings)
    assert (folder / "tokens/x.rejects.jsonl").is_file()
    assert totals["rejected"] == 2
    assert outputs(folder / "tokens") == outputs(tmp_path / "clean")


def test_a_document_that_is_read_and_not_written_ends_the_run(tmp_path, corpus, toy_tokenizer, monkeypatch):
    def add(self, ids, lengths, end, *, real=TokenWriter.add):
        return real(self, ids[: lengths[:-1].sum()], lengths[:-1], end)

    monkeypatch.setattr(TokenWriter, "add", add)
    with pytest.raises(RuntimeError, match=r"a\.jsonl: 22 documents read in shard 0 and 21 written: a fault"):
        run(corpus, toy_tokenizer, tmp_path / "x")
    assert not (tmp_path / "x.shards").exists()


def test_several_keys_become_several_files(tmp_path, toy_tokenizer, speeches):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"q": t[:50], "a": t[50:]}) + "\n" for t in speeches), encoding="utf-8")
    run(source, toy_tokenizer, tmp_path / "x", keys=("q", "a"))
    counts = [open_token_files(tmp_path / f"x_{key}_document")[0][0].documents for key in ("q", "a")]
    assert counts == [len(speeches)] * 2


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kill_at", range(1, 11))
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path, corpus, toy_tokenizer, monkeypatch, kill_at):
    """The run dies at its kill_at-th rename (tokens, index, hashes or record of a shard, or of the merge)."""
    settings = {"shard_bytes": 20_000}
    encoded: list[str] = []
    monkeypatch.setattr(ShardMaker, "encode", counting(ShardMaker.encode, encoded))
    run(corpus, toy_tokenizer, tmp_path / "clean" / "x", **settings)
    whole = len(encoded)  # one piece a shard
    renames = []

    def replace(source, target, *, real=os.replace):
        renames.append(target)
        if len(renames) == kill_at * 3:
            raise Killed
        real(source, target)

    with mock.patch.object(os, "replace", replace), pytest.raises(Killed):
        run(corpus, toy_tokenizer, tmp_path / "killed" / "x", **settings)
    encoded.clear()
    run(corpus, toy_tokenizer, tmp_path / "killed" / "x", **settings)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "clean")
    finished = (kill_at * 3 - 1) // 4  # a shard is three renames of files and one of its record
    assert len(encoded) <= max(0, whole - finished), "finished shards were made again"


@pytest.mark.parametrize("one_file", [True, False])
def test_a_run_killed_while_it_tidies_up_tidies_up_the_next_time(tmp_path, corpus, toy_tokenizer, one_file):
    settings = {"shard_bytes": 9000, "one_file": one_file}
    run(corpus, toy_tokenizer, tmp_path / "clean" / "x", **settings)
    removed = []

    def unlink(path, *, real=os.unlink, **arguments):
        removed.append(path)
        if len(removed) == 5:
            raise Killed
        real(path, **arguments)

    with mock.patch.object(os, "unlink", unlink), pytest.raises(Killed):
        run(corpus, toy_tokenizer, tmp_path / "killed" / "x", **settings)
    assert (tmp_path / "killed/x_text_document.manifest.json").is_file()
    run(corpus, toy_tokenizer, tmp_path / "killed" / "x", **settings)
    assert outputs(tmp_path / "killed") == outputs(tmp_path / "clean")
    assert not (tmp_path / "killed/x.shards").exists()


def test_a_merge_leaves_the_open_files_of_other_jobs(tmp_path, corpus, toy_tokenizer):
    """Of a prefix that begins with this one's, of a key that begins with this one's; its own go."""
    others = ["x2_text_document.00000.0000.bin", "x_text_document2_document.manifest.json", "x_more.shards"]
    others = [f"{name}.0a1b2c3d.partial" for name in others]
    own = ["x_text_document.00000.0000.bin.0a1b2c3d.partial", "x_text_document.manifest.json.0a1b2c3d.partial"]
    for name in others + own:
        (tmp_path / name).touch()
    run(corpus, toy_tokenizer, tmp_path / "x", shard_bytes=9000)
    assert sorted(path.name for path in tmp_path.glob("*.partial")) == sorted(others)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_resumed_run_reports_what_the_clean_one_did(tmp_path, speeches, toy_tokenizer, name):
    """Documents with the rejected ones, and every byte once: --max-bad-fraction and the bar go by them."""
    content = b"broken\n" + "".join(json.dumps({"text": text}) + "\n" for text in speeches[:9]).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    def totals(prefix):
        reports = []
        job = make_job([tmp_path / name], toy_tokenizer, prefix, shard_bytes=9000)
        preprocess(job, workers=1, max_bad_fraction=0.1, report=reports.append)
        return [sum(getattr(one, field) for one in reports) for field in ("bytes", "documents", "rejected")]

    def dies_at_the_third_record(source, target, *, real=os.replace):
        if "0002.json" in str(target):
            raise Killed
        real(source, target)

    clean = totals(tmp_path / "clean")
    assert clean[1:] == [10, 1]
    with mock.patch.object(os, "replace", dies_at_the_third_record), pytest.raises(Killed):
        totals(tmp_path / "killed")
    assert totals(tmp_path / "killed") == clean


def counting(encode, calls):
    def counted(self, texts, where):
        calls.append(where)
        return encode(self, texts, where)

    return counted


def test_too_many_bad_lines_stop_with_the_list(tmp_path, toy_tokenizer, speeches):
    source = write_jsonl(tmp_path / "in.jsonl", speeches[:8])
    with open(source, "a", encoding="utf-8") as file:
        file.write("broken\n[]\n")
    job = make_job([source], toy_tokenizer, tmp_path / "x")
    with pytest.raises(ValueError, match=r"2 of 10 documents rejected.*in\.jsonl line 9: not JSON.*line 10: not an"):
        preprocess(job, workers=1, max_bad_fraction=0.1)
    assert not list(tmp_path.glob("*.bin.*")), "half-written files remain"
    assert preprocess(job, workers=1, max_bad_fraction=0.2)["rejected"] == 2


def test_a_document_that_can_only_be_encoded_at_once_is_rejected_and_listed(tmp_path, toy_tokenizer, monkeypatch):
    """Under every key; where more is allowed its ids are made, and the shards that lost none to the limit are kept."""
    monkeypatch.setattr(long_texts, "LONG_TEXT_BYTES", 100)
    monkeypatch.setattr(readers, "LONG_LINE_BYTES", 100)
    whole = "word " * 10 + "\n" * 1500
    lines = [{"text": "one", "body": "two"}, {"text": "three", "body": whole}, {"text": whole * 4, "body": "four"}]
    for number, line in enumerate(lines):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    settings = ([tmp_path / f"{number}.jsonl" for number in range(3)], toy_tokenizer, tmp_path / "x")
    job = make_job(*settings, keys=("text", "body"), unbroken_bytes=1000)
    with pytest.raises(
        ValueError,
        match=r"2 of 3 documents.*1\.jsonl line 1: more than 0 MiB of it can only be encoded at once.*2\.jsonl",
    ):
        preprocess(job, workers=1, max_bad_fraction=0.5)
    assert preprocess(job, workers=1, max_bad_fraction=0.7)["rejected"] == 2
    assert all(read_manifest(manifest_path(job.output(key)))["documents"] == 1 for key in job.keys)
    more = dataclasses.replace(job, unbroken_bytes=2000)
    with pytest.raises(ValueError, match="made by another run"):  # the records are gone
        preprocess(more, workers=1, max_bad_fraction=0.7)
    for prefix in ("y", "z"):
        (tmp_path / prefix).mkdir()
    again, clean = (dataclasses.replace(more, prefix=str(tmp_path / prefix / "x")) for prefix in ("y", "z"))
    with pytest.raises(ValueError, match="2 of 3 documents"):
        preprocess(dataclasses.replace(again, unbroken_bytes=1000), workers=1, max_bad_fraction=0.5)
    reports = []
    assert preprocess(again, workers=1, max_bad_fraction=0.5, report=reports.append)["rejected"] == 1
    assert [(report.earlier, report.rejected) for report in reports] == [(True, 0), (False, 0), (False, 1)]
    preprocess(clean, workers=1, max_bad_fraction=0.5)
    assert outputs(tmp_path / "y") == outputs(tmp_path / "z")


def test_a_limit_below_the_one_that_shards_were_made_under_is_refused(tmp_path, corpus, toy_tokenizer):
    """Who forgets the option loses neither documents nor what was made; one that changes nothing is the same job."""
    larger, settings = UNBROKEN_BYTES + 1, {"one_file": False, "shard_bytes": 9000}
    run(corpus, toy_tokenizer, tmp_path / "x", part=(0, 2), unbroken_bytes=larger, **settings)
    for merge_only in (False, True):
        with pytest.raises(ValueError, match=f"with --max-unbroken-size {larger}, this run's is .*; give at least"):
            run(corpus, toy_tokenizer, tmp_path / "x", merge_only=merge_only, **settings)
    made = run(corpus, toy_tokenizer, tmp_path / "x", unbroken_bytes=larger, **settings)
    assert run(corpus, toy_tokenizer, tmp_path / "x", unbroken_bytes=larger + 1, **settings) == made
    with pytest.raises(ValueError, match="made by another run"):
        run(corpus, toy_tokenizer, tmp_path / "x", **settings)


def test_a_run_without_the_compiled_module_says_so(tmp_path, corpus, toy_tokenizer, monkeypatch):
    monkeypatch.setattr("k2_megatron.data.preprocess.compiled", lambda: None)
    said: list[str] = []
    preprocess(make_job([corpus], toy_tokenizer, tmp_path / "x"), workers=1, max_bad_fraction=1.0, announce=said.append)
    assert "is not built: lines are read slower, a long one may take more memory" in said[0]


@pytest.mark.parametrize("prefix", ["file/x", "file/deeper/x"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, corpus, toy_tokenizer, prefix):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output-prefix .*: its folder cannot be made \(.*\); choose a prefix"):
        run(corpus, toy_tokenizer, tmp_path / prefix)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_token_files_of_megatrons_tool_are_not_overwritten(tmp_path, corpus, toy_tokenizer, suffix):
    foreign = tmp_path / f"x_text_document{suffix}"
    foreign.write_bytes(b"theirs")
    with mock.patch.object(ShardMaker, "run", side_effect=AssertionError("before any work")):
        with pytest.raises(ValueError, match=r"x_text_document\..*: exists, and nothing tells that this tool made it"):
            run(corpus, toy_tokenizer, tmp_path / "x")
    assert outputs(tmp_path) == {foreign.name: b"theirs"}
    run(corpus, toy_tokenizer, tmp_path / "y")
    made = outputs(tmp_path)
    manifest_path(tmp_path / "y_text_document").unlink()  # the documented way to make all again
    run(corpus, toy_tokenizer, tmp_path / "y")
    assert outputs(tmp_path) == made


def test_a_folder_that_is_only_read_is_named_where_there_is_work_to_do(tmp_path, corpus, toy_tokenizer):
    """The tests may run as root, whom no mode keeps out."""
    made = run(corpus, toy_tokenizer, tmp_path / "x")
    with mock.patch.object(os, "access", return_value=False):
        assert run(corpus, toy_tokenizer, tmp_path / "x") == made
        with pytest.raises(ValueError, match=r"--output-prefix .*/y: its folder is not yours to write to; choose"):
            run(corpus, toy_tokenizer, tmp_path / "y")


@pytest.mark.parametrize("prefix", ["", "new/"])
def test_a_prefix_without_a_name_is_refused(tmp_path, corpus, toy_tokenizer, monkeypatch, prefix):
    """The outputs of "new/" would be hidden files and shards that no merge finds."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="ends without a name"):
        run(corpus, toy_tokenizer, prefix)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("key", ["meta/text", "meta/"])
def test_a_key_that_cannot_be_part_of_a_name_is_refused(tmp_path, corpus, toy_tokenizer, key):
    with pytest.raises(ValueError, match=f"--json-keys {key}: a key of the record itself.* such as text$"):
        run(corpus, toy_tokenizer, tmp_path / "x", keys=(key,))
    assert not list(tmp_path.iterdir())


def test_a_second_run_at_once_is_refused_and_does_the_first_no_harm(tmp_path, corpus, toy_tokenizer, monkeypatch):
    """The second would tidy away the open files of the first."""
    told = []

    def second(unused):
        if not told:
            told.append(1)
            with pytest.raises(ValueError, match="another process is making it; wait for that one"):
                run(corpus, toy_tokenizer, tmp_path / "x")

    job = make_job([corpus], toy_tokenizer, tmp_path / "x")
    assert preprocess(job, workers=1, max_bad_fraction=0.1, report=second)["rejected"] == 2
    assert told
    run(corpus, toy_tokenizer, tmp_path / "y")
    for suffix in (".bin", ".idx", ".xxh3"):
        one, other = (tmp_path / f"{name}_text_document{suffix}" for name in ("x", "y"))
        assert one.read_bytes() == other.read_bytes()
    assert not list(tmp_path.glob("*.shards")) and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("workers", [1, 2])
def test_far_too_many_bad_lines_stop_early_with_the_first_of_them(tmp_path, toy_tokenizer, workers):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text('\n{"body": "x"}\n' * 9_000, encoding="utf-8")
    job = make_job([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], toy_tokenizer, tmp_path / "x", shard_bytes=1 << 15)
    with pytest.raises(ValueError, match=r"of the first \d+ documents rejected, more than --max-bad-fraction 0\.1 can"):
        preprocess(job, workers=workers, max_bad_fraction=0.1)
    lines = [json.loads(line) for line in (tmp_path / "x.rejects.jsonl").read_text().splitlines()]
    assert [(line["file"], line["line"]) for line in lines] == [("a.jsonl", 2 * n + 2) for n in range(1000)]
    assert not list(tmp_path.glob("*.manifest.json"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_lines_first_are_no_reason_to_stop(tmp_path, toy_tokenizer, suffix):
    """Within the fraction in the end; of what is compressed nobody knows how many follow."""
    content = b"broken\n" * 1500 + b'{"text":"x"}\n' * 18_500
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(gzip.compress(content) if suffix else content)
    told: list[str] = []
    with mock.patch.object(gigatoken_encoder, "FEW_BYTES", 1 << 14):
        job = make_job([path], toy_tokenizer, tmp_path / "x")
        assert preprocess(job, workers=1, max_bad_fraction=0.1, announce=told.append)["rejected"] == 1500
    assert ["1500 of the first" in text for text in told] == [False, True]


def test_a_line_over_the_edge_of_shards_is_counted_once(tmp_path, speeches, toy_tokenizer):
    """Bytes that were read twice would leave room for fewer documents than there are."""
    source = write_jsonl(tmp_path / "a.jsonl", speeches)
    counted: list[int] = []
    job = make_job([source], toy_tokenizer, tmp_path / "x", shard_bytes=1 << 10)
    preprocess(job, workers=1, max_bad_fraction=0, report=lambda progress: counted.append(progress.bytes))
    assert sum(counted) <= source.stat().st_size


def test_another_run_under_the_same_name_is_refused(tmp_path, toy_tokenizer, corpus, sentencepiece_model):
    run(corpus, toy_tokenizer, tmp_path / "x")
    assert run(corpus, toy_tokenizer, tmp_path / "x")["rejected"] == 2  # the same again: nothing to do
    with pytest.raises(ValueError, match="made by another run"):
        run(corpus, sentencepiece_model, tmp_path / "x")


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("suffix", [".bin", ".idx", ".xxh3"])
def test_outputs_that_are_not_what_their_manifest_says_are_told(tmp_path, corpus, toy_tokenizer, suffix, one_file):
    """The same command says so, and makes them again where its remedy is followed."""
    settings = {"shard_bytes": 20_000, "one_file": one_file}
    run(corpus, toy_tokenizer, tmp_path / "x", **settings)
    before = outputs(tmp_path)
    path = sorted(tmp_path.glob(f"*{suffix}"))[-1]
    for damage in (lambda: cut(path), path.unlink):
        damage()
        told = r": [^;]*; restore it from a backup, or remove \S+/x_text_document\.manifest\.json and give the [^;]*$"
        with pytest.raises(ValueError, match=path.name + told):
            run(corpus, toy_tokenizer, tmp_path / "x", **settings)
    (tmp_path / "x_text_document.manifest.json").unlink()
    if suffix == ".xxh3" and one_file:  # nothing tells any more whose the others are
        with pytest.raises(ValueError, match="nothing tells that this tool made it"):
            run(corpus, toy_tokenizer, tmp_path / "x", **settings)
        for other in tmp_path.glob("*.[bi][id][nx]"):
            other.unlink()
    run(corpus, toy_tokenizer, tmp_path / "x", **settings)
    assert outputs(tmp_path) == before


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_outputs_of_another_job_stay_when_a_key_is_added(tmp_path, speeches, toy_tokenizer):
    lines = "\n".join(json.dumps({"text": text, "body": text[::-1]}) for text in speeches[:4])
    (tmp_path / "in.jsonl").write_text(lines, encoding="utf-8")
    run(tmp_path / "in.jsonl", toy_tokenizer, tmp_path / "x")
    before = outputs(tmp_path)
    with pytest.raises(ValueError, match=r"x_text_document\.manifest\.json: made by another run"):
        run(tmp_path / "in.jsonl", toy_tokenizer, tmp_path / "x", keys=("text", "body"))
    assert outputs(tmp_path) == before


def test_a_source_that_changed_between_runs_is_refused(tmp_path, corpus, toy_tokenizer):
    folder = shutil.copytree(corpus, tmp_path / "in")
    settings = {"one_file": False, "shard_bytes": 9000}
    run(folder, toy_tokenizer, tmp_path / "x", part=(0, 2), **settings)
    with open(folder / "a.jsonl", "ab") as file:
        file.write(b'\n{"text": "more"}')
    with pytest.raises(ValueError, match="its source_bytes is"):
        run(folder, toy_tokenizer, tmp_path / "x", part=(0, 2), **settings)


def test_a_source_that_changed_and_kept_its_size_is_refused(tmp_path, corpus, toy_tokenizer):
    folder = shutil.copytree(corpus, tmp_path / "in")
    settings = {"one_file": False, "shard_bytes": 9000}
    for index in range(2):
        run(folder, toy_tokenizer, tmp_path / "x", part=(index, 2), **settings)
    content = (folder / "a.jsonl").read_bytes()
    (folder / "a.jsonl").write_bytes(content.replace(b"the", b"THE"))
    for arguments in ({"part": (1, 2)}, {"merge_only": True}):
        with pytest.raises(ValueError, match=r"its source_modified_ns is \d+, this run's is \d+; remove .*x\.shards"):
            run(folder, toy_tokenizer, tmp_path / "x", **arguments, **settings)


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path, corpus, toy_tokenizer, monkeypatch):
    folder = shutil.copytree(corpus, tmp_path / "in")

    def encode(self, texts, where, *, real=ShardMaker.encode):
        os.utime(folder / "a.jsonl", ns=(1, 1))
        return real(self, texts, where)

    monkeypatch.setattr(ShardMaker, "encode", encode)
    with pytest.raises(ValueError, match=r"a\.jsonl: changed while it was read; run again when"):
        run(folder, toy_tokenizer, tmp_path / "x")
    assert not (tmp_path / "x.shards").exists()


def test_what_a_record_names_is_on_the_disk_before_it(tmp_path, corpus, toy_tokenizer):
    """Each file's content before its name, the names before the record or manifest, and that before what it replaces
    is removed."""
    done = []

    def fsync(descriptor, *, real=os.fsync):
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}")))
        real(descriptor)

    def replace(source, target, *, real=os.replace):
        done.append(("content", str(target)) if ("sync", str(source)) in done else ("unsynced", str(target)))
        real(source, target)

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "replace", replace):
        run(corpus, toy_tokenizer, tmp_path / "x", shard_bytes=20_000)
    assert not [target for what, target in done if what == "unsynced"]
    renames = [(place, target) for place, (what, target) in enumerate(done) if what == "content"]
    records = [(place, target) for place, target in renames if target.endswith(".json")]
    assert len(records) > 3
    for place, target in records:
        assert ("sync", os.path.dirname(target)) in done[place:], "the record's own name"
        before = [at for at, name in renames if at < place and not name.endswith(".json")]
        assert ("sync", str(tmp_path)) in done[before[-1] : place], "the names of its files"


def test_a_shard_that_changed_before_the_merge_is_refused(tmp_path, corpus, toy_tokenizer):
    settings = {"shard_bytes": 9000}
    for index in range(2):
        run(corpus, toy_tokenizer, tmp_path / "x", part=(index, 2), **settings)
    shard = sorted(tmp_path.glob("x_text_document.*.bin"))[2]
    content = bytearray(shard.read_bytes())
    content[77] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shard.name}: changed since it was written; remove it"):
        run(corpus, toy_tokenizer, tmp_path / "x", merge_only=True, **settings)
    shard.unlink()
    for index in range(2):
        run(corpus, toy_tokenizer, tmp_path / "x", part=(index, 2), **settings)
    assert run(corpus, toy_tokenizer, tmp_path / "x", merge_only=True, **settings)["rejected"] == 2


@pytest.mark.parametrize("shard_bytes", [9000, 1 << 28])
def test_the_sources_of_a_manifest_are_known_again(tmp_path, speeches, toy_tokenizer, shard_bytes):
    """Of every kind, in several shards; a letter changed in any of them is found."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = "\n".join(json.dumps({"text": text, "body": text[::-1]}) for text in speeches).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines + b"\nbad\n"))
    rows = {"text": speeches, "body": speeches[::-1]}
    parquet.write_table(arrow.table(rows), folder / "d.parquet", row_group_size=7, compression="none")
    run(folder, toy_tokenizer, tmp_path / "x", keys=("text", "body"), shard_bytes=shard_bytes, one_file=False)
    manifest = read_manifest(tmp_path / "x_body_document.manifest.json")
    assert check_sources(manifest, [tmp_path, folder]) == 3
    for name in ("a.jsonl", "d.parquet"):
        path, whole = folder / name, (folder / name).read_bytes()
        place = whole.index(speeches[20][100:120].encode())
        path.write_bytes(whole[:place] + b"#" + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{name}: another text than when its tokens were made"):
            check_sources(manifest, [folder])
        path.write_bytes(whole)


def test_foreign_files_get_a_manifest(tmp_path, token_prefix):
    for suffix in (".bin", ".idx"):
        shutil.copy(token_prefix + suffix, tmp_path / f"x{suffix}")
    ours = read_manifest(Path(token_prefix + ".manifest.json"))["files"][0]
    theirs = manifest_of_foreign_files(str(tmp_path / "x"))["files"][0]
    assert {**theirs, "name": "", "parts": []} == {**ours, "name": "", "parts": []}
    open_token_files(tmp_path / "x")[0][0].check_everything()
    before = outputs(tmp_path)
    with pytest.raises(ValueError, match=r"x\.manifest\.json: exists, and this would forget"):
        manifest_of_foreign_files(str(tmp_path / "x.bin"))
    assert outputs(tmp_path) == before
