"""Fill-in-the-middle: documents of a row reordered so that the middle comes last.

In: a row's tokens and the documents in it. Out: as many tokens. Bavarian et al. 2022 (arXiv 2207.14255), with the two
arrangements of StarCoder (arXiv 2305.06161):

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

Whether a document is reordered, and how, is a hash of seed, file and document, so every repeat and every part of it is
treated alike; where it is cut, a hash of the part's first token. Cuts fall between tokens, not characters, so that a
row's content never depends on a tokenizer library at training time. What no longer fits at the row's end is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from k2_megatron.data.permutation import hash64_of_numbers

SHORTEST = 8  # tokens; a shorter part of a document is left as it is


@dataclass(frozen=True)
class FimRates:
    """The rates of a source and the ids of the pieces."""

    psm: float
    spm: float
    prefix: int
    middle: int
    suffix: int


@dataclass(frozen=True)
class Segment:
    """Part of a document in a row: tokens start..end-1 of the row; `ends` where the document ends here."""

    document: int
    first_token: int  # in its file: the key of the cuts
    start: int
    end: int
    ends: bool


def reorder(row: np.ndarray, segments: Sequence[Segment], rates: FimRates, key: int) -> np.ndarray:
    """`row` int [L + 1] with its chosen documents reordered; the last token of an ending document stays last."""
    parts: list[np.ndarray] = []
    for segment in segments:
        tokens = row[segment.start : segment.end]
        body = tokens[:-1] if segment.ends else tokens
        draw = _uniform(key, segment.document)
        if draw >= rates.psm + rates.spm or len(body) < SHORTEST:
            parts.append(tokens)
            continue
        cuts = sorted(int(_uniform(key ^ mark, segment.first_token) * (len(body) + 1)) for mark in (1, 2))
        prefix, middle, suffix = body[: cuts[0]], body[cuts[0] : cuts[1]], body[cuts[1] :]
        before, after, then = (np.array([token]) for token in (rates.prefix, rates.suffix, rates.middle))
        if draw < rates.psm:
            parts += [before, prefix, after, suffix, then, middle]
        else:
            parts += [before, after, suffix, then, prefix, middle]
        parts.append(tokens[len(body) :])
    return np.concatenate(parts).astype(row.dtype)[: len(row)]


def _uniform(key: int, number: int) -> float:
    return float(hash64_of_numbers(key, np.array([number]))[0] >> np.uint64(11)) / 2.0**53
