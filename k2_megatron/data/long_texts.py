"""Long documents to ids in slices, so that memory does not grow with a document: only where the ids are the same.

In: an encoder, its tokenizer and a text. Out: the slices of the text, and their ids one after another. A text may be
cut where no piece of the vocabulary stands in it across the cut (then no merge reaches over it: each merge's result is
a piece) and where, at this very cut, the text around it gives the same ids in two parts as in one. Looked for are
single spaces and newlines between other characters; then places before white space, where words are known to end
whatever stands around; then other places. What a pre-tokenizer splits at decides over more than the text around, so
that with one those are only places between two letters without case (Chinese, Japanese, Thai): any that keeps runs of
letters together goes on with such a run as it would begin it. Where there is no such place, boundaries of byte-pair
encoding are tried (byte_pair_cuts.py). A text that stays whole for too long has no slices.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np

from k2_megatron.data.byte_pair_cuts import Encode, Seam, character_at, find_seam, has_seams, ids_of
from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from k2_megatron.data.word_patterns import counts_characters, ends_words_before_spaces

LONG_TEXT_BYTES = 2 << 20  # longer ones are sliced
SLICE_BYTES = 1 << 20
UNBROKEN_BYTES = 4 << 20  # of a slice that has no place to cut; its ids take thirty times as much meanwhile
WINDOW_BYTES = 1 << 10  # on either side of a cut that are encoded twice
TRIED_PLACES = 20  # of a kind, for one cut, before it is looked for a slice later
READ_PLACES = 400  # of which those are tried that may be one by the text as it is written


@dataclass(frozen=True)
class Cut:
    """How a text goes on behind a cut, so that the ids are those of the whole: without its first `skip` bytes (an
    encoder that puts a space before every text), or without the first `drop` ids (those of that space)."""

    skip: int
    drop: int


@dataclass(frozen=True)
class Slice:
    """Bytes first..end - 1 of a text, encoded on their own, and which of their ids are taken: drop..keep - 1."""

    first: int
    end: int
    drop: int = 0
    keep: int | None = None


CUTS = (Cut(1, 0), Cut(0, 0), Cut(0, 1))
SPACES = (re.compile(rb"(?<=[^\s]) (?=[^\s])"), re.compile(rb"(?<=[^\s])\n(?=[^\s])"))
WORD_ENDS = re.compile(rb"(?<=[^\s])(?=\s)")
BETWEEN = re.compile(rb"(?<=[^\s])(?=[^\s\x80-\xBF])")  # two characters: all but the first byte of one are \x80-\xBF


class Slicer:
    """Where an encoder's texts may be cut."""

    def __init__(
        self,
        encode: Encode,
        tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer,
        unbroken_bytes: int = UNBROKEN_BYTES,
    ):
        """`unbroken_bytes`: the longest slice of a long text."""
        self._encode, self._tokenizer, self._unbroken_bytes = encode, tokenizer, unbroken_bytes
        self._piece_at = tokenizer.piece_at
        self._pieces = frozenset(tokenizer.pieces())
        self._lengths = sorted(set(map(len, self._pieces)))
        self._longest = self._lengths[-1]
        self._caseless_only = tokenizer.pre_tokenizer is not None
        self._never = counts_characters(tokenizer.pre_tokenizer)  # what stands behind a cut would be counted anew
        word_ends = [(WORD_ENDS, _ends_word, CUTS[1:2])] if ends_words_before_spaces(tokenizer.pre_tokenizer) else []
        spaces = [(pattern, _stands_alone, CUTS) for pattern in SPACES]
        self._kinds = [*spaces, *word_ends, (BETWEEN, self._may_part, CUTS[1:])]
        self._has_seams = has_seams(tokenizer)

    def encode(self, text: np.ndarray, slices: Sequence[Slice]) -> Iterator[np.ndarray]:
        """The ids of a text (its UTF-8 as uint8 [bytes]), slice after slice."""
        for one in slices:
            yield ids_of(self._encode, text[one.first : one.end])[one.drop : one.keep]

    def slices(self, text: np.ndarray) -> list[Slice] | None:
        """The slices of a text; None where one would be too long."""
        found: list[tuple[Slice, tuple[int, ...]]] = []
        begins: tuple[int, ...] = ()
        current, least = Slice(0, len(text)), SLICE_BYTES
        while True:
            seam = self._find(text, current, least)
            end = seam.end if seam else len(text)
            if len(text) > LONG_TEXT_BYTES and end - current.first > self._unbroken_bytes:
                return None
            if begins and not self._begin_with(begins, text[current.first : end], seam):
                (current, begins), least = found.pop(), end  # the cut before does not hold
                continue
            found.append((replace(current, end=end, keep=seam.keep if seam else None), begins))
            if seam is None:
                return [one for one, _ in found]
            current, begins = Slice(seam.first, len(text), seam.drop), seam.begins
            least = current.first + SLICE_BYTES

    def _begin_with(self, begins: tuple[int, ...], text: np.ndarray, seam: Seam | None) -> bool:
        """Whether the ids of a slice begin so; the seam behind it may know them."""
        ids = seam.ids if seam is not None and seam.ids is not None else ids_of(self._encode, text)
        return tuple(ids[: len(begins)].tolist()) == begins

    def _find(self, text: np.ndarray, one: Slice, least: int) -> Seam | None:
        """The first place from `least` on where a cut changes no id of a slice."""
        if self._never or len(text) - one.first <= LONG_TEXT_BYTES:
            return None
        for first in range(least, min(len(text) - WINDOW_BYTES, one.first + self._unbroken_bytes), SLICE_BYTES):
            found = self._find_unreached(text, first)
            if found is None and self._has_seams:
                found = find_seam(self._encode, self._tokenizer, text, one.first, one.drop, first)
            if found is not None:
                return found
        return None

    def _find_unreached(self, text: np.ndarray, first: int) -> Seam | None:
        """The first place of a slice over which no piece reaches."""
        for pattern, may_part, cuts in self._kinds:
            matches = pattern.finditer(text[first : first + SLICE_BYTES + 2].data)
            places = (first + match.start() for match in islice(matches, READ_PLACES))
            for place in islice((place for place in places if may_part(text, place)), TRIED_PLACES):
                cut = self._cut_at(text, place, cuts)
                if cut is not None:
                    return Seam(place, place + cut.skip, cut.drop)
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


def _stands_alone(text: np.ndarray, place: int) -> bool:
    """Whether the space or newline at `place` stands between other characters: not all white space is ASCII."""
    before = text[character_at(text, place - 1) : place].tobytes().decode("utf-8")
    behind = text[place + 1 : place + 5].tobytes().decode("utf-8", errors="ignore")[0]
    return not before.isspace() and not behind.isspace()


def _ends_word(text: np.ndarray, place: int) -> bool:
    """Whether a word ends before the white space at `place`: newlines may belong to symbols, and what Unicode did not
    always know may be taken for one."""
    before = text[character_at(text, place - 1) : place].tobytes().decode("utf-8")
    if before.isascii() and before.isalnum():
        return True
    return unicodedata.category(before)[0] not in "ZC" and text[place] in b" \t"


def _window(text: np.ndarray, place: int) -> tuple[int, int]:
    begin = character_at(text, max(0, place - WINDOW_BYTES))
    return begin, character_at(text, min(len(text), place + WINDOW_BYTES))


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
