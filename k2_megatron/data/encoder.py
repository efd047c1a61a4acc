"""Batches of texts to ids: gigatoken where it agrees with the tokenizer's own library, else that library.

In: a loaded tokenizer. Out: an `Encoder` whose `encode(texts)` gives one flat array of ids and the length of each text.
gigatoken is 10-20 times faster; it is used only after it gave the same ids on a probe that holds every added piece of
the tokenizer, and every worker compares it again on the first documents it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from k2_megatron.data.gigatoken_encoder import FEW_BYTES, GigatokenEncode, gigatoken_settings, release_freed_memory
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

ENCODERS = ("auto", "gigatoken", "tokenizers", "sentencepiece")
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


@dataclass(frozen=True)
class Encoder:
    """`encode(texts)` -> (ids [sum of lengths], lengths int64 [texts]); `name`, `reason`: which library and why."""

    name: str
    reason: str
    encode: Encode
    reference: Encode
    make_room: Callable[[], None] = release_freed_memory  # before something large is held in memory
    bytes_at_once: int = FEW_BYTES  # of text that are best given to a call


def make_encoder(
    tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, requested: str = "auto", settings: str | None = None
) -> Encoder:
    """The fastest exact encoder for `tokenizer`, or the one asked for. ValueError where it cannot be had. `settings`:
    gigatoken's, where they are at hand."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        own, reference = "sentencepiece", _sentencepiece_encode(tokenizer)
    else:
        own, reference = "tokenizers", _tokenizers_encode(tokenizer)
    if requested not in ("auto", "gigatoken", own):
        raise ValueError(f"--encoder {requested}: {tokenizer.path} is read by {own}; ask for auto, gigatoken or {own}")
    if requested == own:
        return Encoder(own, "asked for", reference, reference)
    try:
        fast = GigatokenEncode(tokenizer, settings)
        problem = first_difference(fast, reference, (*PROBE, *_added_pieces(tokenizer)))
    except Exception as error:  # a Rust panic arrives as a bare exception type of its own
        problem = f"{type(error).__name__}: {error}".splitlines()[0]  # Rust's go on with where it is in its source
    if not problem:
        return Encoder("gigatoken", f"gives the same ids as {own}", fast, reference, fast.forget, fast.bytes_at_once)
    if requested == "gigatoken":
        raise ValueError(f"--encoder gigatoken: it does not take {tokenizer.path} ({problem}); ask for auto or {own}")
    return Encoder(own, f"gigatoken does not take this tokenizer ({problem})", reference, reference)


def settings_for_workers(
    tokenizer: HuggingFaceTokenizer | SentencePieceTokenizer, requested: str = "auto"
) -> str | None:
    """gigatoken's settings, to be made once for all workers; None where make_encoder shall say what is wrong."""
    if requested not in ("auto", "gigatoken"):
        return None
    try:
        return gigatoken_settings(tokenizer)
    except Exception:
        return None


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


def _tokenizers_encode(tokenizer: HuggingFaceTokenizer) -> Encode:
    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        try:
            encodings = tokenizer.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # a bare one: a word that the vocabulary lacks
            raise ValueError(
                f"{tokenizer.path}: a text cannot be encoded ({error}); give the tokenizer's model an unknown piece "
                "(unk_token, of Unigram unk_id) that its vocabulary has, or take another tokenizer"
            ) from error
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
