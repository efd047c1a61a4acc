"""Speed of the feed at K2's sequence length, from the page cache, and of reading against broadcasting.

    python benchmarks/feed.py [--megatokens 50]

Token files and a plan are made in a temporary folder. Printed, in M tokens a CPU second of one process: rows whose
64 KiB blocks are touched for the first time (each is hashed), rows touched before, and mcore's GPTDataset on the same
file. Then rows reordered by fill-in-the-middle, in microseconds a document, of files with 45,000 and with 4 million
documents: the length of the .idx must not count. Then, for tensor-parallel ranks: microseconds to read a micro-batch of
4 x 2,049 on every rank, against reading on one and broadcasting to another over gloo.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from torch import distributed

import k2_megatron.data.open_feed as opening
from k2_megatron.data.blended import open_blend
from k2_megatron.data.build import build_plans
from k2_megatron.data.manifest import manifest_of_foreign_files
from k2_megatron.data.open_feed import open_feed
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.store import TokenWriter
from k2_megatron.data.training import train_byte_level_bpe

LENGTH, MICRO_BATCH, DOCUMENT = 2048, 4, 1100
SHAPE: dict[str, Any] = {"sequence_length": LENGTH, "seed": 1, "vocab_size": 32032}


def make_data(folder: Path, tokens: int) -> None:
    generator = np.random.default_rng(1)
    writer = TokenWriter(str(folder / "x"), np.dtype("<u2"))
    for _ in range(tokens // 1_100_000):
        lengths = np.full(1000, DOCUMENT)
        writer.add(generator.integers(0, 32000, 1000 * DOCUMENT, dtype=np.uint32), lengths, None)
    writer.finish()
    manifest_of_foreign_files(str(folder / "x"))
    sources = {"x": {"tokens": (str(folder / "x"),), "repeats": 1.0}}
    recipe = {"sequence_length": LENGTH, "chunks": 2, "seed": 1, "sources": sources}
    build_plans(Recipe.model_validate(recipe), folder / "plan", None)
    samples = tokens // LENGTH - 2
    blend = f'samples = {samples}\ncache = "{folder / "cache"}"\n[[sources]]\nprefix = "{folder / "x"}"\nweight = 1.0\n'
    (folder / "blend.toml").write_text(blend, encoding="utf-8")


def reordered(folder: Path, documents: int) -> float:
    """Microseconds of CPU a document, half of them reordered, in rows of a file of so many documents of 30 tokens."""
    folder.mkdir()
    train_byte_level_bpe(["text"], 300, ["</s>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]).save(
        str(folder / "tokenizer.json")
    )
    writer = TokenWriter(str(folder / "x"), np.dtype("<u2"))
    writer.add(np.arange(30 * documents, dtype=np.uint32) % 250, np.full(documents, 30), None)
    writer.finish()
    manifest_of_foreign_files(str(folder / "x"))
    source = {"tokens": (str(folder / "x"),), "repeats": 1.0, "fim_psm": 0.25, "fim_spm": 0.25}
    recipe = {"sequence_length": LENGTH, "chunks": 1, "seed": 1, "fim": {"tokenizer": str(folder / "tokenizer.json")}}
    build_plans(Recipe.model_validate({**recipe, "sources": {"x": source}}), folder / "plan", None)
    feed, rows = open_feed(folder / "plan", **SHAPE), 200
    start = time.process_time()
    feed.tokens(0, rows)
    return (time.process_time() - start) / (rows * LENGTH / 30) * 1e6


def pass_over(feed) -> float:
    """M tokens a CPU second of reading every sample once in micro-batches."""
    samples = feed.rows // MICRO_BATCH * MICRO_BATCH
    start = time.process_time()
    for first in range(0, samples, MICRO_BATCH):
        feed.tokens(first, MICRO_BATCH)
    return samples * LENGTH / 1e6 / (time.process_time() - start)


def tensor_parallel_rank(rank: int, folder: Path, store_path: str) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    distributed.init_process_group("gloo", store=distributed.FileStore(store_path, 2), rank=rank, world_size=2)
    feed = open_feed(folder / "plan", **SHAPE)
    pass_over(feed)
    buffer = torch.empty(MICRO_BATCH, LENGTH + 1, dtype=torch.int64)
    rounds = 200
    for name in ("read on every rank", "read on one rank, broadcast"):
        distributed.barrier()
        start = time.monotonic()
        for turn in range(rounds):
            if rank == 0 or name == "read on every rank":
                tokens = feed.tokens(turn * MICRO_BATCH % 400, MICRO_BATCH)
                buffer.copy_(torch.from_numpy(tokens.astype(np.int64)))
            if name != "read on every rank":
                distributed.broadcast(buffer, 0)
        distributed.barrier()
        if rank == 0:
            print(f"{name}: {(time.monotonic() - start) / rounds * 1e6:.0f} us a micro-batch")
    distributed.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatokens", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, options.megatokens * 1_000_000)
        blend = open_blend(folder / "blend.toml", None, **SHAPE)
        print("M tokens a CPU second: first touch, touched before, mcore's GPTDataset")
        for _ in range(3):
            feed = open_feed(folder / "plan", **SHAPE)
            print(f"{pass_over(feed):8.1f} {pass_over(feed):8.1f} {pass_over(blend):8.1f}", flush=True)
        opening.INDEX_BYTES_CHECKED_AT_START = 0  # as with K2's files
        few, many = (reordered(folder / str(documents), documents) for documents in (45_000, 4_000_000))
        print(f"us a document reordered or not: {few:.1f} of 45,000, {many:.1f} of 4 million")
        multiprocessing.spawn(tensor_parallel_rank, args=(folder, str(folder / "store")), nprocs=2)


if __name__ == "__main__":
    main()
