"""A kill at any system call of a save, and of the retention after it, leaves two checkpoints and all permanent ones."""

import os

from k2_megatron.train.checkpoints.folders import (
    apply_retention,
    complete_checkpoints,
    latest_checkpoint,
    publish,
    remove_unfinished,
    set_later_aside,
    start_writing,
)
from k2_megatron.train.checkpoints.hashing_writer import HashingWriter
from k2_megatron.train.checkpoints.manifest import read_manifest, step_of, verify_files

KILLS = 100
KEEP_LAST, KEEP_EVERY, PINNED = 2, 5, {7}
FACTS = {"layout": "tp1", "precision": "float32", "weights": "00", "config": {}, "optimizer_step": 1}
CALLS = ("mkdir", "open", "fsync", "rename", "replace", "unlink", "rmdir")  # of the module os


class Killed(BaseException):
    """Passes every handler of errors, as a SIGKILL passes every handler."""


class _Killer:
    """Counts the system calls of this process, and kills before the one of a number."""

    def __init__(self, monkeypatch) -> None:
        self.calls, self.deadly = 0, None
        for name in CALLS:
            monkeypatch.setattr(os, name, self._counting(getattr(os, name)))

    def _counting(self, call):
        def counted(*arguments, **keywords):
            self.calls += 1
            if self.calls == self.deadly:
                raise Killed
            return call(*arguments, **keywords)

        return counted


def save(checkpoints, step: int) -> None:
    """As the training loop does at a checkpoint, with files of a few bytes."""
    aside = start_writing(checkpoints, step)
    writer = HashingWriter(aside)
    for name in ("a", "b"):
        with writer.fs.create_stream(aside / name, "wb") as stream:
            stream.write(f"{name} of step {step}".encode())
            os.fsync(stream.fileno())
    publish(aside, {**FACTS, "step": step, "files": dict(writer.files)})
    apply_retention(checkpoints, KEEP_LAST, KEEP_EVERY, PINNED)


def test_a_kill_at_any_call_leaves_two_checkpoints_and_the_permanent_ones(tmp_path, monkeypatch):
    killer = _Killer(monkeypatch)
    for step in (1, 2):
        save(tmp_path, step)
    killed, at, saved, step = 0, 0, 2, 3
    permanent = set()
    while killed < KILLS:
        at += 1
        killer.calls, killer.deadly = 0, at
        try:
            save(tmp_path, step)
            at = 0  # one without a kill; the next cycle begins at its first call again
        except Killed:
            killed += 1
        killer.deadly = None
        after_kill = complete_checkpoints(tmp_path)
        remove_unfinished(tmp_path)  # this and the next as a start does
        assert set(after_kill) <= set(complete_checkpoints(tmp_path)), "what a start removes is no checkpoint"
        newest, _ = latest_checkpoint(tmp_path)
        set_later_aside(tmp_path, newest)
        folders = complete_checkpoints(tmp_path)
        found = [step_of(folder) for folder in folders]
        saved = max(saved, step_of(newest))
        permanent |= {step for step in found if step % KEEP_EVERY == 0 or step in PINNED}
        assert len(folders) >= 2, (step, at, found)
        assert permanent <= set(found), (step, at, found)
        assert step_of(newest) == saved in (step - 1, step), (step, at, found)
        assert [problem for folder in folders for problem in verify_files(folder, read_manifest(folder))] == []
        assert not list(tmp_path.glob(".step_*"))
        step = saved + 1
    print(f"{killed} kills over {step} saves; permanent: {sorted(permanent)}")
    assert {5, 7, 10} <= permanent
