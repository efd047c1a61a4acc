"""Speed of preprocessing: ours end to end, against the raw encoder and the tokenizer's own library, in one run.

    python benchmarks/preprocess.py [--tokenizer tokenizer.json] [--text corpus.jsonl] [--workers 2]
    python benchmarks/preprocess.py --varied [FOLDER ...] [--megabytes 300]

Without --text the State of the Union speeches are repeated to --megabytes (cut at another place each time, so that no
cache sees the same document twice). --varied takes text that nobody repeated: every text file (source code, manuals in
many languages, licences, pages) below the folders named, by default Python's own and /usr/share's, each content once,
in a fixed shuffled order; without --tokenizer a byte-level one of 32,000 pieces is trained on a sixth of it.
All measures read the same .jsonl file with the same number of processes, fresh ones for each measure:

    ours         tools/preprocess_data.py: read, parse, encode, append the end, hash, write; wall from start to end,
                 and by CPU second without the start of the processes
    raw encoder  gigatoken (or what ours falls back to) on texts that are parsed and in memory as UTF-8: no file, no
                 output, the same allocator settings as ours; by CPU second of encoding alone
    own library  tokenizers or sentencepiece on the same texts (a slice of them: it is slow)

CPU seconds are what to compare on a machine that others use too.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from k2_megatron.data.texts import Texts

ROOT = Path(__file__).parents[1]
BATCH_BYTES = 8 << 20
FOLDERS = (*(sysconfig.get_paths()[name] for name in ("purelib", "stdlib")), "/usr/share/doc", "/usr/share/man")
TEXT_SUFFIXES = frozenset(".py .pyi .md .rst .txt .h .hpp .html .js .gz .1 .3 .5 .7 .8".split())
LARGEST_FILE = 1 << 20  # bytes; larger ones are tables more often than text
VOCABULARY = 32_000


def make_text(path: Path, megabytes: int) -> None:
    with lzma.open(ROOT / "examples/toy/state_of_the_union.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    written, turn = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < megabytes * 1_000_000:
            for text in texts:
                cut = 1 + 997 * (turn + 1) % max(1, len(text) - 1)
                written += file.write(json.dumps({"text": text[cut:] + text[:cut]}, ensure_ascii=False) + "\n")
            turn += 1


def text_of(path: Path) -> str | None:
    """A file's text, None where it is none (or short, or a table)."""
    if path.suffix not in TEXT_SUFFIXES or path.is_symlink() or not path.is_file():
        return None
    if not 200 <= path.stat().st_size <= LARGEST_FILE:
        return None
    content = path.read_bytes()
    try:
        return (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8")
    except (UnicodeDecodeError, OSError, EOFError):
        return None


def make_varied_text(path: Path, folders: list[str], megabytes: int) -> None:
    """Every different text file below the folders as a document, up to --megabytes."""
    paths = sorted(path for folder in folders for path in Path(folder).rglob("*"))
    random.Random(1).shuffle(paths)
    seen, written = set(), 0
    with open(path, "w", encoding="utf-8") as file:
        for found in paths:
            text = text_of(found)
            digest = hashlib.blake2b((text or "").encode(), digest_size=8).digest()
            if text is None or "\0" in text or digest in seen:
                continue
            seen.add(digest)
            written += file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if written > megabytes * 1_000_000:
                return


def train_tokenizer(path: Path, output: Path) -> None:
    """The project's own training on every sixth document."""
    from k2_megatron.data.training import train_byte_level_bpe

    with open(path, encoding="utf-8") as lines:
        texts = (json.loads(line)["text"] for number, line in enumerate(lines) if number % 6 == 0)
        train_byte_level_bpe(texts, VOCABULARY, ["<|endoftext|>"]).save(str(output))


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
    """One process of the raw measurement: everything ready, then wait for the others, then encode."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from k2_megatron.data.encoder import make_encoder
    from k2_megatron.data.preprocess import keep_freed_memory
    from k2_megatron.data.tokenizer import load_tokenizer

    keep_freed_memory()
    encoder = make_encoder(load_tokenizer(tokenizer_path))
    encode = encoder.reference if own else encoder.encode
    batches = batches_of(path, share, limit)
    encode(["warm up"])
    barrier.wait()
    cpu = time.process_time()
    tokens = sum(int(encode(batch)[1].sum()) for batch in batches)
    results.put((tokens, time.process_time() - cpu))


def raw_encoder(tokenizer: str, path: Path, workers: int, limit: int, own: bool = False) -> float:
    """M tokens a CPU second of `workers` processes that only encode; `own`: with the tokenizer's own library."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(
            target=encode_share, args=(tokenizer, path, (number, workers), limit // workers, own, barrier, results)
        )
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    tokens, cpu = zip(*found, strict=True)
    return sum(tokens) / 1e6 / sum(cpu)


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


def ours(tokenizer: str, path: Path, workers: int, shard: str) -> tuple[float, float, int, int]:
    """(wall seconds, CPU seconds, tokens, bytes of the largest worker) of the tool."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path), "--append-eod"]
        command += ["--tokenizer", tokenizer, "--output-prefix", f"{folder}/x", "--workers", str(workers)]
        start, cpu = time.monotonic(), cpu_of_children()
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, "--shard-size", shard], **silent)
        largest = largest_worker(process)
        seconds, cpu = time.monotonic() - start, cpu_of_children() - cpu
        manifest = json.loads(Path(folder, "x_text_document.manifest.json").read_text(encoding="utf-8"))
    return seconds, cpu, manifest["tokens"], largest


def start_cpu_seconds(tokenizer: str, workers: int, folder: Path) -> float:
    """CPU seconds of the tool on next to nothing: Python, imports, workers, loading the tokenizer."""
    path = folder / "nothing.jsonl"
    path.write_text('{"text": "x"}\n' * 8, encoding="utf-8")
    return ours(tokenizer, path, workers, "64")[1]


def measure(tokenizer: str, path: Path, workers: int, rounds: int) -> None:
    size = path.stat().st_size
    shard = f"{max(1, size // (workers * 4) >> 20)}M"
    print(f"{size / 1e6:.0f} MB, tokenizer {tokenizer}, {workers} processes, shards of {shard}")
    print("M tokens/s by wall | CPU s | M tokens by CPU second: ours, raw encoder, ours/raw, own library, ours/own")
    for _ in range(rounds):
        empty = start_cpu_seconds(tokenizer, workers, path.parent)
        seconds, cpu, tokens, largest = ours(tokenizer, path, workers, shard)
        raw = raw_encoder(tokenizer, path, workers, size)
        slow = raw_encoder(tokenizer, path, workers, min(size, 8_000_000), own=True)
        inside = tokens / 1e6 / (cpu - empty)
        print(
            f"{tokens / 1e6 / seconds:8.2f} ({size / 1e6 / seconds:.1f} MB/s) | {cpu:.2f}, {empty:.2f} to start | "
            f"{inside:8.2f} {raw:8.2f} {inside / raw:6.2f} {slow:8.2f} {inside / slow:6.1f} | "
            f"largest worker {largest / 1e6:.0f} MB",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="default: the toy's, or with --varied one that is trained")
    parser.add_argument("--text", type=Path, help='a .jsonl file with text under "text"')
    parser.add_argument("--varied", nargs="*", metavar="FOLDER", help="text files below these, each content once")
    parser.add_argument("--megabytes", type=int, default=200, help="of text that is made where --text is not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.text or Path(folder, "text.jsonl")
        tokenizer = options.tokenizer or str(ROOT / "examples/toy/tokenizer.json")
        if options.varied is not None:
            make_varied_text(path, options.varied or list(FOLDERS), options.megabytes)
            if options.tokenizer is None:
                tokenizer = f"{folder}/tokenizer.json"
                train_tokenizer(path, Path(tokenizer))
        elif options.text is None:
            make_text(path, options.megabytes)
        measure(tokenizer, path, options.workers, options.rounds)


if __name__ == "__main__":
    main()
