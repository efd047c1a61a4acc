"""Questions about a run's data, answered from its plan, ledger and journal: what was trained when, and is it proved.

In: a run folder. Out: lines of text. `tools/inspect_data.py` is the command line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from k2_megatron.config import Config, load_run_config
from k2_megatron.data.documents import DocumentSpan, line_of_document, short_names
from k2_megatron.data.feed import AnyFeed, Feed, open_feed
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.manifest import manifest_path, read_manifest
from k2_megatron.data.plan import Plan
from k2_megatron.data.rows import unpack
from k2_megatron.data.tokenizer import Tokenizer, load_tokenizer
from k2_megatron.runtime.journal import JOURNAL, read_events, standing_events

SAMPLES_A_SLICE = 1 << 20


@dataclass(frozen=True)
class Step:
    """One step event of the journal: samples first..end-1, how many ledger entries there were by then, and the length
    in which samples were counted."""

    number: int
    first: int
    end: int
    ledger_entries: int
    sequence_length: int


class Run:
    """A run folder, open for questions."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        if not (self.folder / "config.toml").is_file():
            raise ValueError(f"{folder}: no config.toml there; name the folder of a run")
        self.config: Config = load_run_config(self.folder / "config.toml")
        self._feeds: dict[tuple[int, int], AnyFeed] = {}

    @cached_property
    def ledger(self) -> Ledger:
        return Ledger(self.folder)

    @property
    def first_sequence_length(self) -> int:
        """Tokens of a sample when the run began."""
        return self.config.stages[0].sequence_length

    def amendments_at(self, ledger_entries: int) -> int:
        """How many of the first `ledger_entries` lines of the ledger are amendments."""
        return self._amendments_before[min(ledger_entries, len(self.ledger.entries))]

    @cached_property
    def _amendments_before(self) -> list[int]:
        """How many amendments there are before each line of the ledger, and in all."""
        return [0, *accumulate(entry["event"] == "amendment" for entry in self.ledger.entries)]

    def feed_at(self, ledger_entries: int, sequence_length: int) -> AnyFeed:
        """The feed of samples so long, under the amendments among the first `ledger_entries` lines of the ledger."""
        key = self.amendments_at(ledger_entries), sequence_length
        if key not in self._feeds:
            data = self.config.data
            self._feeds[key] = open_feed(
                data.train,
                sequence_length=sequence_length,
                seed=self.config.run.seed,
                vocab_size=self.config.model.vocab_size,
                row_length=self.first_sequence_length,
                part="train" if data.train == data.held_out else "all",
                ledger=self.ledger.before(ledger_entries),
            )
        return self._feeds[key]

    def feed_of(self, step: Step) -> AnyFeed:
        """The feed that a step read."""
        return self.feed_at(step.ledger_entries, step.sequence_length)

    @property
    def feed(self) -> AnyFeed:
        """What the run goes on with."""
        return self.feed_at(len(self.ledger.entries), self.config.model.sequence_length)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        return load_tokenizer(self.config.data.tokenizer) if self.config.data.tokenizer else None

    @cached_property
    def manifests(self) -> list[tuple[Path, dict[str, Any]]]:
        """The manifests of the token files, with their paths."""
        train = Path(self.config.data.train)
        if train.is_dir():
            paths = Plan(train).manifest_paths()
        else:
            paths = [path for path in [manifest_path(train)] if path.is_file()]
        return [(path, read_manifest(path)) for path in paths]

    @cached_property
    def manifest_of(self) -> dict[str, dict[str, Any]]:
        """The prefix of a token file, as spans have it -> the manifest it is in."""
        return {str(path.parent / entry["name"]): found for path, found in self.manifests for entry in found["files"]}

    @cached_property
    def _names(self) -> dict[str, str]:
        return short_names(self.manifest_of)

    def name_of(self, prefix: str) -> str:
        """What a token file is called here: where two have one name, with folders that tell them apart."""
        return self._names.get(prefix) or Path(prefix).name

    @cached_property
    def steps(self) -> list[Step]:
        """Every step that the journal tells of, in order; a step done twice stands twice."""
        path = self.folder / JOURNAL
        events = read_events(path) if path.is_file() else ()
        return [self._step_of(event) for event in events if event["event"] == "step"]

    @cached_property
    def trained(self) -> dict[int, Step]:
        """The last telling of each step that no rollback or resume took back since."""
        path = self.folder / JOURNAL
        events = standing_events(path, "step") if path.is_file() else []
        return {event["step"]: self._step_of(event) for event in events}

    def _step_of(self, event: dict[str, Any]) -> Step:
        first, end = event["samples"]
        length = event.get("sequence_length", self.first_sequence_length)  # of earlier versions, which kept it
        # The journal of earlier versions does not say; clocks may have been set back since
        told = event.get("ledger")
        entries = told["lines"] if told else sum(entry["time"] <= event["time"] for entry in self.ledger.entries)
        return Step(event["step"], first, end, entries, length)

    def step(self, number: int) -> Step:
        """A step as it was trained; where it was not, what configuration and ledger say of it."""
        if number in self.trained:
            return self.trained[number]
        if not 1 <= number <= self.config.train.steps:
            raise ValueError(f"step {number}: the run has steps 1..{self.config.train.steps}")
        first = self.config.consumed_samples_at(number - 1)
        end = first + self.config.global_batch_at(number - 1)
        return Step(number, first, end, len(self.ledger.entries), self.config.sequence_length_at(number - 1))

    def untrained_line(self, first_step: int, last_step: int) -> Iterator[str]:
        """What an answer about these steps begins with where the journal does not tell that all were trained."""
        missing = [number for number in range(first_step, last_step + 1) if number not in self.trained]
        if not missing:
            return
        some = f"{len(missing)} of these steps, the first {missing[0]}, are "
        yield f"{some if len(missing) <= last_step - first_step else ''}not trained yet; as plan and ledger stand:"

    def where(self, span: DocumentSpan) -> str:
        """Source, document, and the file and line it was read from."""
        manifest = self.manifest_of.get(span.prefix)
        line = line_of_document(manifest, span.file, span.document) if manifest else None
        origin = f"{line[0]} line {line[1]}" if line else "source text not recorded"
        tokens = f"tokens {span.first_token}..{span.end_token - 1}{' reordered' if span.reordered else ''}"
        file = self.name_of(span.prefix) if span.prefix else span.file
        return f"{span.source}  {file}:{span.document}  {origin}  {tokens}"


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
