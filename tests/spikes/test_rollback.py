"""A run over poisoned rows goes back by itself, and is then the run that a fresh start under its ledger would be."""

import errno
import json
from pathlib import Path

import numpy as np
from injected_faults import STEADY
from rank_processes import pretrain, results_of
from run_results import events_of, steps_of, stored_state

from k2_megatron.data.ledger import Ledger

POISONED = range(352, 472)  # plan positions: the batches of steps 45 to 59
SETTINGS = [
    "train.steps=72",
    *STEADY,
    "checkpoint.every_steps=20",
    "checkpoint.keep_last=2",
    "spikes.window_steps=16",
    "spikes.benign_steps=12",
]


def poison() -> None:
    """Rows of the range hold random bytes, wherever the schedule puts them."""
    from k2_megatron.data.feed import Feed

    read = Feed._read

    def tokens(self, first_sample, count):
        rows = read(self, first_sample, count).copy()
        for number in range(count):
            if self.schedule.positions(first_sample + number, 1)[0] in POISONED:
                rows[number] = np.random.default_rng(first_sample + number).integers(1, 256, rows.shape[1])
        return rows

    Feed._read = tokens


def run(config: Path, folder: Path, ranks: int, *more: str):
    settings = [*SETTINGS, f"run.folder={folder}", *more]
    return pretrain(ranks, config, settings, folder.with_name(folder.name + "_output"), fault=poison)


def test_going_back_and_skipping_equals_a_fresh_start_under_the_ledger(small_config, tmp_path):
    policy = ["spikes.policy=skip", "spikes.scope=batches", "spikes.max_rollbacks=30"]
    results_of(run(small_config, tmp_path / "skip", 2, "parallel.tensor=2", *policy))
    back = events_of(tmp_path / "skip", "rollback")
    assert [event["step"] for event in back][:1] == [40], (
        "the newest checkpoint before the onset, although two are kept"
    )
    amendments = Ledger(tmp_path / "skip").amendments
    assert [entry["samples"] for entry in amendments] == [event["amendment"]["samples"] for event in back]
    assert amendments[0]["samples"][0] == 320

    # From the first step on, with the amendments in force from the start
    again = tmp_path / "again"
    for entry in amendments:
        fields = ("action", "from_sample", "sequence_length", "reason", "samples")
        Ledger(again).amend(**{field: entry[field] for field in fields})
    results_of(run(small_config, again, 2, "parallel.tensor=2", *policy))
    assert events_of(again, "rollback") == []
    assert steps_of(again) == steps_of(tmp_path / "skip")
    assert stored_state(again, 72) == stored_state(tmp_path / "skip", 72)


def _saves_seen_when_waited_for_on_a_disk_that_refuses() -> None:
    """As slow storage does, a save in the background is still in flight when the verdict comes; and what going back
    writes, `latest` and the ledger's line, is refused the first time."""
    from k2_megatron.data.ledger import Ledger
    from k2_megatron.train.checkpoints.save import CheckpointWriter
    from k2_megatron.train.spikes import rollback

    CheckpointWriter.finished = lambda self: None
    rollback.write_file = _refusing_once(rollback.write_file)
    Ledger.amend = _refusing_writes_once(Ledger.amend)
    poison()


def _refusing_once(right):
    calls = []

    def refusing(*arguments, **fields):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return right(*arguments, **fields)

    return refusing


def _refusing_writes_once(right):
    """`Ledger.amend`, whose first write the disk refuses."""

    def amend(ledger, *arguments, **fields):
        write = type(ledger)._write
        if not hasattr(amend, "refused"):
            amend.refused = True
            type(ledger)._write = _refusing_once(write)
        return right(ledger, *arguments, **fields)

    return amend


def test_save_in_flight_at_the_verdict_does_not_cost_the_checkpoint_to_go_back_to(small_config, tmp_path):
    """Nor does a disk that is full for a moment end the run, or the second going back the checkpoints that the first
    had set aside."""
    more = ["spikes.policy=skip", "spikes.scope=batches", "spikes.max_rollbacks=30", "train.steps=60"]
    more += ["checkpoint.every_steps=4", "checkpoint.asynchronous=true", f"run.folder={tmp_path / 'run'}"]
    fault = _saves_seen_when_waited_for_on_a_disk_that_refuses
    ranks = pretrain(1, small_config, [*SETTINGS, *more], tmp_path / "output", fault=fault)
    results_of(ranks)
    back = events_of(tmp_path / "run", "rollback")
    assert back[0]["step"] == 44
    for what in ("could not be set back to step_00000044 (", "ledger.jsonl is not written yet ("):
        assert f"{what}[Errno 28] No space left on device)" in ranks[0].stderr
    assert len(back) > 1 and back[1]["step"] == 44
    branches = [
        json.loads(path.read_text())["amendments"] for path in tmp_path.glob("run/checkpoints/spiked_*/k2.json")
    ]
    assert sorted(set(branches)) == list(range(len(back))), "each branch that was left has its checkpoints still"


def test_limits_and_impossible_amendments_stop_the_run(small_config, tmp_path):
    policy = ["spikes.policy=rollback", "spikes.max_rollbacks=1"]
    for scope, reason in (("batches", "moves rows to the end, and this feed has none"), ("chunk", "to be a plan")):
        ended = run(small_config, tmp_path / scope, 1, *policy, f"spikes.scope={scope}")[0]
        assert ended.exit_code == 3, ended.stderr
        assert reason in ended.stderr
        assert not Ledger(tmp_path / scope).amendments
        assert events_of(tmp_path / scope, "spike")[-1]["kind"] == "malignant"
