"""Long documents to ids in slices, so that memory does not grow with a document: only where the ids are the same.

In: an encoder, its tokenizer and a text. Out: ids, slice after slice. A text may be cut where no piece of the
vocabulary stands in it across the cut (then no merge reaches over it: each merge's result is a piece) and where, at
this very cut, the text around it gives the same ids in two parts as in one. Looked for are single
spaces and newlines between other characters, then other places. What a pre-tokenizer splits at decides over more than
the text around, so that with one those are only places between two letters without case (Chinese, Japanese, Thai): any
that keeps runs of letters together goes on with such a run as it would begin it. A text without such places is encoded
whole.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

LONG_TEXT_BYTES = 2 << 20  # longer ones are sliced
SLICE_BYTES = 1 << 20
WINDOW_BYTES = 1 << 10  # on either side of a cut that are encoded twice
TRIED_PLACES = 20  # of a kind, for one cut, before it is looked for a slice later
READ_PLACES = 400  # between two characters, of which those are tried over which no piece is seen to reach
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Cut:
    """How a text goes on behind a cut, so that the ids are those of the whole: without its first `skip` bytes (an
    encoder that puts a space before every text), or without the first `drop` ids (those of that space)."""

    skip: int
    drop: int


CUTS = (Cut(1, 0), Cut(0, 0), Cut(0, 1))
SPACES = (re.compile(rb"(?<=[^\s]) (?=[^\s])"), re.compile(rb"(?<=[^\s])\n(?=[^\s])"))
BETWEEN = re.compile(rb"(?<=[^\s])(?=[^\s\x80-\xBF])")  # two characters: all but the first byte of one are \x80-\xBF


class Slicer:
    """Where an encoder's texts may be cut."""

    def __init__(self, encode: Encode, tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer):
        self._encode = encode
        self._piece_at = tokenizer.piece_at
        self._pieces = frozenset(tokenizer.pieces())
        self._lengths = sorted(set(map(len, self._pieces)))
        self._longest = self._lengths[-1]
        self._caseless_only = tokenizer.splits_words
        self._never = tokenizer.splits_by_count  # what stands behind a cut would be counted anew

    def _ids(self, text: np.ndarray) -> np.ndarray:
        return self._encode(Texts(text, np.array([0, len(text)], dtype=np.int64)))[0]

    def encode(self, text: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of a text (its UTF-8 as uint8 [bytes]), in one or more arrays."""
        start, drop = 0, 0
        while len(text) - start > LONG_TEXT_BYTES and not self._never:
            found = self._find(text, start + SLICE_BYTES)
            if found is None:
                break
            place, cut = found
            yield self._ids(text[start:place])[drop:]
            start, drop = place + cut.skip, cut.drop
        yield self._ids(text[start:])[drop:]

    def _find(self, text: np.ndarray, at_least: int) -> tuple[int, Cut] | None:
        """The first place from `at_least` on where a cut changes no id."""
        for first in range(at_least, len(text) - WINDOW_BYTES, SLICE_BYTES):
            for pattern in (*SPACES, BETWEEN):
                matches = pattern.finditer(text[first : first + SLICE_BYTES + 2].data)
                places = (first + match.start() for match in matches)
                if pattern is BETWEEN:
                    places = (place for place in islice(places, READ_PLACES) if self._may_part(text, place))
                for place in islice(places, TRIED_PLACES):
                    cut = self._cut_at(text, place, CUTS[1:] if pattern is BETWEEN else CUTS)
                    if cut is not None:
                        return place, cut
        return None

    def _may_part(self, text: np.ndarray, place: int) -> bool:
        """Whether trying a place between two characters is worth the time: by the text as it is written, which a
        normalizer may change."""
        begin, end = _window(text, place)
        before, behind = text[begin:place].tobytes().decode("utf-8"), text[place:end].tobytes().decode("utf-8")
        if self._caseless_only and not unicodedata.category(before[-1]) == unicodedata.category(behind[0]) == "Lo":
            return False
        return not self._reached_over(before, behind)

    def _cut_at(self, text: np.ndarray, place: int, cuts: Sequence[Cut]) -> Cut | None:
        """How to go on behind a cut at `place` where it changes no id."""
        begin, end = _window(text, place)
        behind_cuts = sorted({min(place + cut.skip, end) for cut in cuts})
        parts = [(begin, end), (begin, place), *((first, end) for first in behind_cuts)]
        offsets = np.cumsum([0, *(last - first for first, last in parts)], dtype=np.int64)
        ids, lengths = self._encode(Texts(np.concatenate([text[first:last] for first, last in parts]), offsets))
        whole, left, *rights = np.split(ids, np.cumsum(lengths)[:-1])
        for cut in cuts:
            right = rights[behind_cuts.index(min(place + cut.skip, end))]
            kept = right[cut.drop :]
            if not np.array_equal(whole, np.concatenate([left, kept])):
                continue
            before, dropped, behind = map(self._written, (left, right[: cut.drop], kept))
            if (begin and len(before) < self._longest) or len(behind) < self._longest:
                continue  # a piece may reach out of what is looked at
            if not self._reached_over(before, behind) and not self._reached_over(dropped, behind):
                return cut
        return None

    def _written(self, ids: np.ndarray) -> str:
        """The text of ids as the vocabulary writes it."""
        return "".join(map(self._piece_at, ids.tolist()))

    def _reached_over(self, before: str, behind: str) -> bool:
        """Whether a piece of the vocabulary stands in the text across the place between `before` and `behind`."""
        before, behind = before[-self._longest :], behind[: self._longest]
        around, place = before + behind, len(before)
        for length in self._lengths:
            for start in range(max(0, place - length + 1), min(place, len(around) - length + 1)):
                if around[start : start + length] in self._pieces:
                    return True
        return False


def _window(text: np.ndarray, place: int) -> tuple[int, int]:
    begin = _character_at(text, max(0, place - WINDOW_BYTES))
    return begin, _character_at(text, min(len(text), place + WINDOW_BYTES))


def _character_at(text: np.ndarray, place: int) -> int:
    """The first byte of the character that holds byte `place`."""
    while 0 < place < len(text) and text[place] & 0xC0 == 0x80:
        place -= 1
    return place


def apart(texts: Sequence[str]) -> Iterator[Sequence[str] | np.ndarray]:
    """Runs of texts that are not long, and each long one alone, as UTF-8; in order."""
    if not isinstance(texts, Texts):
        run: list[str] = []
        for text in texts:
            if len(text) <= LONG_TEXT_BYTES // 4:  # characters
                run.append(text)
                continue
            if run:
                yield run
            run = []
            yield np.frombuffer(text.encode(), dtype=np.uint8)
        if run:
            yield run
        return
    first = 0
    for long in np.flatnonzero(np.diff(texts.offsets) > LONG_TEXT_BYTES).tolist():
        if first < long:
            yield texts.run(first, long)
        yield texts.content[texts.offsets[long] : texts.offsets[long + 1]]
        first = long + 1
    if first < len(texts):
        yield texts.run(first, len(texts)) if first else texts
