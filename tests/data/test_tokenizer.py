"""Two kinds of tokenizer, one interface; control pieces in text are text; the fast encoder is exact or not used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer
from token_corpora import ROOT, TOY
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from k2_megatron.data import encoder as encoders
from k2_megatron.data import gigatoken_encoder
from k2_megatron.data.encoder import PROBE, first_difference, make_encoder, settings_for_workers
from k2_megatron.data.readers import documents
from k2_megatron.data.sources import find_sources
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.data.training import train_byte_level_bpe

LITERALS = "a <s> b </s> c <|endoftext|> d <unk>"


def test_the_toys_tokenizer_is_what_the_command_trains():
    texts = documents(find_sources([str(TOY / "state_of_the_union.jsonl.xz")]), "text")
    trained = train_byte_level_bpe(texts, 4096, ["<|endoftext|>"])
    assert json.loads(trained.to_str()) == json.loads((TOY / "tokenizer.json").read_text(encoding="utf-8"))


def test_toy_tokenizer(toy_tokenizer):
    tokenizer = load_tokenizer(toy_tokenizer)
    assert (tokenizer.vocab_size, tokenizer.end_of_document) == (4096, 0)
    text = "We the People, naïve — 🙂\n\t<|endoftext|> 1790"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_control_pieces_in_text_stay_text(toy_tokenizer, sentencepiece_model, hugging_face_twin):
    for path in (toy_tokenizer, sentencepiece_model, hugging_face_twin):
        tokenizer = load_tokenizer(path)
        assert tokenizer.end_of_document not in tokenizer.encode(LITERALS)
    asked = load_tokenizer(toy_tokenizer, special_pieces=True)
    assert 0 in asked.encode(LITERALS)
    assert asked.fingerprint != load_tokenizer(toy_tokenizer).fingerprint


def test_both_kinds_agree(sentencepiece_model, hugging_face_twin, speeches):
    one, other = load_tokenizer(sentencepiece_model), load_tokenizer(hugging_face_twin)
    assert one.end_of_document == other.end_of_document == 2
    for text in (*speeches, LITERALS, "  two  spaces ", "naïve 🙂"):
        assert one.encode(text) == other.encode(text)


@pytest.mark.parametrize("special_pieces", [False, True])
def test_gigatoken_is_used_and_exact_for_byte_level_bpe(toy_tokenizer, speeches, special_pieces):
    encoder = make_encoder(load_tokenizer(toy_tokenizer, special_pieces=special_pieces))
    assert encoder.name == "gigatoken"
    texts = [*speeches, *PROBE, LITERALS]
    assert first_difference(encoder.encode, encoder.reference, texts) == ""
    ids, lengths = encoder.encode(texts)
    assert (0 in ids[-lengths[-1] :]) == special_pieces


def test_gigatoken_is_exact_for_both_llama_like_kinds(sentencepiece_model, hugging_face_twin, speeches):
    ids = []
    for path in (sentencepiece_model, hugging_face_twin):
        encoder = make_encoder(load_tokenizer(path))
        assert first_difference(encoder.encode, encoder.reference, [*speeches, LITERALS]) == ""
        ids.append(encoder.encode([*speeches, LITERALS])[0])
    assert np.array_equal(*ids)


def test_a_model_with_user_defined_symbols_is_read_by_sentencepiece(tmp_path, speeches):
    """gigatoken drops the space before a symbol, which a document far behind the compared ones may be the first to
    hold. Such symbols are found in text; control pieces are text here, too."""
    symbols = ["<fim_prefix>", "foobar"]
    prefix = str(tmp_path / "tokenizer")
    sentences = [text[first : first + 200] for text in speeches for first in range(0, 2400, 200)]
    settings = {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_prefix=prefix, user_defined_symbols=symbols, **settings
    )
    tokenizer = load_tokenizer(prefix + ".model")
    encoder = make_encoder(tokenizer)
    assert (encoder.name, settings_for_workers(tokenizer)) == ("sentencepiece", None)
    assert "it has user-defined symbols, the first '<fim_prefix>'" in encoder.reason
    ids, _ = encoder.encode(["a foobar <s>"])
    assert tokenizer.piece_id("foobar") in ids and tokenizer.piece_id("<s>") not in ids
    with pytest.raises(ValueError, match=r"--encoder gigatoken: it does not take .* user-defined symbols"):
        make_encoder(tokenizer, "gigatoken")


@pytest.mark.parametrize(("kind", "mebibytes"), [("toy_tokenizer", 2), ("sentencepiece_model", 4)])
def test_gigatoken_needs_no_awkward_and_gets_much_text_where_it_keeps_no_words(request, monkeypatch, kind, mebibytes):
    other = ModuleType("awkward")
    monkeypatch.setitem(sys.modules, "awkward", other)
    encoder = make_encoder(load_tokenizer(request.getfixturevalue(kind)))
    assert (encoder.name, encoder.bytes_at_once) == ("gigatoken", mebibytes << 20)
    assert sys.modules["awkward"] is other


def test_an_encoder_that_forgets_gives_the_same_ids(toy_tokenizer, speeches, monkeypatch):
    monkeypatch.setattr(gigatoken_encoder, "LARGE_PROCESS_BYTES", 0)
    monkeypatch.setattr(gigatoken_encoder, "FEWER_WORDS_BYTES", -(1 << 40))
    encode = encoders.GigatokenEncode(load_tokenizer(toy_tokenizer))
    made = [encode._backend]
    reference = make_encoder(load_tokenizer(toy_tokenizer), "tokenizers").encode
    for text in speeches[:6]:
        assert first_difference(encode, reference, [text, text[::-1]]) == ""
        made.append(encode._backend)
    assert len({id(backend) for backend in made}) >= 3


def word_tokenizer(path: Path, speeches) -> Path:
    """A kind that gigatoken does not read."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(speeches, trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"]))
    tokenizer.save(str(path))
    return path


def test_falls_back_and_says_why(tmp_path, speeches):
    tokenizer = load_tokenizer(word_tokenizer(tmp_path / "tokenizer.json", speeches))
    encoder = make_encoder(tokenizer)
    assert encoder.name == "tokenizers"
    assert "gigatoken does not take this tokenizer" in encoder.reason
    assert "\n" not in encoder.reason, "one line, without the place in the library's source"
    ids, lengths = encoder.encode(["the Congress", ""])
    assert ids.tolist() == tokenizer.encode("the Congress")
    assert lengths.tolist() == [2, 0]
    with pytest.raises(ValueError, match="--encoder gigatoken: it does not take"):
        make_encoder(tokenizer, "gigatoken")


@pytest.mark.parametrize(
    "model",
    [
        models.WordLevel({"a": 0, "</s>": 1}, unk_token="<unk>"),
        models.WordPiece({"a": 0, "</s>": 1}, unk_token="[UNK]"),
        models.Unigram([("a", -1.0), ("</s>", -2.0)]),
    ],
    ids=lambda model: type(model).__name__,
)
def test_a_tokenizer_without_unknown_piece_is_named(tmp_path, model):
    Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    encoder = make_encoder(load_tokenizer(tmp_path), "tokenizers")
    assert encoder.encode(["a"])[0].tolist() == [0]
    with pytest.raises(
        ValueError, match=r"tokenizer\.json: a text cannot be encoded \(.*give the tokenizer's model an un"
    ):
        encoder.encode(["a b"])


def test_an_encoder_that_differs_is_not_used(toy_tokenizer, monkeypatch):
    def off_by_one(tokenizer, settings):
        exact = encoders._tokenizers_encode(tokenizer)

        def encode(texts):
            ids, lengths = exact(texts)
            return np.where(np.arange(len(ids)) == len(ids) - 1, ids + 1, ids), lengths

        return encode

    monkeypatch.setattr(encoders, "GigatokenEncode", off_by_one)
    encoder = make_encoder(load_tokenizer(toy_tokenizer))
    assert encoder.name == "tokenizers"
    assert "instead of" in encoder.reason


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "none.json", "no such tokenizer; train one with"),
        (lambda folder: folder, "holds neither tokenizer.json nor tokenizer.model"),
        (lambda folder: write(folder / "tokenizer.json", "{"), "not a tokenizer.json"),
        (lambda folder: write(folder / "tokenizer.model", "x"), "not a sentencepiece model"),
    ],
)
def test_a_tokenizer_that_cannot_be_read(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        load_tokenizer(make(tmp_path))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_end_of_document_piece_must_exist(toy_tokenizer, tmp_path):
    with pytest.raises(ValueError, match="has no piece '<eot>'"):
        load_tokenizer(toy_tokenizer, end_of_document="<eot>")
    write(tmp_path / "tokenizer_config.json", json.dumps({"eos_token": {"content": "the"}}))
    write(tmp_path / "tokenizer.json", Path(toy_tokenizer).read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.end_of_document == tokenizer.piece_id("the")


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="--vocab-size 100: bytes and special tokens alone take 257"):
        train_byte_level_bpe(["text"], 100, ["<|endoftext|>"])


@pytest.mark.parametrize("special", [[], [""], ["<a>", "<a>"]])
def test_special_pieces_that_are_none_are_refused(special):
    with pytest.raises(ValueError, match="give one or more, none of them empty or twice"):
        train_byte_level_bpe(["text"], 300, special)


def test_a_tokenizer_that_cannot_be_written_is_one_line(tmp_path, tool_environment):
    """No Python exception of the library's, no text read before, nothing left."""
    (tmp_path / "in.jsonl").write_text('{"text": "some text"}', encoding="utf-8")
    (tmp_path / "folder").mkdir()
    for size, output, says in (
        (300, "folder", f"--output {tmp_path}/folder: is a folder; name a file in it"),
        (300, "in.jsonl/x.json", f"--output {tmp_path}/in.jsonl/x.json: its folder cannot be made"),
        (10**30, "t.json", f"--vocab-size {10**30}: at most 2147483647"),
    ):
        command = [sys.executable, str(ROOT / "tools/train_tokenizer.py"), "--input", str(tmp_path / "in.jsonl")]
        command += ["--vocab-size", str(size), "--output", str(tmp_path / output)]
        done = subprocess.run(command, env=tool_environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith(f"train_tokenizer: {says}") and done.stderr.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "in.jsonl"]
