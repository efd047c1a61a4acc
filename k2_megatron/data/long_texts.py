"""Long documents to ids in slices, so that memory does not grow with a document: only where the ids are the same.

In: an encoder and a text. Out: ids, slice after slice. A text may be cut at a single space or newline between other
characters where no piece of the vocabulary holds the character before it and it (then no merge reaches over the cut:
each merge's result is a piece) and where, at this very cut, the text around it gives the same ids in two parts as in
one. A text without such places is encoded whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from k2_megatron.data.texts import Texts

LONG_TEXT_BYTES = 2 << 20  # longer ones are sliced
SLICE_BYTES = 1 << 20
WINDOW_BYTES = 1 << 10  # on either side of a cut that are encoded twice
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Cut:
    """How a text goes on behind a cut, so that the ids are those of the whole: without its first `skip` bytes (an
    encoder that puts a space before every text), or without the first `drop` ids (those of that space)."""

    skip: int
    drop: int


CUTS = (Cut(1, 0), Cut(0, 0), Cut(0, 1))


@dataclass(frozen=True)
class _Place:
    """Places of one kind: which, how vocabularies write them, and a text to try them on."""

    pattern: re.Pattern[bytes]
    marks: str
    probe: tuple[bytes, bytes]


PLACES = (
    _Place(re.compile(rb"(?<=[^\s]) (?=[^\s])"), " ▁Ġ", (b"the union", b" is")),
    _Place(re.compile(rb"(?<=[^\s])\n(?=[^\s])"), "\nĊ", (b"the union", b"\nis")),
)


class Slicer:
    """Where an encoder's texts may be cut."""

    def __init__(self, encode: Encode, pieces: Iterable[str]):
        self._encode = encode
        pieces = list(pieces)
        self._ways: list[tuple[_Place, Cut, frozenset[str]]] = []
        for place in PLACES:
            cuts = [cut for cut in CUTS if self._same(b"".join(place.probe), len(place.probe[0]), cut)]
            behind = re.compile(f"(.)[{place.marks}]", re.DOTALL)
            joined = frozenset(character for piece in pieces for character in behind.findall(piece))
            self._ways += [(place, cut, joined) for cut in cuts[:1]]

    def _ids(self, text: bytes | np.ndarray) -> np.ndarray:
        content = np.frombuffer(text, dtype=np.uint8) if isinstance(text, bytes) else text
        return self._encode(Texts(content, np.array([0, len(content)], dtype=np.int64)))[0]

    def _same(self, text: bytes, place: int, cut: Cut) -> bool:
        parts = [self._ids(text[:place]), self._ids(text[place + cut.skip :])[cut.drop :]]
        return np.array_equal(self._ids(text), np.concatenate(parts))

    def encode(self, text: np.ndarray) -> Iterator[np.ndarray]:
        """The ids of a text (its UTF-8 as uint8 [bytes]), in one or more arrays."""
        start, drop = 0, 0
        while len(text) - start > LONG_TEXT_BYTES:
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
            for place, cut, joined in self._ways:
                for match in place.pattern.finditer(text[first : first + SLICE_BYTES + 2].data):
                    if self._is_exact(text, first + match.start(), cut, joined):
                        return first + match.start(), cut
        return None

    def _is_exact(self, text: np.ndarray, place: int, cut: Cut, joined: frozenset[str]) -> bool:
        begin = _character_at(text, max(0, place - WINDOW_BYTES))
        end = _character_at(text, min(len(text), place + WINDOW_BYTES))
        character = text[_character_at(text, place - 1) : place].tobytes().decode("utf-8")
        if character in joined or (not character.isascii() and not joined.isdisjoint(BYTE_MARKS)):
            return False
        return self._same(text[begin:end].tobytes(), place - begin, cut)


# How byte-level vocabularies write the bytes that characters beyond ASCII end with (0x80 to 0xBF).
BYTE_MARKS = frozenset(map(chr, [*range(0xA1, 0xAD), *range(0xAE, 0xC0), *range(0x122, 0x144)]))


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
