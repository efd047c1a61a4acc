"""Folders of checkpoints that may not be written or read, that are links, or that another version wrote."""

import ctypes
import errno
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from endings import INTERRUPTED, MISTAKE, says_one_line

from k2_megatron.runtime.journal import read_events
from k2_megatron.train.checkpoints import restricted_loading
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.hashing_writer import HashingWriter
from k2_megatron.train.checkpoints.manifest import manifest_text, read_manifest, verify_files

SETTINGS = {"train.steps": 6, "checkpoint.every_steps": 2, "checkpoint.retry_seconds": 0}


@pytest.fixture
def newest(finished_run: Path, tmp_path: Path) -> Path:
    """The newest checkpoint of a copy of a finished run."""
    return Path(shutil.copytree(finished_run, tmp_path / "run")) / "checkpoints" / "step_00000006"


def test_checkpoint_of_a_later_version_stops_the_run_and_stays(attempt, newest):
    """It is not damaged: setting it aside and going on from an older one would lose what it holds."""
    manifest = json.loads((newest / "k2.json").read_text())
    (newest / "k2.json").write_text(manifest_text({**manifest, "format": 3}))
    outcomes = attempt(SETTINGS)
    says_one_line(outcomes, MISTAKE, "k2.json has format 3, this version reads 1 and 2; use the version of k2_megatron")
    assert newest.is_dir()
    last = [event["event"] for event in read_events(newest.parents[1] / "journal.jsonl")][-1]
    assert last == "stop", "of the run before: nothing was begun"


def root_may_do_no_more_than_others() -> None:
    """Drop the capabilities of this process: permissions then bind it even when tests run as root."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None).capset(header, none) == 0


@pytest.fixture
def shut(newest: Path) -> Iterator:
    """shut(path, mode) -> path, opened again when the test is over."""
    paths = []

    def change(path: Path, mode: int) -> Path:
        paths.append(path)
        path.chmod(mode)
        return path

    yield change
    for path in paths:
        path.chmod(0o755)


def without_newest(newest: Path) -> Path:
    """The folder of checkpoints, in which four is the newest."""
    shutil.rmtree(newest)
    (newest.parent / "latest").write_text("step_00000004\n")
    return newest.parent


def attempt_without_rights(attempt):
    return attempt(SETTINGS, fault=root_may_do_no_more_than_others)


def last_resume(checkpoints: Path) -> dict:
    return [event for event in read_events(checkpoints.parent / "journal.jsonl") if event["event"] == "resume"][-1]


def test_folder_that_may_not_be_written(attempt, newest, shut):
    checkpoints = shut(without_newest(newest), 0o555)
    outcomes = attempt_without_rights(attempt)
    says_one_line(
        outcomes,
        MISTAKE,
        f"step 6 could not be saved under {checkpoints}: PermissionError: [Errno 13] Permission denied",
        "earlier checkpoints are untouched. Make room or restore access, and start again",
    )
    assert last_resume(checkpoints)["step"] == 4
    assert all(verify_files(folder, read_manifest(folder)) == [] for folder in complete_checkpoints(checkpoints))
    checkpoints.chmod(0o755)
    (outcome,) = attempt(SETTINGS)
    assert (outcome.exit_code, newest.is_dir()) == (0, True), outcome.stderr


@pytest.mark.parametrize("what", ["all", "one"])
def test_folder_that_may_not_be_read_is_not_taken_for_empty(attempt, newest, shut, what):
    place = shut(newest.parent if what == "all" else newest, 0o000)
    says_one_line(attempt_without_rights(attempt), MISTAKE, f"{place}", "cannot be read (Permission denied); restore")


def test_file_that_may_not_be_read_is_named(attempt, newest, shut):
    shut(newest / "__0_0.distcp", 0o000)
    (outcome,) = attempt_without_rights(attempt)
    assert outcome.exit_code == 0, outcome.stderr
    resume = last_resume(newest.parent)
    assert (resume["step"], "__0_0.distcp cannot be read (Permission denied)" in resume["doubts"][0]) == (4, True)
    shut(newest.with_name(f"damaged_{newest.name}") / "__0_0.distcp", 0o644)


def test_damaged_checkpoint_that_cannot_be_set_aside(attempt, newest, shut):
    (newest / "common.pt").write_bytes(b"")
    shut(newest.parent, 0o555)
    says_one_line(
        attempt_without_rights(attempt),
        MISTAKE,
        "step_00000006 is damaged (",
        "common.pt has 0 bytes",
        "cannot be set aside (Permission denied); restore access, or remove it",
    )


def test_folder_of_checkpoints_on_another_disk(attempt, newest, tmp_path):
    """A link in its place is followed: what is read and written is there."""
    checkpoints = without_newest(newest)
    elsewhere = Path(shutil.move(checkpoints, tmp_path / "elsewhere"))
    checkpoints.symlink_to(elsewhere)
    (outcome,) = attempt(SETTINGS)
    assert outcome.exit_code == 0, outcome.stderr
    assert last_resume(checkpoints)["step"] == 4
    assert (elsewhere / "latest").read_text() == "step_00000006\n"
    assert checkpoints.is_symlink()


def test_links_to_checkpoints_and_latest_that_is_a_link(attempt, newest, tmp_path):
    """A link to a whole checkpoint is one; retention removes the link and not what it names; a dangling one is none;
    `latest` as a link to a folder, as other programs make it, is no name: the newest is taken."""
    checkpoints = without_newest(newest)
    elsewhere = Path(shutil.move(checkpoints / "step_00000002", tmp_path / "kept"))
    (checkpoints / "step_00000002").symlink_to(elsewhere)
    (checkpoints / "step_00000005").symlink_to(tmp_path / "gone")
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to(checkpoints / "step_00000004")
    (outcome,) = attempt({**SETTINGS, "checkpoint.keep_last": 2})
    assert outcome.exit_code == 0, outcome.stderr
    resume = last_resume(checkpoints)
    assert (resume["step"], "says 'nothing (Is a directory)'" in resume["doubts"][0]) == (4, True)
    assert [folder.name for folder in complete_checkpoints(checkpoints)] == ["step_00000006", "step_00000004"]
    assert (elsewhere / "k2.json").is_file()
    assert not os.path.lexists(checkpoints / ".step_00000002.removed")
    assert (checkpoints / "latest").read_text() == "step_00000006\n"


def no_space_left() -> None:
    """Every write of a checkpoint's file fails, as on a full disk."""
    import k2_megatron.train.checkpoints.hashing_writer as hashing_writer

    def write(self, data) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    hashing_writer._HashingStream.write = write


def test_full_disk_under_a_save_in_the_background(attempt, newest):
    checkpoints = without_newest(newest)
    outcomes = attempt({**SETTINGS, "checkpoint.asynchronous": True}, fault=no_space_left)
    says_one_line(outcomes, MISTAKE, "step 6 could not be saved", "No space left on device", "earlier checkpoints are")
    assert (checkpoints / "latest").read_text() == "step_00000004\n"
    (outcome,) = attempt({**SETTINGS, "checkpoint.asynchronous": True})
    assert outcome.exit_code == 0, outcome.stderr
    assert last_resume(checkpoints)["step"] == 4
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "latest",
        "step_00000002",
        "step_00000004",
        "step_00000006",
    ]


def no_space_left_and_rank_1_slow_to_know() -> None:
    """As `no_space_left`; of the ranks one learns of it several steps after the other."""
    import time

    import k2_megatron.train.checkpoints.save as checkpoint_save

    no_space_left()
    right = checkpoint_save.CheckpointWriter._write

    def write(self, *arguments):
        try:
            return right(self, *arguments)
        finally:
            time.sleep(2.0 * int(os.environ["RANK"]))

    checkpoint_save.CheckpointWriter._write = write


def test_failed_save_in_the_background_ends_every_rank_at_the_same_step(attempt, newest):
    """One that left at once would have the other fail with a broken connection, which is then what is read."""
    without_newest(newest)
    settings = {**SETTINGS, "train.steps": 12, "checkpoint.every_steps": 5, "checkpoint.asynchronous": True}
    outcomes = attempt({**settings, "parallel.pipeline": 2}, 2, None, no_space_left_and_rank_1_slow_to_know)
    says_one_line(outcomes, MISTAKE, "step 5 could not be saved", "No space left on device")
    assert (newest.parent / "latest").read_text() == "step_00000004\n"


def asked_twice_in(place: type, call: str) -> None:
    """Have `call` of a class find SIGINT sent twice to its process."""
    whole = getattr(place, call)

    def interrupted(*given, **named):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return whole(*given, **named)

    setattr(place, call, interrupted)


def asked_twice_while_loading() -> None:
    asked_twice_in(restricted_loading._Planner, "load_bytes")


def asked_twice_while_saving() -> None:
    asked_twice_in(HashingWriter, "finish")


@pytest.mark.parametrize("when", [asked_twice_while_loading, asked_twice_while_saving])
def test_whoever_does_not_wait_is_not_told_of_a_bad_checkpoint(attempt, newest, when):
    """torch.distributed.checkpoint catches KeyboardInterrupt as it does errors, and makes it one of its own."""
    longer = {**SETTINGS, "train.steps": 8}
    outcomes = attempt(longer, fault=when)
    says_one_line(outcomes, INTERRUPTED, "interrupted; start again to resume from the last save")
    assert complete_checkpoints(newest.parent)[0] == newest
    (outcome,) = attempt(longer)
    assert outcome.exit_code == 0, outcome.stderr
    assert (last_resume(newest.parent)["step"], last_resume(newest.parent)["doubts"]) == (6, [])
