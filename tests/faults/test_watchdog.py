"""A rank that stops moving ends the whole run, within half a minute, with its name and every stack on disk."""

import errno
import math
import os
import random
import signal
import threading
import time
from collections import deque
from functools import partial
from pathlib import Path
from statistics import median

import pytest
from rank_processes import REPOSITORY, Rank, pretrain, rank_environment, results_of, run_pretrain
from run_results import events_of, events_told
from torch.distributed import TCPStore

from k2_megatron.config import load_config
from k2_megatron.config.schema import Watchdog as Settings
from k2_megatron.runtime.mistakes import HUNG
from k2_megatron.train import watchdog
from k2_megatron.train.heartbeats import ranks_behind
from k2_megatron.train.watchdog import pause_limit_seconds, step_limit_seconds

LIMITS = ["watchdog.minimum_seconds=6.0"]


def test_limit_follows_the_recent_steps():
    settings = Settings(step_factor=10.0, minimum_seconds=60.0, pause_minimum_seconds=200.0, pause_seconds=1800.0)
    assert step_limit_seconds(settings, [25.0, 24.0, 90.0, 25.0]) == 310.0
    assert step_limit_seconds(settings, [0.125] * 50) == 61.25
    assert step_limit_seconds(settings, [0.125] * 50, 64) == 140.0, "seconds a sample, 64 samples"
    assert step_limit_seconds(settings, []) == 1800.0, "it compiles, and nothing is known"
    assert step_limit_seconds(settings, [5.0, 0.1], 2) == 300.0, "as a pause: the first steps compile"
    assert step_limit_seconds(settings, [300.0, 0.1]) == 1800.0


def test_limit_of_a_pause_follows_the_longest_of_its_kind(tmp_path, monkeypatch):
    """What is waited for in it, or tried again, is not counted; the end, which comes once, is measured by the saves."""
    settings = Settings(step_factor=10.0, pause_minimum_seconds=200.0, pause_seconds=1800.0)
    assert pause_limit_seconds(settings, None) == 1800.0
    assert pause_limit_seconds(settings, 0.5) == 205.0
    assert pause_limit_seconds(settings, 500.0) == 1800.0
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.Watchdog, "_watch", lambda self: None)  # the limits are looked at here
    guard = watchdog.Watchdog(Settings(), tmp_path, 0, 1)

    def limit_of(phase: str, seconds: float, *, waited: float = 0.0, failed: float = 0.0) -> float:
        guard.at(phase, 1)
        limit = guard._progress.limit
        with guard.waiting():
            assert guard._progress.limit == math.inf
            now[0] += waited
        assert (guard._progress.limit, guard._progress.since) == (limit, now[0])
        now[0] += failed
        guard.tried_again()
        now[0] += seconds
        return limit

    assert [limit_of("evaluation", 40.0), limit_of("checkpoint", 2.0, waited=500.0)] == [3600.0, 3600.0]
    assert [limit_of("evaluation", 20.0), limit_of("checkpoint", 1.0, failed=500.0)] == [420.0, 306.0]
    assert [limit_of("evaluation", 10.0), limit_of("checkpoint", 20.0)] == [420.0, 306.0]
    assert limit_of("end", 1.0) == 360.0
    guard.stop()


def test_what_goes_on_beside_the_steps_has_a_limit_of_its_own(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.Watchdog, "_watch", lambda self: None)
    guard = watchdog.Watchdog(Settings(), tmp_path, 0, 1)
    with pytest.raises(OSError), guard.beside("save in the background", 1):
        raise OSError("at once: nothing is known of a save that is written")
    assert guard._beside is None
    limits, backstops = [], []
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback_later", lambda limit, **_: backstops.append(limit))
    for seconds in (50.0, 10.0, 10.0):
        with guard.beside("save in the background", 1):
            guard.at("step", 1)
            now[0] += 700.0  # a try that failed
            guard.tried_again()
            assert guard._beside.since == now[0] and guard._progress.since == now[0] - 700.0
            limits.append(guard._beside.limit)
            now[0] += seconds
        assert guard._beside is None
    assert limits == [3600.0, 450.0, 450.0]
    backstops.clear()
    with guard.waiting():
        assert backstops and 3600.0 < backstops[-1] < math.inf
    guard.stop()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_steps_of_the_large_run_raise_no_alarm_and_a_hang_is_found_within_three_of_them(stage, tmp_path, monkeypatch):
    """10,000 steps of about 25 s, one in 10 half as long again (layers, replicas, phases are measured in them), with
    evaluations of ten minutes and saves of five between them, which are no measure of a step."""
    settings = load_config(REPOSITORY / "examples" / "k2_65b" / f"{stage}.toml").watchdog
    now, chance, recent = [0.0], random.Random(1), deque(maxlen=watchdog.RECENT_STEPS)
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watchdog.Watchdog, "_watch", lambda self: None)  # the limits are looked at here
    guard = watchdog.Watchdog(settings, tmp_path, 0, 1)

    def passes(phase: str, step: int, seconds: float) -> float:
        guard.at(phase, step)
        assert seconds < guard._progress.limit, f"a false alarm in {phase} after step {step}"
        now[0] += seconds
        return guard._progress.limit

    for step in range(10_000):
        seconds = 25.0 * chance.lognormvariate(0.0, 0.05) * (1.5 if step % 10 == 9 else 1.0)
        limit = passes("step", step, seconds)
        assert len(recent) < 3 or limit <= 3 * median(recent) + 10 + 1e-6
        recent.append(seconds)
        if step % 50 == 49:
            passes("evaluation", step + 1, 600.0)
            passes("checkpoint", step + 1, 300.0)
    guard.stop()


def test_batch_that_grows_is_no_hang(tmp_path, monkeypatch):
    """K2-65B's could begin with 8 sequences and go on with 2,040: steps of 0.1 s are then steps of 25 s."""
    now = [0.0]
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: now[0])
    settings = Settings(heartbeat_seconds=3600.0)
    guard = watchdog.Watchdog(settings, tmp_path, 0, 1, lambda step: 8 if step < 5 else 2040)
    for step in range(6):
        guard.at("step", step)
        limit = guard._progress.limit
        now[0] += 0.1 if step < 5 else 25.0
    guard.at("end", 6)
    guard.stop()
    assert limit == pytest.approx(3 * 0.1 * 2040 / 8 + 10)
    assert limit > 25.0


def test_ranks_behind_are_named_with_the_reason():
    beats = [
        {"rank": 0, "host": "a", "phase": "step", "step": 7, "time": 100.0, "every_seconds": 10.0},
        {"rank": 1, "host": "a", "phase": "step", "step": 6, "time": 100.0, "every_seconds": 10.0},
        {"rank": 2, "host": "b", "phase": "step", "step": 7, "time": 50.0, "every_seconds": 10.0},
    ]
    assert ranks_behind(beats, 4, 100.5, 5.0) == {
        1: "at step 6 of 7, in step",
        2: "silent for 50 s on b, last in step",
        3: "gave no sign since the start",
    }
    assert ranks_behind(beats[:1], 1, 101.0, 5.0) == {}
    # One that has just said where it is lives, though its host's clock is an hour behind.
    beats[2]["time"] = -3500.0
    told = [beat | {"place": "waits in all_reduce", "waits": True} for beat in beats]
    assert ranks_behind(told[::2], 3, 100.5, 5.0) == {1: "gave no sign since the start"}
    assert ranks_behind([told[0], beats[1] | {"step": 7}], 2, 100.5, 5.0) == {1: "silent for 0 s on a, last in step"}
    told[1] |= {"step": 7, "place": "is at feed.py:9 in read", "waits": False}
    assert ranks_behind(told, 3, 100.5, 5.0) == {1: "is at feed.py:9 in read"}


def _places_while_rank_0_works_alone(folder: Path) -> None:
    """Each rank notes its phase; rank 0 notes all of them after a while of removing checkpoints, or of a dossier."""
    from k2_megatron.train import saves
    from k2_megatron.train.spikes.detector import Finding
    from k2_megatron.train.spikes.watch import SpikeWatch

    rank, at = os.environ["RANK"], watchdog.Watchdog.at

    def noted(self, phase: str, step: int) -> None:
        (folder / f"phase_{rank}").write_text(phase)
        at(self, phase, step)

    def slowly(name: str, right):
        def then(*arguments):
            if rank == "0":
                time.sleep(0.5)
                with (folder / name).open("a") as file:
                    print(*((folder / f"phase_{number}").read_text() for number in range(2)), file=file)
            return right(*arguments)

        return then

    watchdog.Watchdog.at = noted
    saves.apply_retention = slowly("retention", saves.apply_retention)
    SpikeWatch.write_dossier = slowly("dossier", SpikeWatch.write_dossier)
    observe = SpikeWatch.observe

    def spike_at_step_2(self, event, sample_losses):
        observe(self, event, sample_losses)
        return Finding("spike", 2, 2, 2, 30.0, 9.0, 1.5, 0.3) if event["step"] == 2 else None

    SpikeWatch.observe = spike_at_step_2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_rank_is_in_a_step_while_rank_0_removes_checkpoints_or_writes_a_dossier(
    small_config, tmp_path, asynchronous
):
    """It would wait for rank 0 within the limit of a step, which a slow file system takes no notice of."""
    sets = ["parallel.data=2", "train.steps=6", "checkpoint.every_steps=2", "checkpoint.keep_last=2"]
    sets += [f"checkpoint.asynchronous={str(asynchronous).lower()}", f"run.folder={tmp_path / 'run'}"]
    fault = partial(_places_while_rank_0_works_alone, tmp_path)
    results_of(pretrain(2, small_config, [*sets, "train.evaluate_every_steps=6"], tmp_path / "output", fault=fault))
    assert (tmp_path / "dossier").read_text() == "spike spike\n"
    assert (tmp_path / "retention").read_text() == "checkpoint checkpoint\n" * 3 + "end end\n"
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        *("step_00000004", "step_00000006"),
    ]


def _end_soon() -> None:
    watchdog.GRACE_SECONDS = 1.5  # it also decides when a rank counts as silent


@pytest.mark.parametrize("stopped", [0, 1])
def test_stopped_rank_ends_the_run_and_is_named(small_config, tmp_path, stopped):
    folder = tmp_path / "run"
    sets = [*LIMITS, "parallel.data=2", f"run.folder={folder}", "train.steps=100000", "train.evaluate_every_steps=1000"]
    arguments = [str(small_config), *(part for setting in sets for part in ("--set", setting))]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Rank(run_pretrain, (arguments, _end_soon), rank_environment(rank, 2, store.port), tmp_path / f"rank_{rank}")
        for rank in range(2)
    ]
    deadline = time.monotonic() + 120
    while events_told(folder, "step") < 60 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(ranks[stopped].process.pid, signal.SIGSTOP)
    began = time.monotonic()
    ended = ranks[1 - stopped].finish()
    seconds = time.monotonic() - began
    ranks[stopped].kill()  # as its launcher does, when a rank has ended with a code that is not 0

    assert ended.exit_code == HUNG, ended.stderr
    print(f"rank {stopped} stopped: the other ended after {seconds:.1f} s")
    assert seconds < 30
    incident = events_of(folder, "incident")[-1]
    assert incident["kind"] == "hang"
    assert list(incident["behind"]) == [str(stopped)]
    assert incident["behind"][str(stopped)].startswith("silent for ")
    assert f"rank {stopped}" in ended.stderr
    assert incident["last_collective"], "what it waited in"
    stacks = next((folder / "incidents").glob(f"*/rank_{1 - stopped:05d}.txt")).read_text()
    assert "pretrain_k2.py" in stacks
    assert "distributed_c10d" in stacks or "step.py" in stacks


@pytest.mark.parametrize("lost", ["journal", "stderr"])
def test_rank_ends_although_its_report_cannot_be_written(tmp_path, monkeypatch, lost):
    """A disk or terminal that is gone must not keep a hung rank alive."""
    ended = threading.Event()

    def fail(*_arguments, **_keywords):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(watchdog, "Journal" if lost == "journal" else "print", fail, raising=False)
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.0)
    monkeypatch.setattr(watchdog.os, "_exit", lambda _code: ended.set())
    guard = watchdog.Watchdog(Settings(minimum_seconds=0.1, pause_seconds=0.2, heartbeat_seconds=0.1), tmp_path, 0, 1)
    assert ended.wait(10), "the thread died before it ended the rank"
    guard.stop()
