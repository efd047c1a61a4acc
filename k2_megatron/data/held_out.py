"""Which documents are held out: a hash of the document's number under a key decides, so the choice needs no list.

In: document numbers, the fraction, a key (of the seed and the file). Out: the spans of tokens held out.
"""

from __future__ import annotations

import numpy as np

from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.permutation import hash64_of_numbers

DOCUMENTS_A_SLICE = 1 << 20  # documents whose hashes are in memory at once


def is_held_out(documents: np.ndarray, fraction: float, key: int) -> np.ndarray:
    """Whether each document number is held out: a hash below `fraction` of its range."""
    return (hash64_of_numbers(key, documents) >> np.uint64(11)).astype(np.float64) < fraction * 2.0**53


def held_out_spans(file: TokenFile, first: int, end: int, fraction: float, key: int) -> np.ndarray:
    """Token spans int64 [n, 2] of the held-out ones of documents first..end-1."""
    spans = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(first, end if fraction > 0 else first, DOCUMENTS_A_SLICE):
        documents = np.arange(start, min(end, start + DOCUMENTS_A_SLICE))
        chosen = documents[is_held_out(documents, fraction, key)]
        spans.append(np.stack([file.document_start(chosen), file.document_start(chosen + 1)], axis=1))
    joined = np.concatenate(spans).astype(np.int64)
    return joined[joined[:, 0] < joined[:, 1]]


def complement(spans: np.ndarray, start: int, end: int) -> np.ndarray:
    """The spans between `spans` within start..end, empty ones left out."""
    kept = np.stack([np.append(start, spans[:, 1]), np.append(spans[:, 0], end)], axis=1)
    return kept[kept[:, 0] < kept[:, 1]]
