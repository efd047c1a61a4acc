"""A plan at the size of K2, from synthetic token files: time, memory, and how fast training starts on it.

    python benchmarks/build_plan.py [--fraction 1.0] [--folder /a/disk/with/40/GB]

At fraction 1: 690 M rows of 2,048 tokens (1.4 T), 360 chunks, 14 sources in 2,400 files, 1.27 G documents. The .idx
files are written for real (25 GB), the .bin files are holes of the right size: building a plan reads no token. Half a
percent of the documents is held out, so that every .idx is used. A fraction shortens every file and chunk alike.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xxhash

from k2_megatron.data.build import build_plans
from k2_megatron.data.indexed import index_bytes
from k2_megatron.data.manifest import FORMAT, manifest_path
from k2_megatron.data.open_feed import open_feed
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.store import BLOCK_BYTES, HashedWriter, write_sealed

FILES, SOURCES, CHUNKS, ROWS_A_CHUNK, LENGTH = 2400, 14, 360, 1_919_640, 2048
MEAN_DOCUMENT = 1100
WEIGHTS = np.array([47.1, 10.2, 8.3, 6.2, 5.9, 5.1, 5.2, 4.7, 2.1, 2.0, 1.1, 1.1, 0.6, 0.4])


def write_file(prefix: Path, documents: int, generator: np.random.Generator) -> dict:
    """One synthetic pair: lengths around the mean, .idx in full, .bin a hole, and the hashes of both."""
    lengths = generator.geometric(1 / MEAN_DOCUMENT, documents).astype(np.int32)
    tokens = int(lengths.sum())
    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(2 * tokens)
    index = HashedWriter(Path(f"{prefix}.idx"))
    for part in index_bytes(np.dtype("<u2"), lengths, np.arange(documents + 1, dtype=np.int64)):
        index.write(part)
    index.commit()
    whole, rest = divmod(2 * tokens, BLOCK_BYTES)
    zeros = [xxhash.xxh3_64_intdigest(bytes(BLOCK_BYTES))] * whole + [xxhash.xxh3_64_intdigest(bytes(rest))] * (
        rest > 0
    )
    hashes = HashedWriter(Path(f"{prefix}.xxh3"))
    hashes.write(np.array(zeros, dtype="<u8").tobytes() + index.block_hashes.tobytes())
    hashes.commit()
    return {
        "name": prefix.name,
        "documents": documents,
        "sequences": documents,
        "tokens": tokens,
        "dtype": "uint16",
        "bin_bytes": 2 * tokens,
        "idx_bytes": index.bytes,
        "bin_xxh3": "",  # of the whole: nothing reads it
        "idx_xxh3": index.whole_hash,
        "blocks_xxh3": hashes.whole_hash,
    }


def write_sources(folder: Path, fraction: float) -> Recipe:
    """14 sources in files of one size; the recipe asks each for its share."""
    generator = np.random.default_rng(1)
    counts = np.maximum(1, np.round(FILES * WEIGHTS / WEIGHTS.sum())).astype(int)
    documents = int(CHUNKS * ROWS_A_CHUNK * LENGTH * 1.02 / MEAN_DOCUMENT / counts.sum() * fraction)
    sources = {}
    for number, files in enumerate(counts):
        entries = [write_file(folder / f"s{number}.{file:04d}", documents, generator) for file in range(files)]
        manifest = {"format": FORMAT, "tokenizer": None, "sources": [], "files": entries}
        write_sealed(manifest_path(str(folder / f"s{number}")), manifest)
        sources[f"s{number}"] = {"tokens": (str(folder / f"s{number}"),), "share": float(WEIGHTS[number])}
    settings = {"sequence_length": LENGTH, "chunks": CHUNKS, "rows_per_chunk": int(ROWS_A_CHUNK * fraction), "seed": 1}
    return Recipe.model_validate({**settings, "held_out_fraction": 0.005, "sources": sources})


def open_plan(folder: Path) -> None:
    """What a training rank does before its first step: open, read the chunk's records and a micro-batch of 4."""
    start = time.monotonic(), time.process_time()
    feed = open_feed(folder, sequence_length=LENGTH, seed=1, vocab_size=1 << 16)
    opened = time.monotonic() - start[0], time.process_time() - start[1]
    feed.tokens(0, 4)
    first = time.monotonic() - start[0], time.process_time() - start[1]
    print(f"open: {opened[0]:.2f} s wall, {opened[1]:.2f} s CPU; with 4 samples {first[0]:.2f} s, {first[1]:.2f} s CPU")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fraction", type=float, default=0.05)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--open", type=Path, help="(used by the benchmark itself) time the opening of a plan")
    options = parser.parse_args()
    if options.open:
        open_plan(options.open)
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        start = time.monotonic()
        recipe = write_sources(folder, options.fraction)
        index_gigabytes = sum(path.stat().st_size for path in folder.glob("*.idx")) / 1e9
        print(f"synthetic files: {index_gigabytes:.1f} GB of .idx, {time.monotonic() - start:.0f} s", flush=True)
        start, cpu = time.monotonic(), time.process_time()
        build_plans(recipe, folder / "train", folder / "held_out", threads=options.threads, report=print)
        seconds, cpu = time.monotonic() - start, time.process_time() - cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        assert recipe.rows_per_chunk is not None, "write_sources says it"
        rows = recipe.chunks * recipe.rows_per_chunk
        print(f"plan: {rows / 1e6:.1f} M rows, {seconds:.1f} s wall, {cpu:.1f} s CPU, peak {peak:.2f} GB")
        subprocess.run([sys.executable, __file__, "--open", str(folder / "train")], check=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
