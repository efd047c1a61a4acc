"""Which documents were in step N, which steps saw a document, and is the recorded chain that of the plan."""

from __future__ import annotations

import ast
import fcntl
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from loaded_tool import loaded_tool
from token_corpora import ROOT, tokenize

from k2_megatron.config import load_config
from k2_megatron.data.build import build_plans
from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.inspect import document_lines, mix_lines, show_lines, step_lines
from k2_megatron.data.inspected_run import Run
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.manifest import manifest_of_foreign_files
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.training import train_byte_level_bpe
from k2_megatron.train import run_folder
from k2_megatron.train.checkpoints.manifest import CheckpointError, manifest_text
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.verify_data import verify_lines

LENGTH, BATCH, STEPS = 256, 16, 12
UNTRAINED = "not trained yet; as plan and ledger stand:"
DEFER_AT = 5 * BATCH
PIECES = ["<fim_prefix>", "<fim_middle>", "<fim_suffix>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, speeches, toy_tokenizer) -> Path:
    """A run of 12 steps that went back from step 8 to 5, deferred chunk 1, and trained 6 to 12 again."""
    folder = tmp_path_factory.mktemp("run")
    old = tokenize(speeches[:20], folder / "tokens", toy_tokenizer, "old")
    new = tokenize(speeches[20:], folder / "tokens", toy_tokenizer, "new")
    sources = {"old": {"tokens": (old,), "share": 1.0}, "new": {"tokens": (new,), "share": 3.0}}
    recipe = {"sequence_length": LENGTH, "chunks": 4, "rows_per_chunk": 80, "seed": 1, "sources": sources}
    build_plans(Recipe.model_validate(recipe), folder / "train", None)
    run = folder / "run"
    run.mkdir()
    settings = [
        f"run.folder={run}",
        f"data.train={folder / 'train'}",
        *("data.held_out=", "train.evaluate_every_steps=", "train.evaluate_batches="),
        f"data.tokenizer={toy_tokenizer}",
        f"train.steps={STEPS}",
        "optimizer.warmup_steps=2",
    ]
    config = load_config(ROOT / "examples/toy/toy.toml", settings)
    assert (config.model.sequence_length, config.train.global_batch) == (LENGTH, BATCH)
    (run / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    journal = run / "journal.jsonl"
    opened = Run(run)
    opened.ledger.attach(opened.feed)
    write_steps(journal, range(1, 6), opened.ledger)
    chain = opened.ledger.chain("", 0, DEFER_AT)
    opened.ledger.record_position(DEFER_AT, chain, step=5)
    write_steps(journal, range(6, 9), opened.ledger)
    opened.ledger.record_position(8 * BATCH, opened.ledger.chain(chain, DEFER_AT, 8 * BATCH), step=8)
    opened.ledger.amend("defer", from_sample=DEFER_AT, sequence_length=LENGTH, reason="spike", chunk=1)
    again = Run(run)
    again.ledger.attach(again.feed)
    write_steps(journal, range(6, 13), again.ledger)
    again.ledger.record_position(12 * BATCH, again.ledger.chain(chain, DEFER_AT, 12 * BATCH), step=12)
    return run


def write_steps(journal: Path, steps: range, ledger: Ledger) -> None:
    """By a clock that stands still: it tells nothing of what came before what."""
    with open(journal, "a", encoding="utf-8") as file:
        for step in steps:
            event = {"event": "step", "time": "2026-01-01T00:00:00.000+00:00", "step": step, "ledger": ledger.mark()}
            file.write(json.dumps({**event, "samples": [(step - 1) * BATCH, step * BATCH]}) + "\n")


def save_checkpoint(run: Path, step: int) -> None:
    """What a checkpoint says of its data, with the ledger as it is."""
    checkpoint = run / f"checkpoints/step_{step:08d}"
    checkpoint.mkdir(parents=True)
    config = load_config(run / "config.toml").model_dump(exclude_none=True)
    manifest = {"step": step, "layout": "", "precision": "", "weights": "", "config": config, "files": {}}
    manifest |= {"consumed_samples": step * BATCH, "amendments": 1, "ledger": Ledger(run).mark()}
    (checkpoint / "k2.json").write_text(manifest_text(manifest), encoding="utf-8")
    (run / "checkpoints/latest").write_text(f"{checkpoint.name}\n", encoding="utf-8")


def test_verify_computes_the_chain_again(folder):
    lines = list(verify_lines(Run(folder), contents=True))
    assert [line.split(":")[0] for line in lines if "chain" in line] == ["position 80", "position 128", "position 192"]
    assert lines[-1] == "2 token files are as written"


def test_verify_finds_rows_that_were_not_these(folder, tmp_path):
    text = (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()[0]
    entry = json.loads(text)
    entry["chain"] = entry["chain"][:-1] + ("0" if entry["chain"][-1] != "0" else "1")
    (tmp_path / "config.toml").write_bytes((folder / "config.toml").read_bytes())
    (tmp_path / "ledger.jsonl").write_text(json.dumps(entry) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"line 1: 80 samples have chain .*: it was trained on other rows"):
        list(verify_lines(Run(tmp_path), contents=False))


@pytest.mark.parametrize("change", ["none", "edit", "remove"])
def test_verify_compares_the_ledger_with_the_checkpoints(folder, tmp_path, change):
    """Where no journal line does, a checkpoint vouches for the last line."""
    for name in ("config.toml", "journal.jsonl", "ledger.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_checkpoint(tmp_path, 12)
    *lines, last = (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    changed = {"none": [last], "edit": [last.replace('"step": 12', '"step": 11')], "remove": []}[change]
    (tmp_path / "ledger.jsonl").write_text("\n".join([*lines, *changed]) + "\n", encoding="utf-8")
    if change == "none":
        assert "step_00000012: the lines that the ledger had then stand" in list(verify_lines(Run(tmp_path), False))
        return
    found = {"edit": "that line is another now", "remove": "there are 3 lines"}[change]
    with pytest.raises(ValueError, match=f"the checkpoint of step 12 was saved after line 4, and {found}"):
        list(verify_lines(Run(tmp_path), contents=False))


@pytest.mark.parametrize("change", ["none", "edit", "remove"])
def test_verify_compares_the_ledger_with_the_journal(folder, tmp_path, change):
    """The line after the newest checkpoint, for which a step stands, or what `amend` itself has told."""
    for name in ("config.toml", "ledger.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "amend", str(tmp_path), "skip", "--chunk", "1"]
    command += ["--from-sample", str(12 * BATCH), "--reason", "by hand"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    *lines, last = (tmp_path / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    changed = {"none": [last], "edit": [last.replace("by hand", "by head")], "remove": []}[change]
    (tmp_path / "ledger.jsonl").write_text("\n".join([*lines, *changed]) + "\n", encoding="utf-8")
    if change == "none":
        assert "journal: the ledger has the 5 lines that it had at the journal's last telling" in list(
            verify_lines(Run(tmp_path), contents=False)
        )
        return
    found = {"edit": "that line is another now", "remove": "there are 4 lines"}[change]
    with pytest.raises(ValueError, match=f"the journal tells of amendment after line 5, and {found}"):
        list(verify_lines(Run(tmp_path), contents=False))


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            "skip --samples 190 200 --from-sample 190",
            "step 12 has trained up to sample 192 of 256: rows would be trained",
        ),
        ("defer --chunk 3 --from-sample 80", "from sample 80 of 256 tokens on, and the checkpoint of step 12"),
        ("skip --chunk 3 --from-sample 192", "skipping would leave 272 rows, too few for the run. Defer them"),
        ("defer --samples 192 320 --from-sample 192", "all that is left of the data, and its order would stay"),
        ("defer --chunk 3 --from-sample 192", "another process is training in"),
        ("defer --chunk 3 --from-sample 192", ""),
    ],
)
def test_an_amendment_that_cannot_hold_is_not_written(folder, tmp_path, order, message):
    """Not in the past, not where the plan would be too short, not while the run lives: there is no way back."""
    for name in ("config.toml", "journal.jsonl", "ledger.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    longer = re.sub(r"^steps = 12$", "steps = 18", text, flags=re.MULTILINE)  # of the plan's 320 rows 288
    (tmp_path / "config.toml").write_text(longer, encoding="utf-8")
    save_checkpoint(tmp_path, 12)
    before = (tmp_path / "ledger.jsonl").read_bytes()
    inspect_data = loaded_tool("inspect_data")
    options = ["inspect_data.py", "amend", str(tmp_path), *order.split(), "--reason", "by hand"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", options)
        patch.setattr(run_folder, "TAKEOVER_SECONDS", 0.0)
        lock = open(tmp_path / ".lock", "a+")
        if "training" in message:
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not message:
            assert inspect_data.main() == 0
            assert Ledger(tmp_path).amendments[-1]["chunk"] == 3
            return
        with pytest.raises(ValueError, match=message):
            list(inspect_data.answer(inspect_data.parse_arguments()))
        lock.close()
    assert (tmp_path / "ledger.jsonl").read_bytes() == before


def test_step_names_source_file_line_and_text(folder, speeches):
    run = Run(folder)
    step = run.step(3)
    lines = list(step_lines(run, 3, characters=60))
    assert lines[0] == f"step 3: samples {2 * BATCH}..{3 * BATCH - 1}"
    assert sum(line.startswith("sample ") for line in lines) == BATCH
    place, span = lines[2], run.feed_of(step).describe(2 * BATCH)[0]
    name = f"{span.source}.jsonl line {span.document + 1}"
    assert f"{span.source}  {span.file}:{span.document}  {name}  tokens " in place
    text = speeches[span.document + (20 if span.source == "new" else 0)]
    assert eval(lines[3])[5:50] in text


def test_document_lists_every_step_that_saw_it(folder):
    """Against a walk through all samples of all steps that the journal tells of."""
    run = Run(folder)
    expected: dict[str, list[str]] = {}
    for step in run.steps:
        feed = run.feed_of(step)
        for sample in range(step.first, step.end):
            for span in {(span.file, span.document) for span in feed.describe(sample)}:
                expected.setdefault(f"{span[0]}:{span[1]}", []).append(f"step {step.number}, sample {sample}")
    assert len(expected) > 30
    for identity, sightings in list(expected.items())[:12]:
        assert list(document_lines(run, identity)) == [*sightings, f"{identity}: seen {len(sightings)} times"]


@pytest.fixture(scope="module", params=["none", "tokens", "characters"])
def cut_plan(request, tmp_path_factory, speeches):
    """A plan with rows of 64 tokens, and its tokenizer; two thirds of the documents filled in by the cut named."""
    folder = tmp_path_factory.mktemp("cut")
    tokenizer = str(folder / "tokenizer.json")
    train_byte_level_bpe(speeches, 500, ["<|endoftext|>", *PIECES]).save(tokenizer)
    prefix = tokenize([text[: 60 + 9 * number] for number, text in enumerate(speeches)], folder, tokenizer)
    rates = {} if request.param == "none" else {"fim_psm": 0.3, "fim_spm": 0.4}
    sources = {"code": {"tokens": (prefix,), "repeats": 2.0, **rates}}
    fim = {"fim": {"tokenizer": tokenizer, "cut": request.param}} if rates else {}
    recipe = {"sequence_length": 64, "chunks": 2, "seed": 3, **fim, "sources": sources}
    build_plans(Recipe.model_validate(recipe), folder / "train", None)
    return folder / "train", tokenizer, prefix


def run_over(cut_plan, folder: Path, length: int) -> Run:
    """A run folder of a configuration alone: 6 steps of 4 samples of `length` tokens."""
    settings = {"run.folder": folder, "data.train": cut_plan[0], "data.held_out": cut_plan[0]}
    settings |= {"data.tokenizer": cut_plan[1], "train.steps": 6, "optimizer.warmup_steps": 2}
    settings |= {"model.sequence_length": length, "train.global_batch": 4, "train.micro_batch": 1}
    config = load_config(ROOT / "examples/toy/toy.toml", [f"{key}={value}" for key, value in settings.items()])
    (folder / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    return Run(folder)


@pytest.mark.parametrize("length", [64, 32, 16, 128])
def test_a_document_stands_with_its_own_text(cut_plan, tmp_path, speeches, length):
    """Documents reordered or not, in whole rows, parts of rows and several rows: what is printed joins to the sample,
    is of the document named, and is the tokens named (all of them where they are in order, else some)."""
    run, file = run_over(cut_plan, tmp_path, length), TokenFile(cut_plan[2])
    assert run.tokenizer is not None
    reordered, decode = 0, run.tokenizer.decode
    for number in range(1, 7):
        samples = "\n".join(step_lines(run, number, 10000)).split("\nsample ")[1:]
        for sample in samples:
            tokens = run.feed.tokens(int(sample.split("\n")[0]), 1)[0].tolist()
            entries = re.findall(r"code  \S+:(\d+)  \S+ line (\d+)  tokens (\d+)\.\.(\d+)(.*)\n    (.*)", sample)
            texts = [ast.literal_eval(entry[5]) for entry in entries]
            assert len(entries) == len(sample.splitlines()) // 2
            assert "".join(texts) == decode(tokens)
            for (document, line, first, last, mark, _), text in zip(entries, texts, strict=True):
                whole = speeches[int(document)][: 60 + 9 * int(document)] + "<|endoftext|>"
                named = decode(file.tokens[int(first) : int(last) + 1].tolist())
                pieces = re.split("|".join(PIECES), text.removesuffix("<|endoftext|>"))
                assert int(line) == int(document) + 1
                assert named in whole
                assert all(piece in named for piece in pieces)
                assert mark in (" reordered", "")
                assert mark or text == named
                reordered += mark != ""
    assert (reordered > 10) == bool(run.feed._fim)


@pytest.mark.parametrize("length", [64, 16, 128])
def test_a_document_is_seen_where_a_sample_holds_it(cut_plan, tmp_path, length):
    """Not in the parts of a row without it, nor where fill-in-the-middle pushed it over the row's end."""
    run = run_over(cut_plan, tmp_path, length)
    expected: dict[str, list[str]] = {}
    with open(tmp_path / "journal.jsonl", "w", encoding="utf-8") as journal:
        for number in range(1, 7):
            event = {"event": "step", "time": "2026", "step": number, "samples": [4 * number - 4, 4 * number]}
            journal.write(json.dumps(event) + "\n")
            lines = "\n".join(step_lines(run, number, 0)).split("\nsample ")[1:]
            for sample, *entries in (part.split("\n") for part in lines):
                for document in dict.fromkeys(entry.split()[1] for entry in entries):
                    expected.setdefault(document, []).append(f"step {number}, sample {sample}")
    run = Run(tmp_path)  # with the journal
    assert len(expected) > 8
    for document, sightings in expected.items():
        assert list(document_lines(run, document)) == [*sightings, f"{document}: seen {len(sightings)} times"]


def test_a_deferred_chunk_was_seen_before_the_rollback_and_not_after(folder):
    run = Run(folder)
    assert [step.number for step in run.steps] == [*range(1, 9), *range(6, 13)]
    assert [step.ledger_entries for step in run.steps] == [0] * 5 + [1] * 3 + [3] * 7
    before, after = run.steps[5], run.steps[-7]
    assert before.first == after.first
    one = run.feed_of(before).tokens(before.first, BATCH)
    other = run.feed_of(after).tokens(after.first, BATCH)
    assert not (one == other).all()
    assert run.step(6) == after


def test_journals_of_earlier_versions_tell_by_their_times(folder, tmp_path):
    """They have no ledger in their steps."""
    for name in ("config.toml", "ledger.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with open(tmp_path / "journal.jsonl", "w", encoding="utf-8") as journal:
        for number, time in ((1, "2026-01-01"), (2, "2999-01-01")):
            journal.write(json.dumps({"event": "step", "time": time, "step": number, "samples": [0, BATCH]}) + "\n")
    assert [step.ledger_entries for step in Run(tmp_path).steps] == [0, 4]


def test_lines_that_a_power_cut_tore_are_no_steps(folder, tmp_path):
    """Bytes that are no text, and a whole line of JSON that is no event."""
    (tmp_path / "config.toml").write_bytes((folder / "config.toml").read_bytes())
    steps = (folder / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "journal.jsonl").write_bytes(b"".join([steps[0], b'\xff\x00\x00{"event": "st\n', b"[7]\n", steps[1]]))
    assert [step.number for step in Run(tmp_path).steps] == [1, 2]


def test_mix_adds_up(folder):
    lines = list(mix_lines(Run(folder), 1, 12))
    assert lines[0] == "steps 1..12: 192 rows"
    rows = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert sum(int(row[0]) for row in rows.values()) == 192
    assert [row[2] for row in rows.values()] == ["25.00%", "75.00%"]
    assert abs(int(rows["old"][0]) - 48) <= 16


@pytest.mark.parametrize("event", ["rollback", "resume"])
def test_steps_that_were_never_trained_or_taken_back_are_marked(folder, tmp_path, event):
    """A rollback to step 4 and a new step 5: of 6 to 12 the journal tells twice, and none of it stands."""
    for name in ("config.toml", "ledger.jsonl", "journal.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with open(tmp_path / "journal.jsonl", "a", encoding="utf-8") as journal:
        journal.write(json.dumps({"event": event, "time": "2026-01-01", "step": 4}) + "\n")
    write_steps(tmp_path / "journal.jsonl", range(5, 6), Ledger(tmp_path))
    run = Run(tmp_path)
    assert next(step_lines(run, 5, 0)) == f"step 5: samples {4 * BATCH}..{5 * BATCH - 1}"
    assert list(step_lines(run, 6, 0))[:2] == [UNTRAINED, f"step 6: samples {5 * BATCH}..{6 * BATCH - 1}"]
    assert run.step(6).ledger_entries == len(run.ledger.entries), "not what stood when it was last told of"
    assert next(mix_lines(run, 2, 5)) == "steps 2..5: 64 rows"
    assert next(mix_lines(run, 4, 7)) == f"2 of these steps, the first 6, are {UNTRAINED}"
    assert len(list(document_lines(run, "old_text_document:1"))) > 1, "what saw it then is told"
    assert [step.number for step in run.steps] == [*range(1, 9), *range(6, 13), 5]


def test_mix_counts_every_part_of_a_row_in_the_step_that_trained_it(folder, tmp_path):
    """Four samples a row and six a step: a row that two steps share counts two in each, and all steps add up."""
    text = (folder / "config.toml").read_text(encoding="utf-8")
    for key, value in (("sequence_length", LENGTH // 4), ("global_batch", 6), ("micro_batch", 1)):
        text, found = re.subn(rf"^{key} = \d+$", f"{key} = {value}", text, flags=re.MULTILINE)
        assert found == 1
    (tmp_path / "config.toml").write_text(text, encoding="utf-8")
    run = Run(tmp_path)
    sources = [run.feed.describe(sample)[0].source for sample in range(6 * STEPS)]
    for first, last in [(1, 1), (2, 2), (2, 3), (5, 9), (1, STEPS)]:
        lines = list(mix_lines(run, first, last))
        asked = sources[6 * first - 6 : 6 * last]
        assert lines[:2] == [UNTRAINED, f"steps {first}..{last}: {len(asked)} samples, 4 a row"]
        assert {line.split()[0]: int(line.split()[1]) for line in lines[3:]} == {
            name: asked.count(name) for name in ("old", "new")
        }


@pytest.mark.parametrize("change", ["none", "letter", "size", "missing"])
def test_verify_reads_the_texts_again_where_it_is_told_where_they_are(folder, tmp_path, change):
    texts = tmp_path / "texts"
    shutil.copytree(folder.parent / "tokens", texts)
    path = texts / "new.jsonl"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {
        "none": lambda: None,
        "letter": lambda: path.write_bytes(content),  # the same size
        "size": lambda: path.write_bytes(content[:-1]),
        "missing": path.unlink,
    }[change]()
    if change == "none":
        assert list(verify_lines(Run(folder), False, [texts]))[-1] == "2 text files are what the tokens were made from"
        return
    found = {"letter": "another text than when", "size": r"\d+ bytes, \d+ when", "missing": "not below"}[change]
    with pytest.raises(ValueError, match=f"new.jsonl: {found}"):
        list(verify_lines(Run(folder), False, [texts]))


@pytest.fixture(scope="module")
def same_names(tmp_path_factory, speeches, toy_tokenizer) -> tuple[Path, str]:
    """A plan over en/web_text_document and de/web_text_document, each made of a web.jsonl, and its tokenizer."""
    folder = tmp_path_factory.mktemp("languages")
    texts = {"en": speeches[:6], "de": [text[::-1] for text in speeches[6:14]]}
    prefixes = {name: tokenize(part, folder / name, toy_tokenizer, "web") for name, part in texts.items()}
    sources = {name: {"tokens": (prefix,), "repeats": 1.0} for name, prefix in prefixes.items()}
    recipe = {"sequence_length": 64, "chunks": 2, "seed": 3, "sources": sources}
    build_plans(Recipe.model_validate(recipe), folder / "train", None)
    return folder / "train", toy_tokenizer


def test_two_files_of_one_name_are_told_apart(same_names, tmp_path, speeches):
    run = run_over(same_names, tmp_path, 64)
    for line in (line for number in range(1, 7) for line in step_lines(run, number, 0) if "_document:" in line):
        source, file, origin = re.match(r"  (\w+)  (\S+):\d+  (web\.jsonl line \d+) ", line).groups()
        assert file == f"{source}/web_text_document"
        assert int(origin.split()[-1]) <= {"en": 6, "de": 8}[source]
    with open(tmp_path / "journal.jsonl", "w", encoding="utf-8") as journal:
        event = {"event": "step", "time": "2026", "step": 1, "samples": [0, run.feed.rows]}
        journal.write(json.dumps(event) + "\n")
    spans = [span for sample in range(run.feed.rows) for span in run.feed.describe(sample)]
    for language in ("en", "de"):
        seen = sum((span.source, span.document) == (language, 2) for span in spans)
        assert list(document_lines(Run(tmp_path), f"{language}/web_text_document:2"))[-1].endswith(f"seen {seen} times")
    with pytest.raises(ValueError, match=r"no token file 'web_text_document' .*: (en|de)/web.*, (en|de)/web"):
        list(document_lines(Run(tmp_path), "web_text_document:2"))


@pytest.mark.parametrize("changed", ["none", "en", "de"])
def test_verify_reads_the_texts_of_every_file_of_a_name(same_names, tmp_path, changed):
    """Two texts of one name, below the two folders that --input named."""
    run, texts = run_over(same_names, tmp_path, 64), tmp_path / "texts"
    for language in ("en", "de"):
        (texts / language).mkdir(parents=True)
        content = (same_names[0].parent / language / "web.jsonl").read_bytes()
        content = content.replace(b" ", b"_", 1) if language == changed else content
        (texts / language / "web.jsonl").write_bytes(content)
    for folders in ([texts / "en", texts / "de"], [texts / "de", texts / "en"]):
        if changed == "none":
            assert list(verify_lines(run, False, folders))[-1] == "2 text files are what the tokens were made from"
            continue
        found = "web.jsonl: another text than when its tokens were made, in part 0"
        with pytest.raises(ValueError, match=f"{changed}/{found}"):
            list(verify_lines(run, False, folders))


def test_a_run_goes_on_and_is_verified_when_its_files_get_a_manifest(token_prefix, tmp_path):
    """As docs/data.md says of files of Megatron's own tool: from then on damage is found. Twice resumed."""
    prefix = str(tmp_path / "bare")
    for suffix in (".bin", ".idx"):
        shutil.copy(token_prefix + suffix, prefix + suffix)
    settings = {"run.folder": tmp_path, "data.train": prefix, "data.held_out": "", "model.sequence_length": 64}
    settings |= {"train.evaluate_every_steps": "", "train.evaluate_batches": ""}
    config = load_config(ROOT / "examples/toy/toy.toml", [f"{key}={value}" for key, value in settings.items()])
    (tmp_path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
    manifest: dict = {}
    for step in (1, 2, 3):
        if step == 2:
            manifest_of_foreign_files(prefix)
        data = open_run_data(config, writer=True)
        if manifest:
            data.resume_at(manifest)
        data.consumed((step - 1) * BATCH, step * BATCH)
        data.record_position(config, step)
        manifest = {"step": step, **data.position()}
    lines = list(verify_lines(Run(tmp_path), contents=True))
    assert [line.split(":")[0] for line in lines if "chain" in line] == ["position 16", "position 32", "position 48"]
    with open(prefix + ".bin", "r+b") as file:
        file.write(b"\7\7\7")
    with pytest.raises(ValueError, match=r"bare\.bin: bytes 0\.\.\d+ differ from their hash"):
        list(verify_lines(Run(tmp_path), contents=True))
    manifest["data"] = "0123456789abcdef"
    with pytest.raises(CheckpointError, match=r"was trained on data 0123456789abcdef, data\.train is now"):
        open_run_data(config).resume_at(manifest)


def test_show_decodes_rows(folder, speeches):
    lines = list(show_lines(Run(folder), 2, 7))
    assert [line for line in lines if line.startswith("---")] == ["--- sample 7", "--- sample 8"]
    assert any(lines[1][10:60] in text for text in speeches) or "<|endoftext|>" in lines[1]


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (lambda run: document_lines(run, "old"), "FILE:NUMBER"),
        (lambda run: document_lines(run, "nothing:3"), "no token file 'nothing'"),
        (lambda run: document_lines(run, "old_text_document:99"), "has documents 0..19"),
        (lambda run: step_lines(run, 99, 10), r"step 99: the run has steps 1\.\.12"),
        (lambda run: mix_lines(run, 5, 4), "mix 5 4: the first step comes after the last"),
        (lambda run: mix_lines(run, 0, 4), r"step 0: the run has steps 1\.\.12"),
        (lambda run: show_lines(run, 0, 4), "show 0 from 4: a count of 1 or more"),
        (lambda run: show_lines(run, 2, -1), "show 2 from -1: .* from sample 0 or a later one"),
        (lambda run: show_lines(run, 2, 319), r"samples 319\.\.320 asked for, the data has 320"),
    ],
)
def test_questions_without_an_answer(folder, question, message):
    with pytest.raises(ValueError, match=message):
        list(question(Run(folder)))


def test_a_run_on_a_blend_answers_what_it_can(folder, tmp_path):
    """Steps, rows and the chain; not documents and mixtures."""
    tokens = folder.parent / "tokens"
    source = '[[sources]]\nprefix = "{}"\nweight = 1.0\n'
    sources = "".join(source.format(tokens / f"{name}_text_document") for name in ("old", "new"))
    blend = tmp_path / "blend.toml"
    blend.write_text(f'samples = 192\ncache = "{tmp_path / "cache"}"\n{sources}', encoding="utf-8")
    config = (folder / "config.toml").read_text(encoding="utf-8")
    (tmp_path / "config.toml").write_text(config.replace(str(folder.parent / "train"), str(blend)), encoding="utf-8")
    write_steps(tmp_path / "journal.jsonl", range(1, 4), Ledger(tmp_path))
    opened = Run(tmp_path)
    opened.ledger.attach(opened.feed)
    opened.ledger.record_position(2 * BATCH, opened.ledger.chain("", 0, 2 * BATCH), step=2)
    run = Run(tmp_path)
    assert f"position {2 * BATCH}: chain" in list(verify_lines(run, contents=True))[2]
    lines = list(step_lines(run, 2, 10))
    assert (lines[0], len(lines)) == (f"step 2: samples {BATCH}..{2 * BATCH - 1}", 1 + 3 * BATCH)
    assert len(list(show_lines(run, 2, 0))) == 4
    for question in (mix_lines(run, 1, 2), document_lines(run, "old_text_document:1")):
        with pytest.raises(ValueError, match="blended datasets tell neither documents nor a mixture"):
            list(question)


def test_the_command_line_has_no_traceback(tmp_path, tool_environment):
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify", str(tmp_path)]
    done = subprocess.run(command, env=tool_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"inspect_data: {tmp_path}: no config.toml there; name the folder of a run\n"


def test_verify_ends_with_a_code_of_its_own_where_the_ledger_was_altered(folder, tmp_path, tool_environment):
    for name in ("config.toml", "journal.jsonl"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    ledger = (folder / "ledger.jsonl").read_text(encoding="utf-8")
    (tmp_path / "ledger.jsonl").write_text(ledger.replace('"reason": "', '"reason": "x', 1), encoding="utf-8")
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "verify", str(tmp_path)]
    done = subprocess.run(command, env=tool_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"inspect_data: {tmp_path}/ledger.jsonl") and done.stderr.count("\n") == 1


def test_a_negative_number_of_characters_is_refused(tmp_path, tool_environment):
    """As a slice it would print all but the last of them."""
    command = [sys.executable, str(ROOT / "tools/inspect_data.py"), "step", str(tmp_path), "1", "--characters", "-5"]
    done = subprocess.run(command, env=tool_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "argument --characters: '-5' is not a number from 0" in done.stderr


def test_the_toy_goes_through_the_same_tools(tmp_path, tool_environment):
    """The two commands of examples/toy/data.toml, from its folder's files to feeds."""

    def tool(name, *arguments):
        command = [sys.executable, str(ROOT / "tools" / name), *arguments]
        subprocess.run(command, env=tool_environment, cwd=tmp_path, capture_output=True, check=True)

    toy = ROOT / "examples/toy"
    inputs = ["--input", str(toy / "state_of_the_union.jsonl.xz"), "--tokenizer", str(toy / "tokenizer.json")]
    tool("preprocess_data.py", *inputs, "--output-prefix", "runs/toy_data/speeches", "--append-eod")
    output = ["--output", "runs/toy_data/train", "--held-out", "runs/toy_data/held_out"]
    tool("build_plan.py", str(toy / "data.toml"), *output)
    from k2_megatron.data.open_feed import open_feed

    shape = {"sequence_length": LENGTH, "seed": 1, "vocab_size": 4096}
    train = open_feed(tmp_path / "runs/toy_data/train", **shape)
    held_out = open_feed(tmp_path / "runs/toy_data/held_out", **shape)
    assert train.rows == 8000
    assert held_out.rows >= 64
    assert train.source_names[0] == "eighteenth_century"
    assert len({span.source for sample in range(80) for span in train.describe(sample)}) == 4
