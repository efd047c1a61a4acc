"""Open as a feed what `data.train` or `data.held_out` names: a plan folder, a prefix of token files or a blend file."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

import numpy as np

from k2_megatron.data.amendments import amended_by
from k2_megatron.data.feed import Feed
from k2_megatron.data.fim import FimRates
from k2_megatron.data.held_out import complement, held_out_spans
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.manifest import CheckedTokenFile, open_token_files
from k2_megatron.data.order import EpochOrder
from k2_megatron.data.permutation import hash64
from k2_megatron.data.plan import Plan
from k2_megatron.data.rows import RowStore, Stream
from k2_megatron.data.schedule import Schedule

if TYPE_CHECKING:
    from k2_megatron.data.blended import BlendedFeed

AnyFeed = Union[Feed, "BlendedFeed"]  # what training reads; rows, a schedule and amendments are asked of a Feed alone
PARTS = ("all", "train", "held_out")
INDEX_BYTES_CHECKED_AT_START = 256 << 20  # more would take a noticeable time; verify reads them


def open_feed(
    path: str | os.PathLike,
    *,
    sequence_length: int,
    seed: int,
    vocab_size: int,
    row_length: int | None = None,
    part: str = "all",
    held_out_fraction: float = 0.02,
    ledger: Ledger | None = None,
) -> AnyFeed:
    """Open a plan folder, the prefix of token files, or a blend file (blended.py).

    For a prefix, `part` "train" or "held_out" splits it by document: each is held out with probability
    `held_out_fraction`, by a hash of seed and document number; "all" is everything. A plan is split when it is built.
    `row_length`: the sequence length that the run began with, where it has changed since; a plan has one of its own.
    `ledger`: its amendments are followed, and its chain is of this feed.
    ValueError: a file missing, cut or damaged, an .idx that disagrees with its .bin, ids beyond the vocabulary.
    """
    if part not in PARTS:
        raise ValueError(f"part {part!r}: one of {', '.join(PARTS)}")
    if os.fspath(path).endswith(".toml"):
        from k2_megatron.data.blended import open_blend  # brings pydantic

        if row_length not in (None, sequence_length):
            raise ValueError(
                f"{path}: this run began with model.sequence_length {row_length}, and mcore cuts and shuffles blended "
                f"datasets anew for {sequence_length}: what was trained on cannot be found again. Build a plan "
                "(tools/build_plan.py) and begin a new run with checkpoint.start_from, or keep the length"
            )
        feed: AnyFeed = open_blend(
            Path(path), ledger, sequence_length=sequence_length, seed=seed, vocab_size=vocab_size
        )
    elif os.path.isdir(path):
        feed = _plan_feed(Path(path), sequence_length, vocab_size, ledger)
    else:
        rows = (sequence_length, row_length or sequence_length)
        feed = _prefix_feed(os.fspath(path), *rows, seed, vocab_size, part, held_out_fraction, ledger)
    if ledger is not None:
        ledger.attach(feed)
    return feed


def _plan_feed(folder: Path, sequence_length: int, vocab_size: int, ledger: Ledger | None) -> Feed:
    plan = Plan(folder)
    check_vocabulary(folder, plan.content["tokenizer"], vocab_size)
    streams = plan.streams()
    entries = [file["entry"] for source in plan.sources for file in source["files"]]
    if sum(entry["idx_bytes"] for entry in entries) <= INDEX_BYTES_CHECKED_AT_START:
        for stream in (stream for of_source in streams for stream in of_source):
            stream.file.check_whole_index()
    pieces, fim_tokenizer = plan.content["fim"], plan.fim_tokenizer()
    fim = {
        number: FimRates(source["fim_psm"], source["fim_spm"], **pieces, tokenizer=fim_tokenizer)
        for number, source in enumerate(plan.sources)
        if source["fim_psm"] or source["fim_spm"]
    }
    for token in (pieces or {}).values():
        if token >= vocab_size:
            raise ValueError(f"{folder}: fill-in-the-middle piece {token}, model.vocab_size is {vocab_size}; raise it")
    store = RowStore(streams, plan.row_length, vocab_size, _widest(entries, (pieces or {}).values()))
    schedule = Schedule.of_chunks(plan.chunk_order, plan.rows_per_chunk)
    schedule = amended_by(schedule, ledger, plan.rows_per_chunk, plan.row_length)
    names = [source["name"] for source in plan.sources]
    return Feed(plan, schedule, store, sequence_length, plan.fingerprint, names, fim, plan.content["recipe"]["seed"])


def _prefix_feed(
    prefix: str,
    sequence_length: int,
    row_length: int,
    seed: int,
    vocab_size: int,
    part: str,
    fraction: float,
    ledger: Ledger | None,
) -> Feed:
    files, manifest = open_token_files(prefix)
    check_vocabulary(prefix, (manifest or {}).get("tokenizer"), vocab_size)
    if sum(file.idx_path.stat().st_size for file in files) <= INDEX_BYTES_CHECKED_AT_START:
        for file in files:
            file.check_whole_index()
    key = hash64(seed, "held out")
    streams = [Stream(partial(_itself, file), document_spans(file, part, fraction, key)) for file in files]
    dtype = _widest([{"dtype": file.dtype.name} for file in files])
    store = RowStore([streams], row_length, vocab_size, dtype)
    if store.rows(0) == 0:
        raise ValueError(
            f"{prefix}: the {part} part has {sum(stream.length for stream in streams)} tokens, too few for one row of "
            f"{row_length + 1}; give more text, a shorter model.sequence_length, or another held-out fraction"
        )
    sizes = [str(file.token_count) for file in files]
    hashes = [file.entry["bin_xxh3"] if file.entry else size for file, size in zip(files, sizes, strict=True)]
    fingerprint, before = (f"{hash64('prefix', *x, row_length, seed, part, fraction):016x}" for x in (hashes, sizes))
    schedule = amended_by(Schedule.endless(), ledger, None, row_length)
    order = EpochOrder(store.rows(0), seed)
    feed = Feed(order, schedule, store, sequence_length, fingerprint, [os.path.basename(files[0].prefix)], {})
    if not (manifest or {}).get("sources"):  # it came after the files
        feed.earlier_fingerprint = before
    return feed


def _itself(file: CheckedTokenFile) -> CheckedTokenFile:
    return file


def _widest(entries: list[dict[str, Any]], pieces: Iterable[int] = ()) -> np.dtype:
    """What holds the ids of all files and the pieces. Of eight bytes: damage must not be cut to a good id."""
    found = {entry["dtype"] for entry in entries}
    if "int64" in found:
        return np.dtype("<i8")
    return np.dtype("<u2") if found <= {"uint8", "uint16"} and max(pieces, default=0) < 1 << 16 else np.dtype("<i4")


def document_spans(file: CheckedTokenFile, part: str, fraction: float, key: int) -> np.ndarray:
    """Token spans int64 [n, 2] of a file's documents that belong to `part`."""
    if part == "all":
        return np.array([[0, file.token_count]], dtype=np.int64)
    spans = held_out_spans(file, 0, file.documents, fraction, key)
    return spans if part == "held_out" else complement(spans, 0, file.token_count)


def check_vocabulary(path: str | Path, tokenizer: dict[str, Any] | None, vocab_size: int) -> None:
    """ValueError where the tokenizer that made the tokens has more pieces than the model."""
    made_with = (tokenizer or {}).get("vocab_size")
    if made_with is not None and made_with > vocab_size:
        raise ValueError(
            f"{path}: made with a tokenizer of {made_with} pieces, model.vocab_size is {vocab_size}; "
            f"set vocab_size to at least {made_with}, or make the tokens with another tokenizer"
        )
