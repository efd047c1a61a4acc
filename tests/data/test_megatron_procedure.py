"""The command against the procedure of Megatron's own preprocessing tool, written out with megatron-core's builder:
the same .bin and .idx, byte for byte, and read by megatron-core's dataset."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
from token_corpora import ROOT
from tokenizers import Tokenizer

KEYS = ("text", "title")
MANY = 70_000  # pieces: too many for uint16


def megatrons_procedure(
    lines: list[str], tokenize: Callable[[str], list[int]], pieces: int, end: int | None, prefix: Path
) -> None:
    """For each line and key: tokenize; where there are ids, append the end; one document of one sequence; finalize."""
    dtype = DType.optimal_dtype(pieces)
    builders = {key: IndexedDatasetBuilder(f"{prefix}_{key}_document.bin", dtype=dtype) for key in KEYS}
    for line in lines:
        record = json.loads(line)
        for key, builder in builders.items():
            ids = tokenize(record[key])
            lengths = [len(ids)] if ids else []
            if ids and end is not None:
                ids.append(end)
                lengths[-1] += 1
            builder.add_document(torch.IntTensor(ids), lengths)
    for key, builder in builders.items():
        builder.finalize(f"{prefix}_{key}_document.idx")


@pytest.fixture(scope="module")
def records(speeches) -> list[str]:
    texts = [*speeches[:25], "", " ", "naïve 🙂 日本語 \t\x00", "<s> </s> <unk>", speeches[0]]
    whole = [{"title": text[:40], "n": number, "text": text} for number, text in enumerate(texts)]
    return [json.dumps(record, ensure_ascii=number % 2 == 0) for number, record in enumerate(whole)]


def hugging_face(path: str):
    tokenizer = Tokenizer.from_file(path)
    tokenizer.encode_special_tokens = True  # text is text: what sentencepiece does, and megatron's tool with it
    ids = lambda text: tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    return ids, max(tokenizer.get_vocab().values()) + 1


def sentencepiece(path: str):
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=path)
    return processor.encode, processor.vocab_size()


@pytest.fixture(scope="module")
def large_tokenizer(tmp_path_factory, toy_tokenizer) -> str:
    """The toy's pieces at the end of a vocabulary of 70,000."""
    settings = json.loads(Path(toy_tokenizer).read_text(encoding="utf-8"))
    vocabulary = settings["model"]["vocab"]
    shift = MANY - len(vocabulary)
    unused = {f"unused {number}": number for number in range(shift)}
    settings["model"]["vocab"] = unused | {piece: number + shift for piece, number in vocabulary.items()}
    for token in settings["added_tokens"]:
        token["id"] += shift
    path = tmp_path_factory.mktemp("large") / "tokenizer.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("append", [False, True], ids=["plain", "append-eod"])
@pytest.mark.parametrize(
    ("tokenizer", "read", "end", "dtype"),
    [
        ("toy_tokenizer", hugging_face, 0, np.uint16),
        ("sentencepiece_model", sentencepiece, 2, np.uint16),
        ("hugging_face_twin", hugging_face, 2, np.uint16),
        ("large_tokenizer", hugging_face, MANY - 4096, np.int32),
    ],
)
def test_the_commands_files_are_megatrons(request, tmp_path, monkeypatch, records, tokenizer, read, end, dtype, append):
    path = request.getfixturevalue(tokenizer)
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(records) + "\n", encoding="utf-8")
    arguments = ["--input", source, "--tokenizer", path, "--output-prefix", tmp_path / "ours", "--workers", 1]
    command = ["preprocess_data.py", *map(str, arguments), "--json-keys", *KEYS, *["--append-eod"][: int(append)]]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools/preprocess_data.py"), run_name="__main__")
    assert ended.value.code == 0
    tokenize, pieces = read(path)
    megatrons_procedure(records, tokenize, pieces, end if append else None, tmp_path / "theirs")
    for key in KEYS:
        for suffix in (".bin", ".idx"):
            ours, theirs = (tmp_path / f"{name}_{key}_document{suffix}" for name in ("ours", "theirs"))
            assert ours.read_bytes() == theirs.read_bytes(), f"{key}{suffix}"
        dataset = IndexedDataset(str(tmp_path / f"ours_{key}_document"))
        assert dataset.index.dtype == dtype
        assert len(dataset.document_indices) == len(records) + 1
        with_ids = [ids for ids in (tokenize(json.loads(line)[key]) for line in records) if ids]
        assert [row.tolist() for row in dataset[:]] == [ids + [end] * append for ids in with_ids]
