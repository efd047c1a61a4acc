"""Storage that fails under a running run: what the run says, that it loses nothing, and how it goes on."""

import errno
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from failing_disk import FailingDisk
from rank_processes import pretrain, results_of
from run_results import steps_of, stored_state
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.data.ledger import Ledger, LedgerNotWritten
from k2_megatron.runtime import durable
from k2_megatron.train.run_data import RunData
from k2_megatron.train.run_folder import hold_run_folder

STEPS = 6
SETTINGS = {"train.steps": STEPS, "checkpoint.every_steps": 2, "train.evaluate_every_steps": STEPS}


def run(small_config: Path, folder: Path, fault=None, **more) -> object:
    number = len(list(folder.parent.glob("output_*")))
    given = overrides({"run.folder": folder, **SETTINGS, **more})
    return pretrain(1, small_config, given, folder.parent / f"output_{number}", fault)[0]


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory) -> Path:
    """The run folder of a run in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("sound") / "run"
    results_of([run(small_config, folder)])
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert steps_of(folder) == steps_of(whole)
    assert stored_state(folder, STEPS) == stored_state(whole, STEPS)


def _before_step_4(act) -> None:
    """Call `act` when the fourth step begins."""
    import pretrain_k2

    train_step, calls = pretrain_k2.train_step, []

    def then(*arguments, **more):
        calls.append(1)
        if len(calls) == 4:
            act()
        return train_step(*arguments, **more)

    pretrain_k2.train_step = then


def _cut_the_shard(path: Path, unseen: bool) -> None:
    if unseen:  # between the look at its size and the reading of it
        from k2_megatron.data.manifest import CheckedTokenFile

        CheckedTokenFile.check_tokens = lambda *_: None
    _before_step_4(partial(os.truncate, path, 0))


@pytest.mark.parametrize("unseen", [False, True], ids=["seen", "in the moment of reading"])
def test_shard_that_is_cut_under_the_run(small_config, text_folder, tmp_path, whole, unseen):
    for suffix in (".bin", ".idx"):
        shutil.copy(text_folder / f"train{suffix}", tmp_path / f"copy{suffix}")
    shard, folder = tmp_path / "copy.bin", tmp_path / "run"
    data = {"data.train": tmp_path / "copy"}
    ended = run(small_config, folder, partial(_cut_the_shard, shard, unseen), **data)
    if unseen:
        assert ended.exit_code == -signal.SIGBUS
        assert "Fatal Python error: Bus error" in ended.stderr and "rows.py" in ended.stderr
    else:
        assert ended.exit_code == 2
        assert ended.stderr.startswith(f"error: {shard}: 0 bytes, and ") and ended.stderr.count("\n") == 1
        assert "something cut it while it was read; " in ended.stderr
    assert max(steps_of(folder)) <= 4
    shutil.copy(text_folder / "train.bin", shard)
    results_of([run(small_config, folder, **data)])
    assert_same(folder, whole)


def _lose_tensorboard(folder: Path) -> None:
    def lose() -> None:
        # In one move: TensorBoard's thread, which opens its file anew for each write, would make it again meanwhile.
        shutil.rmtree((folder / "tensorboard").rename(folder / "lost"))

    _before_step_4(lose)


def test_tensorboard_folder_that_is_lost_or_cannot_be_made(small_config, tmp_path, whole):
    folder, blocked = tmp_path / "run", tmp_path / "blocked"
    results_of([run(small_config, folder, partial(_lose_tensorboard, folder), **{"log.tensorboard": True})])
    assert_same(folder, whole)
    blocked.mkdir()
    (blocked / "tensorboard").write_text("in the way")
    ended = run(small_config, blocked, **{"log.tensorboard": True})
    assert ended.exit_code == 0, ended.stderr
    assert "TensorBoard files cannot be written" in ended.stderr
    assert_same(blocked, whole)


def test_ledger_that_cannot_be_written_ends_the_run_before_the_save(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "ledger.jsonl").symlink_to("/dev/full")
    ended = run(small_config, folder, **{"checkpoint.retry_seconds": 0})
    assert ended.exit_code == 2
    assert (
        ended.stderr.startswith(f"error: {folder}/ledger.jsonl could not be written (") and "make room" in ended.stderr
    )
    assert not list((folder / "checkpoints").glob("step_*"))
    (folder / "ledger.jsonl").unlink()
    results_of([run(small_config, folder)])
    assert_same(folder, whole)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "left in the file"])
@pytest.mark.parametrize("lines", [0, 2])
def test_ledger_line_that_reached_the_file_and_not_the_disk_is_written_again(
    tmp_path, monkeypatch, capsys, error, cut, lines
):
    """On NFS it is fsync that says so, or close. The line of another process is refused nevertheless."""
    data = RunData(SimpleNamespace(fingerprint="00"), None, Ledger(tmp_path), writer=True)
    toy = load_config("examples/toy/toy.toml", ["checkpoint.retry_seconds=10"])
    hasty = load_config("examples/toy/toy.toml", ["checkpoint.retry_seconds=0"])
    for number in range(1, lines + 1):
        data.record_position(hasty, number)
    fsync, truncate, answers = os.fsync, os.truncate, [error, error]

    def refuse(*arguments, call):
        if answers:
            raise OSError(answers.pop(), "refused")
        return call(*arguments)

    monkeypatch.setattr(os, "fsync", partial(refuse, call=fsync))
    monkeypatch.setattr(os, "truncate", truncate if cut else partial(refuse, call=truncate))
    monkeypatch.setattr(durable.time, "sleep", lambda _seconds: None)
    data.record_position(toy, 7)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == f"{data.ledger.path} is not written yet ([Errno {error}] refused); trying again in 1 s"
    assert "start again" not in "".join(told)
    assert [entry["step"] for entry in Ledger(tmp_path).entries] == [*range(1, lines + 1), 7]

    answers.append(error)
    with pytest.raises(LedgerNotWritten, match="make room or restore access, and start again"):
        data.record_position(hasty, 8)
    Ledger(tmp_path).amend("skip", chunk=3, from_sample=0, sequence_length=8, reason="by hand")
    with pytest.raises(ValueError, match="another process has appended"):
        data.record_position(hasty, 8)


def _lose_the_file_system(folder: Path) -> None:
    """From step 4 on every call in the run folder fails, as on a file server that restarts: for 2 s; and then the first
    of retention."""
    disk, lost = FailingDisk(folder), []

    def fails(_number: int) -> int:
        if time.monotonic() < lost[0]:
            return errno.ESTALE
        if disk.calls[-1:] and ".removed" in disk.calls[-1] and len(lost) == 1:
            lost.append(0.0)
            return errno.EIO
        return 0

    def lose() -> None:
        lost.append(time.monotonic() + 2.0)
        disk.fails = fails

    _before_step_4(lose)


def test_file_system_that_is_gone_for_a_while_is_waited_for(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    more = {"checkpoint.keep_last": 2, "watchdog.heartbeat_seconds": 0.5}
    ended = run(small_config, folder, partial(_lose_the_file_system, folder), **more)
    assert ended.exit_code == 0, ended.stderr
    assert "ledger.jsonl is not written yet ([Errno 116] Stale file handle" in ended.stderr
    assert "; trying again in 1 s" in ended.stderr
    assert "journal: cannot write" in ended.stderr and "heartbeat cannot be written" in ended.stderr
    assert_same(folder, whole)


def _wait_for_no_lock() -> None:
    from k2_megatron.train import run_folder

    run_folder.TAKEOVER_SECONDS = 0.2


def test_second_start_in_a_folder_is_refused_and_does_the_first_no_harm(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    config = load_config(small_config, overrides({"run.folder": folder, **SETTINGS}))
    shutil.copytree(whole, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with hold_run_folder(config):
        ended = run(small_config, folder, _wait_for_no_lock)
    assert ended.exit_code == 2
    assert f"error: another process is training in {folder}" in ended.stderr
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
