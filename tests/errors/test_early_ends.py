"""A run that is stopped, killed or blows up: what it saved, what it said, and that it can go on."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from endings import NOT_FINITE, says_one_line
from out_of_memory import kill_for_want_of_memory
from rank_processes import DEADLINE_SECONDS, Rank, rank_environment, run_pretrain
from small_run import overrides
from torch.distributed import TCPStore

from k2_megatron.runtime.journal import read_events
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import read_manifest, verify_files

# More steps than any test waits for; not evaluated, and saved when asked to stop.
ENDLESS = {
    "train.steps": 1_000_000,
    "train.evaluate_every_steps": "",
    "train.evaluate_batches": "",
    "data.held_out": "",
    "checkpoint.every_steps": 1_000_000,
}
ENDS_WITHIN_SECONDS = 30.0  # all local ranks, after the death of one


@pytest.fixture
def start(small_config: Path, tmp_path: Path) -> Callable[..., Rank]:
    """start(settings) -> a plain start, running, with its folder in tmp_path / "run"."""
    started = []

    def plain(settings: dict[str, object]) -> Rank:
        given = overrides({"run.folder": tmp_path / "run", **ENDLESS, **settings})
        arguments = [str(small_config), *(part for setting in given for part in ("--set", setting))]
        started.append(Rank(run_pretrain, (arguments,), {}, tmp_path / f"output_{len(started)}"))
        return started[-1]

    yield plain
    for rank in started:
        rank.kill()


def events(folder: Path) -> list[dict]:
    journal = folder / "journal.jsonl"
    return list(read_events(journal)) if journal.exists() else []


def wait_for(folder: Path, arrived: Callable[[list[dict]], bool], rank: Rank) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not arrived(events(folder)):
        assert rank.process.is_alive(), rank.finish().stderr
        assert time.monotonic() < deadline, "the run did not get this far"
        time.sleep(0.05)


def last_start(told: list[dict]) -> list[dict]:
    """The events since the newest start."""
    return told[max((place for place, event in enumerate(told) if event["event"] == "start"), default=len(told)) :]


def has_trained(told: list[dict], starts: int) -> bool:
    """Whether two steps were made since the given number of starts."""
    kinds = [event["event"] for event in told]
    return kinds.count("start") == starts and sum(event["event"] == "step" for event in last_start(told)) >= 2


def assert_stopped_by(name: str, folder: Path) -> int:
    """The run's last words: a checkpoint of its last step, and a stop for this reason. Returns the step."""
    told = last_start(events(folder))
    step, checkpoint, stop = told[-3:]
    assert [event["event"] for event in (step, checkpoint, stop)] == ["step", "checkpoint", "stop"]
    assert step["step"] == checkpoint["step"] == stop["step"] == stop["saved_step"]
    assert stop["reason"] == name
    newest = complete_checkpoints(folder / "checkpoints")[0]
    assert verify_files(newest, read_manifest(newest)) == []
    return stop["step"]


def test_signal_to_one_rank_stops_all_after_the_same_step(small_config, tmp_path):
    """As Slurm does with --signal=USR1@60 when it reaches some tasks later than others."""
    folder = tmp_path / "run"
    given = overrides({"run.folder": folder, **ENDLESS, "parallel.pipeline": 2})
    arguments = [str(small_config), *(part for setting in given for part in ("--set", setting))]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Rank(run_pretrain, (arguments,), rank_environment(rank, 2, store.port), tmp_path / str(rank))
        for rank in range(2)
    ]
    try:
        wait_for(folder, lambda told: has_trained(told, starts=1), ranks[1])
        os.kill(ranks[1].process.pid, signal.SIGUSR1)
        outcomes = [rank.finish() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert_stopped_by("SIGUSR1", folder)


def test_death_of_a_rank_ends_the_others_and_loses_nothing_saved(start, tmp_path):
    """Through the launcher, with ranks that are programs of their own: killed, started again, stopped by Ctrl-C. Killed
    by the kernel for want of memory, where this machine lets us make control groups."""
    folder = tmp_path / "run"
    settings = {"parallel.pipeline": 2, "checkpoint.every_steps": 5}
    launcher = start(settings)
    wait_for(folder, lambda told: any(event["event"] == "checkpoint" for event in told), launcher)
    ranks = psutil.Process(launcher.process.pid).children()
    assert len(ranks) == 2
    killed = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    if not kill_for_want_of_memory(killed.pid):
        killed.kill()
    _, alive = psutil.wait_procs(ranks, timeout=ENDS_WITHIN_SECONDS)
    assert alive == []
    outcome = launcher.finish(ENDS_WITHIN_SECONDS)
    assert outcome.exit_code == 128 + signal.SIGKILL
    assert "rank 1 was killed by SIGKILL; the other ranks were ended. Start again to resume." in outcome.stderr
    saved = complete_checkpoints(folder / "checkpoints")
    assert saved
    assert all(verify_files(checkpoint, read_manifest(checkpoint)) == [] for checkpoint in saved)

    launcher = start(settings)
    wait_for(folder, lambda told: has_trained(told, starts=2), launcher)
    os.kill(launcher.process.pid, signal.SIGINT)
    outcome = launcher.finish()
    assert outcome.exit_code == 0, outcome.stderr
    (resume,) = [event for event in last_start(events(folder)) if event["event"] == "resume"]
    assert (resume["checkpoint"], resume["doubts"]) == (saved[0].name, [])
    assert assert_stopped_by("SIGINT", folder) > resume["step"]


def test_loss_that_is_not_finite_stops_the_run(attempt, tmp_path):
    # Weights of 1e38 are the first update's doing; the second step's loss is then not finite.
    settings = {
        "optimizer.learning_rate": 1e38,
        "optimizer.min_learning_rate": "",
        "optimizer.schedule": "constant",
        "optimizer.warmup_steps": 0,
        "checkpoint.every_steps": 1,
    }
    outcomes = attempt({**settings, "parallel.pipeline": 2}, ranks=2)
    says_one_line(
        outcomes,
        NOT_FINITE,
        "step 2: loss ",
        "not finite",
        "its batch is samples 8 to 15",
        "; the last save was step 1",
    )
    told = events(tmp_path / "run")
    assert [event["event"] for event in told][-4:] == ["step", "checkpoint", "incident", "incident"]
    assert (told[-1]["kind"], told[-1]["step"], told[-1]["samples"]) == ("not finite", 2, [8, 16])
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step_00000001"]


def test_every_line_of_the_journal_is_json(finished_run):
    lines = (finished_run / "journal.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["event"] for line in lines]
    assert kinds[0] == "start"
    assert kinds[-1] == "stop"
    assert kinds.count("step") == 6
