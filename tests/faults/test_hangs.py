"""A rank that hangs, in computing, reading or saving, is named with its place while the others wait; patience is given
where it is due. The watchdog's clock is moved on by hand: no test waits for a limit, or depends on the machine."""

import contextlib
import errno
import functools
import importlib
import os
import sys
import threading
import time
from pathlib import Path

import pytest
from rank_processes import pretrain
from run_results import events_of

HOURS = 10_000.0  # seconds past every limit of the watchdog
MINUTES = 400.0  # past what follows from an evaluation or a save of a few seconds, not past the limit of the first
BACKGROUND = "save in the background"
SETTINGS = [
    *("parallel.data=2", "train.steps=8", "checkpoint.every_steps=6", "watchdog.heartbeat_seconds=0.5"),
    *("train.evaluate_every_steps=4", "train.evaluate_batches=1"),
]


class _Clock:
    """`time` for the watchdog: `ahead` is added to what the machine says."""

    time, sleep = staticmethod(time.time), staticmethod(time.sleep)

    def __init__(self) -> None:
        self.ahead = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.ahead


def _clock() -> _Clock:
    from k2_megatron.train import watchdog

    watchdog.time = _Clock()
    return watchdog.time


def _replace(place: str, call: int, what) -> None:
    """In the `call`-th call of a function ("module:Class.name"), call `what` before it."""
    module, _, name = place.partition(":")
    *owners, name = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), []

    def called(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call:
            what()
        return original(*arguments, **keywords)

    setattr(owner, name, called)


def _waits_beside() -> threading.Event:
    """Set while the loop waits for a save in the background."""
    from k2_megatron.train.watchdog import Watchdog

    waiting, there = Watchdog.waiting, threading.Event()

    @contextlib.contextmanager
    def told(self):
        with waiting(self):
            there.set()
            yield
            there.clear()

    Watchdog.waiting = told
    return there


def _hang_on_one_rank(place: str, call: int, rank: str, seconds: float, asynchronous: bool, sign: Path) -> None:
    """The rank loops for ever in that call; when the other has come to wait for it, so many seconds pass for both."""
    from k2_megatron.train import watchdog
    from k2_megatron.train.heartbeats import place_of

    watchdog.GRACE_SECONDS = 1.5
    clock, main, waits_beside = _clock(), threading.main_thread().ident, _waits_beside()

    def hang_for_ever() -> None:
        sign.touch()
        while True:
            time.sleep(0.05)

    def waits() -> bool:
        place = place_of(sys._current_frames()[main])
        return place is not None and place.waits

    def let_time_pass() -> None:
        quiet = 0
        while quiet < 5:
            time.sleep(0.1)
            there = waits_beside.is_set() if asynchronous else os.environ["RANK"] == rank or waits()
            quiet = quiet + 1 if sign.exists() and there else 0
        clock.ahead = seconds

    threading.Thread(target=let_time_pass, daemon=True).start()
    if os.environ["RANK"] == rank:
        _replace(place, call, hang_for_ever)


@pytest.mark.parametrize(
    ("place", "call", "rank", "seconds", "phase"),
    [
        ("k2_megatron.train.step:_forward", 11, "1", HOURS, "step"),
        ("k2_megatron.data.feed:Feed._read", 5, "0", HOURS, "step"),
        ("k2_megatron.train.checkpoints.save:_Plan.write", 1, "1", HOURS, "checkpoint"),
        ("k2_megatron.train.checkpoints.save:_Plan.write", 2, "0", MINUTES, "checkpoint"),
        ("k2_megatron.train.checkpoints.save:_Plan.write", 2, "1", MINUTES, BACKGROUND),
        ("pretrain_k2:evaluate", 2, "1", MINUTES, "evaluation"),
    ],
    ids=["forward pass", "data loader", "saving", "saving again", "saving beside the steps", "evaluation again"],
)
def test_hung_rank_is_named_with_its_place(small_config, tmp_path, place, call, rank, seconds, phase):
    folder, asynchronous = tmp_path / "run", phase == BACKGROUND
    fault = functools.partial(_hang_on_one_rank, place, call, rank, seconds, asynchronous, tmp_path / "hangs")
    began = time.monotonic()
    settings = [*SETTINGS, f"checkpoint.asynchronous={str(asynchronous).lower()}", f"run.folder={folder}"]
    outcomes = pretrain(2, small_config, settings, tmp_path / "output", fault)
    print(f"{place}: {time.monotonic() - began:.1f} s in all")
    codes = {outcome.exit_code for outcome in outcomes}
    # The first ends by itself; the other too, or it loses its connection (1), or is killed as by its launcher (-9).
    assert 4 in codes and codes <= {4, 1, -9}
    (incident,) = events_of(folder, "incident")
    assert (incident["kind"], incident["phase"]) == ("hang", phase)
    assert list(incident["behind"]) == [rank], incident
    other = str(1 - int(rank))
    assert incident["places"][other].startswith("waits in ")
    assert f"Behind: rank {rank} (is at " in "".join(outcome.stderr for outcome in outcomes)
    stacks = [path.read_text() for path in sorted((folder / "incidents").glob("*/rank_*.txt"))]
    assert "in hang_for_ever" in stacks[int(rank)] and "in hang_for_ever" not in stacks[int(other)]


def _quarters_of_an_hour_pass() -> None:
    """In the start, the first step, the first evaluation and save, and at last in the seventh step."""
    clock = _clock()

    def pass_on() -> None:
        clock.ahead += 1000.0
        time.sleep(1.2)  # the watchdog looks every half second

    for place, call in (
        ("pretrain_k2:build_model", 1),
        ("k2_megatron.train.step:_forward", 1),
        ("pretrain_k2:evaluate", 1),
        ("k2_megatron.train.checkpoints.save:_Plan.write", 1),
        ("k2_megatron.train.step:_forward", 30),  # of four a step, and four of the evaluation
    ):
        _replace(place, call, pass_on)


def test_a_quarter_of_an_hour_is_a_hang_in_a_step_alone_and_forgiven_when_it_ends(small_config, tmp_path):
    folder = tmp_path / "run"
    settings = [*SETTINGS, "parallel.data=1", "watchdog.minimum_seconds=100.0", f"run.folder={folder}"]
    (outcome,) = pretrain(1, small_config, settings, tmp_path / "output", _quarters_of_an_hour_pass)
    assert outcome.exit_code == 0, outcome.stderr
    assert [(event["phase"], event["step"]) for event in events_of(folder, "incident")] == [("step", 6)]
    assert "it went on after all" in outcome.stderr


def _first_save_takes_a_quarter_of_an_hour() -> None:
    """In the background; the quarter passes when the loop waits for it, at the next save."""
    clock, waits_beside = _clock(), _waits_beside()

    def last() -> None:
        assert waits_beside.wait(60)
        clock.ahead += 1000.0
        time.sleep(1.2)

    _replace("k2_megatron.train.checkpoints.save:_Plan.write", 1, last)


def test_save_that_waits_for_the_first_one_is_no_hang(small_config, tmp_path):
    """The step that the first save in the background took says nothing of how long the save takes."""
    settings = [*SETTINGS, "parallel.data=1", "checkpoint.asynchronous=true", f"run.folder={tmp_path / 'run'}"]
    (outcome,) = pretrain(1, small_config, settings, tmp_path / "output", _first_save_takes_a_quarter_of_an_hour)
    assert outcome.exit_code == 0, outcome.stderr
    assert not events_of(tmp_path / "run", "incident")
    assert [event["step"] for event in events_of(tmp_path / "run", "checkpoint")] == [6, 8]


def _disk_fills_at_the_end_of_each_try() -> None:
    """Of the second save, which is tried twice, each for longer than half of the watchdog's limit."""
    clock = _clock()

    def fill() -> None:
        clock.ahead += 200.0
        time.sleep(1.2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for call in (2, 3):
        _replace("k2_megatron.train.checkpoints.save:_Plan.write", call, fill)


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_disk_that_is_full_at_the_end_of_long_tries_is_no_hang(small_config, tmp_path, asynchronous):
    settings = [*SETTINGS, "parallel.data=1", f"checkpoint.asynchronous={asynchronous}", "checkpoint.retry_seconds=1"]
    settings.append(f"run.folder={tmp_path / 'run'}")
    (outcome,) = pretrain(1, small_config, settings, tmp_path / "output", _disk_fills_at_the_end_of_each_try)
    assert outcome.exit_code == 2, outcome.stderr
    assert "trying again in 1 s" in outcome.stderr and "step 8 could not be saved" in outcome.stderr
    assert not events_of(tmp_path / "run", "incident")
