"""200 seeded damages to tokens, hashes, plan and manifest: each is a named error, none reaches the model."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from token_corpora import tokenize

import k2_megatron.data.open_feed as opening
from k2_megatron.data.build import build_plans
from k2_megatron.data.manifest import manifest_of_foreign_files
from k2_megatron.data.open_feed import open_feed
from k2_megatron.data.recipe import Recipe
from k2_megatron.data.store import TokenWriter
from k2_megatron.data.training import train_byte_level_bpe

LENGTH = 128
DAMAGES_A_KIND = 40
DAMAGES = ("flip", "truncate", "zero", "delete", "swap")
# Files whose every byte the training reads or checks. locations.json is the one file a user may edit: not among them.
PATTERNS = ("*.bin", "*.idx", "*.xxh3", "*.manifest.json", "train/plan.json", "train/spans.i64", "train/chunks/*.rows")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory, speeches, toy_tokenizer) -> Path:
    """Three token files of several 64 KiB blocks each, and a plan over them."""
    folder = tmp_path_factory.mktemp("pristine")
    for number, name in enumerate("abc"):
        tokenize([text * 6 for text in speeches[number::3]], folder, toy_tokenizer, name)
        (folder / f"{name}.jsonl").unlink()
    sources = {name: {"tokens": (str(folder / f"{name}_text_document"),), "repeats": 1.0} for name in "abc"}
    recipe = {"sequence_length": LENGTH, "chunks": 5, "seed": 1, "sources": sources}
    build_plans(Recipe.model_validate(recipe), folder / "train", None)
    return folder


def read_all(folder: Path, samples: list[np.ndarray], most: int = 1 << 20) -> list[np.ndarray]:
    """What training would do: open, then read every sample (or the first so many)."""
    feed = open_feed(folder / "train", sequence_length=LENGTH, seed=0, vocab_size=4096)
    for number in range(min(most, feed.rows)):
        samples.append(feed.tokens(number, 1)[0])
    return samples


def damage(folder: Path, kind: str, draw: random.Random) -> Path:
    path = draw.choice(sorted(folder.glob(draw.choice(PATTERNS))))
    content = bytearray(path.read_bytes())
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del content[draw.randrange(len(content)) :]
    elif kind == "zero":
        start = draw.choice([place for place in range(len(content)) if content[place]])
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    elif kind == "swap":
        half = len(content) // 2
        content[:half], content[half : 2 * half] = content[half : 2 * half], content[:half]
        others = [other for other in sorted(path.parent.glob(f"*{path.suffix}")) if other != path]
        if others and draw.random() < 0.5:  # two files changed places
            other = draw.choice(others)
            content = bytearray(other.read_bytes())
            other.write_bytes(path.read_bytes())
    path.write_bytes(content)
    if kind == "delete":
        path.unlink()
    return path


@pytest.mark.parametrize("kind", DAMAGES)
def test_every_damage_is_found(tmp_path, pristine, kind):
    samples = read_all(pristine, [])
    found: Counter[str] = Counter()
    for seed in range(DAMAGES_A_KIND):
        draw = random.Random(f"{kind} {seed}")
        folder = tmp_path / str(seed)
        shutil.copytree(pristine, folder)
        path = damage(folder, kind, draw)
        seen: list[np.ndarray] = []
        with pytest.raises(ValueError) as error:
            read_all(folder, seen)
        assert str(folder) in str(error.value), f"seed {seed}, {path.name}: the error names no file"
        assert ";" in str(error.value), f"seed {seed}, {path.name}: the error names no remedy"
        if seen:
            assert np.array_equal(seen, samples[: len(seen)]), f"seed {seed}, {path.name}: a wrong sample was given"
        found[next(pattern for pattern in PATTERNS if path.match(pattern))] += 1
        shutil.rmtree(folder)
    assert set(found) == set(PATTERNS), "a kind of file was never damaged"
    assert found.total() * len(DAMAGES) == 200


def test_every_byte_of_a_sealed_file_counts(tmp_path, pristine):
    """Every single bit of the first and last 60 bytes of plan.json and a manifest."""
    for name in ("train/plan.json", "a_text_document.manifest.json"):
        content = (pristine / name).read_bytes()
        folder = tmp_path / Path(name).name
        shutil.copytree(pristine, folder)
        for place in [*range(60), *range(len(content) - 60, len(content))]:
            for bit in (0, 5):
                changed = bytearray(content)
                changed[place] ^= 1 << bit
                (folder / name).write_bytes(changed)
                with pytest.raises(ValueError, match="damaged"):
                    open_feed(folder / "train", sequence_length=LENGTH, seed=0, vocab_size=4096)


def test_undamaged_files_read(pristine):
    assert len(read_all(pristine, [])) > 1000


@pytest.fixture(scope="module")
def reordered(tmp_path_factory, speeches) -> Path:
    """A plan that fills in the middle, over 30,000 documents: seven blocks of an index that opening does not read."""
    folder = tmp_path_factory.mktemp("reordered")
    tokenizer = str(folder / "tokenizer.json")
    train_byte_level_bpe(speeches[:5], 300, ["</s>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"]).save(tokenizer)
    writer = TokenWriter(str(folder / "code"), np.dtype("<u2"))
    lengths = np.random.default_rng(1).integers(9, 30, 30_000)
    writer.add(np.arange(lengths.sum(), dtype=np.uint32) % 250, lengths, None)
    writer.finish()
    manifest_of_foreign_files(str(folder / "code"))
    source = {"tokens": (str(folder / "code"),), "repeats": 1.0, "fim_psm": 0.5, "fim_spm": 0.3}
    recipe = {"sequence_length": LENGTH, "chunks": 1, "seed": 1, "fim": {"tokenizer": tokenizer}}
    build_plans(Recipe.model_validate({**recipe, "sources": {"code": source}}), folder / "train", None)
    return folder


@pytest.mark.parametrize("field", ["offsets", "bounds"])
def test_documents_are_told_apart_by_checked_blocks_of_an_index_too_large_to_read_at_the_start(
    tmp_path, reordered, monkeypatch, field
):
    """A document that begins a token later would be cut and reordered otherwise, and every sample stay a whole row."""
    monkeypatch.setattr(opening, "INDEX_BYTES_CHECKED_AT_START", 0)
    samples = read_all(reordered, [], most=200)
    folder = tmp_path / "damaged"
    shutil.copytree(reordered, folder)
    first, documents = {"offsets": (34 + 4 * 30_000, 30_000), "bounds": (34 + 12 * 30_000, 30_001)}[field]
    index = bytearray((folder / "code.idx").read_bytes())
    where = first + 8 * (documents // 3)
    index[where : where + 8] = (int.from_bytes(index[where : where + 8], "little") + 2).to_bytes(8, "little")
    (folder / "code.idx").write_bytes(index)
    seen: list[np.ndarray] = []
    found = r"code\.idx: bytes \d+\.\.\d+ differ from their hash; restore it"
    with pytest.raises(ValueError, match=found):
        read_all(folder, seen, most=200)
    with pytest.raises(ValueError, match=found):
        open_feed(folder / "code", sequence_length=LENGTH, seed=0, vocab_size=4096, part="held_out")
    assert np.array_equal(seen, samples[: len(seen)]), "a wrong sample was given"


def test_to_find_a_row_in_its_documents_reads_little_of_the_index(reordered, monkeypatch):
    monkeypatch.setattr(opening, "INDEX_BYTES_CHECKED_AT_START", 0)
    feed = open_feed(reordered / "train", sequence_length=LENGTH, seed=0, vocab_size=4096)
    file, read = feed.store.sources[0][0].file, []
    monkeypatch.setattr(file, "check_index_bytes", lambda first, end: read.append(end - first))
    feed.tokens(7, 1)
    assert 0 < sum(read) < 16 * 16 * 10, "documents a row x steps of a search, each of an offset and a bound"
