"""Samples are a pure function of their number; what does not fit is one clear error before a token is used."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from threading import current_thread

import numpy as np
import pytest
from token_corpora import ROOT

from k2_megatron.data.build import build_plans
from k2_megatron.data.documents import describe_row
from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.open_feed import open_feed
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.store import TokenWriter

LENGTH = 32


def open_small(path, **settings):
    return open_feed(path, **{"sequence_length": LENGTH, "seed": 3, "vocab_size": 4096, **settings})


@pytest.fixture(scope="module")
def plan_folder(tmp_path_factory, token_prefix) -> Path:
    folder = tmp_path_factory.mktemp("plan") / "train"
    sources = {"text": {"tokens": (token_prefix,), "repeats": 2.0}}
    recipe = {"sequence_length": LENGTH, "chunks": 6, "rows_per_chunk": 200, "seed": 5, "sources": sources}
    build_plans(Recipe.model_validate(recipe), folder, None)
    return folder


@pytest.fixture(params=["plan", "prefix"])
def data(request, plan_folder, token_prefix):
    return plan_folder if request.param == "plan" else token_prefix


def test_samples_do_not_depend_on_how_they_are_read(data):
    """Steps of any batch, ranks and micro-batches in any order, prefetched or not: sample n is sample n."""
    whole = open_small(data).tokens(0, 96)
    assert whole.shape == (96, LENGTH + 1)
    assert whole.dtype == np.uint16
    feed = open_small(data)
    for micro_batch in (3, 2, 1, 0):
        for rank in (1, 0):
            first = 40 + (micro_batch * 2 + rank) * 5
            feed.prefetch(first, 5)
            assert np.array_equal(feed.tokens(first, 5), whole[first : first + 5])
    feed.prefetch(0, 8)
    assert np.array_equal(feed.tokens(8, 8), whole[8:16]), "another range than the prefetched one"
    assert feed.seconds_waited > 0


def test_a_step_finds_its_rows_read_and_the_next_chunk_opened(plan_folder, monkeypatch):
    """What the training loop does: ask for samples, have the next ones prefetched. All but the first are read by the
    prefetching thread, and a chunk's part is asked for a chunk ahead, so that no step waits at a chunk's border."""
    feed = open_small(plan_folder)
    events: list[tuple[str, object]] = []
    read, load = feed.store.read, feed.order.load_chunk
    monkeypatch.setattr(
        feed.store, "read", lambda records: (events.append(("rows", current_thread().name)), read(records))[1]
    )
    monkeypatch.setattr(feed.order, "load_chunk", lambda chunk: (events.append(("chunk", chunk)), load(chunk))[1])
    batch, chunk = 20, 200
    for first in range(0, 3 * chunk, batch):
        feed.tokens(first, batch)
        feed.prefetch(first + batch, batch)
    feed.tokens(3 * chunk, batch)
    readers = [what for kind, what in events if kind == "rows"]
    assert readers[0] == "MainThread" and all(name.startswith("prefetch") for name in readers[1:])
    assert len(readers) == 3 * chunk // batch + 1
    for number in range(1, 4):
        asked = events.index(("chunk", number))
        batches_before = sum(kind == "rows" for kind, _ in events[:asked])
        assert batches_before <= (number - 1) * chunk // batch + 1, "asked for while the chunk before it begins"


def test_an_epoch_holds_every_row_once_and_the_next_another_order(token_prefix):
    feed = open_small(token_prefix)
    assert feed.rows is None
    rows = feed.store.rows(0)
    assert rows == (TokenFile(token_prefix).token_count - 1) // LENGTH
    first, second = feed.tokens(0, rows), feed.tokens(rows, rows)
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert len(set(map(bytes, first))) == rows
    assert not np.array_equal(first, second)
    assert np.array_equal(feed.tokens(rows - 2, 4), np.concatenate([first[-2:], second[:2]]))
    assert not np.array_equal(open_small(token_prefix, seed=4).tokens(0, 8), first[:8])


def test_neighbouring_rows_share_one_token(token_prefix):
    """Every token but the first is a label once."""
    feed = open_small(token_prefix)
    rows = feed.store.rows(0)
    tokens = np.asarray(TokenFile(token_prefix).tokens)
    labels = sorted(map(bytes, feed.tokens(0, rows)[:, 1:]))
    assert labels == sorted(bytes(tokens[1 + LENGTH * row :][:LENGTH]) for row in range(rows))


def test_a_prefix_is_split_by_document(token_prefix):
    parts = {name: open_small(token_prefix, part=name, held_out_fraction=0.3) for name in ("train", "held_out")}
    documents = {
        name: {span.document for sample in range(feed.store.rows(0)) for span in feed.describe(sample)}
        for name, feed in parts.items()
    }
    assert len(documents["held_out"]) >= 5
    assert not documents["train"] & documents["held_out"]
    assert len(documents["train"] | documents["held_out"]) >= 38  # the end of a part may be too short for a row
    assert parts["train"].fingerprint != parts["held_out"].fingerprint


@pytest.mark.parametrize("factor", [2, 3])
def test_a_longer_context_is_rows_end_to_end(plan_folder, factor):
    rows = open_small(plan_folder).tokens(0, 12 * factor)
    feed = open_small(plan_folder, sequence_length=LENGTH * factor)
    assert feed.rows == 1200 // factor
    samples = feed.tokens(2, 8)
    for number, sample in enumerate(samples, start=2):
        own = rows[number * factor : (number + 1) * factor]
        assert np.array_equal(sample[:-1], own[:, :-1].reshape(-1))
        assert sample[-1] == own[-1, -1]


@pytest.mark.parametrize("factor", [2, 4])
def test_a_shorter_context_is_parts_of_rows(plan_folder, factor):
    rows = open_small(plan_folder).tokens(0, 10)
    feed = open_small(plan_folder, sequence_length=LENGTH // factor)
    assert feed.rows == 1200 * factor
    short = LENGTH // factor
    for first, count in ((0, 8), (3, 9), (5, 1)):
        for number, sample in enumerate(feed.tokens(first, count), start=first):
            part = number % factor * short
            assert np.array_equal(sample, rows[number // factor, part : part + short + 1])


@pytest.mark.parametrize("length", [LENGTH // 2, LENGTH * 3])
def test_a_prefix_stays_cut_as_the_run_began(token_prefix, length):
    began = open_small(token_prefix)
    feed = open_small(token_prefix, sequence_length=length, row_length=LENGTH)
    assert feed.fingerprint == began.fingerprint
    assert feed.fingerprint != open_small(token_prefix, sequence_length=length).fingerprint
    tokens = began.tokens(0, 24)[:, :-1].reshape(-1)
    assert np.array_equal(feed.tokens(1, 3)[:, :-1].reshape(-1), tokens[length : 4 * length])


def test_a_context_that_does_not_fit_the_rows_is_refused(plan_folder, token_prefix):
    with pytest.raises(ValueError, match="48 is neither a multiple nor a divisor of the plan's 32; build a plan"):
        open_small(plan_folder, sequence_length=48)
    with pytest.raises(ValueError, match=r"48 is neither .* of this run's first, 32; begin a new run with checkpoint"):
        open_small(token_prefix, sequence_length=48, row_length=32)


def test_amendments_move_what_is_to_come(plan_folder, tmp_path):
    plain = open_small(plan_folder).tokens(0, 1200)
    ledger = Ledger(tmp_path)
    open_small(plan_folder, ledger=ledger)
    ledger.amend("defer", from_sample=250, sequence_length=LENGTH, reason="spike", chunk=2)
    ledger.amend("skip", from_sample=300, sequence_length=LENGTH, reason="spike", samples=(310, 320))
    feed = open_small(plan_folder, ledger=Ledger(tmp_path))
    moved = np.concatenate([plain[:400], plain[600:], plain[400:600]])
    assert feed.rows == 1190
    assert np.array_equal(feed.tokens(0, 1190), np.concatenate([moved[:310], moved[320:]]))


def test_amendments_hold_for_another_context_length(plan_folder, tmp_path):
    """From sample 5 of 64 tokens on = from row 10 of 32."""
    ledger = Ledger(tmp_path)
    ledger.amend("skip", from_sample=5, sequence_length=2 * LENGTH, reason="spike", samples=(6, 7))
    plain = open_small(plan_folder).tokens(0, 30)
    feed = open_small(plan_folder, ledger=ledger)
    assert np.array_equal(feed.tokens(0, 20), np.concatenate([plain[:12], plain[14:22]]))


def test_an_amendment_that_does_not_fit_names_its_line(plan_folder, tmp_path):
    ledger = Ledger(tmp_path)
    ledger.amend("skip", from_sample=0, sequence_length=LENGTH, reason="x", chunk=77)
    with pytest.raises(ValueError, match=r"ledger\.jsonl, amendment 0: chunk 77: none of its rows"):
        open_small(plan_folder, ledger=ledger)


def test_the_chain_is_of_the_rows_trained(plan_folder, tmp_path):
    ledger = Ledger(tmp_path / "a")
    open_small(plan_folder, ledger=ledger)
    before, after = ledger.chain("", 0, 250), ledger.chain("", 0, 260)
    ledger.amend("defer", from_sample=250, sequence_length=LENGTH, reason="spike", samples=(250, 270))
    again = Ledger(tmp_path / "a")
    open_small(plan_folder, ledger=again)
    assert again.chain("", 0, 250) == before
    assert again.chain("", 0, 260) != after


def test_past_the_end_of_a_plan(plan_folder):
    with pytest.raises(ValueError, match=r"samples 1196\.\.1203 asked for, the data has 1200; lower train\.steps"):
        open_small(plan_folder).tokens(1196, 8)


def copy_of(prefix, folder, with_manifest):
    suffixes = (".bin", ".idx", ".xxh3", ".manifest.json") if with_manifest else (".bin", ".idx")
    name = folder / Path(prefix).name
    for suffix in suffixes:
        shutil.copy(prefix + suffix, str(name) + suffix)
    return str(name)


def test_a_vocabulary_that_does_not_fit_is_refused(token_prefix, plan_folder, tmp_path):
    for path in (token_prefix, plan_folder):
        with pytest.raises(ValueError, match="tokenizer of 4096 pieces"):
            open_small(path, vocab_size=4000)
    bare = open_small(copy_of(token_prefix, tmp_path, with_manifest=False), vocab_size=3000)
    with pytest.raises(ValueError, match=r"token id \d+ near .* model.vocab_size is 3000; use the data's own"):
        bare.tokens(0, bare.store.rows(0))


def test_empty_documents_are_in_no_row(tmp_path):
    """Between others, at the beginning, and at the end of a row."""
    lengths = np.array([0, 10, 0, 0, 22, 0, 40, 0])
    writer = TokenWriter(str(tmp_path / "gaps"), np.dtype("<u2"))
    writer.add(np.arange(72, dtype=np.uint32), lengths, None)
    writer.finish()
    store = open_small(tmp_path / "gaps").store
    spans = [
        [(span.document, span.first_token, span.end_token) for span in describe_row(store, 0, row, "x")]
        for row in (0, 1)
    ]
    assert spans == [[(1, 0, 10), (4, 10, 32), (6, 32, 33)], [(6, 32, 65)]]


def test_ids_of_eight_bytes_are_not_cut_to_four(tmp_path):
    """2^32 + 5 is not 5."""
    writer = TokenWriter(str(tmp_path / "wide"), np.dtype("<i8"))
    writer.add_long([np.arange(2 * LENGTH + 1)], None)
    writer.finish()
    assert open_small(tmp_path / "wide").tokens(0, 2).dtype == np.int32
    tokens = np.memmap(tmp_path / "wide.bin", dtype="<i8", mode="r+")
    tokens[40] += 1 << 32
    with pytest.raises(ValueError, match=rf"token id {(1 << 32) + 40} near"):
        open_small(tmp_path / "wide").tokens(0, 2)


def test_the_parts_of_a_row_may_be_more_than_a_byte_counts(tmp_path):
    """And the chain of fewer stays what it was."""
    writer = TokenWriter(str(tmp_path / "long"), np.dtype("<u2"))
    writer.add_long([np.arange(5200) % 99], None)
    writer.finish()
    for row_length, width in ((512, 9), (2560, 12)):  # 256 parts, 1280
        feed = open_small(tmp_path / "long", sequence_length=2, row_length=row_length)
        records = list(feed.sample_records(0, row_length // 2))
        assert {len(record) for record in records} == {width}
        assert [int.from_bytes(record[8:], "little") for record in records] == [*range(row_length // 2)]


def test_files_of_megatrons_own_tool_need_no_manifest(token_prefix, tmp_path):
    bare = open_small(copy_of(token_prefix, tmp_path, with_manifest=False))
    assert np.array_equal(bare.tokens(0, 50), open_small(token_prefix).tokens(0, 50))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "nowhere"}, r"nowhere\.bin: no such file; make it with tools/preprocess_data\.py"),
        (
            {"path": "blend.toml", "row_length": 16},
            r"blend\.toml: this run began with model\.sequence_length 16, and mcore",
        ),
        ({"part": "some"}, "part 'some': one of all, train, held_out"),
        ({"sequence_length": 10**6}, "too few for one row of 1000001; give more text"),
        ({"part": "held_out", "held_out_fraction": 1e-9}, "the held_out part has 0 tokens"),
    ],
)
def test_mistakes_are_named(token_prefix, arguments, message):
    with pytest.raises(ValueError, match=message):
        open_small(**{"path": token_prefix, **arguments})


def test_training_imports_nothing_heavy():
    """A rank that feeds needs numpy and the hash: no parquet, no tokenizers, no pydantic, no torch."""
    heavy = ["pyarrow", "gigatoken", "awkward", "tokenizers", "sentencepiece", "pydantic", "torch", "rich"]
    code = f"import sys, k2_megatron.data.open_feed; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
