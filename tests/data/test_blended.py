"""A blend file is mcore's BlendedDataset, sample for sample."""

from __future__ import annotations

import numpy as np
import pytest
from token_corpora import tokenize

from k2_megatron.data.feed import open_feed
from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.ledger import Ledger

LENGTH = 32
SHAPE = {"sequence_length": LENGTH, "seed": 3, "vocab_size": 4096}


@pytest.fixture(scope="module")
def blend(tmp_path_factory, speeches, toy_tokenizer):
    folder = tmp_path_factory.mktemp("blend")
    parts = {"a": speeches[:20], "b": speeches[20:]}
    prefixes = [tokenize(part, folder, toy_tokenizer, name) for name, part in parts.items()]
    path = folder / "blend.toml"
    sources = "".join(
        f'[[sources]]\nprefix = "{prefix}"\nweight = {weight}\n'
        for prefix, weight in zip(prefixes, (3.0, 1.0), strict=True)
    )
    path.write_text(f'samples = 400\ncache = "{folder / "cache"}"\n{sources}', encoding="utf-8")
    return path, prefixes


def test_samples_come_by_weight_and_are_the_files_text(blend):
    path, prefixes = blend
    feed = open_feed(path, **SHAPE)
    assert feed.rows == 400
    rows = feed.tokens(0, 400)
    assert rows.shape == (400, LENGTH + 1)
    streams = [TokenFile(prefix).tokens.astype("<i4").tobytes() for prefix in prefixes]
    names = [feed.describe(sample)[0].source for sample in range(400)]
    assert abs(names.count("a_text_document") - 300) <= 1
    whole = [row.tobytes() for row in rows]
    # rows within one document appear in the stream as they are; rows over a seam of shuffled documents need not
    inside = [row in streams[name[0] == "b"] for row, name in zip(whole, names, strict=True)]
    assert sum(inside) > 300
    assert np.array_equal(open_feed(path, **SHAPE).tokens(37, 5), rows[37:42])
    assert not np.array_equal(open_feed(path, **{**SHAPE, "seed": 4}).tokens(0, 9), rows[:9])


def test_the_chain_knows_a_blend_and_amendments_are_refused(blend, tmp_path):
    path, _ = blend
    ledger = Ledger(tmp_path)
    open_feed(path, ledger=ledger, **SHAPE)
    assert ledger.chain("", 0, 20) == ledger.chain(ledger.chain("", 0, 7), 7, 20)
    with pytest.raises(ValueError, match="cannot be amended; build a plan"):
        ledger.amend("skip", from_sample=0, sequence_length=LENGTH, reason="x", samples=(1, 2))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("weight = 3.0", "weight = -1"), "sources.0.weight"),
        (("samples", "sample"), r"samples: Field required; .*sample: Extra inputs"),
        (("a_text_document", "missing"), r"missing\.bin: no such file"),
    ],
)
def test_mistakes_in_a_blend_file_are_named(blend, tmp_path, change, message):
    changed = tmp_path / "blend.toml"
    changed.write_text(blend[0].read_text(encoding="utf-8").replace(*change), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        open_feed(changed, **SHAPE)


def test_past_the_end_of_a_blend(blend):
    with pytest.raises(ValueError, match=r"samples 398\.\.401 asked for"):
        open_feed(blend[0], **SHAPE).tokens(398, 4)
    with pytest.raises(ValueError, match=r"model\.vocab_size is 2000"):
        open_feed(blend[0], **{**SHAPE, "vocab_size": 2000}).tokens(0, 100)
