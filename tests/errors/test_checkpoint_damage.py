"""200 seeded damages to the files of the newest checkpoint: each is found before anything is loaded, the checkpoint is
set aside with the reason, and the one before is taken. In one process: what a start does until it loads. Every fifth
time both are as a version before aes_lanes left them."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from manifest_of_before import write_manifest_of_before
from rank_processes import Rank

from k2_megatron.config.schema import Parallel
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import single_rank
from k2_megatron.train.checkpoints.folders import remove_unfinished
from k2_megatron.train.checkpoints.load import find_checkpoint
from k2_megatron.train.checkpoints.manifest import CheckpointError, read_manifest

DAMAGES_A_KIND = 50
KINDS = ("flip", "truncate", "zero", "delete")
NEWEST, BEFORE = "step_00000006", "step_00000004"


def damage(path: Path, kind: str, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    path.unlink()  # its bytes are those of the original: the copy is made of links
    if kind == "flip":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif kind == "truncate":
        del content[draw.randrange(len(content)) :]
    elif kind == "zero":
        start = draw.choice([place for place in range(0, len(content), len(content) // 50) if content[place]])
        content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    if kind != "delete":
        path.write_bytes(content)


def _start_from_damaged_ones(original: Path, scratch: Path) -> tuple[dict[str, int], list[str]]:
    """({file: how often damaged}, what was not found or not told)."""
    damaged: Counter[str] = Counter()
    wrong = []
    connect(single_rank(), find_device(0), 60.0)
    groups = build_groups(Parallel())
    for kind in KINDS:
        for seed in range(DAMAGES_A_KIND):
            draw = random.Random(f"{kind} {seed}")
            checkpoints = scratch / f"{kind}_{seed}"
            shutil.copytree(original, checkpoints, copy_function=os.link)
            if seed % 5 == 0:
                for step in (NEWEST, BEFORE):
                    write_manifest_of_before(checkpoints / step)
            name = draw.choice(sorted(path.name for path in (checkpoints / NEWEST).iterdir()))
            damage(checkpoints / NEWEST / name, kind, draw)
            damaged[name] += 1
            remove_unfinished(checkpoints)
            try:
                taken, doubts = find_checkpoint(checkpoints, groups)
            except CheckpointError as error:
                wrong.append(f"{kind} {seed} of {name}: {error}")
                continue
            told = f"damaged_{NEWEST}" if (name, kind) == ("k2.json", "delete") else f"{NEWEST}/{name}"
            if taken != checkpoints / BEFORE or not any(told in doubt and "set aside" in doubt for doubt in doubts):
                wrong.append(f"{kind} {seed} of {name}: {taken} was taken, {doubts}")
            if not (checkpoints / f"damaged_{NEWEST}").is_dir() or (checkpoints / NEWEST).exists():
                wrong.append(f"{kind} {seed} of {name}: it was not set aside")
            shutil.rmtree(checkpoints)
    disconnect()
    return dict(damaged), wrong


def test_every_damage_to_the_newest_checkpoint_is_found_and_the_one_before_is_taken(finished_run, tmp_path):
    arguments = (finished_run / "checkpoints", tmp_path)
    outcome = Rank(_start_from_damaged_ones, arguments, {}, tmp_path / "output").finish()
    assert outcome.exit_code == 0, outcome.stderr
    damaged, wrong = outcome.result
    assert wrong == []
    names = {path.name for path in (finished_run / "checkpoints" / NEWEST).iterdir()}
    assert set(damaged) == names and sum(damaged.values()) == 200


def test_every_bit_of_a_manifest_counts(finished_run, tmp_path):
    """The number of its format, the name and the value of its hash, spaces, the case of an exponent: all of them."""
    content = (finished_run / "checkpoints" / NEWEST / "k2.json").read_bytes()
    folder = tmp_path / NEWEST
    folder.mkdir()
    number = content.index(b'"format": ') + len('"format": ')
    places = [*range(60), *range(60, len(content) - 60, 7), *range(len(content) - 60, len(content))]
    bits = [(place, random.Random(place).randrange(8)) for place in places] + [(number, bit) for bit in range(8)]
    for place, bit in bits:
        changed = bytearray(content)
        changed[place] ^= 1 << bit
        (folder / "k2.json").write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"k2\.json is damaged"):
            read_manifest(folder)
