"""Tokenizers by file: a Hugging Face `tokenizer.json` (or its folder) and a sentencepiece `.model`, one interface.

In: a path. Out: a `Tokenizer` with encode, decode, vocabulary size, the end-of-document id and a fingerprint.
Text is only ever text: a document that contains the characters `<s>` gets the pieces of `<`, `s`, `>`, never the
control id, in both kinds (Hugging Face's default would give the id; sentencepiece would not).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

TRAINER_SPEC, MODEL_TYPE, BPE_TYPE = (
    2,
    3,
    2,
)  # sentencepiece_model.proto: fields of a model and of its training, a value

# The piece that ends a document, in the order they are looked for when the tokenizer's own files do not name it.
END_OF_DOCUMENT_PIECES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|eot|>", "<eod>", "<eos>")


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    path: Path
    vocab_size: int  # largest id + 1, added pieces included
    end_of_document: int
    fingerprint: str  # changes with anything that changes ids

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def piece_id(self, piece: str) -> int | None: ...

    def pieces(self) -> Iterable[str]: ...


class HuggingFaceTokenizer:
    """A `tokenizer.json`, through the `tokenizers` library. `special_pieces` True lets control pieces match in text."""

    def __init__(self, path: Path, end_of_document: str | None = None, special_pieces: bool = False):
        from tokenizers import Tokenizer as Backend

        self.path = path
        content = path.read_bytes()
        try:
            self.backend = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path}: not a tokenizer.json that the tokenizers library reads ({error})") from error
        self.backend.no_truncation()
        self.backend.no_padding()
        self.backend.encode_special_tokens = not special_pieces
        self.special_pieces = special_pieces
        self.vocab_size = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        self.end_of_document = _end_of_document(self, end_of_document or _configured_end(path))
        self.fingerprint = _fingerprint("hf", content, special_pieces, self.end_of_document)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=False)

    def piece_id(self, piece: str) -> int | None:
        return self.backend.token_to_id(piece)

    def pieces(self) -> Iterable[str]:
        return self.backend.get_vocab(with_added_tokens=True)

    def piece_at(self, token: int) -> str:
        piece = self.backend.id_to_token(token)
        assert piece is not None, f"{self.path} has no piece {token}, which it gave itself"
        return piece

    @cached_property
    def pre_tokenizer(self) -> dict[str, Any] | None:
        """The settings of what splits text before the pieces of each part are looked for."""
        if self.backend.pre_tokenizer is None:
            return None
        return json.loads(self.backend.pre_tokenizer.__getstate__())  # to_str writes all pieces too

    @property
    def merges_pairs(self) -> bool:
        """Whether ids come of merging pairs by their rank and order alone."""
        from tokenizers.models import BPE

        model: Any = self.backend.model
        plain = isinstance(model, BPE) and not model.dropout
        return plain and not model.continuing_subword_prefix and not model.end_of_word_suffix


class SentencePieceTokenizer:
    """A sentencepiece `.model`."""

    def __init__(self, path: Path, end_of_document: str | None = None, special_pieces: bool = False):
        from sentencepiece import SentencePieceProcessor

        if special_pieces:
            raise ValueError(f"{path}: sentencepiece never matches control pieces in text; use a tokenizer.json for it")
        self.path = path
        content = path.read_bytes()
        try:
            self.backend = SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise ValueError(f"{path}: not a sentencepiece model ({error})") from error
        self.special_pieces = False
        self.vocab_size = self.backend.get_piece_size()
        configured = self.backend.eos_id()
        if end_of_document is None and configured >= 0:
            end_of_document = self.backend.id_to_piece(configured)
        self.end_of_document = _end_of_document(self, end_of_document)
        self.fingerprint = _fingerprint("spm", content, special_pieces, self.end_of_document)

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode([int(token) for token in ids])

    def piece_id(self, piece: str) -> int | None:
        token = self.backend.piece_to_id(piece)
        return None if token == self.backend.unk_id() and piece != self.backend.id_to_piece(token) else token

    def pieces(self) -> Iterable[str]:
        return map(self.backend.id_to_piece, range(self.vocab_size))

    def piece_at(self, token: int) -> str:
        return self.backend.id_to_piece(token)

    pre_tokenizer = None

    @property
    def merges_pairs(self) -> bool:
        """Whether ids come of merging pairs by their rank and order alone."""
        settings = dict(_protobuf(dict(_protobuf(self.path.read_bytes())).get(TRAINER_SPEC, b"")))
        is_pairs = settings.get(MODEL_TYPE) == BPE_TYPE
        return is_pairs and not any(map(self.backend.is_unused, range(self.vocab_size)))


def _protobuf(message: bytes) -> Iterator[tuple[int, Any]]:
    """The numbers and values of a message's fields."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = message[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        field, kind = divmod(number(), 8)
        if kind == 0:
            yield field, number()
            continue
        size = {1: 8, 5: 4}.get(kind) or number()
        yield field, message[at : at + size]
        at += size


def load_tokenizer(
    path: str | Path, *, end_of_document: str | None = None, special_pieces: bool = False
) -> HuggingFaceTokenizer | SentencePieceTokenizer:
    """Open a `tokenizer.json`, a folder that holds one (or a `tokenizer.model`), or a sentencepiece `.model`.

    `end_of_document` names the piece that ends a document where the files do not. ValueError where nothing fits.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).is_file()]
        if not found:
            raise ValueError(f"{path}: holds neither tokenizer.json nor tokenizer.model; name the tokenizer's file")
        path = found[0]
    if not path.is_file():
        raise ValueError(f"{path}: no such tokenizer; train one with tools/train_tokenizer.py or correct the path")
    kind = SentencePieceTokenizer if path.suffix == ".model" else HuggingFaceTokenizer
    return kind(path, end_of_document, special_pieces)


def made_by(record: dict[str, Any], tokenizer: Tokenizer) -> bool:
    """Whether a manifest's record of its tokenizer is of this one's file. Which piece ended a document, and whether
    special pieces were looked for in the text, may differ: the pieces have the same ids."""
    kind = "spm" if isinstance(tokenizer, SentencePieceTokenizer) else "hf"
    content = tokenizer.path.read_bytes()
    return record["fingerprint"] in [
        _fingerprint(kind, content, special_pieces, record["end_of_document"]) for special_pieces in (False, True)
    ]


def _end_of_document(tokenizer: Tokenizer, piece: str | None) -> int:
    for candidate in [piece] if piece else END_OF_DOCUMENT_PIECES:
        token = tokenizer.piece_id(candidate)
        if token is not None:
            return token
    asked = f"has no piece {piece!r}" if piece else f"has none of {', '.join(END_OF_DOCUMENT_PIECES)}"
    raise ValueError(f"{tokenizer.path}: {asked}; name the piece that ends a document (--eod-token)")


def _configured_end(path: Path) -> str | None:
    """`eos_token` of the `tokenizer_config.json` beside the tokenizer, where there is one."""
    config = path.with_name("tokenizer_config.json")
    if not config.is_file():
        return None
    piece = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    return piece.get("content") if isinstance(piece, dict) else piece


def _fingerprint(kind: str, content: bytes, special_pieces: bool, end_of_document: int) -> str:
    digest = hashlib.blake2b(content, digest_size=16)
    digest.update(f"{kind} {special_pieces} {end_of_document}".encode())
    return digest.hexdigest()
