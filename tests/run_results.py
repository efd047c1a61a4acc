"""What a run left behind, without the times: two runs are equal when these are, to the bit."""

import json
from pathlib import Path

import torch
from small_run import checkpoint_tensors

from k2_megatron.data.ledger import Ledger
from k2_megatron.runtime.journal import read_events, read_steps
from k2_megatron.train.checkpoints.file_hash import hash_file

# Fields of a step that hold measured time
MEASURED = {"time", "ledger", "step_seconds", "data_seconds", "tokens_per_second", "model_flops_utilization"}


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


def events_told(folder: Path, kind: str) -> int:
    """How many events of a kind the journal holds; cheap enough to be asked again and again."""
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(f'"event": "{kind}"'.encode()) if journal.exists() else 0


def differences(whole: Path, run: Path, step: int) -> list[str]:
    """What differs at the end of two runs of `step` steps, to the bit, in a word each; the first was not disturbed.

    A run that was set back has told of some steps twice: each telling must be what the undisturbed run told.
    """
    folders = [folder / "checkpoints" / f"step_{step:08d}" for folder in (whole, run)]
    stored = [stored_state(folder, step) for folder in (whole, run)]
    found = []
    if stored[0] != stored[1]:
        found = _unequal_parts(*folders)
    facts = [json.loads((folder / "k2.json").read_text()) for folder in folders]
    found += [f"{key} in the manifest" for key in facts[0].keys() | facts[1].keys() if _differs(key, *facts)]
    if not _same_journal(whole, run):
        found.append("journal")
    chains = [{entry["step"]: entry["chain"] for entry in Ledger(folder).positions} for folder in (whole, run)]
    told = [(entry["step"], entry["chain"]) for entry in Ledger(run).positions]
    if chains[0].keys() - chains[1].keys() or any(chains[0].get(step, chain) != chain for step, chain in told):
        found.append("ledger")
    return found


_OF_THE_LIFE = {"config", "files", "ledger", "xxh3"}  # folder and way of saving; hashes and times


def _differs(key: str, first: dict, second: dict) -> bool:
    return key not in _OF_THE_LIFE and first.get(key) != second.get(key)


def _unequal_parts(first: Path, second: Path) -> list[str]:
    """Which of weights, moments and generators differ."""
    tensors = [checkpoint_tensors(folder) for folder in (first, second)]
    names = [
        name
        for name in tensors[0].keys() | tensors[1].keys()
        if any(name not in of for of in tensors) or not torch.equal(tensors[0][name], tensors[1][name])
    ]
    moments = sum(name.startswith("optimizer.state.exp_avg") for name in names)
    parts = [f"{moments} moments"] if moments else []
    parts += [f"{len(names) - moments} weights"] if len(names) > moments else []
    return parts or ["generators"]


def _same_journal(whole: Path, run: Path) -> bool:
    """Whether `run` tells of every step and evaluation, each time, what `whole` tells."""
    told = [[], []]
    for events, folder in zip(told, (whole, run), strict=True):
        for event in read_events(folder / "journal.jsonl"):
            if event["event"] in ("step", "evaluation"):
                events.append((event["event"], event["step"], {key: event[key] for key in event.keys() - MEASURED}))
    expected = {(kind, step): event for kind, step, event in told[0]}
    found = {(kind, step): event for kind, step, event in told[1]}
    return found == expected and all(expected[kind, step] == event for kind, step, event in told[1])
