"""A run folder has one run: a second start is refused, a stranger's line in the ledger is kept, orphans leave."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from run_results import events_of
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.data.ledger import Ledger
from k2_megatron.train import run_folder
from k2_megatron.train.run_folder import hold_run_folder

REPOSITORY = Path(__file__).resolve().parents[2]


def test_a_second_run_in_the_folder_is_refused(small_config, tmp_path, monkeypatch):
    config = load_config(small_config, [f"run.folder={tmp_path / 'run'}"])
    monkeypatch.setattr(run_folder, "TAKEOVER_SECONDS", 0.2)
    beats = tmp_path / "run" / "heartbeats"
    beats.mkdir(parents=True)
    (beats / "rank_00000.json").write_text('{"rank": 0, "time": 5.0, "host": "n1", "pid": 77}')
    lock = hold_run_folder(config)
    who = "the last sign of life is of process 77 on n1, an old one"
    with pytest.raises(ValueError, match=rf"another process is training in .*run: it has held the lock .* {who}"):
        hold_run_folder(config)
    lock.close()
    hold_run_folder(config).close()


@pytest.mark.parametrize("refused", ["lock", "config"])
def test_a_folder_that_cannot_be_written_is_one_line(small_config, tmp_path, monkeypatch, refused):
    config = load_config(small_config, [f"run.folder={tmp_path / 'file' / 'run'}"])
    (tmp_path / "file").touch()
    says = r"run\.folder .*file/run cannot be written \(Not a directory: .*file/run\); make room or restore access"
    with pytest.raises(ValueError, match=says):
        hold_run_folder(config) if refused == "lock" else run_folder.write_config(config)

    def failing(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO), "file")

    for name in ("make_folder", "write_file"):
        monkeypatch.setattr(run_folder, name, failing)
    config = load_config(small_config, [f"run.folder={tmp_path / 'run'}"])
    with pytest.raises(OSError):  # the next start may find it well: no mistake of the user's
        hold_run_folder(config) if refused == "lock" else run_folder.write_config(config)


def test_lock_of_a_machine_that_died_is_taken_over_when_its_lease_ends(small_config, tmp_path, monkeypatch):
    """NFS lets go of a dead client's lock after its lease; Slurm starts the job again before that."""
    config = load_config(small_config, [f"run.folder={tmp_path / 'run'}"])
    dead, looks = hold_run_folder(config), []

    def sleep(_seconds):
        looks.append(1)
        if len(looks) == 3:
            dead.close()

    monkeypatch.setattr(time, "sleep", sleep)
    hold_run_folder(config).close()
    assert len(looks) == 3


def test_lock_of_a_run_that_lives_is_refused_at_its_next_heartbeat(small_config, tmp_path, monkeypatch):
    config = load_config(small_config, [f"run.folder={tmp_path / 'run'}"])
    (tmp_path / "run" / "heartbeats").mkdir(parents=True)
    beat = tmp_path / "run" / "heartbeats" / "rank_00003.json"
    beat.write_text('{"rank": 3, "time": 5.0, "host": "n1", "pid": 77}')
    lock, looks = hold_run_folder(config), []

    def sleep(_seconds):
        looks.append(1)
        if len(looks) == 2:
            beat.write_text('{"rank": 3, "time": 6.0, "host": "n1", "pid": 77}')

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(ValueError, match=r"rank 3 has just given a sign of life \(of process 77 on n1\)"):
        hold_run_folder(config)
    assert len(looks) == 2
    lock.close()


@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_a_heartbeat_that_changes_refuses_the_second_run(small_config, tmp_path, monkeypatch, alive):
    folder = tmp_path / "run"
    config = load_config(small_config, [f"run.folder={folder}", "watchdog.heartbeat_seconds=0.4"])

    def no_locks(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    hold_run_folder(config).close()  # nobody was ever here
    (folder / "heartbeats").mkdir()
    beat = folder / "heartbeats" / "rank_00003.json"
    beat.write_text('{"rank": 3, "time": 5.0}')
    if alive:
        monkeypatch.setattr(time, "sleep", lambda _: beat.write_text('{"rank": 3, "time": 6.0}'))
        with pytest.raises(ValueError, match=r"another process is training in .*run: rank 3 has just given a sign"):
            hold_run_folder(config)
    else:
        hold_run_folder(config).close()


def test_a_line_that_another_process_appended_is_not_cut_off(tmp_path):
    ours, strangers = Ledger(tmp_path), Ledger(tmp_path)
    strangers.amend("defer", from_sample=8, sequence_length=32, reason="by hand", samples=(0, 4))
    with pytest.raises(ValueError, match="another process has appended"):
        ours.record_position(8, "00")
    assert [entry["reason"] for entry in Ledger(tmp_path).amendments] == ["by hand"]


@pytest.mark.parametrize("when", ["importing", "training"])
def test_ranks_leave_when_their_launcher_is_killed_and_save_what_there_is(small_config, tmp_path, when):
    folder = tmp_path / "run"
    settings = {"run.folder": folder, "train.steps": 100_000, "train.evaluate_every_steps": 50_000}
    arguments = [part for item in overrides({**settings, "parallel.data": 2}) for part in ("--set", item)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    program = [sys.executable, str(REPOSITORY / "pretrain_k2.py"), str(small_config), *arguments]
    launcher = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while len(ranks := psutil.Process(launcher.pid).children()) < 2:
            assert time.monotonic() < deadline, "no ranks within 120 s"
            time.sleep(0.01)
        while when == "training" and not ((folder / "journal.jsonl").exists() and events_of(folder, "step")):
            assert time.monotonic() < deadline, "no step within 120 s"
            time.sleep(0.1)
        assert len(ranks) == 2
        launcher.kill()
        _, alive = psutil.wait_procs(ranks, timeout=30)
    finally:
        for rank in psutil.Process(launcher.pid).children() if launcher.poll() is None else ranks:
            if rank.is_running():
                rank.kill()
        launcher.kill()
        launcher.wait()
    assert alive == []
    if when == "importing":
        assert not folder.exists()
        return
    (stop,) = events_of(folder, "stop")
    assert stop["reason"] == signal.Signals.SIGTERM.name
    assert stop["saved_step"] == stop["step"]
