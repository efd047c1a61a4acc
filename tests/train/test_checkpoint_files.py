"""Checkpoint folders as files: what is complete, which is the latest, which ones go."""

import json
import os
import re
from pathlib import Path

import pytest

from k2_megatron.runtime import durable
from k2_megatron.runtime.durable import make_folder
from k2_megatron.train.checkpoint_files import (
    CheckpointError,
    HashingWriter,
    apply_retention,
    complete_checkpoints,
    hash_file,
    latest_checkpoint,
    publish,
    read_manifest,
    remove_unfinished,
    start_writing,
    step_of,
    verify_files,
)


@pytest.fixture
def saved(tmp_path):
    """saved(step, ...) -> the folder of checkpoints after saving these steps one after the other."""

    def save(*steps: int) -> Path:
        for step in steps:
            aside = start_writing(tmp_path, step)
            for name in ("a", "b", "c"):
                (aside / name).write_text(f"{name} of step {step}")
            publish(aside, {"step": step, "files": {"a": hash_file(aside / "a")}})
        return tmp_path

    return save


def steps(checkpoints: Path) -> list[int]:
    return [step_of(folder) for folder in complete_checkpoints(checkpoints)]


def test_nothing_saved_is_no_error(tmp_path):
    assert latest_checkpoint(tmp_path / "none") == (None, None)
    assert latest_checkpoint(tmp_path) == (None, None)
    assert complete_checkpoints(tmp_path / "none") == []


def test_published_checkpoint_is_the_latest_and_sound(saved):
    checkpoints = saved(5, 10)
    folder, doubt = latest_checkpoint(checkpoints)
    assert (folder.name, doubt) == ("step_00000010", None)
    manifest = read_manifest(folder)
    assert sorted(manifest["files"]) == ["a", "b", "c"], "files that others wrote are listed too"
    assert verify_files(folder, manifest) == []


def test_latest_is_what_the_pointer_says_and_not_the_highest(saved):
    checkpoints = saved(5, 10)
    (checkpoints / "latest").write_text("step_00000005\n")
    assert latest_checkpoint(checkpoints)[0].name == "step_00000005"


def test_step_numbers_order_by_value(saved):
    assert steps(saved(99_999_999, 100_000_000, 7)) == [100_000_000, 99_999_999, 7]


def test_folder_without_manifest_is_no_checkpoint(saved):
    checkpoints = saved(5, 10)
    (checkpoints / "step_00000010" / "k2.json").unlink()
    assert steps(checkpoints) == [5]
    folder, doubt = latest_checkpoint(checkpoints)
    assert folder.name == "step_00000005"
    assert "says 'step_00000010', which is no complete checkpoint" in doubt


def test_missing_pointer_takes_the_newest_and_says_so(saved):
    checkpoints = saved(5, 10)
    (checkpoints / "latest").unlink()
    folder, doubt = latest_checkpoint(checkpoints)
    assert (folder.name, doubt) == ("step_00000010", f"{checkpoints / 'latest'} is missing")


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\n", b" \n\n", b"\x00" * 14, b"\xff\xfe\x80"),  # empty, of spaces, zeroed by a power cut, garbage
        *(b"step_00000003"[:cut] for cut in (1, 4, 5, 8, 12)),
        *(b"step_00000005\n", b"step_00000099\n", b"step_00000001\n"),  # ahead of the files, behind them
        *(b"step_3\n", b"step_000000003\n", b"STEP_00000003\n", b"3\n"),
        *(b".\n", b"../elsewhere\n", b"/tmp\n", b"damaged_step_00000003\n", b".step_00000003.writing\n"),
        *(b"step_00000003 step_00000002\n", b"step_00000002/../step_00000003\n"),
    ],
)
def test_pointer_that_names_no_checkpoint_takes_the_newest_and_says_so(saved, content):
    checkpoints = saved(2, 3)
    for name in ("damaged_step_00000003", ".step_00000003.writing", "step_00000005"):  # the last without a manifest
        (checkpoints / name).mkdir()
    (checkpoints / "latest").write_bytes(content)
    folder, doubt = latest_checkpoint(checkpoints)
    assert folder == checkpoints / "step_00000003"
    assert "which is no complete checkpoint" in doubt


def test_pointer_that_is_a_folder_or_leads_nowhere_takes_the_newest(saved):
    checkpoints = saved(2, 3)
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").mkdir()
    assert latest_checkpoint(checkpoints)[0] == checkpoints / "step_00000003"
    (checkpoints / "latest").rmdir()
    (checkpoints / "latest").symlink_to("nowhere")
    folder, doubt = latest_checkpoint(checkpoints)
    assert folder == checkpoints / "step_00000003"
    assert "is missing" in doubt


def test_pointer_to_nothing_with_no_other_is_an_error(tmp_path):
    (tmp_path / "latest").write_text("")
    with pytest.raises(CheckpointError, match="holds no other; put a checkpoint back, or remove the folder"):
        latest_checkpoint(tmp_path)


def test_saving_a_step_again_replaces_it(saved):
    checkpoints = saved(5, 10, 5)
    assert steps(checkpoints) == [10, 5]
    assert latest_checkpoint(checkpoints)[0].name == "step_00000005"
    assert not list(checkpoints.glob(".*"))


def test_unfinished_saves_are_removed_and_nothing_else(saved):
    checkpoints = saved(5)
    start_writing(checkpoints, 10)
    assert steps(checkpoints) == [5]
    assert remove_unfinished(checkpoints) == [".step_00000010.writing"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_00000005"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "pinned", "kept"),
    [
        (None, None, set(), [60, 50, 40, 30, 20, 10]),
        (2, None, set(), [60, 50]),
        (1, None, set(), [60, 50]),  # the newest may turn out damaged: the one before it always stays
        (3, None, set(), [60, 50, 40]),
        (2, 30, set(), [60, 50, 30]),
        (2, 20, {10}, [60, 50, 40, 20, 10]),
        (9, None, set(), [60, 50, 40, 30, 20, 10]),
    ],
)
def test_retention(saved, keep_last, keep_every, pinned, kept):
    checkpoints = saved(10, 20, 30, 40, 50, 60)
    removed = apply_retention(checkpoints, keep_last, keep_every, pinned)
    assert steps(checkpoints) == kept
    assert sorted(removed) == sorted({10, 20, 30, 40, 50, 60} - set(kept))
    assert latest_checkpoint(checkpoints)[0].name == "step_00000060"


def test_shares_of_the_files_cover_each_file_once(saved):
    folder = complete_checkpoints(saved(5))[0]
    manifest = read_manifest(folder)
    for name in ("a", "b", "c"):
        (folder / name).write_text("other")
    for parts in (1, 2, 3, 5):
        problems = [problem for part in range(parts) for problem in verify_files(folder, manifest, part, parts)]
        assert len(problems) == 3, parts


def test_manifest_of_another_format_is_refused(saved):
    folder = complete_checkpoints(saved(5))[0]
    manifest = json.loads((folder / "k2.json").read_text())
    (folder / "k2.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1"):
        read_manifest(folder)


def test_folder_of_another_name_has_no_step(tmp_path):
    with pytest.raises(CheckpointError, match=re.escape("should look like step_00000941")):
        step_of(tmp_path / "step_12.old")


def test_what_torch_asks_to_sync_is_out_of_the_buffer(tmp_path):
    with HashingWriter(tmp_path).fs.create_stream(tmp_path / "file", "wb") as stream:
        stream.write(b"short")
        os.fsync(stream.fileno())  # as torch's writer does
        assert (tmp_path / "file").read_bytes() == b"short"


def test_folder_is_made_with_those_above_it_and_each_is_synced(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(durable, "sync", synced.append)
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    assert synced == [tmp_path, tmp_path / "a"]
