"""Questions about a run's data, answered from its plan, ledger and journal: what was trained when, and is it proved.

In: a run folder (inspected_run.py). Out: lines of text. `tools/inspect_data.py` is the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from k2_megatron.data.feed import Feed
from k2_megatron.data.inspected_run import Run
from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.data.plan import Plan
from k2_megatron.data.rows import unpack

SAMPLES_A_SLICE = 1 << 20


def step_lines(run: Run, number: int, characters: int) -> Iterator[str]:
    """The documents of a step, sample by sample, with the beginning of their text as it was trained."""
    step = run.step(number)
    feed = run.feed_of(step)
    length = f" of {step.sequence_length} tokens" if run.config.train.history else ""
    yield from run.untrained_line(number, number)
    yield f"step {number}: samples {step.first}..{step.end - 1}{length}"
    for sample in range(step.first, step.end):
        tokens = feed.tokens(sample, 1)[0]
        yield f"sample {sample}"
        for span in feed.describe(sample):
            yield f"  {run.where(span)}"
            if run.tokenizer is not None and characters:
                text = run.tokenizer.decode(tokens[span.start : span.end].tolist())
                yield f"    {text[:characters]!r}"


def show_lines(run: Run, count: int, first_sample: int) -> Iterator[str]:
    """Samples decoded whole."""
    if count < 1 or first_sample < 0:
        raise ValueError(f"show {count} from {first_sample}: a count of 1 or more, from sample 0 or a later one")
    if run.tokenizer is None:
        raise ValueError(f"{run.folder}/config.toml: data.tokenizer is not set; it is needed to decode rows")
    for number, tokens in enumerate(run.feed.tokens(first_sample, count), start=first_sample):
        yield f"--- sample {number}"
        yield run.tokenizer.decode(tokens.tolist())


def mix_lines(run: Run, first_step: int, last_step: int) -> Iterator[str]:
    """Rows of each source in steps first_step..last_step, against the whole plan's mixture; samples, where a row is
    cut into several, of which a step may train some and the next the others; tokens, where it is now this, now that."""
    if first_step > last_step:
        raise ValueError(f"mix {first_step} {last_step}: the first step comes after the last; exchange them")
    with_rows(run, run.feed)
    counts: Counter[int] = Counter()  # tokens of each source
    units: dict[int, str] = {}  # tokens of what was counted: what it is
    for number in range(first_step, last_step + 1):
        step = run.step(number)
        feed = with_rows(run, run.feed_of(step))
        sources = _sources_of_samples(feed, step.first, step.end)
        unit = feed.store.row_length // feed.samples_a_row
        units[unit] = "rows" if feed.samples_a_row == 1 else f"samples, {feed.samples_a_row} a row"
        for source, count in zip(*(part.tolist() for part in np.unique(sources, return_counts=True)), strict=True):
            counts[source] += count * unit
    unit, what = units.popitem() if len(units) == 1 else (1, "tokens")
    total = counts.total()
    train = Path(run.config.data.train)
    planned = Plan(train).sources if train.is_dir() else [{"rows_used": 1}]
    whole = sum(source["rows_used"] for source in planned)
    yield from run.untrained_line(first_step, last_step)
    yield f"steps {first_step}..{last_step}: {total // unit} {what}"
    yield f"{'source':28}{what.split(',')[0]:>12}{'here':>9}{'plan':>9}"
    for number, name in enumerate(run.feed.source_names):
        here, plan = counts[number] / total, planned[number]["rows_used"] / whole
        yield f"{name:28}{counts[number] // unit:>12}{here:>9.2%}{plan:>9.2%}"


def _sources_of_samples(feed: Feed, first: int, end: int) -> np.ndarray:
    """The source of every row that samples first..end-1 are made of, or of every sample where it is a part of a row."""
    first_row, rows = feed.row_range(first, end - first)
    sources = unpack(feed.order.records(feed.schedule.positions(first_row, rows)))[0]
    if feed.samples_a_row == 1:
        return sources
    return sources[np.arange(first, end) // feed.samples_a_row - first_row]


def document_lines(run: Run, identity: str) -> Iterator[str]:
    """Every step that saw a document, named FILE:NUMBER as `step` prints it."""
    name, _, number = identity.rpartition(":")
    if not name or not number.isdigit():
        raise ValueError(f"document {identity!r}: FILE:NUMBER, as `step` prints it")
    with_rows(run, run.feed)
    steps = run.steps
    if not steps:
        raise ValueError(f"{run.folder}/journal.jsonl tells of no step yet")
    wanted = _records_of_document(run, name, int(number))
    seen = 0
    ends: dict[int, int] = {}  # the last sample of each length
    for step in steps:
        ends[step.sequence_length] = max(step.end, ends.get(step.sequence_length, 0))
    cache: dict[tuple[int, int], np.ndarray] = {}
    for step in steps:
        key = run.amendments_at(step.ledger_entries), step.sequence_length
        if key not in cache:
            under = with_rows(run, run.feed_of(step))
            possible = _samples_of_rows(under, wanted, ends[step.sequence_length]).tolist()
            held = [sample for sample in possible if _holds(run, under, sample, name, int(number))]
            cache[key] = np.array(held, dtype=np.int64)
        hits = cache[key]
        for sample in hits[(hits >= step.first) & (hits < step.end)].tolist():
            seen += 1
            yield f"step {step.number}, sample {sample}"
    yield f"{identity}: seen {seen} times" if seen else f"{identity}: never seen"


def with_rows(run: Run, feed: AnyFeed) -> Feed:
    """The feed. ValueError where its order is mcore's (a blend file), which tells neither rows nor documents."""
    if not isinstance(feed, Feed):
        raise ValueError(
            f"{run.config.data.train}: mcore's blended datasets tell neither documents nor a mixture by step; "
            "`step`, `show` and `verify` work, and a plan (tools/build_plan.py) tells all"
        )
    return feed


def _records_of_document(run: Run, name: str, document: int) -> np.ndarray:
    """Records of every row that holds a token of a document."""
    feed, found, names = with_rows(run, run.feed), [], set()
    for source, streams in enumerate(feed.store.sources):
        first_row = 0
        for stream in streams:
            rows = stream.rows(feed.store.row_length)
            names.add(run.name_of(stream.file.prefix))
            if run.name_of(stream.file.prefix) == name:
                if document >= stream.file.documents:
                    raise ValueError(f"{name} has documents 0..{stream.file.documents - 1}")
                start, end = (stream.file.first_token(document + more) for more in (0, 1))
                found += stream.rows_of_tokens(start, end, feed.store.row_length, source, first_row)
            first_row += rows
    if name not in names:
        alike = sorted(other for other in names if other.endswith(f"/{name}"))
        which = f", but several that end so: {', '.join(alike)}" if alike else ""
        raise ValueError(f"no token file {name!r} in this run's data{which}")
    return np.array(found, dtype=np.uint64)


def _holds(run: Run, feed: Feed, sample: int, name: str, document: int) -> bool:
    """Whether a sample, which may be a part of its row, holds a token of a document."""
    return any((run.name_of(span.prefix), span.document) == (name, document) for span in feed.describe(sample))


def _samples_of_rows(feed: Feed, wanted: np.ndarray, end: int) -> np.ndarray:
    """Samples below `end` that are made of any of the `wanted` records, ascending."""
    found = [np.zeros(0, dtype=np.int64)]
    for first in range(0, end, SAMPLES_A_SLICE):
        count = min(SAMPLES_A_SLICE, end - first)
        first_row, rows = feed.row_range(first, count)
        hit = np.flatnonzero(np.isin(feed.order.records(feed.schedule.positions(first_row, rows)), wanted)) + first_row
        if feed.samples_a_row > 1:
            hit = (hit[:, None] * feed.samples_a_row + np.arange(feed.samples_a_row)).reshape(-1)
        found.append(np.unique(hit // feed.rows_a_sample))
    samples = np.unique(np.concatenate(found))  # two slices may share a row
    return samples[samples < end]
