"""A run that ends by an error while a save is written in the background: its code is the error's own, and a save that
all ranks can finish is finished."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from rank_processes import pretrain
from run_results import events_of
from small_run import overrides

from k2_megatron.runtime.mistakes import INTERRUPTED, STOPPED
from k2_megatron.train.checkpoints.folders import complete_checkpoints

SETTINGS = {
    "parallel.data": 2,
    "train.steps": 100,
    "checkpoint.every_steps": 6,
    "checkpoint.asynchronous": True,
    "watchdog.minimum_seconds": 1.0,
}


def _end_in_step_8(how: str, write_seconds: float) -> None:
    """The save of step 6 takes long, so that it is still written when the run ends in step 8."""
    import k2_megatron.train.checkpoints.save as checkpoint_save
    import pretrain_k2
    from k2_megatron.runtime import mistakes
    from k2_megatron.runtime.mistakes import StopRun
    from k2_megatron.train import watchdog

    watchdog.GRACE_SECONDS = 0.5  # a hang would be told, and the rank ended, some 3 s after the limit of a step
    write, train_step = checkpoint_save._Plan.write, pretrain_k2.train_step

    def slowly(*arguments):
        time.sleep(write_seconds)
        return write(*arguments)

    def ends(config, parts, feed, step, **more):
        if step == 7 and how == "stop":
            raise StopRun("all ranks stop")
        if step == 7 and parts.groups.rank == 1 and how == "error":
            raise RuntimeError("one rank fails")
        if step == 7 and parts.groups.rank == 0 and how == "interrupt":
            mistakes.time.sleep = lambda _seconds: os.kill(os.getpid(), signal.SIGINT)  # impatient: once more
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(config, parts, feed, step, **more)

    checkpoint_save._Plan.write, pretrain_k2.train_step = slowly, ends


def end(small_config: Path, tmp_path: Path, how: str, write_seconds: float) -> tuple[list, float]:
    given = overrides({"run.folder": tmp_path / "run", **SETTINGS})
    began = time.monotonic()
    outcomes = pretrain(2, small_config, given, tmp_path / "output", partial(_end_in_step_8, how, write_seconds))
    return outcomes, time.monotonic() - began


def test_ranks_that_stop_together_finish_the_save_and_are_not_called_hung(small_config, tmp_path):
    outcomes, _ = end(small_config, tmp_path, "stop", 7.0)
    assert [outcome.exit_code for outcome in outcomes] == [STOPPED, STOPPED], outcomes[0].stderr
    assert "all ranks stop; the last save was step 6\n" in "".join(outcome.stderr for outcome in outcomes)
    assert [folder.name for folder in complete_checkpoints(tmp_path / "run" / "checkpoints")] == ["step_00000006"]
    assert [event["step"] for event in events_of(tmp_path / "run", "checkpoint")] == [6]
    assert events_of(tmp_path / "run", "incident") == []


@pytest.mark.parametrize(("how", "rank", "code"), [("error", 1, 1), ("interrupt", 0, INTERRUPTED)])
def test_one_rank_that_fails_or_is_not_to_wait_leaves_at_once(small_config, tmp_path, how, rank, code):
    outcomes, seconds = end(small_config, tmp_path, how, 150.0)
    assert outcomes[rank].exit_code == code, outcomes[rank].stderr
    assert seconds < 100, "it waited for the save"
    assert complete_checkpoints(tmp_path / "run" / "checkpoints") == []
