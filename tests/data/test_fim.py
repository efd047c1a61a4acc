"""Fill-in-the-middle: whole documents reordered at the asked rates, decided by hash, invertible."""

from __future__ import annotations

import numpy as np
import pytest
from token_corpora import tokenize

from k2_megatron.data.build import build_plans
from k2_megatron.data.feed import open_feed
from k2_megatron.data.fim import FimRates, Segment, reorder
from k2_megatron.data.recipe import Recipe
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
