"""Windows: the pieces of a document that the model reads, of which each predicts its own share of the tokens.

In: token ids of a document, the longest window, the context. Out: windows that predict every token exactly once.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """`tokens` [n + 1]: the model reads the first n and predicts the last n; of these predictions those from number
    `first` on count."""

    tokens: np.ndarray
    first: int

    @property
    def length(self) -> int:
        return len(self.tokens) - 1

    @property
    def counted(self) -> int:
        return self.length - self.first


def spans(predictions: int, longest: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, first counted) of windows over predictions 0..predictions-1, each of at most `longest`.

    Every prediction counts in one window. Before a token that counts stand at least `context` tokens in its window, or
    all that the document has; the last window is moved back as far as its length allows.
    """
    assert 1 <= context <= longest, f"a context of {context} tokens in windows of {longest}"
    done = 0
    while done < predictions:
        start = max(0, done - (context - 1)) if done else 0
        end = min(start + longest, predictions)
        start = max(0, end - longest)
        yield start, end, done
        done = end


def document_windows(tokens: Sequence[int] | np.ndarray, before: int, longest: int, context: int) -> Iterator[Window]:
    """Windows that predict each of `tokens` once; the token `before`, which ends a document, comes before the first."""
    whole = np.concatenate([[before], tokens]).astype(np.int64)
    for start, end, first in spans(len(tokens), longest, context):
        yield Window(whole[start : end + 1], first - start)


def continuation_window(context: Sequence[int], continuation: Sequence[int], longest: int) -> Window:
    """The window that predicts `continuation` behind as much of `context`, at least one token, as it has room for."""
    assert context, "a continuation needs a token before it"
    assert len(continuation) <= longest, f"{len(continuation)} tokens to predict in a window of {longest}"
    tokens = np.array([*context, *continuation], dtype=np.int64)[-(longest + 1) :]
    return Window(tokens, len(tokens) - 1 - len(continuation))
