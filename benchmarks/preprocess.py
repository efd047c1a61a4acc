"""Speed of preprocessing: ours end to end, against the raw encoder and the tokenizers library, in one run.

    python benchmarks/preprocess.py --tokenizer examples/toy/tokenizer.json [--text corpus.jsonl] [--workers 2]

Without --text the State of the Union speeches are repeated to --megabytes (cut at another place each time, so that no
cache sees the same document twice). All measures read the same .jsonl file with the same number of processes:

    ours         tools/preprocess_data.py: read, parse, encode, append the end, hash, write; wall from start to end,
                 and by CPU second without the start of the processes
    raw encoder  gigatoken (or what ours falls back to) on texts that are parsed and in memory: no file, no output
    tokenizers   the tokenizers library on the same texts (a slice of them: it is slow)

CPU seconds are what to compare on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import lzma
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
BATCH_CHARACTERS = 8 << 20


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


def batches_of(path: Path, share: tuple[int, int], limit_bytes: int) -> list[list[str]]:
    """Every share[1]-th line's text from share[0] on, in batches of about 8 MiB, up to limit_bytes."""
    batches: list[list[str]] = [[]]
    size, total = 0, 0
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            if number % share[1] != share[0]:
                continue
            text = json.loads(line)["text"]
            batches[-1].append(text)
            size, total = size + len(text), total + len(text)
            if size > BATCH_CHARACTERS:
                batches.append([])
                size = 0
            if total > limit_bytes:
                break
    return [batch for batch in batches if batch]


def encode_share(
    tokenizer_path: str, path: Path, share: tuple[int, int], limit: int, name: str, barrier, results
) -> None:
    """One process of the raw measurement: everything ready, then wait for the others, then encode."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    from k2_megatron.data.encoder import make_encoder
    from k2_megatron.data.tokenizer import load_tokenizer

    encoder = make_encoder(load_tokenizer(tokenizer_path), name)
    batches = batches_of(path, share, limit)
    encoder.encode(["warm up"])
    barrier.wait()
    start, cpu = time.monotonic(), time.process_time()
    tokens = sum(int(encoder.encode(batch)[1].sum()) for batch in batches)
    results.put((tokens, start, time.monotonic(), time.process_time() - cpu))


def raw_encoder(tokenizer: str, path: Path, workers: int, name: str, limit: int) -> tuple[float, float]:
    """(M tokens/s, M tokens a CPU second) of `workers` processes that only encode."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(workers), context.Queue()
    processes = [
        context.Process(
            target=encode_share, args=(tokenizer, path, (number, workers), limit // workers, name, barrier, results)
        )
        for number in range(workers)
    ]
    for process in processes:
        process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    tokens, starts, ends, cpu = zip(*found, strict=True)
    return sum(tokens) / 1e6 / (max(ends) - min(starts)), sum(tokens) / 1e6 / sum(cpu)


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ours(tokenizer: str, path: Path, workers: int, shard: str) -> tuple[float, float, int]:
    """(wall seconds, CPU seconds, tokens) of the tool."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        command = [sys.executable, str(ROOT / "tools/preprocess_data.py"), "--input", str(path), "--append-eod"]
        command += ["--tokenizer", tokenizer, "--output-prefix", f"{folder}/x", "--workers", str(workers)]
        start, cpu = time.monotonic(), cpu_of_children()
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        subprocess.run([*command, "--shard-size", shard], check=True, **silent)
        seconds, cpu = time.monotonic() - start, cpu_of_children() - cpu
        manifest = json.loads(Path(folder, "x_text_document.manifest.json").read_text(encoding="utf-8"))
    return seconds, cpu, manifest["tokens"]


def start_cpu_seconds(tokenizer: str, workers: int, folder: Path) -> float:
    """CPU seconds of the tool on next to nothing: Python, imports, workers, loading the tokenizer."""
    path = folder / "nothing.jsonl"
    path.write_text('{"text": "x"}\n' * 8, encoding="utf-8")
    return ours(tokenizer, path, workers, "64")[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", default=str(ROOT / "examples/toy/tokenizer.json"))
    parser.add_argument("--text", type=Path, help='a .jsonl file with text under "text"')
    parser.add_argument("--megabytes", type=int, default=200, help="of text that is made where --text is not given")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = options.text or Path(folder, "text.jsonl")
        if options.text is None:
            make_text(path, options.megabytes)
        size = path.stat().st_size
        shard = f"{max(1, size // (options.workers * 4) >> 20)}M"
        print(f"{size / 1e6:.0f} MB, tokenizer {options.tokenizer}, {options.workers} processes, shards of {shard}")
        print("M tokens/s by wall | by CPU second: ours, raw encoder, ours/raw, tokenizers, ours/tokenizers")
        for _ in range(options.rounds):
            empty = start_cpu_seconds(options.tokenizer, options.workers, path.parent)
            seconds, cpu, tokens = ours(options.tokenizer, path, options.workers, shard)
            _, raw = raw_encoder(options.tokenizer, path, options.workers, "auto", size)
            _, slow = raw_encoder(options.tokenizer, path, options.workers, "tokenizers", min(size, 8_000_000))
            inside = tokens / 1e6 / (cpu - empty)
            print(
                f"{tokens / 1e6 / seconds:8.2f} ({size / 1e6 / seconds:.1f} MB/s) | {inside:8.2f} {raw:8.2f} "
                f"{inside / raw:6.2f} {slow:8.2f} {inside / slow:6.1f}",
                flush=True,
            )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(f"largest process: {peak / 1e6:.0f} MB (the raw encoders hold their texts)")


if __name__ == "__main__":
    main()
