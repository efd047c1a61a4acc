"""Amendments move what is still to come and nothing else; the ledger is append-only."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2_megatron.data.ledger import CHAIN_START, Ledger
from k2_megatron.data.schedule import Amendment, Schedule
from k2_megatron.train.checkpoints.manifest import CheckpointError
from k2_megatron.train.run_data import RunData


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_amendments_against_a_plain_list(data):
    rows, chunks = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    order = data.draw(st.permutations(range(chunks)))
    expected = [chunk * rows + row for chunk in order for row in range(rows)]
    schedule = Schedule.of_chunks(order, rows)
    for _ in range(data.draw(st.integers(0, 4))):
        start = data.draw(st.integers(0, len(expected)))
        action = data.draw(st.sampled_from(["skip", "defer"]))
        if start < len(expected) and data.draw(st.booleans()):
            first = data.draw(st.integers(start, len(expected) - 1))
            end = data.draw(st.integers(first + 1, len(expected)))
            amendment = Amendment(action, start, rows=(first, end))
            taken = expected[first:end]
        else:
            chunk = data.draw(st.integers(0, chunks - 1))
            amendment = Amendment(action, start, chunk=chunk)
            taken = [position for position in expected[start:] if position // rows == chunk]
        if not taken:
            with pytest.raises(ValueError, match="none of its rows"):
                schedule.amended(amendment, rows)
            continue
        kept = [position for position in expected[start:] if position not in taken]
        expected = expected[:start] + kept + (taken if action == "defer" else [])
        schedule = schedule.amended(amendment, rows)
    assert schedule.total == len(expected)
    assert schedule.positions(0, len(expected)).tolist() == expected
    for first in range(0, len(expected), 3):
        assert schedule.positions(first, min(2, len(expected) - first)).tolist() == expected[first : first + 2]


@pytest.mark.parametrize(
    ("amendment", "message"),
    [
        (Amendment("skip", 20, rows=(10, 30)), "rows before it are trained already: roll back further first"),
        (Amendment("skip", 20, rows=(90, 101)), "the end, 100"),
        (Amendment("defer", 30, chunk=1), "chunk 1: none of its rows come at or after row 30"),
        (Amendment("defer", 101, chunk=1), "from row 101: the schedule has rows 0..99"),
    ],
)
def test_an_amendment_that_does_not_fit(amendment, message):
    with pytest.raises(ValueError, match=message):
        Schedule.of_chunks(range(10), 10).amended(amendment, 10)


def test_an_endless_schedule_skips_but_does_not_defer():
    endless = Schedule.endless()
    skipped = endless.amended(Amendment("skip", 5, rows=(10, 20)), None)
    assert skipped.positions(8, 4).tolist() == [8, 9, 20, 21]
    with pytest.raises(ValueError, match="this feed has none; skip them"):
        endless.amended(Amendment("defer", 5, rows=(10, 20)), None)
    with pytest.raises(ValueError, match="only be amended in a plan"):
        endless.amended(Amendment("skip", 5, chunk=3), None)


def test_past_the_end_is_an_error():
    with pytest.raises(ValueError, match=r"lower train\.steps, or build a plan with more"):
        Schedule.of_chunks([1, 0], 10).positions(15, 6)


def test_ledger_round_trip(tmp_path):
    ledger = Ledger(tmp_path)
    assert ledger.entries == []
    assert not ledger.path.exists()
    ledger.record_position(10, "aa", step=1)
    ledger.amend("defer", from_sample=10, sequence_length=8, reason="spike", chunk=3)
    ledger.amend("skip", from_sample=10, sequence_length=8, reason="spike", samples=(12, 14))
    again = Ledger(tmp_path)
    assert again.entries == ledger.entries
    assert [entry["consumed_samples"] for entry in again.positions] == [10]
    assert [entry.get("chunk", entry.get("samples")) for entry in again.amendments] == [3, [12, 14]]
    assert len(again.before(2).amendments) == 1
    with pytest.raises(ValueError, match="either a chunk or a range"):
        again.amend("skip", from_sample=0, sequence_length=8, reason="none")
    with pytest.raises(ValueError, match="action 'drop'"):
        again.amend("drop", from_sample=0, sequence_length=8, reason="none", chunk=1)


def three_lines(folder):
    ledger = Ledger(folder)
    for samples in (10, 20, 30):
        ledger.record_position(samples, "cc")
    return ledger.path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("change", ["edit", "remove", "insert", "swap"])
def test_a_ledger_that_was_edited_is_found(tmp_path, change):
    one, two, three = three_lines(tmp_path)
    content = {
        "edit": [one, two.replace(b'"consumed_samples": 20', b'"consumed_samples": 21'), three],
        "remove": [one, three],
        "insert": [one, two, one, three],
        "swap": [two, one, three],
    }[change]
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(content))
    with pytest.raises(ValueError, match=r"ledger\.jsonl, line \d: does not follow .* append-only"):
        Ledger(tmp_path)


def saved(ledger, step=3):
    """What a checkpoint's manifest says of its data, after 10 samples of 8 tokens a step."""
    facts = {"step": step, "consumed_samples": 10 * step, "config": {"model": {"sequence_length": 8}}}
    return json.loads(json.dumps({**facts, **RunData(Numbers(), None, ledger, writer=True).position()}))


def resume(folder, manifest):
    RunData(Numbers(), None, Ledger(folder), writer=True).resume_at(manifest)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("edit", "saved after line 3, and that line is another now; the ledger is append-only: put back"),
        ("remove", "saved after line 3, and there are 2 lines; the ledger is append-only: put back"),
        ("remove, then go on", "saved after line 3, and that line is another now"),
        ("empty", "saved after line 3, and there are 0 lines"),
    ],
)
def test_the_last_line_is_vouched_for_by_the_checkpoint(tmp_path, change, message):
    one, two, three = three_lines(tmp_path)
    manifest = saved(Ledger(tmp_path))
    resume(tmp_path, manifest)
    content = {"edit": [one, two, three.replace(b'"cc"', b'"cd"')], "empty": []}.get(change, [one, two])
    (tmp_path / "ledger.jsonl").write_bytes(b"".join(content))
    if "go on" in change:
        Ledger(tmp_path).record_position(30, "dd")  # another line within the same millisecond, too
    with pytest.raises(CheckpointError, match=f"the checkpoint of step 3 was {message}"):
        resume(tmp_path, manifest)


def test_lines_after_the_checkpoint_are_as_they_should_be(tmp_path):
    """A kill after an amendment or after a position whose checkpoint was not published, and a write cut short."""
    three_lines(tmp_path)
    manifest = saved(Ledger(tmp_path))
    Ledger(tmp_path).record_position(40, "dd")
    Ledger(tmp_path).amend("defer", from_sample=30, sequence_length=8, reason="spike", chunk=3)
    resume(tmp_path, manifest)
    with open(tmp_path / "ledger.jsonl", "ab") as file:
        file.write(b'{"event": "posi')
    resume(tmp_path, manifest)
    assert len(Ledger(tmp_path).entries) == 5
    resume(tmp_path, {key: value for key, value in manifest.items() if key != "ledger"})  # of an earlier version


@pytest.mark.parametrize(("from_sample", "length", "is_past"), [(29, 8, True), (14, 16, True), (15, 16, False)])
def test_an_amendment_of_what_a_checkpoint_has_trained_is_refused(tmp_path, from_sample, length, is_past):
    """Rows 30 to 39 would be trained twice, or be left out: the samples after the checkpoint have other rows."""
    three_lines(tmp_path)
    manifest = saved(Ledger(tmp_path))
    Ledger(tmp_path).amend("defer", from_sample=from_sample, sequence_length=length, reason="late", samples=(40, 50))
    if is_past:
        with pytest.raises(
            CheckpointError, match=rf"from sample {from_sample} .* step 3 .* up to sample 30 of 8.*roll_back"
        ):
            resume(tmp_path, manifest)
    else:
        resume(tmp_path, manifest)
    resume(tmp_path, saved(Ledger(tmp_path), step=4))  # it was trained under it


def test_a_checkpoint_goes_to_a_new_folder_without_its_ledger_unless_that_amended(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    three_lines(old)
    manifest = saved(Ledger(old))
    for _ in range(2):  # the second start finds the ledger that the first began
        resume(new, manifest)
        assert [entry["event"] for entry in Ledger(new).entries] == ["continues"]
    Ledger(new).record_position(40, "dd")
    resume(new, manifest)
    resume(new, saved(Ledger(new), step=4))
    Ledger(old).amend("defer", from_sample=30, sequence_length=8, reason="spike", chunk=3)
    with pytest.raises(CheckpointError, match=r"after line 4, and there are 0 lines; .*put back the ledger\.jsonl"):
        resume(tmp_path / "newer", saved(Ledger(old)))


def test_two_checkpoints_go_to_a_new_folder_without_their_ledger(tmp_path):
    """Resumed from the newer, the run may still go back to the older; one with amendments it may not."""
    three_lines(tmp_path / "old")
    older, amended = saved(Ledger(tmp_path / "old"), step=3), saved(Ledger(tmp_path / "old"), step=3)
    Ledger(tmp_path / "old").record_position(40, "dd")
    resume(tmp_path / "new", saved(Ledger(tmp_path / "old"), step=4))
    Ledger(tmp_path / "new").record_position(50, "ee")
    resume(tmp_path / "new", older)
    with pytest.raises(CheckpointError, match=r"put back the ledger\.jsonl"):
        resume(tmp_path / "new", {**amended, "amendments": 1})
    with pytest.raises(CheckpointError, match=r"put back the ledger\.jsonl"):
        resume(tmp_path / "new", {**older, "step": 5})


def test_a_line_cut_by_a_crash_is_dropped(tmp_path):
    one, two, three = three_lines(tmp_path)
    (tmp_path / "ledger.jsonl").write_bytes(one + two + three[:17] + b"x" * 999)
    ledger = Ledger(tmp_path)
    assert [entry["consumed_samples"] for entry in ledger.positions] == [10, 20]
    ledger.record_position(25, "dd")
    assert [entry["consumed_samples"] for entry in Ledger(tmp_path).positions] == [10, 20, 25]
    assert all(json.loads(line) for line in ledger.path.read_bytes().splitlines())


@pytest.mark.parametrize("left", [None, 0, 50])
def test_a_ledger_that_was_removed_or_cut_under_a_living_run_is_not_filled_up(tmp_path, left):
    """A line at its old place would follow zeros."""
    three_lines(tmp_path)
    ledger = Ledger(tmp_path)
    if left is None:
        ledger.path.unlink()
    else:
        os.truncate(ledger.path, left)
    with pytest.raises(ValueError, match=rf"{left or 0} bytes, and \d+ when .* put it back"):
        ledger.record_position(40, "dd")
    assert (ledger.path.stat().st_size if ledger.path.exists() else None) == left


class Numbers:
    """A feed whose sample n has the record n."""

    fingerprint = "numbers"

    def sample_records(self, first_sample, count):
        return [number.to_bytes(8, "little") for number in range(first_sample, first_sample + count)]

    def after(self, amendment):
        raise ValueError("does not fit")


def test_the_chain_does_not_depend_on_how_samples_were_grouped(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.attach(Numbers())
    whole = ledger.chain(CHAIN_START, 0, 100)
    assert ledger.chain(ledger.chain(CHAIN_START, 0, 37), 37, 100) == whole
    assert ledger.chain(whole, 100, 100) == whole
    assert ledger.chain(CHAIN_START, 50, 100) != whole, "what came before does not count"
    assert len({whole, ledger.chain(CHAIN_START, 0, 99), ledger.chain(CHAIN_START, 1, 101)}) == 3


def test_an_amendment_that_does_not_fit_the_feed_is_not_written(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.attach(Numbers())
    with pytest.raises(ValueError, match="does not fit"):
        ledger.amend("skip", from_sample=0, sequence_length=8, reason="x", chunk=1)
    assert not ledger.path.exists()
