"""A run that is resumed under another global batch or sequence length: what it is fed, and what the tools say.

The data is a prefix, whose rows of 32 tokens stand in one order: a change cuts that stream otherwise and goes on.
"""

import hashlib
import shutil
import signal
import sys
from functools import partial
from pathlib import Path

import data_changes
import numpy
import pytest
from loaded_tool import loaded_tool
from rank_processes import Outcome, Rank, results_of, run_pretrain, run_ranks
from run_results import events_of, steps_of
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.data.inspect import document_lines, mix_lines, step_lines
from k2_megatron.data.inspected_run import Run
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.open_feed import open_feed
from k2_megatron.plan.text import plan_text
from k2_megatron.train.checkpoints.manifest import read_manifest
from k2_megatron.train.run_folder import with_past
from k2_megatron.train.verify_data import verify_lines

SETTINGS = {"train.steps": 9, "train.evaluate_every_steps": 9, "checkpoint.every_steps": 9}
LENGTH, BATCH = 32, 8
# (steps, global batch, sequence length): tokens 0-767, then 768-2815, then from sample 30 of 96 on, 64 left out
LIVES = [(3, 8, 32), (5, 16, 64), (9, 4, 96)]


def life(
    config: Path, folder: Path, until: int, settings: dict[str, object], ranks: int = 1, fault=None
) -> list[Outcome]:
    """One start of the run in `folder`, which leaves after step `until`."""
    given = overrides({**SETTINGS, "run.folder": folder, **settings})
    arguments = [str(config), *(part for key in given for part in ("--set", key)), "--until", str(until)]
    output = folder.with_name(f"output_{len(list(folder.parent.iterdir()))}")
    if ranks > 1:
        return run_ranks(run_pretrain, ranks, (arguments, fault), output)
    return [Rank(run_pretrain, (arguments, fault), {}, output).finish()]


@pytest.fixture(scope="module")
def begun(small_config, tmp_path_factory) -> Path:
    """Three steps of 8 samples of 32 tokens. Copy it, change nothing in it."""
    folder = tmp_path_factory.mktemp("begun") / "run"
    results_of(life(small_config, folder, 3, {}))
    return folder


@pytest.fixture
def copy(begun, tmp_path) -> Path:
    return Path(shutil.copytree(begun, tmp_path / "run"))


@pytest.fixture(scope="module")
def changed(begun, small_config, tmp_path_factory) -> tuple[Path, Path, list[Outcome]]:
    """(a run that was changed twice, the folder of the rows it was fed since the first change, what it printed)."""
    base = tmp_path_factory.mktemp("changed")
    folder, rows = Path(shutil.copytree(begun, base / "run")), base / "rows"
    rows.mkdir()
    outcomes = []
    for until, batch, length in LIVES[1:]:
        given = {"train.global_batch": batch, "model.sequence_length": length}
        outcomes += life(small_config, folder, until, given, fault=partial(data_changes.fed_rows_are_kept, rows))
    results_of(outcomes)
    return folder, rows, outcomes


@pytest.fixture(scope="module")
def rows_32(text_folder) -> numpy.ndarray:
    """The first rows of the training data, in their order: ids [160, 33]."""
    return open_feed(text_folder / "train", sequence_length=LENGTH, seed=7, vocab_size=256).tokens(0, 160)


def fed(folder: Path, rows: Path) -> dict[int, numpy.ndarray]:
    """{sequence length: the inputs, in the order of the samples} of what the run read for training."""
    train = Run(folder).feed.fingerprint
    found: dict[int, dict[int, numpy.ndarray]] = {}
    for path in rows.glob(f"{train}_*.npy"):
        _, length, first = path.stem.split("_")
        found.setdefault(int(length), {})[int(first)] = numpy.load(path)[:, :-1].reshape(-1)
    return {length: numpy.concatenate([of[first] for first in sorted(of)]) for length, of in found.items()}


def test_every_token_is_fed_once_and_less_than_a_sample_left_out(changed, rows_32):
    folder, rows, _ = changed
    stream = rows_32[:, :-1].reshape(-1)
    found = fed(folder, rows)
    assert numpy.array_equal(found[64], stream[768:2816])
    assert numpy.array_equal(found[96], stream[2880:4416]), "64 tokens, less than a sample of 96, are left out"
    steps = steps_of(folder)
    assert [steps[step]["samples"] for step in (3, 4, 5, 6, 9)] == [[16, 24], [12, 28], [28, 44], [30, 34], [42, 46]]
    assert [steps[step]["sequence_length"] for step in (3, 4, 5, 6)] == [32, 64, 64, 96]
    assert [steps[step]["consumed_tokens"] for step in (3, 5, 9)] == [768, 2816, 2816 + 16 * 96]


def test_what_the_change_means_is_told(changed):
    folder, _, outcomes = changed
    assert (
        "  global batch 8 -> 16, sequence length 32 -> 64 from step 4 on: next sample 12 of 64 tokens, after 24 of 32; "
        "0 tokens left out" in outcomes[0].stdout
    )
    assert (
        "  global batch 16 -> 4, sequence length 64 -> 96 from step 6 on: next sample 30 of 96 tokens, after 44 of 64; "
        "64 tokens left out" in outcomes[1].stdout
    )
    assert "next: step 6, sample 30, learning rate" in outcomes[1].stdout
    resumes = events_of(folder, "resume")
    assert [(event["next_sample"], event["position_change"]["tokens_left_out"]) for event in resumes] == [
        (12, 0),
        (30, 64),
    ]
    manifest = read_manifest(folder / "checkpoints" / "step_00000009")
    assert (manifest["consumed_samples"], manifest["consumed_tokens"]) == (46, 4352)
    assert [stage["first_step"] for stage in manifest["config"]["train"]["history"]] == [0, 3, 5]
    (evaluation,) = events_of(folder, "evaluation")
    assert 0 < evaluation["held_out_loss"] < 10


def chain_by_hand(folder: Path) -> str:
    """Of the nine steps: the records of the rows that tokens 0-767, 768-2815 and 2880-4415 lie in, sample by sample."""
    feed = Run(folder).feed
    records = feed.order.records(numpy.arange(138)).astype("<u8")
    value = feed.fingerprint.encode()
    for first, end, rows in ((0, 24, 1), (24, 88, 2), (90, 138, 3)):
        for row in range(first, end, rows):
            value = hashlib.blake2b(value + records[row : row + rows].tobytes(), digest_size=16).digest()
    return value.hex()


def test_ledger_and_tools_speak_of_both_sides(changed):
    folder, _, _ = changed
    ledger = Ledger(folder)
    assert [entry["event"] for entry in ledger.entries] == ["position", "change", "position", "change", "position"]
    fields = ("from_step", "from_sample", "global_batch", "sequence_length")
    told = [tuple(entry[key] for key in fields) for entry in ledger.entries if entry["event"] == "change"]
    assert told == [(3, 12, 16, 64), (5, 30, 4, 96)]
    assert ledger.positions[-1]["parts"] == [[32, 0, 24], [64, 12, 44], [96, 30, 46]]
    assert ledger.positions[-1]["chain"] == chain_by_hand(folder)
    lines, one = list(verify_lines(Run(folder), contents=False)), "samples 0 to 23 of 32 tokens"
    assert [line.split(":")[0] for line in lines if "chain" in line] == [
        "position 24",
        f"position 44 ({one}, then samples 12 to 43 of 64 tokens)",
        f"position 46 ({one}, then samples 12 to 43 of 64 tokens, then samples 30 to 45 of 96 tokens)",
    ]
    run = Run(folder)
    for step, told in ((3, "samples 16..23 of 32"), (4, "samples 12..27 of 64"), (9, "samples 42..45 of 96")):
        assert next(step_lines(run, step, 0)) == f"step {step}: {told} tokens"
    assert next(mix_lines(run, 3, 3)) == "steps 3..3: 8 rows"
    assert next(mix_lines(run, 3, 9)) == f"steps 3..9: {8 + 64 + 48} rows"
    expected: dict[str, list[str]] = {}
    for step in run.steps:
        for sample in range(step.first, step.end):
            for document in {span.document for span in run.feed_of(step).describe(sample)}:
                expected.setdefault(f"train:{document}", []).append(f"step {step.number}, sample {sample}")
    for document, seen in list(expected.items())[:8]:
        assert list(document_lines(run, document)) == [*seen, f"{document}: seen {len(seen)} times"]


def test_steps_are_found_without_a_journal(changed, tmp_path):
    folder, _, _ = changed
    shutil.copy(folder / "config.toml", tmp_path)
    for number in range(1, 10):
        told, found = Run(folder).step(number), Run(tmp_path).step(number)
        assert (found.first, found.end, found.sequence_length) == (told.first, told.end, told.sequence_length)


def test_position_that_does_not_follow_is_found(changed, tmp_path):
    folder, _, _ = changed
    for name in ("config.toml", "journal.jsonl"):
        shutil.copy(folder / name, tmp_path)
    ledger = Ledger(tmp_path)
    chain = Ledger(folder).positions[-1]["chain"]
    ledger.record_position(46, chain, step=9, parts=[[32, 0, 24], [64, 12, 44], [96, 29, 45]])
    (tmp_path / "journal.jsonl").unlink()
    with pytest.raises(ValueError, match="line 1: sample 29 of 96 tokens does not follow sample 43 of 64"):
        list(verify_lines(Run(tmp_path), contents=False))


def test_doubled_batch_reads_exactly_the_next_samples(copy, small_config):
    """On two ranks, in another layout than before; a length of half a row with it in the next test."""
    results_of(life(small_config, copy, 5, {"train.global_batch": 16, "parallel.tensor": 2}, ranks=2))
    assert [steps_of(copy)[step]["samples"] for step in (3, 4, 5)] == [[16, 24], [24, 40], [40, 56]]
    position, whole = Ledger(copy).positions[-1], Ledger(copy)
    whole.attach(Run(copy).feed)
    assert position["chain"] == whole.chain("", 0, 56)
    assert "parts" not in position
    assert "position 56: chain" in "\n".join(verify_lines(Run(copy), contents=False))


def test_halved_length_reads_the_other_halves(copy, small_config, tmp_path, rows_32):
    rows = tmp_path / "rows"
    rows.mkdir()
    given = {"model.sequence_length": 16, "train.global_batch": 6}
    results_of(life(small_config, copy, 4, given, fault=partial(data_changes.fed_rows_are_kept, rows)))
    assert steps_of(copy)[4]["samples"] == [48, 54]
    assert numpy.array_equal(fed(copy, rows)[16], rows_32[:, :-1].reshape(-1)[768 : 768 + 6 * 16])
    assert "position 54 (samples 0 to 23 of 32 tokens" in "\n".join(verify_lines(Run(copy), contents=False))


def test_plan_of_a_run_with_a_past(changed, copy, small_config):
    """Printed for the file that the user has, which says nothing of the past."""
    given = ["train.steps=9", f"run.folder={changed[0]}", "train.global_batch=4", "model.sequence_length=96"]
    config = with_past(load_config(small_config, given))
    assert (config.total_samples, config.total_tokens) == (46, 4352)
    assert config.train.history == Run(changed[0]).config.train.history
    planned = with_past(load_config(small_config, ["train.steps=9", f"run.folder={copy}", "model.sequence_length=64"]))
    lines = plan_text(planned).splitlines()
    (start,) = [number for number, line in enumerate(lines) if line == "batches"]
    assert lines[start + 1 : start + 5] == [
        "  9 steps, to before sample 60 of 64 tokens",
        "  3,840 tokens in all, 512 a step at the full batch",
        "  from step 0, sample 0 of 32 tokens: global batch 8",
        "  from step 3, sample 12 of 64 tokens: global batch 8 = 4 micro-batches of 2 on 1 data-parallel ranks",
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"train.global_batch": 15}, "train.global_batch = 15: must be a multiple of train.micro_batch"),
        (
            {"model.sequence_length": 48},
            "48 is neither a multiple nor a divisor of this run's first, 32; begin a new run",
        ),
        ({"model.rope_base": 5e5}, "another model: begin a new run with checkpoint.start_from"),
        ({"train.batch_ramp": "{start=2, increment=2, samples=9}"}, "a run that has begun can only end it"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_changed(copy, small_config, given, says):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (outcome,) = life(small_config, copy, 5, given)
    assert outcome.exit_code == 2
    assert says in outcome.stderr
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def with_lines(config: Path, folder: Path, **values: int) -> Path:
    """The small run's file, edited."""
    lines = config.read_text().splitlines()
    for key, value in values.items():
        lines = [f"{key} = {value}" if line.startswith(f"{key} =") else line for line in lines]
    path = folder / "edited.toml"
    path.write_text("\n".join(lines))
    return path


def test_change_in_the_file_alone_is_refused_until_one_was_taken(copy, changed, small_config, tmp_path):
    edited = with_lines(small_config, tmp_path, global_batch=16, sequence_length=64)
    for config_toml in ("there", "gone"):
        if config_toml == "gone":
            (copy / "config.toml").unlink()
        (outcome,) = life(edited, copy, 4, {})
        assert outcome.exit_code == 2
        assert "to take it, give --set train.global_batch=16" in outcome.stderr
        assert "to take it, give --set model.sequence_length=64" in outcome.stderr
    done = Path(shutil.copytree(changed[0], tmp_path / "done" / "run"))
    shutil.rmtree(done / "checkpoints" / "step_00000009")
    (done / "checkpoints" / "latest").write_text("step_00000005\n")
    results_of(life(edited, done, 6, {}))  # of the checkpoint that has it
    assert events_of(done, "resume")[-1]["position_change"] is None


def test_killed_before_a_save_the_run_goes_on_as_it_was(copy, small_config):
    """Without --set, as if there had been no change; and with it again."""
    given = {"train.global_batch": 16, "model.sequence_length": 64}
    (killed,) = life(small_config, copy, 5, given, fault=data_changes.killed_in_step_5)
    assert killed.exit_code == -signal.SIGKILL
    assert steps_of(copy)[4]["samples"] == [12, 28]
    other = Path(shutil.copytree(copy, copy.with_name("other") / "run"))
    (outcome,) = life(small_config, copy, 5, {})
    results_of([outcome])
    assert (
        "train.global_batch = 16 of the last start is not in the newest checkpoint; the run goes on with 8"
        in outcome.stdout
    )
    assert [steps_of(copy)[step]["samples"] for step in (3, 4, 5)] == [[16, 24], [24, 32], [32, 40]]
    results_of(life(small_config, other, 5, given))
    assert [steps_of(other)[step]["samples"] for step in (3, 4, 5)] == [[16, 24], [12, 28], [28, 44]]
    for folder, events in ((copy, 0), (other, 1)):
        assert [entry["event"] for entry in Ledger(folder).entries].count("change") == events
        assert "chain" in "\n".join(verify_lines(Run(folder), contents=False))


def test_killed_between_ledger_and_checkpoint_no_line_contradicts_another(copy, small_config):
    given = {"train.global_batch": 16, "model.sequence_length": 64}
    (killed,) = life(small_config, copy, 4, given, fault=data_changes.killed_when_the_ledger_is_told)
    assert killed.exit_code == -signal.SIGKILL
    assert [entry["event"] for entry in Ledger(copy).entries] == ["position", "change", "position"]
    other = Path(shutil.copytree(copy, copy.with_name("other") / "run"))
    results_of(life(small_config, other, 5, given))
    for until in (4, 5):
        results_of(life(small_config, copy, until, {}))
    changes = [entry for entry in Ledger(copy).entries if entry["event"] == "change"]
    assert [(entry["from_step"], entry["from_sample"], entry["global_batch"]) for entry in changes] == [
        (3, 12, 16),
        (3, 24, 8),
    ]
    assert [entry["event"] for entry in Ledger(other).entries].count("change") == 1
    for folder, last, positions in ((copy, 40, 4), (other, 44, 3)):
        assert Ledger(folder).positions[-1]["consumed_samples"] == last
        lines = "\n".join(verify_lines(Run(folder), contents=False))
        assert lines.count("chain") == positions


SPIKES = {"spikes.policy": "skip", "spikes.scope": "batches", "spikes.max_rollbacks": 1, "checkpoint.every_steps": 1}


def test_a_run_that_goes_back_to_before_the_change_goes_on_under_it(small_config, tmp_path):
    """Back from step 5 to 1, of before the length was doubled after 2; the steps up to 4 are skipped. A restart before
    the next save needs no --set: the file has the new length, and the ledger knows that it was taken."""
    run, policy = tmp_path / "run", SPIKES
    results_of(life(small_config, run, 2, policy))
    given = {**policy, "model.sequence_length": 64}
    (killed,) = life(small_config, run, 6, given, fault=partial(data_changes.spike_at_step_5, True))
    assert killed.exit_code == -signal.SIGKILL, killed.stderr
    (back,) = events_of(run, "rollback")
    assert (back["step"], back["position_change"]["next_sample"]) == (1, [8, 4])
    assert "model.sequence_length" in {change["key"] for change in back["changes"]}, "as replay.py reads it"
    (amendment,) = Ledger(run).amendments  # step 1: 256 tokens; steps 3 and 4: 16 samples of 64 from token 512 on
    assert (amendment["from_sample"], amendment["samples"], amendment["sequence_length"]) == (4, [4, 24], 64)
    edited = with_lines(small_config, tmp_path, sequence_length=64)
    results_of(life(edited, run, 3, policy))
    assert [steps_of(run)[step]["samples"] for step in (1, 2, 3)] == [[0, 8], [4, 12], [12, 20]]
    assert [entry["from_step"] for entry in Ledger(run).entries if entry["event"] == "change"] == [2, 1]
    feed = Run(run).feed
    plain = open_feed(Run(run).config.data.train, sequence_length=LENGTH, seed=7, vocab_size=256).tokens(0, 60)
    assert numpy.array_equal(feed.tokens(4, 1)[0, :-1], plain[48:50, :-1].reshape(-1)), (
        "the rows of 4 to 23 are skipped"
    )
    assert "position 20 (samples 0 to 7 of 32 tokens, then samples 4 to 19 of 64" in "\n".join(
        verify_lines(Run(run), contents=False)
    )


def test_set_back_by_hand_to_before_the_change(changed, small_config, tmp_path, monkeypatch):
    """The samples to skip are counted in the present length; the file with the old values goes on under them."""
    run = Path(shutil.copytree(changed[0], tmp_path / "run"))
    arguments = ["--before", "4", "--to", "7", "--skip", "batches", "--reason", "x"]
    monkeypatch.setattr(sys, "argv", ["roll_back.py", str(run), *arguments])
    assert loaded_tool("roll_back").main() == 0
    (amendment,) = Ledger(run).amendments  # from token 768 to 30 * 96 + 2 * 4 * 96 = 3648
    assert (amendment["from_sample"], amendment["samples"], amendment["sequence_length"]) == (8, [8, 38], 96)
    results_of(life(small_config, run, 4, {}))
    assert steps_of(run)[4]["samples"] == [24, 32]
    plain = open_feed(Run(run).config.data.train, sequence_length=LENGTH, seed=7, vocab_size=256).tokens(0, 120)
    assert numpy.array_equal(Run(run).feed.tokens(24, 6), plain[114:120])
    assert "position 32: chain" in "\n".join(verify_lines(Run(run), contents=False))


def test_run_on_a_blend_takes_another_batch_and_no_other_length(small_config, text_folder, tmp_path):
    """Its rows are mcore's, which cuts and shuffles them by the length: they cannot be cut anew."""
    sources = "".join(
        f'[[sources]]\nprefix = "{text_folder / name}"\nweight = {weight}\n'
        for name, weight in (("train", 3.0), ("held_out", 1.0))
    )
    blend = tmp_path / "blend.toml"
    blend.write_text(f'samples = 120\ncache = "{tmp_path / "cache"}"\n{sources}')
    folder, rows, data = tmp_path / "run", tmp_path / "rows", {"data.train": blend}
    rows.mkdir()
    keeps = partial(data_changes.fed_rows_are_kept, rows)
    results_of(life(small_config, folder, 3, data, fault=keeps))
    results_of(life(small_config, folder, 5, {**data, "train.global_batch": 16}, fault=keeps))
    assert [steps_of(folder)[step]["samples"] for step in (1, 3, 4, 5)] == [[0, 8], [16, 24], [24, 40], [40, 56]]
    whole = open_feed(blend, sequence_length=LENGTH, seed=7, vocab_size=256).tokens(0, 56)
    assert numpy.array_equal(fed(folder, rows)[LENGTH], whole[:, :-1].reshape(-1))
    assert "position 56: chain" in "\n".join(verify_lines(Run(folder), contents=False))
    (outcome,) = life(small_config, folder, 9, {**data, "train.global_batch": 16, "model.sequence_length": 64})
    assert outcome.exit_code == 2
    assert "began with model.sequence_length 32, and mcore cuts and shuffles blended" in outcome.stderr
