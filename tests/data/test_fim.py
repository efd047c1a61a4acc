"""Fill-in-the-middle: whole documents reordered at the asked rates, decided by hash, invertible."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from token_corpora import tokenize

from k2_megatron.data.build import build_plans
from k2_megatron.data.fim import FimRates, Segment, reorder
from k2_megatron.data.open_feed import open_feed
from k2_megatron.data.plan import Plan
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.store import write_sealed
from k2_megatron.data.tokenizer import load_tokenizer
from k2_megatron.data.training import train_byte_level_bpe

PREFIX, MIDDLE, SUFFIX = 901, 902, 903


def undo(tokens: np.ndarray) -> list[int]:
    """The text of one reordered document."""
    text = tokens.tolist()
    if text[0] != PREFIX:
        return text
    if text[1] == SUFFIX:  # SPM
        middle = text.index(MIDDLE)
        suffix, prefix_and_middle = text[2:middle], text[middle + 1 :]
        return prefix_and_middle + suffix
    suffix, middle = text.index(SUFFIX), text.index(MIDDLE)
    return text[1:suffix] + text[middle + 1 :] + text[suffix + 1 : middle]


@pytest.mark.parametrize(("psm", "spm"), [(1.0, 0.0), (0.0, 1.0), (0.4, 0.3), (0.0, 0.0)])
def test_documents_are_reordered_at_their_rates_and_lose_nothing(psm, spm):
    rates = FimRates(psm, spm, PREFIX, MIDDLE, SUFFIX)
    counts = {"plain": 0, "psm": 0, "spm": 0}
    for document in range(1000):
        text = np.arange(20, dtype=np.uint16) + document % 5
        row = np.concatenate([text, np.zeros(3, np.uint16)])  # room for the three pieces, and the end
        changed = reorder(row, [Segment(document, 100 * document, 0, 20, False)], rates, key=5)
        kind = "plain" if changed[0] != PREFIX else "spm" if changed[1] == SUFFIX else "psm"
        counts[kind] += 1
        assert undo(changed[: 20 if kind == "plain" else 23]) == text.tolist()
    no_prefix = 1 - (20 / 21) ** 2  # of the two cuts, one falls before the first token: PSM then looks like SPM
    for kind, rate in (("psm", psm * (1 - no_prefix)), ("spm", spm + psm * no_prefix)):
        assert abs(counts[kind] - 1000 * rate) <= 4 * (1000 * rate * (1 - rate)) ** 0.5


def test_an_ending_document_keeps_its_end_and_a_row_its_length():
    rates = FimRates(1.0, 0.0, PREFIX, MIDDLE, SUFFIX)
    row = np.array([*range(1, 20), 0, *range(50, 70)], dtype=np.uint16)
    segments = [Segment(0, 0, 0, 20, True), Segment(1, 20, 20, 40, False)]
    changed = reorder(row, segments, rates, key=1)
    assert len(changed) == len(row)
    assert changed.dtype == row.dtype
    assert changed[22] == 0, "the end of the first document moved"
    assert undo(changed[:22]) == list(range(1, 20))
    assert changed[23] == PREFIX


def test_short_parts_stay_as_they_are():
    rates = FimRates(1.0, 0.0, PREFIX, MIDDLE, SUFFIX)
    row = np.arange(7, dtype=np.uint16)
    assert np.array_equal(reorder(row, [Segment(0, 0, 0, 7, False)], rates, key=1), row)


@pytest.mark.parametrize("kind", ["toy_tokenizer", "sentencepiece_model"])
def test_cuts_between_characters_keep_the_text_and_fall_inside_tokens(request, speeches, kind):
    """PSM of whole documents: the texts of the parts join to the document's, each part is its own text's tokens, and
    many a cut lies where no token of the document ends."""
    tokenizer = load_tokenizer(request.getfixturevalue(kind))
    prefix, middle, suffix = (tokenizer.vocab_size + mark for mark in range(3))
    rates = FimRates(1.0, 0.0, prefix, middle, suffix, tokenizer=tokenizer)
    inside = 0
    for number, text in enumerate(speeches):
        ids = tokenizer.encode(text[:300] + " naïve 🙂 日本語")
        row = np.array([*ids, *[0] * 40], dtype=np.int32)  # room for what the cuts add
        segments = [Segment(number, 7 * number, 0, len(ids), False)]
        changed = reorder(row, segments, rates, key=3).tolist()
        assert changed == reorder(row, segments, rates, key=3).tolist()
        ends = changed.index(suffix), changed.index(middle)
        before, between, after = changed[1 : ends[0]], changed[ends[1] + 1 :], changed[ends[0] + 1 : ends[1]]
        texts = [tokenizer.decode(part) for part in (before, between, after)]
        assert "".join(texts) == tokenizer.decode(ids)
        assert [before, between, after] == [tokenizer.encode(part) for part in texts]
        inside += before != ids[: len(before)]
    assert inside > len(speeches) / 3


def test_a_character_that_the_row_cuts_is_left_to_the_token_cut(toy_tokenizer):
    tokenizer = load_tokenizer(toy_tokenizer)
    ids = tokenizer.encode("日本語 " * 8)[1:]  # begins within a character
    assert "\ufffd" in tokenizer.decode(ids)
    row = np.array([*ids, 0, 0, 0])
    plain, by_character = (
        reorder(row, [Segment(0, 5, 0, len(ids), False)], FimRates(1.0, 0.0, 5001, 5002, 5003, chosen), key=1)
        for chosen in (None, tokenizer)
    )
    assert np.array_equal(plain, by_character)


@pytest.fixture(scope="module")
def character_plan(tmp_path_factory, code_plan, speeches):
    """The plan of `code_plan` with cuts between characters."""
    folder, tokenizer = tmp_path_factory.mktemp("characters"), code_plan[1]
    recipe = Plan(code_plan[0]).content["recipe"]
    recipe = Recipe.model_validate_json(json.dumps({**recipe, "fim": {**recipe["fim"], "cut": "characters"}}))
    build_plans(recipe, folder / "train", None)
    return folder / "train", tokenizer


def test_a_plan_may_ask_for_cuts_between_characters(code_plan, character_plan):
    """The same documents are reordered, the rows have the same length, and repeats are alike."""
    feeds = [open_feed(plan[0], sequence_length=64, seed=0, vocab_size=500) for plan in (code_plan, character_plan)]
    pieces = {code_plan[1].piece_id(f"<fim_{name}>") for name in ("prefix", "middle", "suffix")}
    by_token, by_character = (feed.tokens(0, feed.rows) for feed in feeds)
    marked = [[bool(pieces & set(row)) for row in rows.tolist()] for rows in (by_token, by_character)]
    assert sum(one != other for one, other in zip(*marked, strict=True)) <= 2  # a mark past the row's end
    assert (by_token != by_character).any(axis=1).sum() > sum(marked[0]) / 2
    assert np.array_equal(by_character, feeds[1].tokens(0, feeds[1].rows))


def test_a_tokenizer_that_does_not_decode_its_own_ids_cuts_between_tokens_only(tmp_path, token_prefix, code_plan):
    settings = json.loads(code_plan[1].path.read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**settings, "decoder": None}), encoding="utf-8")
    sources = {"code": {"tokens": (token_prefix,), "repeats": 1.0, "fim_psm": 0.5}}
    fim = {"tokenizer": str(tmp_path / "tokenizer.json"), "cut": "characters"}
    recipe = {"sequence_length": 16, "chunks": 1, "seed": 3, "fim": fim, "sources": sources}
    with pytest.raises(ValueError, match=r"fim\.cut = \"characters\": .* does not decode its own ids to the text"):
        build_plans(Recipe.model_validate(recipe), tmp_path / "train", None)


def test_another_tokenizer_than_the_plans_is_refused(tmp_path, character_plan, toy_tokenizer):
    folder = tmp_path / "train"
    shutil.copytree(character_plan[0], folder)
    locations = json.loads((folder / "locations.json").read_text(encoding="utf-8"))
    where = [os.path.relpath(character_plan[0] / path, folder) for path in locations["manifests"]]
    for tokenizer, message in ((toy_tokenizer, "not the tokenizer that"), ("nowhere", "no such tokenizer")):
        moved = {"manifests": where, "fim_tokenizer": os.path.relpath(tokenizer, folder)}
        (folder / "locations.json").write_text(json.dumps(moved), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            open_feed(folder, sequence_length=64, seed=0, vocab_size=500)


@pytest.fixture(scope="module")
def code_plan(tmp_path_factory, speeches):
    folder = tmp_path_factory.mktemp("fim")
    pieces = ["<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]
    tokenizer = str(folder / "tokenizer.json")
    train_byte_level_bpe(speeches, 500, pieces).save(tokenizer)
    prefix = tokenize([text[:300] for text in speeches], folder, tokenizer)
    recipe = Recipe.model_validate(
        {
            "sequence_length": 64,
            "chunks": 2,
            "seed": 3,
            "fim": {"tokenizer": tokenizer},
            "sources": {
                "code": {"tokens": (prefix,), "repeats": 2.0, "fim_psm": 0.3, "fim_spm": 0.3},
                "text": {"tokens": (prefix,), "repeats": 1.0},
            },
        }
    )
    build_plans(recipe, folder / "train", None)
    return folder / "train", load_tokenizer(tokenizer)


def test_a_plan_reorders_the_sources_it_names(code_plan):
    folder, tokenizer = code_plan
    feed = open_feed(folder, sequence_length=64, seed=0, vocab_size=500)
    pieces = {tokenizer.piece_id(f"<fim_{name}>") for name in ("prefix", "middle", "suffix")}
    by_row: dict[tuple, list] = {}
    marked = {"code": 0, "text": 0}
    for sample in range(feed.rows):
        row = feed.tokens(sample, 1)[0]
        spans = feed.describe(sample)
        marked[spans[0].source] += bool(pieces & set(row.tolist()))
        by_row.setdefault((spans[0].source, spans[0].first_token), []).append(row)
    assert marked["text"] == 0
    assert marked["code"] > 0.5 * feed.rows * 2 / 3
    copies = [rows for (source, _), rows in by_row.items() if source == "code"]
    assert sum(len(rows) == 2 for rows in copies) >= len(copies) - 1  # the last row of an odd number is left out
    assert all(np.array_equal(rows[0], rows[-1]) for rows in copies), "a repeat was reordered otherwise"


def test_pieces_beyond_two_bytes_are_not_cut(code_plan, tmp_path):
    """Over files of uint16, which another tool may have written for a vocabulary that outgrew it."""
    shutil.copytree(code_plan[0], tmp_path / "train")
    content = json.loads((tmp_path / "train/plan.json").read_text(encoding="utf-8"))
    high = {name: token + (1 << 17) for name, token in content["fim"].items()}
    write_sealed(tmp_path / "train/plan.json", {**content, "fim": high})
    where = {"manifests": [str(path) for path in Plan(code_plan[0]).manifest_paths()]}
    (tmp_path / "train/locations.json").write_text(json.dumps(where), encoding="utf-8")
    shape = {"sequence_length": 64, "seed": 0, "vocab_size": 1 << 18}
    rows, expected = (open_feed(folder, **shape).tokens(0, 40) for folder in (tmp_path / "train", code_plan[0]))
    assert (rows >= 1 << 17).any()
    assert np.array_equal(rows % (1 << 17), expected)


def test_a_model_without_room_for_the_pieces_is_refused(code_plan):
    with pytest.raises(ValueError, match=r"model\.vocab_size is 300"):
        open_feed(code_plan[0], sequence_length=64, seed=0, vocab_size=300)


def test_a_tokenizer_without_the_pieces_is_refused(tmp_path, toy_tokenizer, token_prefix):
    recipe = Recipe.model_validate(
        {
            "sequence_length": 16,
            "chunks": 1,
            "seed": 3,
            "fim": {"tokenizer": toy_tokenizer},
            "sources": {"code": {"tokens": (token_prefix,), "repeats": 1.0, "fim_psm": 0.5}},
        }
    )
    with pytest.raises(ValueError, match="has no piece '<fim_prefix>'"):
        build_plans(recipe, tmp_path / "train", None)


@pytest.mark.parametrize("made_with", ["another", "the same", "special pieces", "another end"])
def test_the_pieces_must_be_those_of_the_tokens(tmp_path, code_plan, speeches, made_with):
    """A tokenizer of other texts has pieces of these names too, but its ids are not the tokens'; how the tokens' own
    tokenizer was told to end documents and to treat special pieces does not matter."""
    own, tokenizer = str(code_plan[1].path), str(tmp_path / "tokenizer.json")
    train_byte_level_bpe(speeches[::-3], 450, ["<fim_suffix>", "<fim_prefix>", "<|endoftext|>", "<fim_middle>"]).save(
        tokenizer
    )
    options = {"special pieces": {"special_pieces": True}, "another end": {"end_of_document_piece": "<fim_middle>"}}
    prefix = tokenize(speeches[:9], tmp_path, own, **options.get(made_with, {}))
    sources = {"code": {"tokens": (prefix,), "repeats": 1.0, "fim_psm": 0.5}}
    fim = {"tokenizer": tokenizer if made_with == "another" else own}
    recipe = Recipe.model_validate({"sequence_length": 16, "chunks": 1, "seed": 3, "fim": fim, "sources": sources})
    if made_with == "another":
        named = rf"{tokenizer} \(fingerprint \w+\) is not the tokenizer that made {prefix}\.manifest\.json"
        with pytest.raises(ValueError, match=named + rf" \(fingerprint {code_plan[1].fingerprint}\); name that one"):
            build_plans(recipe, tmp_path / "train", None)
        assert not (tmp_path / "train").exists()
    else:
        assert build_plans(recipe, tmp_path / "train", None)["fim"]["middle"] == code_plan[1].piece_id("<fim_middle>")
