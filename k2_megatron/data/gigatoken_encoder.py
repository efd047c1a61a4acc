"""gigatoken as an encoder of `Texts`: what it is told of a tokenizer, when it forgets words, and its arrays.

In: a loaded tokenizer. Out: `GigatokenEncode`, a function of texts to ids. gigatoken takes and gives many texts at once
through five functions of the package awkward, which it imports at every call. They are small enough to stand here, over
`Texts`: awkward itself takes 0.2 s to import, 25 MiB of every worker, and 2 ms of every call. A gigatoken that calls
others fails the probe of make_encoder.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import psutil

from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from k2_megatron.runtime.memory import release_freed_memory

# Of a worker that may take 300 MB. The table of words doubles when it is full, at 0.4, 0.8 and 1.6 million words, which
# takes 65, 131 and 233 MB meanwhile: words are forgotten before the last, beside a long text before the last but one.
LARGE_PROCESS_BYTES = 180 << 20
MANY_WORDS_BYTES, FEWER_WORDS_BYTES = 80 << 20, 36 << 20
FEW_BYTES, MANY_BYTES = 2 << 20, 4 << 20  # of text at once: 8 MiB of new words took 328 MB


class GigatokenEncode:
    """gigatoken, which keeps every word that it has met (of byte-level vocabularies): on varied text without end. Made
    anew where the process has grown too large; the ids are the same."""

    def __init__(self, tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, settings: str | None = None):
        """`settings`: what `gigatoken_settings` gave for the tokenizer, where it is at hand."""
        self._settings = settings or gigatoken_settings(tokenizer)
        self._arrays = _arrays()
        self.forget()

    def forget(self) -> None:
        """Start with no word known, and give back the memory of those that were."""
        import gigatoken

        self._backend: Any = None  # the old one's memory goes first
        release_freed_memory()
        self._backend = gigatoken.Tokenizer.from_json(self._settings)
        release_freed_memory()  # or the table would grow into it unseen
        self._bytes_without_words = _resident_bytes()

    @property
    def bytes_at_once(self) -> int:
        """How much text is best given to a call. Byte-level vocabularies' words are kept from call to call, and pieces
        leave memory to them; a sentencepiece-like vocabulary's are met afresh in each."""
        return MANY_BYTES if type(self._backend.backend).__name__ == "SentencePieceTokenizer" else FEW_BYTES

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        with _imported_as("awkward", self._arrays):
            given = texts if isinstance(texts, Texts) else list(texts)
            ids, lengths = self._backend.encode_batch(given, parallel=False)
        resident = _resident_bytes()
        self._bytes_without_words = min(self._bytes_without_words, resident)  # a long text has gone meanwhile
        words = FEWER_WORDS_BYTES if resident > LARGE_PROCESS_BYTES else MANY_WORDS_BYTES
        if resident - self._bytes_without_words > words:
            self.forget()
        return ids, lengths


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def gigatoken_settings(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer) -> str:
    """The tokenizer.json that gigatoken is given. A sentencepiece model takes half a second to write so. ValueError for
    one with user-defined symbols: sentencepiece takes them out of a whole text, gigatoken out of parts whose spaces it
    has dropped."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        settings = json.loads(sentencepiece_to_tokenizer_json(tokenizer.path.read_bytes()))
        symbols = [token["content"] for token in settings["added_tokens"] if not token["special"]]
        if symbols:
            raise ValueError(f"it has user-defined symbols, the first {symbols[0]!r}")
    else:
        settings = json.loads(tokenizer.path.read_bytes())
    if not tokenizer.special_pieces:  # gigatoken matches every added piece it knows of: tell it of no special one
        settings["added_tokens"] = [t for t in settings.get("added_tokens") or [] if not t.get("special")]
    return json.dumps(settings)


def _arrays() -> ModuleType:
    """What gigatoken uses of awkward."""
    module = ModuleType("awkward")
    vars(module).update(
        Array=Texts,
        without_parameters=lambda texts: texts,
        flatten=lambda texts: texts.content[texts.offsets[0] : texts.offsets[-1]],
        num=lambda texts: np.diff(texts.offsets),
        to_numpy=lambda array: array,
        unflatten=lambda ids, lengths: (ids, lengths),
    )
    return module


@contextmanager
def _imported_as(name: str, module: ModuleType) -> Iterator[None]:
    """`import name` gives `module` meanwhile."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before
