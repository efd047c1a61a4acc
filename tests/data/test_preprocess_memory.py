"""A worker stays below 300 MB: endless new words, and among others documents of many times a piece's size, two of them
without a space; long texts in parquet's large pages, under two keys, and in lines that only orjson takes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
from token_corpora import ROOT

from k2_megatron.data.compiled import compiled

BOUND_BYTES = 300_000_000
NEW_WORDS = 3_000_000  # the encoder keeps each one that it has met
LONG_DOCUMENT_BYTES = 24_000_000
UNSPACED_LETTERS = 4_000_000  # of three bytes
BASES = 8_000_000  # of DNA, which is one word

# What a worker does to one unit, in a process of its own; VmHWM is the most it ever had resident.
WORKER = """
import sys
from pathlib import Path
sys.path.insert(0, "tests/data")
from token_corpora import make_job
from k2_megatron.runtime.memory import keep_freed_buffers
from k2_megatron.data.shards import ShardMaker
from k2_megatron.data.preprocess_job import units_of
keep_freed_buffers()
job = make_job([Path(sys.argv[1])], sys.argv[2], Path(sys.argv[3]), keys=tuple(sys.argv[4:]))
(unit,) = units_of(job)
ShardMaker(job).run(unit, lambda progress: None)
print(Path("/proc/self/status").read_text())
"""


def words(count: int) -> str:
    """So many different words of eight letters, a space after each."""
    letters = np.random.default_rng(0).integers(ord("a"), ord("z") + 1, (count, 9), dtype=np.uint8)
    letters[:, 8] = ord(" ")
    return letters.tobytes().decode("ascii")


def test_a_worker_stays_below_its_bound(tmp_path, toy_tokenizer, tool_environment):
    text = words(NEW_WORDS)
    with open(tmp_path / "in.jsonl", "w", encoding="utf-8") as file:
        for start in range(0, len(text), 90_000):
            file.write(json.dumps({"text": text[start : start + 90_000]}) + "\n")
            if start == 13_500_000:
                file.write(json.dumps({"text": text[:LONG_DOCUMENT_BYTES]}) + "\n")
                letters = np.random.default_rng(1).integers(0x4E00, 0x9FA6, UNSPACED_LETTERS, dtype=np.uint32)
                unspaced = letters.tobytes().decode("utf-32-le")
                file.write(json.dumps({"text": unspaced}, ensure_ascii=False) + "\n")
                bases = np.frombuffer(b"ACGT", dtype=np.uint8)[np.random.default_rng(2).integers(0, 4, BASES)]
                file.write(json.dumps({"text": bases.tobytes().decode("ascii")}) + "\n")
    peak = peak_bytes(tmp_path / "in.jsonl", toy_tokenizer, ["text"], tool_environment)
    assert Path(tmp_path, "x_text_document.00000.0000.bin").stat().st_size > LONG_DOCUMENT_BYTES // 4
    assert json.loads(Path(tmp_path, "x.shards/00000.0000.json").read_text(encoding="utf-8"))["rejected"] == []
    assert peak <= BOUND_BYTES, f"peak {peak / 1e6:.0f} MB"


def peak_bytes(path: Path, tokenizer: str, keys: list[str], environment: dict[str, str]) -> int:
    """The most that a worker holds over one file, whose outputs are beside it under x."""
    command = [sys.executable, "-c", WORKER, str(path), tokenizer, str(path.parent / "x"), *keys]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) << 10
    print(f"peak {peak / 1e6:.0f} MB")
    return peak


@pytest.mark.parametrize("kind", ["parquet", "two keys", "only orjson"])
def test_long_texts_of_every_source_stay_below_the_bound(tmp_path, toy_tokenizer, tool_environment, kind):
    """60 MB of text at once, of few words, which take little memory."""
    text = words(20_000) * 330
    path = tmp_path / ("in.parquet" if kind == "parquet" else "in.jsonl")
    keys = ["text", "body"] if kind == "two keys" else ["text"]
    if kind == "parquet":
        if compiled() is None:
            pytest.skip("k2_megatron._cpu is not built, so that arrow reads Snappy's pages")
        parquet.write_table(arrow.table({"text": ["short", text, text[1_000_000:11_000_000], "short"]}), path)
    else:
        record = {"body": text[: len(text) // 2], "text": "🙂" + text[len(text) // 2 :], "n": 1}
        record = record if kind == "two keys" else {"text": "🙂" + text, "n": 1}
        line = json.dumps(record, ensure_ascii=False)
        path.write_text(line[:-2] + "1e5}\n", encoding="utf-8")
    peak = peak_bytes(path, toy_tokenizer, keys, tool_environment)
    written = sum(Path(tmp_path, f"x_{key}_document.00000.0000.bin").stat().st_size for key in keys)
    assert written > len(text) // 4
    assert peak <= BOUND_BYTES, f"peak {peak / 1e6:.0f} MB"
