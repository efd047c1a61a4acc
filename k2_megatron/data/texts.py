"""Many texts in one buffer, so that a text costs no Python object until someone asks for it.

In: UTF-8 bytes end to end and where each text begins. Out: a sequence of str, and the buffer for encoders that take it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import numpy as np


class Texts(Sequence[str]):
    """`content` uint8 [bytes], valid UTF-8; text i is content[offsets[i]:offsets[i + 1]], offsets int64 [texts + 1]."""

    def __init__(self, content: np.ndarray, offsets: np.ndarray):
        self.content, self.offsets = content, offsets

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> list[str]: ...
    def __getitem__(self, place: int | slice) -> str | list[str]:
        if isinstance(place, slice):
            return [self[number] for number in range(*place.indices(len(self)))]
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        place %= len(self)
        return self.content[self.offsets[place] : self.offsets[place + 1]].tobytes().decode("utf-8")

    def run(self, first: int, end: int) -> Texts:
        """Texts first..end-1, over the same buffer."""
        offsets = self.offsets[first : end + 1]
        return Texts(self.content[offsets[0] : offsets[-1]], offsets - offsets[0])


def beginnings(texts: Sequence[str], characters: int) -> list[str]:
    """The first characters of every text until there are so many in all; the rest of a long text is never decoded."""
    found: list[str] = []
    for number in range(len(texts)):
        found.append(_beginning(texts, number, characters))
        characters -= len(found[-1])
        if characters <= 0:
            break
    return found


def _beginning(texts: Sequence[str], number: int, characters: int) -> str:
    if not isinstance(texts, Texts):
        return texts[number][:characters]
    start, end = texts.offsets[number : number + 2].tolist()
    content = texts.content[start : min(end, start + 4 * characters)].tobytes()
    return content.decode("utf-8", errors="ignore")[:characters]  # but for a last character that was cut
