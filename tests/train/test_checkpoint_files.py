"""Checkpoint folders as files: what is complete, which is the latest, which ones go."""

import errno
import json
import os
import re
from pathlib import Path
from traceback import StackSummary

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from k2_megatron.config import load_config
from k2_megatron.runtime import durable
from k2_megatron.runtime.durable import make_folder
from k2_megatron.train.checkpoints.file_hash import hash_file
from k2_megatron.train.checkpoints.folders import (
    apply_retention,
    candidate_checkpoints,
    complete_checkpoints,
    first_cause,
    latest_checkpoint,
    publish,
    remove_unfinished,
    set_damaged_aside,
    set_incomplete_aside,
    set_later_aside,
    start_writing,
)
from k2_megatron.train.checkpoints.hashing_writer import HashingWriter
from k2_megatron.train.checkpoints.manifest import (
    CheckpointError,
    CheckpointVersionError,
    content_hash,
    manifest_text,
    read_manifest,
    step_of,
    verify_files,
)
from k2_megatron.train.summary import resume_changes

FACTS = {"layout": "tp1", "precision": "float32", "weights": "00", "config": {}, "optimizer_step": 1234}
MANIFEST_OF_BEFORE = """\
{
 "format": 1,
 "layout": "tp1",
 "precision": "float32",
 "weights": "00",
 "config": {},
 "step": 5,
 "files": {
  "a": {
   "bytes": 11,
   "xxh3": "0b19d9ffdf7fb6eeb3423b669b9a1060"
  }
 },
 "xxh3": "a718d6de4fdd3dbc02b4e088304a7425"
}"""


@pytest.fixture
def saved(tmp_path):
    """saved(step, ...) -> the folder of checkpoints after saving these steps one after the other."""

    def save(*steps: int) -> Path:
        for step in steps:
            aside = start_writing(tmp_path, step)
            for name in ("a", "b", "c"):
                (aside / name).write_text(f"{name} of step {step}")
            publish(aside, {**FACTS, "step": step, "files": {"a": hash_file(aside / "a")}})
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
    (checkpoints / ".latest.writing").touch()
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


def test_share_of_a_rank_is_what_it_wrote(tmp_path):
    """And what it loads in the same layout, so that it is read from the storage once; others are dealt evenly."""
    written = [f"__{rank}_{number}.distcp" for rank in range(12) for number in range(2)]
    converted = [f"__3_weights_layer{layer}.distcp" for layer in range(10, 20)]
    others = [".metadata", *converted, "common.pt"]
    manifest = {"files": {name: {} for name in [*written, *others]}}
    missing = [verify_files(tmp_path, manifest, rank, 12) for rank in range(12)]
    for rank, problems in enumerate(missing):
        expected = [f"{tmp_path / name} is missing" for name in [*written[2 * rank : 2 * rank + 2], others[rank]]]
        assert sorted(problems) == sorted(expected)


def test_manifest_of_another_format_is_refused(saved):
    folder = complete_checkpoints(saved(5))[0]
    manifest = json.loads((folder / "k2.json").read_text())
    (folder / "k2.json").write_text(manifest_text({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="has format 99, this version reads 1 and 2;"):
        read_manifest(folder)


@pytest.mark.parametrize("digit", ["1235", "9234", "12345"])
def test_altered_digit_of_the_manifest_is_seen(saved, digit):
    """Nothing else knows how many updates Adam has made."""
    path = complete_checkpoints(saved(5))[0] / "k2.json"
    path.write_text(path.read_text().replace("1234", digit))
    with pytest.raises(CheckpointError, match=r"k2\.json is damaged \(its content was altered"):
        read_manifest(path.parent)


def test_checkpoint_of_before_aes_lanes_is_sound_and_its_damage_is_found(tmp_path):
    """Its manifest to the byte as an earlier version wrote it."""
    folder = tmp_path / "step_00000005"
    folder.mkdir()
    (folder / "a").write_text("a of step 5")
    (folder / "k2.json").write_text(MANIFEST_OF_BEFORE)
    manifest = read_manifest(folder)
    assert verify_files(folder, manifest) == []
    (folder / "a").write_text("b of step 5")
    assert verify_files(folder, manifest) == [
        f"{folder / 'a'} was altered after it was written (its xxh3 hash differs)"
    ]
    (folder / "k2.json").write_text(MANIFEST_OF_BEFORE.replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match=r"k2\.json is damaged \(its content was altered"):
        read_manifest(folder)


@pytest.mark.parametrize("hashes", [{}, {"xxh7": "0"}, {"xxh3": 0}, {"xxh3": "0", "aes_lanes": "0"}])
def test_file_without_a_hash_that_is_known_is_told(saved, hashes):
    folder = complete_checkpoints(saved(5))[0]
    manifest = json.loads((folder / "k2.json").read_text())
    (folder / "k2.json").write_text(manifest_text({**manifest, "files": {"a": {"bytes": 1, **hashes}}}))
    with pytest.raises(CheckpointError, match=r"says of the file 'a' is no size and hash \(aes_lanes or xxh3\)"):
        read_manifest(folder)


def test_manifest_of_before_its_own_hash_is_read(saved):
    path = complete_checkpoints(saved(5))[0] / "k2.json"
    manifest = json.loads(path.read_text())
    del manifest["xxh3"]
    path.write_text(json.dumps(manifest))
    assert read_manifest(path.parent) == manifest
    path.write_text(json.dumps({**manifest, "xxh7": content_hash(manifest)}))
    with pytest.raises(CheckpointError, match=r"k2\.json is damaged \(its content was altered"):
        read_manifest(path.parent)


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "1", '"k2"', "{}", '{"format": "1"}', '{"format": 1}', "[" * 100_000),
        '{"format": 1, "step": 5, "layout": "a", "precision": "b", "weights": "c", "config": {}}',
        '{"format": 1, "step": 5, "layout": "a", "precision": "b", "weights": "c", "config": {}, "files": {"a": 1}}',
        '{"format": 1, "step": 5, "layout": "a", "precision": "b", "weights": "c", "config": {}, '
        '"files": {"../a": {"bytes": 1, "xxh3": ""}}}',
    ],
)
def test_manifest_of_the_wrong_form_is_damaged(saved, content):
    folder = complete_checkpoints(saved(5))[0]
    (folder / "k2.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"k2\.json is damaged") as raised:
        read_manifest(folder)
    assert not isinstance(raised.value, CheckpointVersionError)


def test_retention_leaves_what_latest_names(saved):
    """Set back by hand to go on from an earlier step: the later ones are newer by their number alone."""
    checkpoints = saved(2, 4, 6, 8)
    (checkpoints / "latest").write_text("step_00000002\n")
    apply_retention(checkpoints, 2, None, set())
    assert steps(checkpoints) == [8, 6, 2]


def test_later_checkpoints_are_set_aside_whole_and_never_removed(saved):
    checkpoints = saved(2, 4, 6)
    assert set_later_aside(checkpoints, checkpoints / "step_00000002") == [
        *("abandoned_step_00000006", "abandoned_step_00000004"),
    ]
    saved(4)
    assert set_later_aside(checkpoints, checkpoints / "step_00000002") == ["abandoned_step_00000004.2"]
    assert steps(checkpoints) == [2]
    assert (checkpoints / "abandoned_step_00000004" / "a").read_text() == "a of step 4"


def test_damaged_checkpoints_of_one_step_are_all_kept(saved):
    """A step is saved again after its checkpoint was set aside, and may be damaged again."""
    checkpoints = saved(2, 4)
    first = set_damaged_aside(checkpoints / "step_00000004")
    (first / "a").write_text("evidence")
    (saved(4) / "step_00000004" / "k2.json").unlink()
    assert set_incomplete_aside(checkpoints) == ["damaged_step_00000004.2"]
    assert (first / "a").read_text() == "evidence"
    assert (checkpoints / "damaged_step_00000004.2" / "a").read_text() == "a of step 4"
    assert steps(checkpoints) == [2]


def test_one_before_the_damaged_one_is_tried_first(saved):
    checkpoints = saved(2, 4, 6, 8)
    (checkpoints / "latest").write_text("step_00000004\n")
    candidates, _ = candidate_checkpoints(checkpoints)
    assert [step_of(folder) for folder in candidates] == [4, 2, 8, 6]


def test_replaced_checkpoint_stays_until_the_new_one_has_its_name(saved, monkeypatch):
    """A kill at any rename of a step saved again leaves the old or the new one."""

    class Killed(BaseException):
        pass

    checkpoints = saved(4, 5)
    rename, left = os.rename, []

    def dies(old, new):
        if not left:
            raise Killed
        left.pop()
        rename(old, new)

    monkeypatch.setattr(os, "rename", dies)
    for renames in range(2):
        left[:] = [None] * renames
        with pytest.raises(Killed):
            saved(5)
        monkeypatch.undo()
        remove_unfinished(checkpoints)
        assert steps(checkpoints) == [5, 4], renames
        assert verify_files(checkpoints / "step_00000005", read_manifest(checkpoints / "step_00000005")) == []
        assert not list(checkpoints.glob(".*"))
        monkeypatch.setattr(os, "rename", dies)


def test_failed_rename_puts_the_replaced_checkpoint_back(saved, monkeypatch):
    checkpoints = saved(5)
    rename = os.rename

    def fails(old, new):
        if Path(old).name.endswith(".writing"):
            raise OSError(28, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="No space"):
        saved(5)
    assert steps(checkpoints) == [5]


def test_what_a_save_cannot_remove_before_it_begins_is_told_as_it_is(tmp_path, monkeypatch):
    """Not as a folder that exists, which would invite to delete it."""
    start_writing(tmp_path, 6)

    def refused(path):
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr("k2_megatron.train.checkpoints.folders.shutil.rmtree", refused)
    with pytest.raises(PermissionError, match=r"not permitted: .*step_00000006\.writing"):
        start_writing(tmp_path, 6)


def test_words_of_torchs_zip_writer_on_a_full_disk_say_so():
    class Full:
        def write(self, data) -> int:
            if len(data) > 1000:  # the header has room
                raise OSError(28, "No space left on device")
            return len(data)

    with pytest.raises(RuntimeError, match="unexpected pos") as caught:
        torch.save(torch.zeros(1000), Full())
    trace = StackSummary()
    for error in (caught.value, CheckpointException("write", {1: (caught.value, trace)})):
        assert first_cause(error).endswith("(the disk may be full)")
    assert "full" not in first_cause(CheckpointException("read", {1: (RuntimeError("damaged"), trace)}))
    closing = RuntimeError("basic_ios::clear: iostream error")  # of its other writer, when it closes the file
    assert first_cause(closing).endswith("(the disk may be full)")


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


@pytest.mark.parametrize("found", [{}, {"data": "0" * 32}, {"data": 7, "chain": "0" * 32}])
def test_manifest_that_says_nothing_of_its_data_is_named(small_config, tmp_path, found):
    """One of another tool, or of a version to come: it is no KeyError."""
    config = load_config(small_config)
    manifest = {"step": 1, "config": config.model_dump(exclude_none=True), **found}
    with pytest.raises(CheckpointError, match=r"k2.json does not say what data it was trained on .*start_from"):
        resume_changes(config, manifest, tmp_path / "step_00000001", set())
