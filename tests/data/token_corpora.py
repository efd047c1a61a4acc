"""Makes token files of a few texts: what the tests of this folder start from."""

from __future__ import annotations

import json
from pathlib import Path

from k2_megatron.data.preprocess import preprocess
from k2_megatron.data.preprocess_job import Job
from k2_megatron.data.sources import find_sources

ROOT = Path(__file__).parents[2]
TOY = ROOT / "examples/toy"


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def make_job(inputs: list[Path], tokenizer: str, prefix: Path, **changes) -> Job:
    settings = {
        "sources": tuple(find_sources([str(path) for path in inputs], str(prefix))),
        "keys": ("text",),
        "tokenizer_path": tokenizer,
        "end_of_document_piece": None,
        "special_pieces": False,
        "append_end_of_document": True,
        "prefix": str(prefix),
        "shard_bytes": 1 << 28,
        "one_file": True,
        "encoder": "auto",
    }
    return Job(**{**settings, **changes})


def tokenize(texts: list[str], folder: Path, tokenizer: str, name: str = "text", **changes) -> str:
    """Token files of `texts`; the prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    source = write_jsonl(folder / f"{name}.jsonl", texts)
    job = make_job([source], tokenizer, folder / name, **changes)
    preprocess(job, workers=1, max_bad_fraction=0.0)
    return job.output("text")


def outputs(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
