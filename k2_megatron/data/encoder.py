"""Batches of texts to ids: gigatoken where it agrees with the tokenizer's own library, else that library.

In: a loaded tokenizer. Out: an `Encoder` whose `encode(texts)` gives one flat array of ids and the length of each text.
gigatoken is 10-20 times faster; it is used only after it gave the same ids on a probe that holds every added piece of
the tokenizer, and every worker compares it again on the first documents it sees.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

ENCODERS = ("auto", "gigatoken", "tokenizers", "sentencepiece")
LARGE_PROCESS_BYTES = 190 << 20  # of a worker that may take 300 MB: the table of words doubles when it is full
IDS_BEFORE_FORGETTING = 4_000_000  # should the tokenizer alone be so large, words are not forgotten at every call
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
PROBE = (
    "",
    " ",
    "The union shall never be dissolved.",
    "  two  spaces,\ttabs\r\nand\n\n\nlines \u00a0 ",
    "1790 1,234.56 3.14e-10 0x1F",
    "don't you'll it's WE'RE naïve café Ελληνικά русский 日本語 한국어 ไทย العربية",
    "🙂🏽‍🚀 zero\u200bwidth e\u0301 \x00\x01 ﬁ ½ Ⅷ",
    "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # code\n",
    "<s></s><unk><pad><|endoftext|><0x0A>▁_▁▁##ing",
    "a" * 300,
)


def release_freed_memory() -> None:
    """Have glibc give back what is free (preprocess.py has it keep that)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


@dataclass(frozen=True)
class Encoder:
    """`encode(texts)` -> (ids [sum of lengths], lengths int64 [texts]); `name`, `reason`: which library and why."""

    name: str
    reason: str
    encode: Encode
    reference: Encode
    make_room: Callable[[], None] = release_freed_memory  # before something large is held in memory


def make_encoder(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, requested: str = "auto") -> Encoder:
    """The fastest exact encoder for `tokenizer`, or the one asked for. ValueError where it cannot be had."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        own, reference = "sentencepiece", _sentencepiece_encode(tokenizer)
    else:
        own, reference = "tokenizers", _tokenizers_encode(tokenizer)
    if requested not in ("auto", "gigatoken", own):
        raise ValueError(f"--encoder {requested}: {tokenizer.path} is read by {own}; ask for auto, gigatoken or {own}")
    if requested == own:
        return Encoder(own, "asked for", reference, reference)
    try:
        fast = GigatokenEncode(tokenizer)
        problem = first_difference(fast, reference, (*PROBE, *_added_pieces(tokenizer)))
    except Exception as error:  # a Rust panic arrives as a bare exception type of its own
        problem = f"{type(error).__name__}: {error}".splitlines()[0]  # Rust's go on with where it is in its source
    if not problem:
        return Encoder("gigatoken", f"gives the same ids as {own}", fast, reference, fast.forget)
    if requested == "gigatoken":
        raise ValueError(f"--encoder gigatoken: it does not take {tokenizer.path} ({problem}); ask for auto or {own}")
    return Encoder(own, f"gigatoken does not take this tokenizer ({problem})", reference, reference)


def first_difference(one: Encode, other: Encode, texts: Sequence[str]) -> str:
    """What differs between two encoders on `texts`: "" if nothing."""
    ids, lengths = one(texts)
    expected_ids, expected_lengths = other(texts)
    if np.array_equal(lengths, expected_lengths) and np.array_equal(ids, expected_ids):
        return ""
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    expected_bounds = np.concatenate([[0], np.cumsum(expected_lengths)])
    for number, text in enumerate(texts):
        got = ids[bounds[number] : bounds[number + 1]]
        expected = expected_ids[expected_bounds[number] : expected_bounds[number + 1]]
        if not np.array_equal(got, expected):
            return f"{got[:8].tolist()} instead of {expected[:8].tolist()} for {text[:40]!r}"
    raise AssertionError("the flat ids differ but no text does")


def _added_pieces(tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer) -> list[str]:
    if isinstance(tokenizer, SentencePieceTokenizer):
        processor = tokenizer.backend
        pieces = [processor.id_to_piece(i) for i in range(len(processor)) if processor.is_control(i)]
    else:
        pieces = [str(token.content) for token in tokenizer.backend.get_added_tokens_decoder().values()]
    return [f"before{piece}after {piece} {piece}{piece}" for piece in pieces]


class GigatokenEncode:
    """gigatoken, which keeps every word that it has met: on varied text without end. Made anew where the process has
    grown too large; the ids are the same."""

    def __init__(self, tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer):
        if isinstance(tokenizer, SentencePieceTokenizer):
            from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

            settings = json.loads(sentencepiece_to_tokenizer_json(tokenizer.path.read_bytes()))
        else:
            settings = json.loads(tokenizer.path.read_bytes())
        if not tokenizer.special_pieces:  # gigatoken matches every added piece it knows of: tell it of no special one
            settings["added_tokens"] = [t for t in settings.get("added_tokens") or [] if not t.get("special")]
        self._settings = json.dumps(settings)
        _import_awkward()
        self.forget()

    def forget(self) -> None:
        """Start with no word known, and give back the memory of those that were."""
        import gigatoken

        self._backend: Any = None  # the old one's memory goes first
        release_freed_memory()
        self._backend = gigatoken.Tokenizer.from_json(self._settings)
        self._ids_since = 0

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        layout = self._backend.encode_batch(_as_strings(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        ids = np.asarray(layout.content.data)[offsets[0] : offsets[-1]]
        self._ids_since += len(ids)
        if self._ids_since > IDS_BEFORE_FORGETTING and psutil.Process().memory_info().rss > LARGE_PROCESS_BYTES:
            self.forget()
        return ids, np.diff(offsets)


def _import_awkward() -> None:
    """gigatoken's array type, without pyarrow, which it imports where it finds it: 27 MiB of every worker that only
    parquet files need."""
    if "pyarrow" in sys.modules:
        return
    sys.modules["pyarrow"] = None  # type: ignore[assignment]  # to an import: not installed
    try:
        import awkward  # noqa: F401
    finally:
        del sys.modules["pyarrow"]


def _as_strings(texts: Sequence[str]):
    """An awkward array of strings over the buffer of `Texts`, without a copy; a list of any other texts."""
    if not isinstance(texts, Texts):
        return list(texts)
    import awkward  # gigatoken's own array type

    characters = awkward.contents.NumpyArray(texts.content, parameters={"__array__": "char"})
    offsets = awkward.index.Index64(texts.offsets)
    return awkward.Array(awkward.contents.ListOffsetArray(offsets, characters, parameters={"__array__": "string"}))


def _tokenizers_encode(tokenizer: HuggingFaceTokenizer) -> Encode:
    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = tokenizer.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return _flatten([encoding.ids for encoding in encodings])

    return encode


def _sentencepiece_encode(tokenizer: SentencePieceTokenizer) -> Encode:
    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return _flatten([tokenizer.backend.encode(text) for text in texts])

    return encode


def _flatten(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    lengths = np.fromiter((len(row) for row in rows), dtype=np.int64, count=len(rows))
    ids = np.fromiter((token for row in rows for token in row), dtype=np.uint32, count=int(lengths.sum()))
    return ids, lengths
