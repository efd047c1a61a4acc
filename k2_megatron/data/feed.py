"""The feed: sample n as token ids, for any n, a pure function of the data, the seed and the ledger's amendments.

In: the prefix of a .bin/.idx pair (or of a manifest). Out: `Feed.tokens(first_sample, count)` -> [count, S + 1] ids.
Samples are numbered from 0 over the whole run, whatever the layout, micro-batch or number of workers. A prefix is
shuffled anew each epoch and never ends.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from k2_megatron.data.manifest import CheckedTokenFile, open_token_files
from k2_megatron.data.permutation import Permutation, hash64, hash64_of_numbers
from k2_megatron.data.rows import RowStore, Stream, pack, unpack

PARTS = ("all", "train", "held_out")
INDEX_BYTES_CHECKED_AT_START = 256 << 20  # more than a second of hashing otherwise


@dataclass(frozen=True)
class DocumentSpan:
    """A document's share of a sample: tokens first..end-1 of document `document` of one file."""

    source: str
    file: str
    document: int
    first_token: int
    end_token: int


class PrefixFeed:
    """Rows of one prefix in a new seeded order each epoch. `rows` is None: the feed never ends."""

    def __init__(self, prefix: str, sequence_length: int, seed: int, vocab_size: int, part: str, fraction: float):
        files, manifest = open_token_files(prefix)
        check_vocabulary(prefix, manifest, vocab_size)
        check_small_indices(files)
        self.rows: int | None = None
        self.sequence_length = sequence_length
        self._seed = seed
        streams = [Stream(file, document_spans(file, part, fraction, hash64(seed, "held out"))) for file in files]
        self.store = RowStore([streams], sequence_length, vocab_size)
        self.epoch_rows = self.store.rows(0)
        if self.epoch_rows == 0:
            tokens = sum(stream.length for stream in streams)
            raise ValueError(
                f"{prefix}: the {part} part has {tokens} tokens, too few for one row of {sequence_length + 1}; "
                "give more text, a shorter model.sequence_length, or another held-out fraction"
            )
        hashes = [file.entry["bin_xxh3"] if file.entry else str(file.token_count) for file in files]
        self.fingerprint = f"{hash64('prefix', *hashes, sequence_length, seed, part, fraction):016x}"

    def records(self, first_sample: int, count: int) -> np.ndarray:
        """Row records uint64 [count] of samples first_sample.. : which row each sample is (see rows.py)."""
        samples = np.arange(first_sample, first_sample + count)
        out = np.empty(count, dtype=np.uint64)
        for epoch in np.unique(samples // self.epoch_rows):
            here = samples // self.epoch_rows == epoch
            order = Permutation(self.epoch_rows, hash64(self._seed, "epoch", epoch))
            out[here] = pack(0, order(samples[here] % self.epoch_rows))
        return out

    def tokens(self, first_sample: int, count: int) -> np.ndarray:
        """Samples first_sample..first_sample+count-1 as ids [count, S + 1], uint16 or int32."""
        return self.store.read(self.records(first_sample, count))

    def describe(self, sample: int) -> list[DocumentSpan]:
        """The documents that sample is made of, in order."""
        source, row = (int(part[0]) for part in unpack(self.records(sample, 1)))
        return describe_row(self.store, source, row, os.path.basename(self.store.sources[0][0].file.prefix))


Feed = PrefixFeed


def open_feed(
    path: str | os.PathLike,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    part: str = "all",
    held_out_fraction: float = 0.02,
) -> Feed:
    """Open a prefix. `part` "train" and "held_out" split it by document: each document is held out with probability
    `held_out_fraction` by a hash of seed and document number; "all" is everything.

    ValueError: a file missing, truncated or damaged, an .idx that disagrees with its .bin, ids beyond the vocabulary.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r}: one of {', '.join(PARTS)}")
    return PrefixFeed(os.fspath(path), sequence_length, seed, vocab_size, part, held_out_fraction)


def check_vocabulary(path: str, manifest: dict[str, Any] | None, vocab_size: int) -> None:
    """ValueError where the tokenizer that made the tokens has more pieces than the model."""
    made_with = ((manifest or {}).get("tokenizer") or {}).get("vocab_size")
    if made_with is not None and made_with > vocab_size:
        raise ValueError(
            f"{path}: made with a tokenizer of {made_with} pieces, model.vocab_size is {vocab_size}; "
            f"set vocab_size to at least {made_with}, or make the tokens with another tokenizer"
        )


def check_small_indices(files: list[CheckedTokenFile]) -> None:
    """Read every .idx whole where that takes no time; larger ones are checked by tools/inspect_data.py verify."""
    if sum(file.entry["idx_bytes"] for file in files if file.entry) <= INDEX_BYTES_CHECKED_AT_START:
        for file in files:
            file.check_whole_index()


def document_spans(file: CheckedTokenFile, part: str, fraction: float, key: int) -> np.ndarray:
    """Token spans int64 [n, 2] of a file's documents that belong to `part`, neighbours joined."""
    if part == "all":
        return np.array([[0, file.token_count]], dtype=np.int64)
    held_out = np.flatnonzero(is_held_out(np.arange(file.documents), fraction, key))
    spans = np.stack([file.document_start(held_out), file.document_start(held_out + 1)], axis=1).astype(np.int64)
    return spans if part == "held_out" else complement(spans, 0, file.token_count)


def is_held_out(documents: np.ndarray, fraction: float, key: int) -> np.ndarray:
    """Whether each document number is held out: a hash below `fraction` of its range."""
    return (hash64_of_numbers(key, documents) >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53


def complement(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """The spans between `spans` within start..end, empty ones left out."""
    kept = np.stack([np.append(start, spans[:, 1]), np.append(spans[:, 0], end)], axis=1)
    return kept[kept[:, 0] < kept[:, 1]]


def describe_row(store: RowStore, source: int, row: int, source_name: str) -> list[DocumentSpan]:
    """The documents of one row, in order."""
    stream, position = store.locate(source, row)
    found = []
    for first, end in stream.parts(position, store.row_length + 1):
        while first < end:
            document = stream.file.document_at(first)
            stop = min(end, int(stream.file.document_start(document + 1)))
            found.append(DocumentSpan(source_name, os.path.basename(stream.file.prefix), document, first, stop))
            first = stop
    return found
