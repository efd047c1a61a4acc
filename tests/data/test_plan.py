"""Plans: the same bytes every time, every row as often as asked, copies far apart, held-out documents never trained."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from token_corpora import ROOT, outputs, tokenize

from k2_megatron.config import Config, load_config
from k2_megatron.data import build, plan_folders
from k2_megatron.data.build import _ChunkWriter, build_plans
from k2_megatron.data.manifest import manifest_of_foreign_files, manifest_path
from k2_megatron.data.open_feed import open_feed
from k2_megatron.data.plan import Plan
from k2_megatron.data.plan_folders import folder_aside, give_names, write_durably
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.rows import unpack
from k2_megatron.data.store import write_sealed
from k2_megatron.train.run_data import open_run_data

LENGTH = 16


def make_recipe(prefixes: dict[str, str], **settings) -> Recipe:
    sources = {
        "often": {"tokens": (prefixes["a"],), "repeats": 3.0},
        "half": {"tokens": (prefixes["b"],), "repeats": 0.5},
        "rest": {"tokens": (prefixes["c"], prefixes["d"]), "share": 1.0},
    }
    standard = {"sequence_length": LENGTH, "chunks": 12, "rows_per_chunk": 150, "seed": 7, "held_out_fraction": 0.2}
    return Recipe.model_validate({**standard, "sources": sources, **settings})


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory, speeches, toy_tokenizer) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("sources")
    texts = [text[:400] for text in speeches]
    cuts = {"a": texts[:8], "b": texts[8:16], "c": texts[16:28], "d": [text[:900] for text in speeches[28:]]}
    return {name: tokenize(part, folder, toy_tokenizer, name) for name, part in cuts.items()}


@pytest.fixture(scope="module")
def plans(tmp_path_factory, prefixes) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    build_plans(make_recipe(prefixes), folder / "train", folder / "held_out")
    return folder


def open_plan(folder, **settings):
    return open_feed(folder, **{"sequence_length": LENGTH, "seed": 0, "vocab_size": 4096, **settings})


def test_the_same_bytes_with_any_number_of_threads(tmp_path, prefixes, plans):
    for number, threads in enumerate((1, 3)):
        folder = tmp_path / str(number)
        folder.mkdir()
        build_plans(make_recipe(prefixes), folder / "train", folder / "held_out", threads=threads)
    one, other = outputs(tmp_path / "0"), outputs(tmp_path / "1")
    assert one == other
    without_locations = {name: content for name, content in one.items() if "locations" not in name}
    assert {name: outputs(plans)[name] for name in without_locations} == without_locations
    build_plans(make_recipe(prefixes, seed=8), tmp_path / "s" / "train", tmp_path / "s" / "held_out")
    changed = outputs(tmp_path / "s")
    assert all(changed[name] != one[name] for name in one if name.startswith("train/chunks"))


def test_tokens_that_were_moved_change_no_byte_but_the_locations(tmp_path, prefixes, plans):
    moved = {name: str(tmp_path / "moved" / Path(prefix).name) for name, prefix in prefixes.items()}
    shutil.copytree(Path(prefixes["a"]).parent, tmp_path / "moved")
    build_plans(make_recipe(moved), tmp_path / "train", tmp_path / "held_out")
    one, other = (open_plan(folder / "train").tokens(0, 50) for folder in (plans, tmp_path))
    assert np.array_equal(one, other)


def test_every_row_as_often_as_asked(plans):
    plan = Plan(plans / "train")
    records = plan.records(np.arange(plan.rows))
    sources, rows = unpack(records)
    counts = Counter(sources.tolist())
    assert [counts[number] for number in range(3)] == [source["rows_used"] for source in plan.sources]
    assert plan.rows == 12 * 150
    often, half = plan.sources[0], plan.sources[1]
    assert often["rows_used"] == 3 * often["rows_available"]
    assert half["rows_used"] == round(half["rows_available"] / 2)
    each = Counter(rows[sources == 0].tolist())
    assert set(each.values()) == {3}
    assert len(each) == often["rows_available"]
    assert set(Counter(rows[sources == 1].tolist()).values()) == {1}


def test_copies_are_a_whole_pass_apart(plans):
    """Three uses of a row in 12 chunks: 4 chunks apart, or as close to it as whole rows allow."""
    plan = Plan(plans / "train")
    sources, rows = unpack(plan.records(np.arange(plan.rows)))
    chunk_of = np.arange(plan.rows) // plan.rows_per_chunk
    for row in range(plan.sources[0]["rows_available"]):
        chunks = chunk_of[(sources == 0) & (rows == row)]
        assert np.diff(chunks).min() >= 3
        assert np.diff(chunks).max() <= 5


def test_every_chunk_has_the_mixture(plans):
    plan = Plan(plans / "train")
    for chunk in range(12):
        sources = unpack(plan.records(chunk * 150 + np.arange(150)))[0]
        for number, source in enumerate(plan.sources):
            assert abs((sources == number).sum() - source["rows_used"] / 12) <= 2


def test_chunks_are_shuffled(plans):
    sources = unpack(Plan(plans / "train").records(np.arange(150)))[0]
    runs = 1 + np.count_nonzero(np.diff(sources))
    assert runs > 12, "the sources of a chunk stand in blocks"  # 3 if they did; some 25 when shuffled


def documents_of(feed):
    return {(span.file, span.document) for sample in range(feed.rows) for span in feed.describe(sample)}


def test_held_out_documents_are_never_trained(plans, prefixes):
    train, held_out = (open_plan(plans / name) for name in ("train", "held_out"))
    trained, held = documents_of(train), documents_of(held_out)
    assert trained
    assert len(held) >= 3
    assert not trained & held
    seen = [tuple(row) for row in held_out.tokens(0, held_out.rows)]
    assert len(set(seen)) == held_out.rows, "a held-out row stands twice"


def test_rows_are_the_text(plans, prefixes):
    """A row is the tokens of its documents, in order, whole documents with their ends."""
    feed = open_plan(plans / "train")
    from k2_megatron.data.indexed import TokenFile

    files = {Path(prefix).name: TokenFile(prefix) for prefix in prefixes.values()}
    for sample in range(0, feed.rows, 7):
        row = feed.tokens(sample, 1)[0]
        spans = feed.describe(sample)
        expected = np.concatenate([files[span.file].tokens[span.first_token : span.end_token] for span in spans])
        assert np.array_equal(row, expected)
        assert len(row) == LENGTH + 1
        assert all(span.ends for span in spans[:-1])
        start = 0
        for span in spans:
            start += span.end_token - span.first_token
            assert (row[start - 1] == 0) == span.ends


def test_chunk_order_and_last(tmp_path, prefixes):
    order = {"first": ("8-9", 3), "last": (0, 5)}
    build_plans(make_recipe(prefixes, order=order), tmp_path / "train", tmp_path / "held_out")
    feed = open_plan(tmp_path / "train")
    plain = Plan(tmp_path / "train")
    expected = [8, 9, 3, 1, 2, 4, 6, 7, 10, 11, 0, 5]
    for place, chunk in enumerate(expected):
        rows = feed.store.read(plain.records(chunk * 150 + np.arange(150)))
        assert np.array_equal(feed.tokens(place * 150, 150), rows)


def test_document_ranges_divide_a_file(tmp_path, prefixes):
    sources = {
        "first": {"tokens": (prefixes["c"],), "documents": (0, 5), "repeats": 1.0},
        "second": {"tokens": (prefixes["c"],), "documents": (5, 12), "repeats": 1.0},
    }
    recipe = make_recipe(prefixes, sources=sources, rows_per_chunk=None, chunks=2, held_out_fraction=0.0)
    build_plans(recipe, tmp_path / "train", None)
    feed = open_plan(tmp_path / "train")
    for sample in range(feed.rows):
        for span in feed.describe(sample):
            assert (span.document < 5) == (span.source == "first")


def test_a_file_named_twice_is_refused(tmp_path, prefixes):
    """It would give each of its rows twice, whatever `repeats` and `max_repeats` say. Two sources may name one."""
    folder = Path(prefixes["a"]).parent
    (tmp_path / "linked").symlink_to(folder)
    for tokens in (
        (prefixes["a"], str(folder / "*")),
        (str(folder / "[ab]*"), str(folder / "[ac]*")),
        (prefixes["a"], str(tmp_path / "linked/a_text_document")),
    ):
        sources = {"x": {"tokens": tokens, "repeats": 1.0, "max_repeats": 1.0}}
        recipe = make_recipe(prefixes, sources=sources, rows_per_chunk=None, held_out_fraction=0.0)
        with pytest.raises(ValueError, match=r"sources\.x: .*a_text_document\.manifest\.json is named twice"):
            build_plans(recipe, tmp_path / "train", None)


def test_a_range_of_documents_needs_a_single_file(tmp_path, prefixes):
    """Also where one name stands for several: the range would be taken of each."""
    source = {"tokens": (str(Path(prefixes["a"]).parent / "[ab]*"),), "documents": (0, 3), "repeats": 1.0}
    recipe = make_recipe(prefixes, sources={"x": source}, rows_per_chunk=None, chunks=1, held_out_fraction=0.0)
    with pytest.raises(ValueError, match=r"sources\.x: documents needs a single token file, .* names 2"):
        build_plans(recipe, tmp_path / "train", None)


@pytest.mark.parametrize(
    ("settings", "held_out", "message"),
    [
        ({"held_out_fraction": 0.0}, True, "name a folder for the held-out plan where it is more than 0, and only"),
        ({}, False, "name a folder for the held-out plan"),
        ({"held_out_fraction": 1e-9}, True, "holds out no whole row of 17 tokens"),
        ({"sequence_length": 10**6}, True, "no whole row"),
        ({"rows_per_chunk": 5}, True, "repeats alone ask for"),
        ({"fim": {"tokenizer": "nowhere.json"}}, True, "no such tokenizer"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, prefixes, settings, held_out, message):
    with pytest.raises(ValueError, match=message):
        build_plans(make_recipe(prefixes, **settings), tmp_path / "train", tmp_path / "held_out" if held_out else None)
    assert not list(tmp_path.iterdir()), "a refused recipe left something behind"


def test_the_two_plans_need_two_folders_that_can_be_made(tmp_path, prefixes):
    with pytest.raises(ValueError, match="named for both plans"):
        build_plans(make_recipe(prefixes), tmp_path / "x", tmp_path / "x")
    with pytest.raises(ValueError, match="one plan's folder lies in the other's"):
        build_plans(make_recipe(prefixes), tmp_path / "x", tmp_path / "x" / "held_out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/held_out: cannot be made \(Not a directory\); name a folder"):
        build_plans(make_recipe(prefixes), tmp_path / "file/train", tmp_path / "file/held_out")


def test_a_full_disk_leaves_neither_plan(tmp_path, prefixes, monkeypatch):
    """The held-out plan is whole by then; without the other it would only be in the way of the next try."""

    def full(path, content):
        if path.parent.name.startswith("train."):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_sealed(path, content)

    monkeypatch.setattr(build, "write_sealed", full)
    with pytest.raises(ValueError, match=r"train: cannot be written \(No space left on device\); make room"):
        build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out")
    assert not list(tmp_path.iterdir())


def test_a_plan_opens_where_its_folder_is_reached_by_a_link(tmp_path, prefixes):
    """The way to the tokens goes up from where the plan is, not from where the link to it is."""
    (tmp_path / "disk/deep/er").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk/deep/er")
    build_plans(make_recipe(prefixes), tmp_path / "runs/train", tmp_path / "runs/held_out")
    for path in (tmp_path / "runs/train", tmp_path / "disk/deep/er/train"):
        assert open_plan(path).tokens(0, 3).shape == (3, LENGTH + 1)


@pytest.mark.parametrize("plan", ["plan", "runs/plan"])
def test_a_plan_follows_a_link_to_the_tokens(tmp_path, prefixes, monkeypatch, plan):
    """They move to another disk, and the link with them; also where the plan's folder is reached by one."""
    monkeypatch.chdir(tmp_path)
    for folder in ("deep/er/still", "scratch2"):
        Path(folder).mkdir(parents=True)
    Path("runs").symlink_to("deep/er/still")
    shutil.copytree(Path(prefixes["a"]).parent, "scratch1/tokens")
    Path("tokens").symlink_to("scratch1/tokens")
    for way in ("tokens", str(tmp_path / "tokens")):
        sources = {"x": {"tokens": (f"{way}/{Path(prefixes['a']).name}",), "repeats": 1.0}}
        recipe = make_recipe(prefixes, sources=sources, rows_per_chunk=None, chunks=1, held_out_fraction=0.0)
        build_plans(recipe, Path(plan), None)
        expected = open_plan(Path(plan)).tokens(0, 3)
        old, new = ("scratch1", "scratch2") if way == "tokens" else ("scratch2", "scratch1")
        shutil.move(f"{old}/tokens", f"{new}/tokens")
        Path("tokens").unlink()
        with pytest.raises(ValueError, match=rf"no such manifest; restore it, or correct {plan}/locations.json where"):
            open_plan(Path(plan))
        Path("tokens").symlink_to(f"{new}/tokens")
        assert (open_plan(Path(plan)).tokens(0, 3) == expected).all()
        shutil.rmtree(plan)


def test_one_plan_does_not_lie_in_the_other(tmp_path, prefixes):
    for train, held_out in (("plan", "plan/held_out"), ("plan/train", "plan")):
        with pytest.raises(ValueError, match="one plan's folder lies in the other's"):
            build_plans(make_recipe(prefixes), tmp_path / train, tmp_path / held_out)
    assert not list(tmp_path.iterdir())


def test_both_plans_come_or_none(tmp_path, prefixes):
    """The training plan cannot be made: with the held-out plan there, the next try would be refused."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/train: cannot be made \(Not a directory\); name a folder"):
        build_plans(make_recipe(prefixes), tmp_path / "file/train", tmp_path / "held_out")

    def another_build_is_faster(text):
        if "rows" in text:
            (tmp_path / "train/chunks").mkdir(parents=True)

    with pytest.raises(ValueError, match=r"/train: cannot be made \(Directory not empty\); name a folder"):
        build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out", report=another_build_is_faster)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "train"]


def name_two_folders(where: Path) -> None:
    with ExitStack() as stack:
        give_names({where / name: stack.enter_context(folder_aside(where / name)) for name in ("a", "b")})


@pytest.mark.parametrize("call", range(1, 5))
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "Input/output error")])
def test_names_are_given_to_both_plans_or_none(tmp_path, monkeypatch, call, error):
    """Whatever stops it, at whichever file that is synced: nothing is synced between the two renames."""
    synced = []

    def stop(path):
        synced.append([name for name in ("a", "b") if (tmp_path / name).exists()])
        if len(synced) == call:
            raise error

    monkeypatch.setattr(plan_folders, "sync", stop)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else ValueError):
        name_two_folders(tmp_path)
    assert len(synced) == call
    assert synced == [[], [], ["a", "b"], ["a", "b"]][:call]
    assert not list(tmp_path.iterdir())


def test_a_stop_between_the_two_names_leaves_neither_plan(tmp_path, monkeypatch):
    def replace(source, target, *, real=os.replace):
        real(source, target)
        if target == tmp_path / "a":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        name_two_folders(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("function", ["open", "flock"])
def test_a_folder_that_another_build_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch, function):
    module, begun = {"open": os, "flock": fcntl}[function], []
    real = getattr(module, function)

    def another_build_begins(*call, **settings):
        if not begun:
            begun.append(call)
            with folder_aside(tmp_path / "plan"):
                pass
        return real(*call, **settings)

    monkeypatch.setattr(module, function, another_build_begins)
    with folder_aside(tmp_path / "plan") as aside:
        assert begun
        assert aside.is_dir()


def test_an_error_of_the_disk_is_told_with_its_file(tmp_path):
    """Making room helps where there is none, and there alone."""

    def write_over_a_folder():
        with folder_aside(tmp_path / "plan") as aside:
            (aside / "x").mkdir()
            write_durably(aside / "x", b"")

    with pytest.raises(ValueError, match=r"plan: cannot be written \(Is a directory: .*/x\); name another folder"):
        write_over_a_folder()


def test_two_builds_of_one_plan_do_not_share_a_folder(tmp_path, prefixes, plans, monkeypatch):
    """One begins while the other writes. What a kill left behind goes, what a living build writes in does not."""
    (tmp_path / "train.0123abcd.partial").mkdir()
    (tmp_path / "train.0123abcd.partial/spans.i64").touch()
    write, begun = _ChunkWriter.__call__, []

    def write_and_begin_another(self, chunk):
        if not begun:
            begun.append(chunk)
            build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out")
        return write(self, chunk)

    monkeypatch.setattr(_ChunkWriter, "__call__", write_and_begin_another)
    with pytest.raises(ValueError, match=r"(train|held_out): cannot be made \(Directory not empty\)"):
        build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out")
    made, expected = outputs(tmp_path), outputs(plans)
    assert {name: made[name] for name in expected if "locations" not in name} == {
        name: content for name, content in expected.items() if "locations" not in name
    }
    assert made.keys() == expected.keys()


def test_a_plan_is_on_the_disk_before_it_has_its_name(tmp_path, prefixes):
    done, renamed = [], []

    def fsync(descriptor, *, real=os.fsync):
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    def replace(source, target, *, real=os.replace):
        if Path(source).is_dir():
            files = {str(path) for path in Path(source).rglob("*") if path.name != "plan.json"}  # by another name
            assert files | {str(source)} <= set(done), "not all is on the disk"
            assert len(files) == 3 + len(list((Path(source) / "chunks").iterdir()))
            renamed.append(str(target))
        real(source, target)

    with mock.patch.object(os, "fsync", fsync), mock.patch.object(os, "replace", replace):
        build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out")
    assert renamed == [str(tmp_path / "held_out"), str(tmp_path / "train")]
    assert done[-1] == str(tmp_path), "the plans' own names"


def test_missing_manifests_and_other_tokenizers_are_named(tmp_path, prefixes, speeches, sentencepiece_model):
    other = tokenize(speeches[:3], tmp_path, sentencepiece_model)
    with pytest.raises(ValueError, match="another tokenizer than"):
        build_plans(make_recipe({**prefixes, "d": other}), tmp_path / "train", tmp_path / "held_out")
    with pytest.raises(ValueError, match="no such manifest; make the tokens with"):
        build_plans(make_recipe({**prefixes, "d": "nowhere"}), tmp_path / "train", tmp_path / "held_out")
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="exists; remove it, or name another"):
        build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out")


def test_an_error_names_the_files_whose_tokenizers_differ(tmp_path, speeches, toy_tokenizer, sentencepiece_model):
    """The first file is of Megatron's own tool, whose files know no tokenizer."""
    names, tokenizers = "abcd", [toy_tokenizer] * 3 + [sentencepiece_model]
    prefixes = {
        name: tokenize(speeches[:4], tmp_path, path, name) for name, path in zip(names, tokenizers, strict=True)
    }
    manifest_path(prefixes["a"]).unlink()
    manifest_of_foreign_files(prefixes["a"])
    with pytest.raises(ValueError, match=r"/d_text_document.*: made with another tokenizer than .*/b_text_document"):
        build_plans(make_recipe(prefixes), tmp_path / "train", tmp_path / "held_out")


def test_a_manifest_named_like_a_pattern_is_found(tmp_path, speeches, toy_tokenizer):
    """`web[1]` names that file, though as a pattern it would be `web1`."""
    prefix = tokenize([text[:400] for text in speeches], tmp_path, toy_tokenizer, "web[1]")
    recipe = {
        "sequence_length": LENGTH,
        "chunks": 2,
        "seed": 1,
        "sources": {"web": {"tokens": (prefix,), "repeats": 1.0}},
    }
    build_plans(Recipe.model_validate(recipe), tmp_path / "plan", None)
    assert Plan(tmp_path / "plan").sources[0]["files"][0]["entry"]["name"] == "web[1]_text_document"


@pytest.mark.parametrize("asks", [{"held_out_fraction": 0.2}, {"documents": (2, 6)}])
def test_an_index_that_changed_since_its_manifest_is_refused_before_documents_are_told_apart(
    tmp_path, speeches, toy_tokenizer, asks
):
    prefix = tokenize([text[:400] for text in speeches], tmp_path, toy_tokenizer)
    with open(prefix + ".idx", "r+b") as index:
        index.seek(34 + 4 * len(speeches) + 8 * 3)  # where the fourth document begins
        index.write((8).to_bytes(8, "little"))
    source = {"tokens": (prefix,), "repeats": 1.0, "documents": asks.get("documents")}
    recipe = {"sequence_length": LENGTH, "chunks": 2, "seed": 1, "sources": {"text": source}}
    recipe["held_out_fraction"] = asks.get("held_out_fraction", 0.0)
    held_out = tmp_path / "held_out" if "held_out_fraction" in asks else None
    with pytest.raises(ValueError, match=r"text_document\.idx: bytes 0\.\.\d+ differ from their hash"):
        build_plans(Recipe.model_validate(recipe), tmp_path / "plan", held_out)
    assert not (tmp_path / "plan").exists()


def config_over(train: Path, held_out: Path) -> Config:
    """Of the toy, which is evaluated."""
    settings = {"data.train": train, "data.held_out": held_out, "model.sequence_length": LENGTH, "train.steps": 30}
    settings |= {"train.global_batch": 1, "train.micro_batch": 1, "train.evaluate_batches": 1}
    return load_config(ROOT / "examples/toy/toy.toml", [f"{key}={value}" for key, value in settings.items()])


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        ("train", "train", r"data\.held_out = .*: holds the very rows of data\.train"),
        ("train", "../{}/train", r"data\.held_out = .*: holds the very rows of data\.train"),
        ("held_out", "train", r"data\.train = .*/held_out'.* a held-out plan"),
        ("train", "held_out", ""),
    ],
)
def test_plans_are_used_for_what_they_were_made(plans, train, held_out, message):
    config = config_over(plans / train, plans / held_out.format(plans.name))
    if not message:
        assert open_run_data(config).held_out is not None
        return
    with pytest.raises(ValueError, match=message):
        open_run_data(config)


def test_files_of_equal_size_that_nobody_has_hashed_are_not_the_same(tmp_path, prefixes):
    """Shards of one size are common; what is told apart by its place alone is the same by any way to it."""
    for name in ("one", "other"):
        for suffix in (".bin", ".idx"):
            shutil.copy(f"{prefixes['d']}{suffix}", tmp_path / f"{name}{suffix}")
    (tmp_path / "by_link").symlink_to(tmp_path)
    assert open_run_data(config_over(tmp_path / "one", tmp_path / "other")).held_out is not None
    with pytest.raises(ValueError, match="holds the very rows"):
        open_run_data(config_over(tmp_path / "one", tmp_path / "by_link/one"))
    for name in ("one", "other"):
        manifest_of_foreign_files(str(tmp_path / name))
    with pytest.raises(ValueError, match="holds the very rows"):
        open_run_data(config_over(tmp_path / "one", tmp_path / "other"))
