"""Cuts of a long text at which pieces of the vocabulary do reach over: only where byte-pair encoding has a boundary.

In: an encoder of a vocabulary that merges pairs, a text, and where its slice begins. Out: a `Seam`: the slice goes on a
little behind the cut, where its ids end, and the next slice begins a little before it, where its ids begin.

Why the ids are those of the whole: which pair is merged next depends on ranks and order alone. So the two sides of a
boundary merge as they would without the rest, and a merge over it would come in the two tokens beside it alone, too:
ids whose neighbours all stand side by side in the encoding of some text are the encoding of theirs. Here the last id of
one slice and the first of the next are neighbours in what the former gives; that the next slice, which reaches further,
begins with the same ids is for the caller to see. Words are a pre-tokenizer's business: a slice begins only where known
ones go on with a run of letters or symbols as they would begin it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from k2_megatron.data.word_patterns import counts_digits, keeps_runs

BEHIND_BYTES = 2 << 10  # of the text behind where the next slice begins that are encoded with a slice
FEW_PLACES, MOST_PLACES = 8, 256  # characters in which it may begin; few pieces are longer
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Seam:
    """The slice before ends at byte `end`, with its id `keep` - 1 (None: with its last); the next begins at byte
    `first`, with its id `drop`, and is known to have these ids up to that one where it begins with `begins`."""

    end: int
    first: int
    drop: int = 0
    keep: int | None = None
    begins: tuple[int, ...] = ()
    ids: np.ndarray | None = None  # of the slice before up to `end`, where they are known


def has_seams(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer) -> bool:
    return tokenizer.merges_pairs and keeps_runs(tokenizer.pre_tokenizer)


def find_seam(
    encode: Encode,
    tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer,
    text: np.ndarray,
    start: int,
    drop: int,
    least: int,
) -> Seam | None:
    """A seam a little behind byte `least` for a slice that begins at `start` with its id `drop`; None where there is
    none."""
    end = character_at(text, min(len(text), least + BEHIND_BYTES))
    characters = np.flatnonzero(text[least:end] & 0xC0 != 0x80)[:MOST_PLACES] + least
    places = [place for place in characters.tolist() if _may_begin(tokenizer, text, place)]
    if not places:
        return None
    whole = ids_of(encode, text[start:end])
    for some in (places[:FEW_PLACES], places[FEW_PLACES:]):
        common, negative, right = max(
            ((_common_end(whole[drop:], right), -place, right) for place, right in _rights(encode, text, some, end)),
            key=lambda found: found[:2],
            default=(0, 0, whole),
        )
        if common:
            dropped = len(right) - common
            return Seam(end, -negative, dropped, len(whole) - common, tuple(right[: dropped + 1].tolist()), whole)
    return None


def _rights(encode: Encode, text: np.ndarray, places: Sequence[int], end: int) -> Iterator[tuple[int, np.ndarray]]:
    """The ids from each place up to `end`."""
    if not places:
        return iter(())
    offsets = np.cumsum([0, *(end - place for place in places)], dtype=np.int64)
    ids, lengths = encode(Texts(np.concatenate([text[place:end] for place in places]), offsets))
    return zip(places, np.split(ids, np.cumsum(lengths)[:-1]), strict=True)


def _common_end(one: np.ndarray, other: np.ndarray) -> int:
    """How many ids both end with."""
    size = min(len(one), len(other))
    differing = np.flatnonzero(one[len(one) - size :] != other[len(other) - size :])
    return size - 1 - int(differing[-1]) if len(differing) else size


def ids_of(encode: Encode, text: np.ndarray) -> np.ndarray:
    return encode(Texts(text, np.array([0, len(text)], dtype=np.int64)))[0]


def _may_begin(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, text: np.ndarray, place: int) -> bool:
    """Whether a pre-tokenizer goes on at `place` as it would begin there."""
    if tokenizer.pre_tokenizer is None:
        return True
    before = character_at(text, place - 1)
    after = text[place : place + 4].tobytes().decode("utf-8", errors="ignore")[0]
    kinds = [unicodedata.category(one)[0] for one in (text[before:place].tobytes().decode("utf-8"), after)]
    if kinds[0] in "ZC" or kinds[1] in "ZCM":  # of spaces it asks what follows them all; a mark may join the letter
        return False
    return kinds != ["N", "N"] or not counts_digits(tokenizer.pre_tokenizer)


def character_at(text: np.ndarray, place: int) -> int:
    """The first byte of the character that holds byte `place`."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place
