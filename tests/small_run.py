"""A run small enough to be trained many times in a test session: real English text by bytes, four narrow layers."""

import json
import lzma
import warnings
from pathlib import Path

import numpy
import torch
import torch.distributed.checkpoint as torch_checkpoint

from k2_megatron.config.toml_text import toml_document
from k2_megatron.data.store import TokenWriter

TEXT = Path(__file__).resolve().parents[1] / "examples" / "toy" / "state_of_the_union.jsonl.xz"
VOCABULARY = 256  # one token a byte; 0 ends a document

SECTIONS = {
    "run": {"seed": 7},
    "model": {
        "layers": 4,
        "hidden_size": 64,
        "ffn_hidden_size": 172,
        "heads": 4,
        "kv_heads": 4,
        "vocab_size": VOCABULARY,
        "sequence_length": 32,
    },
    "train": {
        "steps": 5,
        "micro_batch": 2,
        "global_batch": 8,
        "precision": "float32",
        "evaluate_every_steps": 5,
        "evaluate_batches": 1,
    },
    "optimizer": {
        "learning_rate": 3e-3,
        "min_learning_rate": 3e-4,
        "warmup_steps": 2,
        "clip_grad_norm": 1.0,  # below the norms of these steps, so that clipping takes part
    },
}


def write_text(folder: Path, train_documents: int = 40, held_out_documents: int = 8) -> None:
    """Write `train` and `held_out` .bin/.idx pairs into `folder`."""
    with lzma.open(TEXT, "rt", encoding="utf-8") as lines:
        texts = [json.loads(next(lines))["text"] for _ in range(train_documents + held_out_documents)]
    for name, part in (("train", texts[:train_documents]), ("held_out", texts[train_documents:])):
        writer = TokenWriter(str(folder / name), numpy.dtype("<u2"))
        for text in part:
            ids = numpy.frombuffer(text.encode(), dtype=numpy.uint8)
            writer.add(ids, numpy.array([len(ids)]), end_of_document=0)
        writer.finish()


def write_small_config(folder: Path, text: Path) -> Path:
    """The configuration of the small run, reading the files that `write_text` wrote into `text`."""
    sections = {
        **SECTIONS,
        "run": {**SECTIONS["run"], "folder": str(folder / "run")},
        "data": {"train": str(text / "train"), "held_out": str(text / "held_out")},
    }
    path = folder / "small.toml"
    path.write_text(toml_document(sections))
    return path


def overrides(settings: dict[str, object]) -> list[str]:
    """{"parallel.tensor": 2} -> ["parallel.tensor=2"], as `load_config` takes them."""
    return [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]


def checkpoint_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, whole, by its global name: weights, moments, main parameters."""
    reader = torch_checkpoint.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, torch_checkpoint.metadata.TensorStorageMetadata)
    }
    with warnings.catch_warnings():  # torch remarks that nothing is distributed here, which is what no_dist asks for
        warnings.simplefilter("ignore", UserWarning)
        torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
