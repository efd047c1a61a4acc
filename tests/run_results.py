"""What a run left behind, without the times: two runs are equal when these are, to the bit."""

import json
from pathlib import Path

from k2_megatron.train.checkpoint_manifest import hash_file
from k2_megatron.train.journal import read_events, read_steps

# Fields of a step that hold measured time
MEASURED = {"time", "step_seconds", "data_seconds", "tokens_per_second", "model_flops_utilization"}


def steps_of(folder: Path) -> dict[int, dict]:
    """{step: what was computed in it} of a run folder."""
    steps = read_steps(folder / "journal.jsonl")
    return {number: {key: event[key] for key in event.keys() - MEASURED} for number, event in steps.items()}


def events_of(folder: Path, kind: str) -> list[dict]:
    """All events of one kind in a run's journal; none when there is no journal yet."""
    journal = folder / "journal.jsonl"
    return [event for event in read_events(journal) if event["event"] == kind] if journal.exists() else []


def stored_state(folder: Path, step: int) -> dict[str, dict | str]:
    """Size and hash of each file of a checkpoint that holds tensors (weights, moments, main parameters, generators),
    read from the disk, and the fingerprint of the weights."""
    checkpoint = folder / "checkpoints" / f"step_{step:08d}"
    files = {path.name: hash_file(path) for path in sorted(checkpoint.glob("*.distcp"))}
    assert files, f"{checkpoint} holds no tensors"
    return {**files, "weights": json.loads((checkpoint / "k2.json").read_text())["weights"]}
