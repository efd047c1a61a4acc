"""What checkpoints are evaluated on: rows of token files, documents, tasks; opened once, scored for every checkpoint.

In: what the command line asks for, and a checkpoint's configuration. Out: `Text`s whose `figures(scorer)` are those of
docs/evaluate.md. ValueError for all that a user can mend, before any model is built.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xxhash

from k2_megatron.config import Config
from k2_megatron.data.feed import Feed
from k2_megatron.data.manifest import manifest_path, read_manifest
from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.data.order import EpochOrder
from k2_megatron.data.plan import Plan
from k2_megatron.data.readers import documents
from k2_megatron.data.sources import find_sources
from k2_megatron.data.tokenizer import Tokenizer, load_tokenizer, made_by
from k2_megatron.evaluate.figures import Figure, loss_figures
from k2_megatron.evaluate.scorer import Scorer
from k2_megatron.evaluate.tasks import Task
from k2_megatron.evaluate.windows import Window, document_windows, spans
from k2_megatron.train.checkpoints.imported_record import TOKENIZER
from k2_megatron.train.run_data import open_evaluated
from k2_megatron.train.step import evaluate_samples

SCORING = 1  # raised when the same settings come to give other figures
ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class HarnessWanted:
    """Tasks of lm-evaluation-harness by name; `include` a folder with more of them; `shots` and `limit` as it has them,
    None for what the task says."""

    names: tuple[str, ...]
    include: str | None = None
    shots: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What the command line asks for; paths by their names. `rows`, `window`, `context`: None for what docs/evaluate.md
    says."""

    held_out: bool = True
    data: dict[str, str] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, str] = field(default_factory=dict)
    harness: HarnessWanted | None = None
    rows: int | None = None
    window: int | None = None
    context: int | None = None
    tokenizer: str | None = None
    key: str = "text"


class Text(Protocol):
    """`kind` says which figures it has; `hash` is of its content; equal settings give equal figures; `tokens` are to be
    predicted, None where only the scoring tells."""

    name: str
    kind: str
    path: str
    hash: str
    settings: dict[str, Any]

    @property
    def tokens(self) -> int | None: ...

    def figures(self, scorer: Scorer) -> dict[str, Figure]: ...


class Rows:
    """Rows of S + 1 tokens as training reads them: of the run's held-out data as many as the training loop evaluates
    on, by its own code (`in_training` True)."""

    kind = "rows"

    def __init__(self, name: str, path: str, feed: AnyFeed, rows: int, config: Config, *, in_training: bool) -> None:
        self.name, self.path, self._feed, self._rows, self._in_training = name, path, feed, rows, in_training
        self.tokens = rows * config.model.sequence_length
        self.hash = self._hash()
        self.settings = _settings(config, rows=rows)

    def _blocks(self) -> Iterator[np.ndarray]:
        for first in range(0, self._rows, ROWS_AT_ONCE):
            yield self._feed.tokens(first, min(ROWS_AT_ONCE, self._rows - first))

    def _hash(self) -> str:
        digest = xxhash.xxh3_128()
        for block in self._blocks():
            digest.update(np.ascontiguousarray(block, dtype="<i4").tobytes())
        return digest.hexdigest()

    def figures(self, scorer: Scorer) -> dict[str, Figure]:
        length = scorer.longest
        if self._in_training:
            loss, of_rows = scorer.timed(
                lambda: evaluate_samples(scorer.config, scorer.parts, self._feed), self._rows * length
            )
            found = loss_figures([mean * length for mean in of_rows], [length] * self._rows)
            return {**found, "loss": loss, "rows": self._rows}
        windows = (Window(row.astype(np.int64), 0) for block in self._blocks() for row in block)
        nats = [float(scored.losses.sum()) for scored in scorer.score(windows)]
        return {**loss_figures(nats, [length] * self._rows), "rows": self._rows}


class Documents:
    """Texts one by one, in windows."""

    kind = "documents"

    def __init__(
        self, name: str, path: str, key: str, tokenizer: Tokenizer, config: Config, longest: int, context: int
    ) -> None:
        self.name, self.path = name, path
        self._before, self._longest, self._context = tokenizer.end_of_document, longest, context
        digest, self.bytes = xxhash.xxh3_128(), 0
        self._ids: list[np.ndarray] = []
        for text in documents(find_sources([path]), key):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
            self.bytes += len(content)
            self._ids.append(np.array(tokenizer.encode(text), dtype=np.int32))
        self.tokens = sum(map(len, self._ids))
        if not self.tokens:
            raise ValueError(f"{path}: holds no text; leave it out, or name another key with --text-key")
        self.hash = digest.hexdigest()
        self.settings = _settings(
            config, longest, context_tokens=context, tokenizer=tokenizer.fingerprint, documents=len(self._ids)
        )

    @cached_property
    def _windows_of(self) -> list[int]:
        return [len(list(spans(len(tokens), self._longest, self._context))) for tokens in self._ids]

    def figures(self, scorer: Scorer) -> dict[str, Figure]:
        windows = (
            window
            for tokens in self._ids
            for window in document_windows(tokens, self._before, self._longest, self._context)
        )
        sums = np.array([scored.losses.sum() for scored in scorer.score(windows)])
        bounds = np.cumsum([0, *self._windows_of]).tolist()
        nats = [float(sums[first:end].sum()) for first, end in pairwise(bounds)]
        return {
            **loss_figures(nats, list(map(len, self._ids)), self.bytes),
            "bytes": self.bytes,
            "documents": len(self._ids),
            "windows": bounds[-1],
        }


class TaskText:
    """The questions or completions of a task file."""

    def __init__(self, name: str, path: str, tokenizer: Tokenizer, config: Config, longest: int) -> None:
        self.name, self.path = name, path
        self._task = Task(Path(path), tokenizer, longest)
        self.kind = "choices" if self._task.has_choices else "completions"
        self.tokens = sum(window.counted for window in self._task.windows)
        self.hash = xxhash.xxh3_128_hexdigest(Path(path).read_bytes())
        self.settings = _settings(config, longest, tokenizer=tokenizer.fingerprint)

    def figures(self, scorer: Scorer) -> dict[str, Figure]:
        return self._task.figures(scorer)


def _settings(config: Config, window: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "scoring": SCORING,
        "window_tokens": config.model.sequence_length if window is None else window,
        "precision": config.train.precision,
        **more,
    }


def open_texts(wanted: Wanted, config: Config, run: Path) -> list[Text]:
    """Everything that is asked for, opened and encoded. ValueError where it is not there, empty, or does not fit."""
    found: list[Text] = []
    held_out = config.data.held_out
    if wanted.held_out and held_out:
        found.append(_held_out(config, held_out, wanted.rows))
    for name, path in wanted.data.items():
        feed = open_evaluated(config, path, "all")
        found.append(Rows(name, path, feed, _rows_of(feed, path, wanted.rows), config, in_training=False))
    if wanted.texts or wanted.tasks or wanted.harness:
        tokenizer = open_tokenizer(wanted.tokenizer, config, run)
        longest, context = _window_and_context(wanted, config)
        for name, path in wanted.texts.items():
            found.append(Documents(name, path, wanted.key, tokenizer, config, longest, context))
        for name, path in wanted.tasks.items():
            found.append(TaskText(name, path, tokenizer, config, longest))
        if wanted.harness:
            found += _harness_tasks(wanted.harness, tokenizer, config)
    if not found:
        raise ValueError(
            f"there is nothing to evaluate on: {run} names no data.held_out; give --data, --text or --task"
        )
    return found


def _harness_tasks(wanted: HarnessWanted, tokenizer: Tokenizer, config: Config) -> Sequence[Text]:
    if find_spec("lm_eval") is None:
        raise ValueError(
            "--lm-eval needs lm-evaluation-harness, which is not installed: pip install "
            '"k2_megatron[eval]", or leave the option out'
        )
    from k2_megatron.evaluate.harness import open_tasks

    return open_tasks(wanted, tokenizer, _settings(config, tokenizer=tokenizer.fingerprint))


def _held_out(config: Config, path: str, rows: int | None) -> Rows:
    part = "held_out" if config.data.train == path else "all"  # one prefix for both is split, as in training
    feed = open_evaluated(config, path, part)
    batches = config.train.evaluate_batches
    in_training = rows is None and batches is not None
    if rows is None and batches is not None:
        rows = batches * config.train.global_batch
        if feed.rows is None:  # training reads on from the first row where a prefix ends
            return Rows("held_out", path, feed, rows, config, in_training=True)
    return Rows("held_out", path, feed, _rows_of(feed, path, rows), config, in_training=in_training)


def _rows_of(feed: AnyFeed, path: str, asked: int | None) -> int:
    """How many rows to read: those asked for, or each once."""
    rows = feed.rows
    if rows is None and isinstance(feed, Feed) and isinstance(feed.order, EpochOrder):
        rows = feed.order.epoch_rows  # of a prefix, which begins anew after its last row
    assert rows is not None, f"{path} neither ends nor begins anew"
    if asked is not None and asked > rows:
        raise ValueError(f"{path} has {rows:,} rows and {asked:,} are asked for; lower --rows, or give more data")
    return rows if asked is None else asked


def open_tokenizer(asked: str | None, config: Config, run: Path) -> Tokenizer:
    """The tokenizer asked for, or the run's. ValueError where there is none, or the model was trained with another."""
    imported = run / TOKENIZER
    path = asked or config.data.tokenizer or (str(imported) if imported.is_dir() else None)
    if path is None:
        raise ValueError(f"{run} names no data.tokenizer, and texts are to be encoded; give one with --tokenizer")
    tokenizer = load_tokenizer(path)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{path} has {tokenizer.vocab_size} pieces, the model {config.model.vocab_size}: it was trained with "
            "another tokenizer; give that one with --tokenizer"
        )
    record = _trained_with(config.data.train)
    if record is not None and not made_by(record, tokenizer):
        raise ValueError(
            f"{path} is not the tokenizer that made {config.data.train}, on which the model was trained; give that one "
            "with --tokenizer"
        )
    return tokenizer


def _trained_with(path: str) -> dict[str, Any] | None:
    """What is on record of the tokenizer of training data; None where nothing is, or it is not at hand."""
    with contextlib.suppress(ValueError):  # damaged, or partly gone: nobody trains here
        if os.path.isdir(path):
            return Plan(Path(path)).content.get("tokenizer")
        if manifest_path(path).is_file():
            return read_manifest(manifest_path(path)).get("tokenizer")
    return None


def _window_and_context(wanted: Wanted, config: Config) -> tuple[int, int]:
    longest = config.model.sequence_length
    window = longest if wanted.window is None else wanted.window
    if window > longest:
        raise ValueError(f"--window {window}: the model was trained on {longest} tokens; give at most that many")
    context = max(1, window // 2) if wanted.context is None else wanted.context
    if context > window:
        raise ValueError(f"--context {context}: a window has {window} tokens; give at most that many")
    return window, context


def named_paths(option: str, given: Sequence[str], taken: set[str]) -> dict[str, str]:
    """{name: path} of "NAME=PATH" or "PATH" (whose name is the file's, without its suffixes). ValueError for two of one
    name; `taken` are the names so far."""
    found: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or "/" in name:
            name, path = Path(text).name.split(".")[0] or text, text
        if not name or not path:
            raise ValueError(f"{option} {text}: give a path, or NAME=PATH")
        if name in taken:
            raise ValueError(f"{option} {text}: another text is called {name}; give it a name, as in NAME={path}")
        taken.add(name)
        found[name] = path
    return found
