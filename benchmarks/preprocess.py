"""Speed of preprocessing: ours end to end, against the raw encoder and the tokenizer's own library, in one run.

    python benchmarks/preprocess.py [--tokenizer FILE] [--text corpus.jsonl] [--workers 2]
    python benchmarks/preprocess.py --varied [FOLDER ...] [--megabytes 300] [--sentencepiece]

Without --text the State of the Union speeches are repeated to --megabytes (cut at another place each time, so that no
cache sees the same document twice). --varied takes text that nobody repeated: every text file (source code, manuals in
many languages, licences, pages) below the folders named, by default Python's own and /usr/share's, each content once,
in a fixed shuffled order. With --varied or --text and no --tokenizer one of 32,000 pieces is trained on a part of the
text: byte-level, or with --sentencepiece as LLaMA's is (BPE with byte fallback).
All measures read the same .jsonl file with the same number of processes or threads, in turn, fresh processes each time
(ours and encode_files change places from round to round):

    ours          tools/preprocess_data.py: read, parse, encode, append the end, hash, write
    encode_files  gigatoken's own file reader, one process of as many threads: read, parse, encode into memory; nothing
                  is written, bad lines end the file without a word, and all ids are in memory at once
    encoder only  gigatoken (or what ours falls back to) on texts that are parsed and in memory as UTF-8: no file, no
                  output, the same allocator settings as ours; a stricter measure than any tool that reads files
    own library   tokenizers or sentencepiece on the same texts (a slice of them: it is slow)

Speeds are without start-up (ours: the tool on eight lines, measured in each round; the others: loading apart), by wall
clock and by CPU second; CPU seconds are what to compare on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from preprocess_text import FOLDERS, ROOT, make_text, make_varied_text, train_byte_level, train_sentencepiece

from k2_megatron.data.texts import Texts

BATCH_BYTES = 8 << 20
SLICE_FOR_OWN_LIBRARY = 8_000_000  # bytes


@dataclass(frozen=True)
class Measured:
    """Tokens made in so many seconds; `largest`: bytes in memory of the largest process."""

    tokens: int
    wall: float
    cpu: float
    largest: int = 0

    def without(self, start: Measured) -> Measured:
        return Measured(self.tokens, self.wall - start.wall, self.cpu - start.cpu, self.largest)

    @property
    def by_wall(self) -> float:
        return self.tokens / 1e6 / self.wall

    @property
    def by_cpu(self) -> float:
        return self.tokens / 1e6 / self.cpu


def batches_of(path: Path, share: tuple[int, int], limit_bytes: int) -> list[Texts]:
    """Every share[1]-th line's text from share[0] on, in batches of about 8 MiB, up to limit_bytes."""
    batches: list[list[bytes]] = [[]]
    size, total = 0, 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % share[1] != share[0]:
                continue
            text = json.loads(line)["text"].encode()
            batches[-1].append(text)
            size, total = size + len(text), total + len(text)
            if size > BATCH_BYTES:
                batches.append([])
                size = 0
            if total > limit_bytes:
                break
    return [
        Texts(np.frombuffer(b"".join(batch), np.uint8), np.cumsum([0, *map(len, batch)], dtype=np.int64))
        for batch in batches
        if batch
    ]


def encode_share(tokenizer_path: str, path: Path, share: tuple[int, int], limit: int, own: bool, barrier, results):
    """One process of the measures that only encode: everything ready, then wait for the others, then encode."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from k2_megatron.data import encoder as encoders
    from k2_megatron.data import gigatoken_encoder
    from k2_megatron.data.tokenizer import load_tokenizer
    from k2_megatron.runtime.memory import keep_freed_buffers

    keep_freed_buffers()
    gigatoken_encoder.MANY_WORDS_BYTES = gigatoken_encoder.FEWER_WORDS_BYTES = (
        1 << 60
    )  # the texts in memory are no reason to forget words
    encoder = encoders.make_encoder(load_tokenizer(tokenizer_path))
    encode = encoder.reference if own else encoder.encode
    batches = batches_of(path, share, limit)
    encode(["warm up"])
    barrier.wait()
    wall, cpu = time.monotonic(), time.process_time()
    tokens = sum(int(encode(batch)[1].sum()) for batch in batches)
    results.put(Measured(tokens, time.monotonic() - wall, time.process_time() - cpu))


def encoder_only(tokenizer: str, path: Path, workers: int, limit: int, own: bool = False) -> Measured:
    """`workers` processes that only encode; `own`: with the tokenizer's own library."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(
            target=encode_share, args=(tokenizer, path, (number, workers), limit // workers, own, barrier, results)
        )
        for number in range(workers)
    ]
    found = _results_of(processes, results)
    return Measured(sum(one.tokens for one in found), max(one.wall for one in found), sum(one.cpu for one in found))


def _results_of(processes: list[Any], results: Any) -> list[Measured]:
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    return found


def encode_files_here(tokenizer: str, path: Path, threads: int, results: Any) -> None:
    """The process of `encode_files`."""
    os.environ["RAYON_NUM_THREADS"] = str(threads)
    import gigatoken

    content = Path(tokenizer).read_bytes()
    is_model = tokenizer.endswith(".model")
    load = gigatoken.Tokenizer.from_sentencepiece if is_model else gigatoken.Tokenizer.from_json
    encoder = load(content)
    encoder.encode_batch(["warm up"])
    wall, cpu = time.monotonic(), time.process_time()
    ids = encoder.encode_files(gigatoken.JsonlFileSource([str(path)], "text"), parallel=True)
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    offsets = np.asarray(ids.layout.offsets.data)
    results.put(Measured(int(offsets[-1] - offsets[0]), wall, cpu, psutil.Process().memory_info().rss))


def encode_files(tokenizer: str, path: Path, threads: int) -> Measured:
    """gigatoken's own reader of files, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=encode_files_here, args=(tokenizer, path, threads, results))
    return _results_of([process], results)[0]


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def largest_worker(process: subprocess.Popen) -> int:
    """The most bytes in memory that any one child of a process has until it ends."""
    largest = 0
    while process.poll() is None:
        try:
            workers = psutil.Process(process.pid).children()
            largest = max([largest, *(worker.memory_info().rss for worker in workers)])
        except psutil.NoSuchProcess:
            pass  # it ended in between
        time.sleep(0.02)
    return largest


def ours(tokenizer: str, path: Path, workers: int, shard: str) -> Measured:
    """The tool, from start to end."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path), "--append-eod"]
        command += ["--tokenizer", tokenizer, "--output-prefix", f"{folder}/x", "--workers", str(workers)]
        start, cpu = time.monotonic(), cpu_of_children()
        command += ["--shard-size", shard]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        largest = largest_worker(process)
        seconds, cpu = time.monotonic() - start, cpu_of_children() - cpu
        manifest = json.loads(Path(folder, "x_text_document.manifest.json").read_text(encoding="utf-8"))
    return Measured(manifest["tokens"], seconds, cpu, largest)


def start_of_ours(tokenizer: str, workers: int, folder: Path) -> Measured:
    """The tool on next to nothing: Python, imports, workers, loading the tokenizer, ending."""
    path = folder / "nothing.jsonl"
    path.write_text('{"text": "x"}\n' * 8, encoding="utf-8")
    return ours(tokenizer, path, workers, "64")


def measure(tokenizer: str, path: Path, workers: int, rounds: int) -> None:
    size = path.stat().st_size
    shard = f"{max(1, size // (workers * 4) >> 20)}M"
    print(f"{size / 1e6:.0f} MB, tokenizer {tokenizer}, {workers} processes or threads, shards of {shard}")
    ratios = []
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            start = start_of_ours(tokenizer, workers, Path(folder))
        if number % 2:  # the first of a round finds pages that the system has not handed out before
            files = encode_files(tokenizer, path, workers)
        whole = ours(tokenizer, path, workers, shard)
        if not number % 2:
            files = encode_files(tokenizer, path, workers)
        inside = whole.without(start)
        alone = encoder_only(tokenizer, path, workers, size)
        own = encoder_only(tokenizer, path, workers, min(size, SLICE_FOR_OWN_LIBRARY), own=True)
        by_cpu = [inside.by_cpu / other.by_cpu for other in (files, alone, own)]
        ratios.append([by_cpu[0], inside.by_wall / files.by_wall, *by_cpu[1:]])
        print(
            f"round {number + 1}: {whole.by_wall:.2f} M tokens/s start to end ({size / 1e6 / whole.wall:.1f} MB/s, "
            f"{whole.wall:.2f} s, {whole.cpu:.2f} CPU s; start-up {start.wall:.2f} s, {start.cpu:.2f} CPU s); largest "
            f"worker {whole.largest / 1e6:.0f} MB, encode_files {files.largest / 1e6:.0f} MB"
        )
        for name, one in (("ours", inside), ("encode_files", files), ("encoder only", alone), ("own library", own)):
            print(f"  {name:14}{one.by_wall:8.2f} M tokens/s {one.by_cpu:8.2f} M tokens/CPU s", flush=True)
    names = ("encode_files by CPU second", "encode_files by wall", "encoder only by CPU second", "own library by CPU s")
    for name, column in zip(names, zip(*ratios, strict=True), strict=True):
        print(f"ours / {name:27} {statistics.median(column):6.2f} (rounds: {', '.join(f'{x:.2f}' for x in column)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="default: the toy's, or with --varied or --text one that is trained")
    parser.add_argument("--sentencepiece", action="store_true", help="train a sentencepiece model as LLaMA's is")
    corpus = parser.add_mutually_exclusive_group()
    corpus.add_argument("--text", type=Path, help='a .jsonl file with text under "text"')
    corpus.add_argument("--varied", nargs="*", metavar="FOLDER", help="text files below these, each content once")
    parser.add_argument("--megabytes", type=int, default=200, help="of text that is made where --text is not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path, tokenizer = options.text or Path(folder, "text.jsonl"), options.tokenizer
        if options.varied is not None:
            make_varied_text(path, options.varied or list(FOLDERS), options.megabytes)
        elif options.text is None:
            make_text(path, options.megabytes)
        if tokenizer is None and options.sentencepiece:
            tokenizer = f"{folder}/trained.model"
            train_sentencepiece(path, Path(tokenizer))
        elif tokenizer is None and (options.text or options.varied is not None):
            tokenizer = f"{folder}/trained.json"
            train_byte_level(path, Path(tokenizer))
        measure(tokenizer or str(ROOT / "examples/toy/tokenizer.json"), path, options.workers, options.rounds)


if __name__ == "__main__":
    main()
