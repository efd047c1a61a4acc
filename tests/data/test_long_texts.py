"""Long documents are encoded in slices with the ids of the whole, in every kind of vocabulary, or whole."""

import itertools
import random

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

from k2_megatron.data import byte_pair_cuts, long_texts
from k2_megatron.data.encoder import make_encoder
from k2_megatron.data.long_texts import Slicer, apart
from k2_megatron.data.texts import Texts
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.data.training import train_byte_level_bpe
from k2_megatron.data.word_patterns import ends_words_before_spaces

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
    monkeypatch.setattr(byte_pair_cuts, "BEHIND_BYTES", 120)
    monkeypatch.setattr(byte_pair_cuts, "MOST_PLACES", 24)


def utf8(text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), dtype=np.uint8)


def slices(tokenizer, text: str, encoder: str = "auto") -> tuple[list[list[int]], list[int]]:
    encode = make_encoder(tokenizer, encoder).encode
    slicer, content = Slicer(encode, tokenizer), utf8(text)
    slices = slicer.slices(content)
    assert slices is not None
    return [ids.tolist() for ids in slicer.encode(content, slices)], encode([text])[0].tolist()


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


RUNS = ["a" * 1000, "ACGT" * 300, "=-" * 500, "🙂" * 300, "é" * 600, "x1,y2;" * 200, "0" * 1000, "a  \n\n" * 300]
SPACES = [" " * 1000, "\n" * 1000]


@pytest.mark.parametrize("text", [*RUNS, *SPACES])
def test_a_run_over_which_pieces_reach_is_sliced_at_boundaries_of_its_ids(tokenizer, text):
    """But spaces where a pre-tokenizer asks what follows them all."""
    found, whole = slices(tokenizer, text)
    assert [token for part in found for token in part] == whole
    assert (len(found) == 1) == (text in SPACES and tokenizer.pre_tokenizer is not None)


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
ALPHABETS = [
    "ab",
    "ACGT",
    "0123456789",
    "a1",
    "'stell",
    "日本語人",
    "🙂👍🏽🚀",
    "<0x>41",
    "é\u0301e",
    "-=.",
    "ab日🙂 ",
    "中B国c",
]


def split_by(pattern: str) -> pre_tokenizers.PreTokenizer:
    whole_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole_words])


def vocabulary_of_any_merges(draw: random.Random, alphabet: str, kind: str) -> Tokenizer:
    """Merges in any order, of which none was learnt: what is merged late may be first in rank."""
    byte_level = kind not in ("bytes", "unknown", "fused")
    symbols = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(alphabet)[0][0]
    pool = list(dict.fromkeys(symbols if byte_level else alphabet))
    unknown = pool.pop() if not byte_level and len(pool) > 2 else ""
    base = sorted({*pre_tokenizers.ByteLevel.alphabet()} if byte_level else pool)
    pieces = [*base, "<unk>", "</s>", "><", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges: list[tuple[str, str]] = []
    for _ in range(draw.choice([5, 40, 200])):
        pair = (draw.choice(pool), draw.choice(pool))
        if len("".join(pair)) <= draw.choice([4, 40]) and pair not in merges:
            merges.append(pair)
            pool.append("".join(pair))
    draw.shuffle(merges)
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, *pool, unknown + "?"]))}
    settings = (
        {} if byte_level else {"unk_token": "<unk>", "fuse_unk": kind == "fused", "byte_fallback": kind == "bytes"}
    )
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind == "whole words", **settings))
    if byte_level:
        digits = {"digits": "{1,3}", "whole words": ""}.get(kind, "+")
        backend.pre_tokenizer = GPT2 if kind == "gpt2" else split_by(LLAMA3.replace("{1,3}", digits))
        backend.normalizer = normalizers.NFC()
    return backend


@pytest.mark.parametrize("kind", ["gpt2", "digits", "numbers", "whole words", "bytes", "unknown", "fused"])
def test_slices_at_boundaries_have_the_ids_of_the_whole_whatever_is_merged(tmp_path, monkeypatch, kind):
    """Texts of one letter, periods, runs, and all mixed; also where little behind a slice is seen."""
    sliced = 0
    for seed, alphabet in itertools.product(range(4), ALPHABETS):
        draw = random.Random(f"{kind} {seed} {alphabet}")
        monkeypatch.setattr(byte_pair_cuts, "BEHIND_BYTES", draw.choice([8, 120]))
        vocabulary_of_any_merges(draw, alphabet, kind).save(str(tmp_path / "tokenizer.json"))
        period = "".join(draw.choices(alphabet, k=draw.randrange(1, 9)))
        text = draw.choice(
            [
                period * (900 // len(period)),
                "".join(draw.choice(alphabet) * draw.randrange(1, 200) for _ in range(9)),
                "".join(draw.choices(alphabet, k=900)),
            ]
        )
        found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), text, "tokenizers")
        assert [token for part in found for token in part] == whole, (seed, alphabet)
        sliced += len(found) > 1
    assert sliced > 24


@pytest.mark.parametrize("kind", ["gpt2", "digits", "numbers", "whole words"])
def test_tables_are_sliced_before_white_space_with_the_ids_of_the_whole(tmp_path, kind):
    """Cells between runs of white space, also longer than what is looked at around a cut; white space, digits or
    symbols are merged in any order."""
    sliced = 0
    for seed, (cells, spaces) in itertools.product(range(4), itertools.product(CELLS, GAPS)):
        draw = random.Random(f"{kind} {seed} {cells} {spaces}")
        backend = vocabulary_of_any_merges(draw, draw.choice([" \t\r\n", "0123456789", "|-.\n"]), kind)
        if draw.random() < 0.3:
            digits = pre_tokenizers.Digits(individual_digits=draw.random() < 0.5)
            backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
        backend.save(str(tmp_path / "tokenizer.json"))
        longest = draw.choice([1, 3, 150])
        text = "".join(
            "".join(
                draw.choices(cells, k=draw.randrange(1, 7)) + draw.choices(spaces, k=draw.randrange(1, longest + 1))
            )
            for _ in range(1800 // (longest + 6))
        )
        found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), text, "tokenizers")
        assert [token for part in found for token in part] == whole, (seed, cells, spaces)
        sliced += len(found) > 1
    assert sliced > 60


CELLS = ["0123456789", "1", "|-", "1|.", "aé\u0301b", "\u0967\u0968", "\u00a0\u200b1"]
GAPS = [" ", "\t", "\r\n", " \t\n", "\n\u3000\u0085"]


@pytest.mark.parametrize("words", [GPT2, split_by(LLAMA3)])
@pytest.mark.parametrize(
    "text", ["12345\t678\r\n" * 99, "   12345      67" * 99, "1\t\t" * 300, "1\n\n" * 300, "|      " * 99]
)
def test_tables_of_integers_are_sliced(toy_tokenizer, tmp_path, words, text):
    backend = Tokenizer.from_file(toy_tokenizer)
    backend.pre_tokenizer = words
    backend.save(str(tmp_path / "tokenizer.json"))
    found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), text)
    assert [token for part in found for token in part] == whole
    assert len(found) > 2


@pytest.mark.parametrize(
    "text",
    [
        ("|\n" + " " * 200 + "\n") * 9,  # behind a symbol: newlines may belong to it
        ("\n " + "\u3000" * 30 + " " + "\u3000" * 30) * 9 + "\n",  # between white space that is not ASCII
    ],
)
def test_no_cut_beside_white_space_that_may_belong_to_a_word_across_it(tmp_path, text):
    """With the cut a word would end or begin elsewhere, far from what is looked at around it."""
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĠ", "</s>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ċ", "Ġ")]))
    backend.pre_tokenizer = split_by(LLAMA3)
    backend.save(str(tmp_path / "tokenizer.json"))
    found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), text, "tokenizers")
    assert [token for part in found for token in part] == whole


O200K = LLAMA3.replace(r"\p{L}+", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+", 1)


@pytest.mark.parametrize(
    ("model", "words", "expected"),
    [
        (models.BPE({"a": 0, "</s>": 1}, []), None, True),
        (models.BPE({"a": 0, "</s>": 1}, []), GPT2, True),
        (models.BPE({"a": 0, "</s>": 1}, []), split_by(LLAMA3), True),
        (models.BPE({"a": 0, "</s>": 1}, []), split_by(O200K), False),
        (models.BPE({"a": 0, "</s>": 1}, []), split_by(r"https?://\S+|" + LLAMA3), False),
        (models.BPE({"a": 0, "</s>": 1}, []), pre_tokenizers.FixedLength(5), False),
        (models.BPE({"a": 0, "</s>": 1}, [], dropout=0.1), None, False),
        (models.BPE({"a": 0, "</s>": 1}, [], end_of_word_suffix="</w>"), None, False),
        (models.BPE({"a": 0, "</s>": 1}, [], continuing_subword_prefix="##"), None, False),
        (models.Unigram([("a", 0.0), ("</s>", 0.0)], 0), None, False),
    ],
)
def test_boundaries_are_looked_for_where_pairs_are_merged_in_words_that_are_known(tmp_path, model, words, expected):
    backend = Tokenizer(model)
    if words is not None:
        backend.pre_tokenizer = words
    backend.save(str(tmp_path / "tokenizer.json"))
    assert byte_pair_cuts.has_seams(load_tokenizer(tmp_path / "tokenizer.json")) == expected


@pytest.mark.parametrize(
    ("splitter", "expected"),
    [
        (None, False),
        (GPT2, True),
        (split_by(LLAMA3), True),
        (split_by(O200K), False),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(), GPT2]), True),
        (pre_tokenizers.Digits(), False),
        (pre_tokenizers.Metaspace(), False),
        (pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), GPT2]), False),  # to which spaces are letters
        (pre_tokenizers.ByteLevel(use_regex=False), False),
    ],
)
def test_words_are_known_to_end_before_white_space_where_a_known_pattern_splits_the_text(tmp_path, splitter, expected):
    backend = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    if splitter is not None:
        backend.pre_tokenizer = splitter
    backend.save(str(tmp_path / "tokenizer.json"))
    assert ends_words_before_spaces(load_tokenizer(tmp_path / "tokenizer.json").pre_tokenizer) == expected


@pytest.mark.parametrize("kind", ["bpe", "unigram", "word", "char"])
def test_of_sentencepieces_models_byte_pair_encoding_alone_has_such_boundaries(tmp_path, kind):
    from sentencepiece import SentencePieceTrainer

    settings = {"model_type": kind, "vocab_size": 14, "hard_vocab_limit": False, "minloglevel": 2}
    settings |= {"use_all_vocab": True} if kind in ("word", "char") else {}
    lines = ["abcabc cab bc a abc"] * 9
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_prefix=str(tmp_path / "model"), **settings)
    assert byte_pair_cuts.has_seams(load_tokenizer(tmp_path / "model.model")) == (kind == "bpe")


def test_a_sentencepiece_model_that_does_not_tell_of_its_training_is_unigram(tmp_path):
    """As sentencepiece itself takes it."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([8 * number + 2, len(content)]) + content

    pieces = [field(1, b"<unk>") + b"\x18\x02", field(1, b"</s>") + b"\x18\x03", *(field(1, x) for x in (b"a", b"ab"))]
    (tmp_path / "x.model").write_bytes(b"".join(field(1, piece) for piece in pieces))
    tokenizer = load_tokenizer(tmp_path / "x.model")
    assert tokenizer.vocab_size == 4
    assert not byte_pair_cuts.has_seams(tokenizer)


def test_a_run_of_unknown_letters_is_one_id_over_all_its_slices(tmp_path):
    """Without byte fallback sentencepiece makes one of them, behind the space that it puts before every slice."""
    from sentencepiece import SentencePieceTrainer

    settings = {"model_type": "bpe", "vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abcabc cab"] * 9), model_prefix=str(tmp_path / "model"), **settings
    )
    tokenizer = load_tokenizer(tmp_path / "model.model")
    for text in ("国" * 600, "abc" * 200 + "国" * 600 + "cab" * 200):
        found, whole = slices(tokenizer, text, "sentencepiece")
        assert [token for part in found for token in part] == whole
        assert whole.count(tokenizer.backend.unk_id()) == 1
        assert len(found) > 5


def test_a_boundary_that_what_follows_does_not_bear_out_is_none(tmp_path, monkeypatch):
    """Pairs that are merged from the end of the text on: where a slice ends decides over the ids far before it."""
    letters = [chr(0x4E00 + number) for number in range(60)]
    merges = [*itertools.pairwise(letters), (letters[-1], letters[0])][::-1]
    pieces = [*letters, *map("".join, merges), "</s>"]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    backend.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(byte_pair_cuts, "BEHIND_BYTES", 30)
    held = []
    begin_with = Slicer._begin_with
    monkeypatch.setattr(Slicer, "_begin_with", lambda *call: held.append(begin_with(*call)) or held[-1])
    found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), "".join(letters) * 9 + letters[0], "tokenizers")
    assert [token for part in found for token in part] == whole
    assert False in held


def test_no_slice_begins_among_digits_that_are_counted(tmp_path):
    """Of zeros alone nobody sees in which three a slice begins; of what follows them it shows."""
    merges = [("1", "2"), ("12", "3")]
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "123", "</s>"]
    backend = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=merges))
    for pattern, many in ((LLAMA3, False), (LLAMA3.replace("{1,3}", "+"), True)):
        backend.pre_tokenizer = split_by(pattern)
        backend.save(str(tmp_path / "tokenizer.json"))
        found, whole = slices(load_tokenizer(tmp_path / "tokenizer.json"), "x" + "0" * 600 + "123" * 40, "tokenizers")
        assert [token for part in found for token in part] == whole
        assert (len(found) > 2) == many


def test_a_text_that_stays_whole_for_too_long_has_no_slices(toy_tokenizer):
    tokenizer = load_tokenizer(toy_tokenizer)
    slicer = Slicer(make_encoder(tokenizer).encode, tokenizer, 1000)
    assert slicer.slices(utf8("word " * 150 + "\n" * 1000)) is None
    assert slicer.slices(utf8("word " * 150 + "\n" * 700 + " word" * 150)) is not None


def test_no_cut_where_a_piece_of_the_vocabulary_reaches_over_it(tmp_path):
    """After an odd number of a the last one joins the space; the window around a cut holds an even number of them."""
    vocabulary = {"a": 0, "Ġ": 1, "aa": 2, "aĠ": 3, "</s>": 4}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "a"), ("a", "Ġ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")
    found, whole = slices(tokenizer, ("a" * 301 + " ") * 20, "tokenizers")
    assert [token for part in found for token in part] == whole == ([2] * 150 + [3]) * 20


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
