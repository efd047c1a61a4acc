"""Where a process stands, read from what launchers set; ports; and each launcher's environment in a real start."""

import json
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from rank_processes import Rank, run_pretrain
from small_run import overrides

from k2_megatron.config.schema import Watchdog
from k2_megatron.runtime import launch
from k2_megatron.runtime.launch import RankEnvironment, port_is_free, read_environment
from k2_megatron.runtime.mistakes import HUNG
from k2_megatron.train.watchdog import (
    BACKSTOP_SECONDS,
    GRACE_SECONDS,
    collective_timeout_seconds,
    pause_limit_seconds,
    step_limit_seconds,
)

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "node3,node4",
}


def test_no_launcher():
    assert read_environment({}) is None


def test_torchrun():
    assert read_environment(TORCHRUN) == RankEnvironment("torchrun", 5, 8, 1, "node1", 29400)


def test_our_own_launcher():
    assert read_environment({**TORCHRUN, "K2_LAUNCHER": "local"}).launcher == "local"


def test_srun_meets_on_the_first_host_at_a_port_of_the_job():
    assert read_environment(SRUN) == RankEnvironment("srun", 9, 16, 1, "node3", 20000 + 123456 % 12000)


def test_srun_takes_a_given_meeting_point():
    given = read_environment({**SRUN, "MASTER_ADDR": "head", "MASTER_PORT": "6000"})
    assert (given.address, given.port) == ("head", 6000)


@pytest.mark.parametrize("name", ["SLURM_STEP_ID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"])
def test_batch_script_without_srun_is_a_plain_start(name):
    """A batch script has some of a step's variables; Slurm's versions differ in which."""
    assert read_environment({key: value for key, value in SRUN.items() if key != name}) is None


def test_torchrun_inside_a_slurm_job_is_torchrun():
    assert read_environment({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_port_that_is_taken_is_not_free():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_two_ranks_meet_and_train(small_config, tmp_path, launcher):
    """The layout asks for one rank, two were started: data parallelism follows from that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    settings = overrides({"run.folder": tmp_path / "run", "train.steps": 3, "train.evaluate_every_steps": 3})
    arguments = [str(small_config), *(part for setting in settings for part in ("--set", setting))]
    ranks = []
    for rank in range(2):
        number = str(rank)
        given = (
            {**TORCHRUN, "RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": "2"}
            if launcher == "torchrun"
            else {**SRUN, "SLURM_PROCID": number, "SLURM_LOCALID": number, "SLURM_STEP_NUM_TASKS": "2"}
        )
        ranks.append(Rank(run_pretrain, (arguments,), {**given, **meeting}, tmp_path / number))
    outcomes = [rank.finish() for rank in ranks]
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    start = json.loads((tmp_path / "run" / "journal.jsonl").read_text().splitlines()[0])
    assert (start["launcher"], start["layout"]) == (launcher, "tp1-pp1-vp1-cp1-dp2")
    assert outcomes[1].stdout == "", "one rank speaks"


def test_random_states_come_back_exactly(tmp_path):
    outcome = Rank(_draw_twice, (), {}, tmp_path).finish()
    assert outcome.exit_code == 0, outcome.stderr
    first, again, once_more, without = outcome.result
    assert once_more == first, "what was drawn after the first time is not in the states"
    assert first == again
    assert first != without


def _draw_twice() -> tuple[list, list, list]:
    import random

    import numpy
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from k2_megatron.config.schema import Parallel
    from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
    from k2_megatron.runtime.devices import find_device
    from k2_megatron.runtime.groups import build_groups, connect, disconnect
    from k2_megatron.runtime.launch import single_rank
    from k2_megatron.runtime.seeds import random_states, restore_random_states, seed_everything

    def draw() -> list:
        with get_cuda_rng_tracker().fork():
            tracked = torch.rand(3).tolist()
        return [random.random(), numpy.random.rand(3).tolist(), torch.rand(3).tolist(), tracked]

    with cpu_stands_in_for_cuda("cpu"):
        connect(single_rank(), find_device(0), 60.0)
        seed_everything(3, build_groups(Parallel()))
        draw()
        states = random_states()
        first = draw()
        restore_random_states(states)
        again = draw()
        restore_random_states(states)
        once_more = draw()
        without = draw()
        disconnect()
    return first, again, once_more, without


@pytest.mark.parametrize(
    ("ends", "code"),
    [
        (["sys.exit(1)", "sys.exit(3)"], 3),  # rank 0 has lost rank 1, which knows why
        (["sys.exit(1)", "time.sleep(0.5); sys.exit(2)"], 2),  # and is seen to end first
        (["sys.exit(1)", "sys.exit(0)", "os.kill(os.getpid(), 9)"], 137),
        (["os.kill(os.getpid(), 9)", "time.sleep(0.5); sys.exit(4)"], 137),
        (["sys.exit(1)", "sys.exit(1)"], 1),
    ],
)
def test_launcher_ends_with_the_code_of_the_rank_that_knows_why(ends, code):
    hold = "import os, sys, time; sys.stdin.read(); "
    ranks = [subprocess.Popen([sys.executable, "-c", hold + end], stdin=subprocess.PIPE) for end in ends]
    for rank in ranks:
        rank.stdin.close()
    if "0.5" not in ends[1]:
        for rank in ranks:
            rank.wait()
    assert launch._supervise(ranks, 60.0) == code


@pytest.mark.parametrize(("end", "told"), [("SIGKILL", "were ended. Do this."), ("SIGSTOP", "Do that.")])
def test_launcher_says_what_to_do_in_the_words_of_the_program(capsys, end, told):
    ends = ("sys.exit(0)", f"os.kill(os.getpid(), signal.{end})")
    ranks = [subprocess.Popen([sys.executable, "-c", f"import os, signal, sys; {end}"]) for end in ends]
    assert ranks[0].wait() == 0
    assert launch._supervise(ranks, 0.5, launch.Remedies("Do this.", "Do that."))
    assert told in capsys.readouterr().err
    assert ranks[1].wait() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("last", "leaving_seconds", "code"),
    [
        ("os.kill(os.getpid(), signal.SIGSTOP)", 0.5, HUNG),
        ("time.sleep(0.5)", 60.0, 0),  # it closes a view, or removes older checkpoints
    ],
)
def test_rank_that_does_not_leave_when_another_has_is_named_and_killed(capsys, last, leaving_seconds, code):
    ends = ("sys.exit(0)", f"{last}; sys.exit(0)", "sys.exit(0)")
    ranks = [subprocess.Popen([sys.executable, "-c", f"import os, signal, sys, time; {end}"]) for end in ends]
    assert ranks[0].wait() == ranks[2].wait() == 0
    ends_the_test = threading.Timer(30.0, ranks[1].kill)
    ends_the_test.start()
    assert launch._supervise(ranks, leaving_seconds) == code
    ends_the_test.cancel()
    assert ("killed: rank 1. All was saved" in capsys.readouterr().err) == (code != 0)
    assert ranks[1].wait() == (-signal.SIGKILL if code else 0)


def _timeouts_of_all_groups(seconds: float, folder: Path) -> list[float]:
    import torch.distributed as distributed

    from k2_megatron.config.schema import Parallel
    from k2_megatron.runtime.devices import find_device
    from k2_megatron.runtime.groups import build_groups, connect, disconnect
    from k2_megatron.train.checkpoints.save import CheckpointWriter

    connect(launch.single_rank(), find_device(0), 60.0)
    groups = build_groups(Parallel(), seconds)
    saver = CheckpointWriter(folder, groups, asynchronous=True)
    of_all = (distributed.group.WORLD, groups.collection.tp, groups.collection.dp_cp, saver._group)
    found = [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in of_all]
    disconnect()
    return found


def test_libraries_wait_longer_than_the_watchdog(tmp_path):
    """What they end by themselves leaves no incident, no stacks and no names."""
    settings = Watchdog(step_factor=10.0, pause_seconds=3600.0)
    seconds = collective_timeout_seconds(settings)
    for limit in (pause_limit_seconds(settings, None), step_limit_seconds(settings, [600.0] * 5)):
        assert seconds > limit + GRACE_SECONDS + BACKSTOP_SECONDS
    found = Rank(_timeouts_of_all_groups, (seconds, tmp_path), {}, tmp_path / "output").finish()
    assert found.exit_code == 0, found.stderr
    assert min(found.result) >= seconds, found.result
