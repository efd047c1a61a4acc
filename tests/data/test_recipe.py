"""Recipes: K2's order and mixture come out of a file; every mistake of a file is told at once."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_corpora import ROOT

from k2_megatron.data.mixture import apportion, rows_of_sources, used_after_chunks
from k2_megatron.data.recipe import Recipe, chunk_order, load_recipe
from k2_megatron.data.schedule import Amendment, Schedule

FIRST_OF_K2 = [*range(16), 32, 33, 34, 35, 36, 37, 44, 45, 46, 47, 48, 49, 50, 51]
K2_ORDER = [
    *FIRST_OF_K2,
    *range(16, 32),
    *range(38, 44),
    *(chunk for chunk in range(52, 360) if chunk not in (160, 186)),
    160,
    186,
]


def test_k2s_published_order():
    recipe = load_recipe(ROOT / "examples/k2_65b/data_stage1.toml")
    order = chunk_order(recipe.order, recipe.chunks)
    assert len(K2_ORDER) == 360
    assert order == K2_ORDER
    assert order[-5:] == [357, 358, 359, 160, 186]


def test_k2s_order_by_amendments():
    """The same list, had the two chunks been deferred when the spikes came: after chunks 160 and 186 in order."""
    undeferred = [*FIRST_OF_K2, *(chunk for chunk in range(360) if chunk not in FIRST_OF_K2)]
    schedule = Schedule.of_chunks(undeferred, 10)
    schedule = schedule.amended(Amendment("defer", 10 * 160, chunk=160), 10)
    schedule = schedule.amended(Amendment("defer", 10 * 185, chunk=186), 10)
    assert [int(position) // 10 for position in schedule.positions(0, 3600)[::10]] == K2_ORDER


def test_k2s_numbers():
    stage1 = load_recipe(ROOT / "examples/k2_65b/data_stage1.toml")
    assert stage1.rows_per_chunk == 941 * 2040
    assert stage1.chunks * stage1.rows_per_chunk * stage1.sequence_length == 1_415_312_179_200
    assert sum(source.share for source in stage1.sources.values()) == pytest.approx(100.0)
    stage2 = load_recipe(ROOT / "examples/k2_65b/data_stage2.toml")
    assert stage2.chunks * stage2.rows_per_chunk * stage2.sequence_length == pytest.approx(69.4e9, rel=1e-3)
    assert sum(source.share for source in stage2.sources.values()) == pytest.approx(100.0)


def test_all_problems_at_once(tmp_path):
    (tmp_path / "r.toml").write_text(
        "sequence_length = 0\nchunks = 4\nseed = 1\nsede = 2\n"
        '[sources.a]\ntokens = "x"\nshare = 1\nrepeats = 2\n[sources.b]\ntokens = "y"\nshare = -1\n',
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="4 problem") as caught:
        load_recipe(tmp_path / "r.toml")
    for part in ("sequence_length", "(found 0)", "sede", "either share or repeats", "sources.b.share", "(found -1)"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('[order]\nfirst = [4]\n[sources.a]\ntokens="x"\nrepeats=1', "chunk 4 does not exist; there are 4"),
        ('[order]\nfirst = ["0-2"]\nlast = [1]\n[sources.a]\ntokens="x"\nrepeats=1', "chunk 1 is named twice"),
        ('[order]\nlast = ["2-1"]\n[sources.a]\ntokens="x"\nrepeats=1', "neither a chunk number nor a range"),
        ('[sources.a]\ntokens="x"\nshare=1', "rows_per_chunk: needed"),
        ('[sources.a]\ntokens="x"\nrepeats=1\nfim_psm=0.5', r"add \[fim\]"),
        ('[sources.a]\ntokens="x"\nrepeats=1\nfim_psm=0.7\nfim_spm=0.7', "fim_psm"),
        ('[sources.a]\ntokens="x"\nrepeats=1\ndocuments=[5, 5]', "0 <= first < end"),
        ("[sources]", "sources"),
        ("nonsense", "not TOML"),
        ("# \udcff", r"r\.toml: not TOML: 'utf-8'"),
        (
            'rows_per_chunk = 4_000_000_000\n[sources.a]\ntokens="x"\nrepeats=1',
            r"rows_per_chunk: .* \(found 4000000000\)",
        ),
        ('[sources.a]\ntokens="x"\nrepeats=inf', "sources.a.repeats: .* finite"),
    ],
)
def test_each_mistake_is_named(tmp_path, lines, message):
    text = f"sequence_length = 8\nchunks = 4\nseed = 1\n{lines}\n"
    (tmp_path / "r.toml").write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=message):
        load_recipe(tmp_path / "r.toml")


def test_more_chunks_than_a_machine_holds_are_refused():
    with pytest.raises(ValueError, match="less than or equal to 1000000"):
        Recipe.model_validate({"sequence_length": 8, "chunks": 10**11, "seed": 1, "sources": {}})


@pytest.mark.parametrize("lines", ["[[sources]]\ntokens = 'x'\nshare = 1", "sources = 'x'"])
def test_sources_that_are_no_tables_of_names_are_told(tmp_path, lines):
    (tmp_path / "r.toml").write_text(f"sequence_length = 8\nchunks = 4\nseed = 1\n{lines}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"1 problem.*\n  sources: Input should be a valid dict"):
        load_recipe(tmp_path / "r.toml")


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        load_recipe(tmp_path / "r.toml")


def recipe(sources, **settings) -> Recipe:
    sources = {name: {"tokens": ("x",), **source} for name, source in sources.items()}
    return Recipe.model_validate({"sequence_length": 8, "chunks": 4, "seed": 1, "sources": sources, **settings})


def test_repeats_alone_use_what_there_is():
    asked = recipe({"a": {"repeats": 3.0}, "b": {"repeats": 0.5}})
    assert rows_of_sources(asked, [10, 100]) == (20, [30, 50])


def test_shares_divide_what_repeats_leave():
    asked = recipe({"a": {"repeats": 2.0}, "b": {"share": 3.0}, "c": {"share": 1.0}}, rows_per_chunk=30)
    assert rows_of_sources(asked, [10, 1000, 5]) == (30, [20, 75, 25])


@pytest.mark.parametrize(
    ("sources", "rows", "available", "message"),
    [
        ({"a": {"repeats": 1.0}}, 30, [100], "asks for 120 rows, the sources with their repeats give 100"),
        ({"a": {"repeats": 9.0}, "b": {"share": 1.0}}, 30, [100, 1], "repeats alone ask for 900 rows"),
        (
            {"a": {"repeats": 1.0}, "b": {"share": 9.0}},
            30,
            [120, 50],
            "sources.b: gets none of the 120 rows",
        ),
        ({"a": {"share": 1.0, "max_repeats": 2.0}}, 30, [50], r"repeats it 2.40 times \(120 rows of 50\)"),
        ({"a": {"share": 1.0}, "b": {"share": 1.0}}, 30, [50, 0], "sources.b: no whole row of 9 tokens"),
        ({"a": {"share": 1e-9}, "b": {"share": 1.0}}, 30, [9, 50], "sources.a: gets none of the 120 rows"),
        ({"a": {"repeats": 1e9}}, None, [100], "give chunks of 25000000000 rows, at most 500000000 fit"),
        ({"a": {"repeats": 1.0}}, None, [3], "the sources give 3 rows in all; use fewer chunks"),
    ],
)
def test_a_mixture_that_does_not_fit(sources, rows, available, message):
    with pytest.raises(ValueError, match=message):
        rows_of_sources(recipe(sources, rows_per_chunk=rows), available)


@settings(max_examples=200, deadline=None)
@given(
    chunks=st.integers(1, 30),
    rows=st.integers(1, 60),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=8),
)
def test_chunks_take_exact_and_even_numbers(chunks, rows, weights):
    """Every chunk has `rows` rows, every source its total, and every source keeps its pace."""
    totals = apportion(chunks * rows, [Fraction(weight) for weight in weights])
    assert sum(totals) == chunks * rows
    assert all(abs(total - chunks * rows * w / sum(weights)) < 1 for total, w in zip(totals, weights, strict=True))
    used = used_after_chunks(totals, chunks)
    assert used[0] == [0] * len(weights)
    assert used[-1] == totals
    for chunk, (before, after) in enumerate(pairwise(used), start=1):
        assert sum(after) == chunk * rows
        assert all(b <= a for b, a in zip(before, after, strict=True))
        for total, here in zip(totals, after, strict=True):
            assert abs(here - total * chunk / chunks) < len(weights) + 1
