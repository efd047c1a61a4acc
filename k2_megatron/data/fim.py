"""Fill-in-the-middle: documents of a row reordered so that the middle comes last.

In: a row's tokens and the documents in it. Out: as many tokens. Bavarian et al. 2022 (arXiv 2207.14255), with the two
arrangements of StarCoder (arXiv 2305.06161):

    PSM   <prefix> prefix <suffix> suffix <middle> middle
    SPM   <prefix> <suffix> suffix <middle> prefix middle

Whether a document is reordered, and how, is a hash of seed, file and document, so every repeat and every part of it is
treated alike; where it is cut, a hash of the part's first token. Cuts fall between tokens, so that a row's content
never depends on a tokenizer library at training time, or (`FimRates.tokenizer`) between characters: then each of the
three parts is tokenized on its own, as StarCoder and K2 did, and the model learns to go on from the middle of a word.
What no longer fits at the row's end is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from k2_megatron.data.permutation import hash64_of_numbers

if TYPE_CHECKING:
    from k2_megatron.data.tokenizer import Tokenizer

SHORTEST = 8  # tokens; a shorter part of a document is left as it is


@dataclass(frozen=True)
class FimRates:
    """The rates of a source and the ids of the pieces."""

    psm: float
    spm: float
    prefix: int
    middle: int
    suffix: int
    tokenizer: Tokenizer | None = None  # cut between characters and tokenize the parts with it


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
    return np.concatenate(reordered_segments(row, segments, rates, key)).astype(row.dtype)[: len(row)]


def reordered_segments(row: np.ndarray, segments: Sequence[Segment], rates: FimRates, key: int) -> list[np.ndarray]:
    """The tokens of each segment as `reorder` lays them end to end; one that was reordered has grown, by the three
    pieces or more."""
    found: list[np.ndarray] = []
    for segment in segments:
        tokens = row[segment.start : segment.end]
        body = tokens[:-1] if segment.ends else tokens
        draw = _uniform(key, segment.document)
        if draw >= rates.psm + rates.spm or len(body) < SHORTEST:
            found.append(tokens)
            continue
        places = sorted(_uniform(key ^ mark, segment.first_token) for mark in (1, 2))
        prefix, middle, suffix = _cut(body, places, rates.tokenizer)
        before, after, then = (np.array([token]) for token in (rates.prefix, rates.suffix, rates.middle))
        if draw < rates.psm:
            parts = [before, prefix, after, suffix, then, middle]
        else:
            parts = [before, after, suffix, then, prefix, middle]
        found.append(np.concatenate([*parts, tokens[len(body) :]]))
    return found


def _cut(body: np.ndarray, places: Sequence[float], tokenizer: Tokenizer | None) -> list[np.ndarray]:
    """`body` in three, cut at two `places` of 0..1 along it: the ids of prefix, middle and suffix.

    Between tokens also where text cannot be cut: a row's edge splits a character, or the parts' tokens would be fewer.
    """
    if tokenizer is not None:
        text = tokenizer.decode(body.tolist())
        parts = [tokenizer.encode(part) for part in _split(text, places)]
        if tokenizer.decode(parts[0]) + tokenizer.decode(parts[1]) + tokenizer.decode(parts[2]) == text:
            if "\ufffd" not in text and sum(map(len, parts)) >= len(body):
                return [np.array(part, dtype=np.int64) for part in parts]
    return _split(body, places)


def _split(whole: Any, places: Sequence[float]) -> list[Any]:
    """A sequence in three, its two cuts at `places` of 0..1 of its length."""
    first, second = (int(place * (len(whole) + 1)) for place in places)
    return [whole[:first], whole[first:second], whole[second:]]


def _uniform(key: int, number: int) -> float:
    return float(hash64_of_numbers(key, np.array([number]))[0] >> np.uint64(11)) / 2.0**53
