"""SIGTERM, SIGUSR1 and SIGINT, once and twice, at twenty instants of a run's lives: each time the run saves and leaves
within a batch system's grace time, asks to be started again, and is in the end as if nothing had happened."""

import os
import random
import signal
import sys
import time
from pathlib import Path

from rank_processes import REPOSITORY, Rank, pretrain, results_of, run_pretrain
from run_results import differences, events_of, events_told

from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import read_manifest, step_of, verify_files

STEPS = 90
GRACE_SECONDS = 30.0
INSTANTS = 20
NOT_FINISHED = 10  # the code of tools/run_state.py by which pretrain.sbatch requeues
SETTINGS = [
    *("model.layers=1", "model.hidden_size=16", "model.ffn_hidden_size=16", "model.heads=2", "model.kv_heads=2"),
    *(f"train.steps={STEPS}", "train.evaluate_every_steps=10", "checkpoint.every_steps=6", "checkpoint.keep_last=3"),
]
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


def wait_for_an_instant(rank: Rank, run: Path, draw: random.Random) -> None:
    """Of a life: in its start, in a step, or in a save."""
    kind = draw.choice(["start", "step", "step", "save"])
    told = "step" if kind == "step" else "start"  # a start has removed what an interrupted save left
    wanted = events_told(run, told) + (draw.randrange(1, 4) if kind == "step" else 1)
    while rank.process.is_alive():
        if events_told(run, told) >= wanted and (kind != "save" or any((run / "checkpoints").glob(".step_*.writing"))):
            break
        time.sleep(0.001)
    time.sleep(draw.uniform(0.0, 0.02))


def test_at_twenty_instants_a_signal_or_two_cost_nothing(small_config, tmp_path, monkeypatch):
    run, draw, spans = tmp_path / "run", random.Random(9), []
    settings = [*SETTINGS, f"run.folder={run}"]
    arguments = [str(small_config), *(part for setting in settings for part in ("--set", setting))]
    for life in range(INSTANTS):
        number, twice = SIGNALS[life % 3], life % 2 == 1
        saving = ["--set", f"checkpoint.asynchronous={'true' if life // 6 % 2 else 'false'}"]
        rank = Rank(run_pretrain, ([*arguments, *saving],), {}, tmp_path / f"life_{life}")
        wait_for_an_instant(rank, run, draw)
        assert rank.process.is_alive(), rank.finish().stderr
        os.kill(rank.process.pid, number)
        asked = time.monotonic()
        if twice:
            time.sleep(draw.uniform(0.0, 0.02))
            os.kill(rank.process.pid, number)
        outcome = rank.finish(GRACE_SECONDS)
        spans.append(time.monotonic() - asked)
        hurried = twice and number == signal.SIGINT  # a person who does not wait for the save
        assert outcome.exit_code in ((0, 130) if hurried else (0,)), outcome.stderr
        if outcome.exit_code == 0:
            stop = events_of(run, "stop")[-1]
            assert stop["reason"] == number.name
            assert stop["saved_step"] == stop["step"] < STEPS
            assert f"stopped by {number.name} after step {stop['step']}; saved, start again" in outcome.stdout
            newest = complete_checkpoints(run / "checkpoints")[0]
            assert step_of(newest) == stop["step"] and verify_files(newest, read_manifest(newest)) == []
        assert run_state(monkeypatch, small_config, settings) == NOT_FINISHED
    print(f"ended after {max(spans):.1f} s at most")
    results_of(pretrain(1, small_config, settings, tmp_path / "last"))
    assert len(events_of(run, "start")) == INSTANTS + 1
    results_of(pretrain(1, small_config, [*SETTINGS, f"run.folder={tmp_path / 'whole'}"], tmp_path / "whole_output"))
    assert differences(tmp_path / "whole", run, STEPS) == []
    assert run_state(monkeypatch, small_config, settings) == 0


def run_state(monkeypatch, config: Path, settings: list[str]) -> int:
    """The exit code of tools/run_state.py."""
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    import run_state

    given = [str(config), *(part for setting in settings for part in ("--set", setting))]
    monkeypatch.setattr(sys, "argv", ["run_state.py", *given])
    return run_state.main()
