"""The .bin/.idx files are Megatron's, byte for byte, in both directions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from k2_megatron.data.indexed import TokenFile, token_dtype
from k2_megatron.data.store import TokenWriter

DOCUMENTS = [[5, 6, 7], [], [9], list(range(300)), [], [1, 2]]


def write_ours(prefix, dtype, documents=DOCUMENTS, pieces=2):
    writer = TokenWriter(str(prefix), dtype)
    for part in np.array_split(np.arange(len(documents)), pieces):
        chosen = [documents[number] for number in part]
        ids = np.array([token for document in chosen for token in document], dtype=np.uint32)
        writer.add(ids, np.array([len(document) for document in chosen], dtype=np.int64), None)
    return writer.finish()


def write_megatron(prefix, dtype, documents=DOCUMENTS):
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_document(torch.tensor(document, dtype=torch.int64), [len(document)] if document else [])
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize("vocab_size", [4096, 65536, 65537])
def test_files_are_byte_identical_to_megatrons(tmp_path, vocab_size):
    dtype = token_dtype(vocab_size)
    write_ours(tmp_path / "ours", dtype)
    write_megatron(tmp_path / "theirs", dtype)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_ids_below_65536_are_stored_in_two_bytes():
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.int32


def test_megatron_reads_ours(tmp_path):
    write_ours(tmp_path / "ours", np.dtype("<u2"))
    dataset = IndexedDataset(str(tmp_path / "ours"))
    assert [dataset[number].tolist() for number in range(len(dataset))] == [d for d in DOCUMENTS if d]
    assert dataset.document_indices.tolist() == [0, 1, 1, 2, 3, 3, 4]


def test_we_read_megatrons(tmp_path):
    write_megatron(tmp_path / "theirs", np.dtype("<i4"))
    file = TokenFile(tmp_path / "theirs")
    file.check_index()
    starts = file.document_start(np.arange(file.documents + 1))
    read = [file.tokens[start:end].tolist() for start, end in pairwise(starts)]
    assert read == DOCUMENTS
    assert file.document_at(3) == 2  # the empty document holds no token
    assert file.document_at(303) == 3
    assert file.document_at(304) == 5


def cut(path, size):
    with open(path, "r+b") as file:
        file.truncate(size)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / "t.bin").unlink(), r"t\.bin: no such file; make it with tools/preprocess_data"),
        (lambda p: (p / "t.idx").unlink(), r"t\.idx: no such file"),
        (lambda p: cut(p / "t.bin", 100), r"t\.bin: 100 bytes, its \.idx describes 612"),
        (lambda p: cut(p / "t.idx", 100), r"t\.idx: 100 bytes, its header asks for"),
        (lambda p: cut(p / "t.idx", 20), "bad or short header"),
        (lambda p: (p / "t.idx").write_bytes(b"MMIDIDX\0\0" + b"\7" * 200), "version"),
    ],
)
def test_damage_is_one_clear_error(tmp_path, damage, message):
    write_ours(tmp_path / "t", np.dtype("<u2"))
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        TokenFile(tmp_path / "t")


def test_an_index_that_disagrees_with_itself_is_found(tmp_path):
    write_ours(tmp_path / "t", np.dtype("<u2"))
    content = bytearray((tmp_path / "t.idx").read_bytes())
    content[34] += 1  # the first length
    content[34 + 4] -= 1  # the second: the sum stays
    (tmp_path / "t.idx").write_bytes(content)
    with pytest.raises(ValueError, match="not the sums of the lengths"):
        TokenFile(tmp_path / "t").check_index()
