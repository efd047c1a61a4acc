"""Small real text, two kinds of tokenizer over the same pieces, and token files made of them."""

from __future__ import annotations

import json
import lzma
import os
from pathlib import Path

import pytest
from token_corpora import ROOT, TOY, tokenize


@pytest.fixture(scope="session")
def toy_tokenizer() -> str:
    return str(TOY / "tokenizer.json")


@pytest.fixture(scope="session")
def speeches() -> list[str]:
    """40 pieces of about 3,000 characters, of 40 different speeches."""
    with lzma.open(TOY / "state_of_the_union.jsonl.xz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    return [text[100 : 2600 + 20 * number] for number, text in enumerate(texts[::5])][:40]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory, speeches) -> str:
    """A LLaMA-like model: BPE with byte fallback and the control pieces <s> and </s>."""
    import sentencepiece

    prefix = str(tmp_path_factory.mktemp("spm") / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(speeches),
        model_prefix=prefix,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        max_sentence_length=1 << 20,
        minloglevel=2,
    )
    return prefix + ".model"


@pytest.fixture(scope="session")
def hugging_face_twin(sentencepiece_model) -> str:
    """The same pieces as a tokenizer.json."""
    from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

    path = Path(sentencepiece_model).with_name("tokenizer.json")
    content = sentencepiece_to_tokenizer_json(Path(sentencepiece_model).read_bytes())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


@pytest.fixture(scope="session")
def token_prefix(tmp_path_factory, speeches, toy_tokenizer) -> str:
    return tokenize(speeches, tmp_path_factory.mktemp("tokens"), toy_tokenizer)


@pytest.fixture(scope="session")
def tool_environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "RAYON_NUM_THREADS": "1"}
