"""Long documents are encoded in slices with the ids of the whole, in every kind of vocabulary, or whole."""

import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from k2_megatron.data import long_texts
from k2_megatron.data.encoder import make_encoder
from k2_megatron.data.long_texts import Slicer, apart
from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.data.training import train_byte_level_bpe

WORDS = [
    "union",
    "State of",
    "don't",
    "naïve",
    "日本語。",
    "🙂",
    ");",
    "x=1,",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "»",
    "…",
    "42",
    "ſ",
]

# The first article of the Universal Declaration of Human Rights in scripts that put no space between words, and more.
UNSPACED = [
    "人人生而自由,在尊严和权利上一律平等。他们赋有理性和良心,并应以兄弟关系的精神相对待。",
    "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。",
    "มนุษย์ทั้งหลายเกิดมามีอิสระและเสมอภาคกันในเกียรติศักดิ์และสิทธิ",
    "🙂👍🏽👩‍🚀🇫🇷ﬁ½x=1;don'te\u0301",
]


@pytest.fixture(scope="module")
def unspaced_sentencepiece(tmp_path_factory):
    """LLaMA-like, with pieces of several Chinese, Japanese and Thai letters."""
    from sentencepiece import SentencePieceTrainer

    prefix = tmp_path_factory.mktemp("unspaced") / "model"
    settings = {"model_type": "bpe", "vocab_size": 600, "byte_fallback": True, "hard_vocab_limit": False}
    settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2}
    texts = [text[start:] for text in UNSPACED[:3] for start in range(0, len(text) - 8, 2)]
    SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=str(prefix), **settings)
    return f"{prefix}.model"


@pytest.fixture(scope="module")
def unspaced_byte_level(tmp_path_factory):
    path = tmp_path_factory.mktemp("unspaced") / "tokenizer.json"
    train_byte_level_bpe([text[start:] for text in UNSPACED for start in range(0, len(text), 3)], 500, ["</s>"]).save(
        str(path)
    )
    return str(path)


@pytest.fixture(params=["toy_tokenizer", "sentencepiece_model", "hugging_face_twin"])
def tokenizer(request):
    return load_tokenizer(request.getfixturevalue(request.param))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    monkeypatch.setattr(long_texts, "LONG_TEXT_BYTES", 400)
    monkeypatch.setattr(long_texts, "SLICE_BYTES", 150)
    monkeypatch.setattr(long_texts, "WINDOW_BYTES", 60)


def utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def slices(tokenizer, text: str, encoder: str = "auto") -> tuple[list[list[int]], list[int]]:
    encode = make_encoder(tokenizer, encoder).encode
    found = [ids.tolist() for ids in Slicer(encode, tokenizer).encode(utf8(text))]
    return found, encode([text])[0].tolist()


@pytest.mark.parametrize("seed", range(20))
def test_slices_have_the_ids_of_the_whole(tokenizer, seed):
    draw = random.Random(seed)
    text = "".join(draw.choice(WORDS) + draw.choice(["", " ", " ", "\n"]) for _ in range(600))
    found, whole = slices(tokenizer, text)
    assert [token for part in found for token in part] == whole
    assert len(found) > 5


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("kind", "encoder"),
    [
        *((kind, "auto") for kind in ("toy_tokenizer", "unspaced_sentencepiece", "unspaced_byte_level")),
        ("unspaced_sentencepiece", "sentencepiece"),
        ("unspaced_byte_level", "tokenizers"),
    ],
)
def test_text_without_spaces_is_sliced_with_the_ids_of_the_whole(request, kind, encoder, seed):
    draw = random.Random(seed)
    lines = [text[draw.randrange(len(text)) :] for text in draw.choices(UNSPACED, k=100)]
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    found, whole = slices(tokenizer, "".join(lines), encoder)
    assert [token for part in found for token in part] == whole
    assert len(found) > 2


@pytest.mark.parametrize("text", ["a" * 1000, " " * 1000, "\n" * 1000, "a  \n\n" * 300])
def test_a_text_without_a_place_to_cut_is_encoded_whole(tokenizer, text):
    found, whole = slices(tokenizer, text)
    assert found == [whole]


def test_no_cut_where_a_piece_of_the_vocabulary_reaches_over_it(tmp_path):
    """After an odd number of a the last one joins the space; the window around a cut holds an even number of them."""
    vocabulary = {"a": 0, "Ġ": 1, "aa": 2, "aĠ": 3, "</s>": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a"), ("a", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    encode = make_encoder(tokenizer, "tokenizers").encode
    text = ("a" * 301 + " ") * 20
    found = [token for ids in Slicer(encode, tokenizer).encode(utf8(text)) for token in ids.tolist()]
    assert found == encode([text])[0].tolist() == ([2] * 150 + [3]) * 20


GPT4_PATTERN = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"  # cl100k's, nearly


@pytest.mark.parametrize("between", ["", " "])
@pytest.mark.parametrize(
    ("splitter", "counts"),
    [
        (pre_tokenizers.FixedLength(5), True),
        (pre_tokenizers.Split(Regex(r"\p{L}{1,5}|\s"), "isolated"), True),
        (pre_tokenizers.Split(Regex(GPT4_PATTERN), "isolated"), False),
    ],
)
def test_no_cut_where_a_pre_tokenizer_counts(tmp_path, splitter, counts, between):
    """Words of five characters from the beginning of a text on: what stands behind a cut would be counted anew."""
    text = between.join(UNSPACED[0][:-1].replace(",", "") for _ in range(100))
    pairs = [("人", "人"), ("人", "生"), ("自", "由")]
    pieces = [*sorted(set(text)), *("".join(pair) for pair in pairs), "</s>"]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=pairs))
    backend.pre_tokenizer = splitter
    backend.save(str(tmp_path / "tokenizer.json"))
    found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), text)
    assert [token for part in found for token in part] == whole
    assert (len(found) == 1) == counts


def test_long_texts_are_taken_apart_in_order():
    texts = ["a", "b" * 500, "c", "d", "e" * 500]
    content = utf8("".join(texts))
    offsets = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    for given in (texts, Texts(content, offsets)):
        found = [run.tobytes().decode() if isinstance(run, np.ndarray) else list(run) for run in apart(given)]
        assert found == [["a"], "b" * 500, ["c", "d"], "e" * 500]
