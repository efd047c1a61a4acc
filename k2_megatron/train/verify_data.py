"""Proof that a run trained on what its folder says: the ledger, the chain over its samples, the plan, tokens, texts.

In: a `Run`. Out: a line for everything that holds; ValueError at the first that does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from k2_megatron.config.batch import carried_over
from k2_megatron.data.feed import Feed
from k2_megatron.data.inspected_run import Run
from k2_megatron.data.ledger import CHAIN_START, chain_samples
from k2_megatron.data.plan import Plan
from k2_megatron.data.source_check import check_sources
from k2_megatron.runtime.journal import JOURNAL, read_events
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import read_manifest

Part = tuple[int, int, int]  # tokens a sample, the first sample, the one after the last


def verify_lines(run: Run, contents: bool, sources: Sequence[Path] = ()) -> Iterator[str]:
    """Check the ledger against checkpoints and journal, its chain at every recorded position, the plan, (`contents`)
    every byte of the tokens, and every byte of the texts below the folders `sources`.

    ValueError at the first thing that is not as it was written.
    """
    yield f"ledger: {len(run.ledger.entries)} lines follow from one another"
    yield from verify_ledger_of_checkpoints(run)
    yield from verify_ledger_of_journal(run)
    yield from verify_chain(run)
    if isinstance(run.feed, Feed):
        yield from verify_plan(run.feed, Path(run.config.data.train), contents)
    else:
        yield f"{run.config.data.train}: mcore's blended datasets; the contents of their files have no hashes"
    if sources:
        manifests = {manifest["xxh3"]: manifest for _, manifest in run.manifests}
        files = sum(check_sources(manifest, sources) for manifest in manifests.values())
        yield f"{files} text files are what the tokens were made from"


def verify_chain(run: Run) -> Iterator[str]:
    """The chain of every position in the ledger, computed again."""
    known: dict[int, tuple[list[Part], str]] = {}  # amendments -> (parts, their chain) computed last
    for number, entry in enumerate(run.ledger.entries):
        if entry["event"] != "position":
            continue
        parts = _parts(run, number)
        amendments = run.amendments_at(number)
        done, chain = known.get(amendments, ([], CHAIN_START))
        begun = _begun(done, parts)
        if begun is None:
            begun, chain = 0, CHAIN_START
        # What was begun is gone on with, from where it ended; what comes after it begins at its own first sample
        rest = parts if not begun else [(parts[begun - 1][0], done[-1][2], parts[begun - 1][2]), *parts[begun:]]
        for start in [chain] if begun else _starts(run):
            chain = start
            for length, first, end in rest:
                chain = chain_samples(run.feed_at(number, length), chain, first, end)
            if chain == entry["chain"]:
                break
        known[amendments] = parts, chain
        if chain != entry["chain"]:
            raise ValueError(
                f"{run.ledger.path}, line {number + 1}: {entry['consumed_samples']} samples have chain {chain}, the "
                f"run recorded {entry['chain']}: it was trained on other rows than plan and ledger now say"
            )
        yield f"position {entry['consumed_samples']}{_lengths(parts)}: chain {chain} holds"


def _starts(run: Run) -> list[str]:
    """The chain of no samples; then that of a run which began when its files had no manifest."""
    earlier = run.feed.earlier_fingerprint
    return [CHAIN_START, *([earlier.encode().hex()] if earlier else [])]


def _parts(run: Run, number: int) -> list[Part]:
    """What the chain of a position, entry `number` of the ledger, goes over. ValueError where a part does not begin
    where the one before it ends, at the next whole sample."""
    entry = run.ledger.entries[number]
    whole = (run.first_sequence_length, 0, entry["consumed_samples"])
    parts = [(length, first, end) for length, first, end in entry.get("parts", [whole])]
    for (length, _, end), (next_length, first, _) in pairwise(parts):
        if first != carried_over(end, length, next_length):
            raise ValueError(
                f"{run.ledger.path}, line {number + 1}: sample {first} of {next_length} tokens does not follow sample "
                f"{end - 1} of {length}: it was written by another program, or altered"
            )
    return parts


def _begun(done: list[Part], parts: list[Part]) -> int | None:
    """How many of `parts` hold all that `done` holds, the last of them perhaps more; None where they do not."""
    count = len(done)
    if count > len(parts) or done[:-1] != parts[: count - 1]:
        return None
    goes_on = not done or (done[-1][:2] == parts[count - 1][:2] and done[-1][2] <= parts[count - 1][2])
    return count if goes_on else None


def _lengths(parts: list[Part]) -> str:
    """Words on the parts where there are several."""
    if len(parts) == 1:
        return ""
    told = ", then ".join(f"samples {first} to {end - 1} of {length} tokens" for length, first, end in parts)
    return f" ({told})"


def verify_ledger_of_checkpoints(run: Run) -> Iterator[str]:
    """For every checkpoint: the ledger still has the lines it had when that was saved."""
    for folder in complete_checkpoints(run.folder / "checkpoints"):
        run.ledger.check_mark(read_manifest(folder))
        yield f"{folder.name}: the lines that the ledger had then stand"


def verify_ledger_of_journal(run: Run) -> Iterator[str]:
    """For every line of the journal that says how the ledger ended then (each step's does): it still has that line."""
    path, last = run.folder / JOURNAL, None
    for event in read_events(path) if path.is_file() else ():
        if "ledger" in event and event["ledger"] != last:
            last = event["ledger"]
            run.ledger.check_lines(last, f"the journal tells of {event['event']} {event.get('step', '')}".rstrip())
    if last is not None:
        yield f"journal: the ledger has the {last['lines']} lines that it had at the journal's last telling"


def verify_plan(feed: Feed, path: Path, contents: bool) -> Iterator[str]:
    """Every chunk of a plan, and the token files behind it."""
    if path.is_dir():
        plan = Plan(path)
        for chunk in range(len(plan.chunk_order)):
            plan.load_chunk(chunk).result()
        yield f"{path}: {len(plan.chunk_order)} chunks are as built"
    files = {stream.file.prefix: stream.file for streams in feed.store.sources for stream in streams}
    for file in files.values():
        if file.entry is None:
            yield f"{file.prefix}: has no manifest; sizes and index checked only (tools/inspect_data.py manifest)"
        elif contents:
            file.check_everything()
    if contents:
        yield f"{len(files)} token files are as written"
