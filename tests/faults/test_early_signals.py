"""SIGINT, SIGTERM and SIGUSR1 at the moments outside a step: each is heard, and no step is trained in vain."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
from rank_processes import Rank, pretrain, rank_environment, results_of, run_pretrain
from run_results import events_of, steps_of
from small_run import overrides
from torch.distributed import TCPStore

SETTINGS = {"train.steps": 6, "checkpoint.every_steps": 2, "train.evaluate_every_steps": 3, "train.evaluate_batches": 1}


def _signal_in(number: signal.Signals, owner: str, function: str, call: int, rank: str) -> None:
    """Send this process the signal within the `call`-th call of a function, on one rank."""
    import importlib

    module, _, name = owner.partition(":")
    place = importlib.import_module(module)
    place = getattr(place, name) if name else place
    original, calls = getattr(place, function), []

    def interrupted(*arguments, **keywords):
        calls.append(1)
        if len(calls) == call and os.environ.get("RANK", "0") == rank:
            os.kill(os.getpid(), number)
        return original(*arguments, **keywords)

    setattr(place, function, interrupted)


def run(small_config: Path, tmp_path: Path, ranks: int = 1, fault=None, **more) -> list:
    number = len(list(tmp_path.glob("output_*")))
    given = overrides({"run.folder": tmp_path / "run", **SETTINGS, **more})
    return pretrain(ranks, small_config, given, tmp_path / f"output_{number}", fault)


def stopped(folder: Path) -> tuple[str, int, int]:
    """Reason, step and saved step of the last stop in the journal."""
    stop = events_of(folder, "stop")[-1]
    return stop["reason"], stop["step"], stop["saved_step"]


def test_while_the_model_is_built_on_one_of_two_ranks(small_config, tmp_path):
    fault = partial(_signal_in, signal.SIGTERM, "pretrain_k2", "build_model", 1, "1")
    outcomes = run(small_config, tmp_path, 2, fault, **{"parallel.pipeline": 2})
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert stopped(tmp_path / "run") == ("SIGTERM", 0, 0)
    assert "stopped by SIGTERM after step 0; nothing to save, start again to resume" in outcomes[0].stdout
    assert steps_of(tmp_path / "run") == {}
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))


@pytest.mark.parametrize(
    ("number", "owner", "function", "call", "step"),
    [
        (signal.SIGINT, "k2_megatron.train.checkpoints.save:CheckpointWriter", "_write", 2, 4),
        (signal.SIGTERM, "pretrain_k2", "evaluate", 1, 3),
    ],
    ids=["while step 4 is saved", "while step 3 is evaluated"],
)
def test_in_a_pause_of_the_loop_the_step_reached_is_the_last(
    small_config, tmp_path, number, owner, function, call, step
):
    folder = tmp_path / "run"
    fault = partial(_signal_in, number, owner, function, call, "0")
    (outcome,) = run(small_config, tmp_path, fault=fault)
    assert outcome.exit_code == 0, outcome.stderr
    assert stopped(folder) == (number.name, step, step)
    assert max(steps_of(folder)) == step

    # While that checkpoint is loaded: nothing is trained, and nothing is saved again.
    fault = partial(_signal_in, signal.SIGUSR1, "pretrain_k2", "load_checkpoint", 1, "0")
    saves = len(events_of(folder, "checkpoint"))
    (outcome,) = run(small_config, tmp_path, fault=fault)
    assert outcome.exit_code == 0, outcome.stderr
    assert stopped(folder) == ("SIGUSR1", step, step)
    assert max(steps_of(folder)) == step
    assert len(events_of(folder, "checkpoint")) == saves

    results_of(run(small_config, tmp_path))
    assert stopped(folder) == ("finished", 6, 6)
    assert sorted(steps_of(folder)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_before_the_ranks_have_met_it_ends_at_once(small_config, tmp_path, number):
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    keys = store.num_keys()
    given = overrides({"run.folder": tmp_path / "run", "parallel.pipeline": 2})
    arguments = [str(small_config), *(part for setting in given for part in ("--set", setting))]
    rank = Rank(run_pretrain, (arguments,), rank_environment(0, 2, store.port), tmp_path / "output")
    deadline = time.monotonic() + 60
    while store.num_keys() == keys:
        assert time.monotonic() < deadline and rank.process.is_alive(), "the rank did not come to the meeting"
        time.sleep(0.02)
    time.sleep(0.2)  # from its first word in the store into the wait for the other
    os.kill(rank.process.pid, number)
    assert rank.finish(seconds=20).exit_code == -number
    assert not (tmp_path / "run").exists()


def _second_ctrl_c_in_the_save() -> None:
    from k2_megatron.train.checkpoints.save import CheckpointWriter

    CheckpointWriter._write = lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]


def test_second_ctrl_c_waits_for_nothing(small_config, tmp_path):
    (outcome,) = run(small_config, tmp_path, fault=_second_ctrl_c_in_the_save)
    assert outcome.exit_code == 130
    assert outcome.stderr == "interrupted; start again to resume from the last save\n"
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    results_of(run(small_config, tmp_path))
    assert stopped(tmp_path / "run") == ("finished", 6, 6)
