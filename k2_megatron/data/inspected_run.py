"""A run folder, open for questions about its data: steps as they were trained, and the feed that each of them read.

In: configuration, plan, ledger and journal of the run. Out: `Run`, whose parts are read when they are first asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from k2_megatron.config import Config, load_run_config
from k2_megatron.data.documents import DocumentSpan, line_of_document, short_names
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.manifest import manifest_path, read_manifest
from k2_megatron.data.open_feed import AnyFeed, open_feed
from k2_megatron.data.plan import Plan
from k2_megatron.data.tokenizer import Tokenizer, load_tokenizer
from k2_megatron.runtime.journal import JOURNAL, read_events, standing_events


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
