"""A blend file is mcore's BlendedDataset, sample for sample."""

from __future__ import annotations

import numpy as np
import pytest
from token_corpora import ROOT, tokenize

from k2_megatron.config import load_config
from k2_megatron.config.schema import Spikes
from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.open_feed import open_feed
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.spikes.detector import Finding
from k2_megatron.train.spikes.policy import Decision
from k2_megatron.train.spikes.rollback import fitting_amendment

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
        (("weight = 3.0", "weight = inf"), "sources.0.weight: Input should be a finite number"),
        (('/cache"', '/blend.toml/cache"'), r"cache '.*/blend\.toml/cache' cannot be made \(Not a directory\); name a"),
        (("samples", "sample"), r"samples: Field required; .*sample: Extra inputs"),
        (("a_text_document", "missing"), r"missing\.bin: no such file"),
        (("cache", "# \udcff\ncache"), r"blend\.toml: not TOML: 'utf-8' codec"),
    ],
)
def test_mistakes_in_a_blend_file_are_named(blend, tmp_path, change, message):
    changed = tmp_path / "blend.toml"
    text = blend[0].read_text(encoding="utf-8").replace(*change)
    changed.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        open_feed(changed, **SHAPE)


def test_past_the_end_of_a_blend(blend):
    with pytest.raises(ValueError, match=r"samples 398\.\.401 asked for"):
        open_feed(blend[0], **SHAPE).tokens(398, 4)
    with pytest.raises(ValueError, match=r"model\.vocab_size is 2000"):
        open_feed(blend[0], **{**SHAPE, "vocab_size": 2000}).tokens(0, 100)


@pytest.mark.parametrize("policy", ["skip", "rollback", "watch"])
def test_a_run_on_a_blend_cannot_go_back_by_itself(blend, tmp_path, policy):
    """Told before the first step; by hand it is told too."""
    settings = {
        "data.train": blend[0],
        "data.held_out": "",
        "checkpoint.chunks": "",
        "checkpoint.every_steps": 20,
        "run.folder": tmp_path,
        "spikes.policy": policy,
    }
    settings |= {"model.sequence_length": LENGTH, "train.global_batch": 4, "train.micro_batch": 1, "train.steps": 80}
    settings |= {"train.evaluate_every_steps": "", "train.evaluate_batches": "", "model.vocab_size": 4096}
    if policy != "watch":
        settings |= {"spikes.scope": "batches", "spikes.max_rollbacks": 1}
    config = load_config(ROOT / "examples/toy/toy.toml", [f"{key}={value}" for key, value in settings.items()])
    if policy == "watch":
        finding, back = Finding("malignant", 9, 5, 6, 1.0, 1.0, 1.0, 1.0), Decision("go back", "by hand", 4)
        data = open_run_data(config)
        by_hand = config.model_copy(update={"spikes": Spikes(policy="skip", scope="batches", max_rollbacks=1)})
        with pytest.raises(ValueError, match="blended datasets cannot be amended; build a plan"):
            fitting_amendment(by_hand, finding, back, data)
        return
    with pytest.raises(
        ValueError, match=rf'spikes\.policy = "{policy}": .*blended datasets cannot be amended; build a'
    ):
        open_run_data(config)
