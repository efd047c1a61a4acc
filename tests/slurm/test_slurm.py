"""pretrain.sbatch on a real Slurm of two nodes: same losses as a plain start, requeued and resumed to the bit."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from one_machine import free_ports, missing_programs, slurm_on_this_machine
from rank_processes import REPOSITORY, pretrain, results_of
from run_results import events_of, steps_of, stored_state

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(missing_programs()),
        reason=f"no Slurm here: {', '.join(missing_programs())} not found; install Debian's slurm-wlm and munge",
    ),
]
STEPS = 40
# No decay, so that runs of different lengths have their first steps in common
SETTINGS = (
    "parallel.pipeline=2",
    "optimizer.schedule=constant",
    "optimizer.min_learning_rate=",
    f"train.steps={STEPS}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with slurm_on_this_machine(tmp_path_factory.mktemp("daemons")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def submit(slurm, folder, small_config):
    """A function that submits the toy's script, two nodes of one rank, for a run of this name; the job's number."""

    def submit(name: str, *settings: str, options: tuple[str, ...] = (), **environment: str) -> str:
        shown = slurm.run(
            "sbatch",
            "--parsable",
            "--ntasks-per-node=1",
            f"--output={folder}/%j.log",
            *options,
            "examples/toy/toy.sbatch",
            *(part for setting in (*SETTINGS, f"run.folder={folder / name}", *settings) for part in ("--set", setting)),
            cwd=REPOSITORY,
            CONFIG=str(small_config),
            LOGS=str(folder / "logs"),
            PYTHON=sys.executable,
            PYTHONPATH=str(REPOSITORY),
            MASTER_ADDR="127.0.0.1",  # both nodes are this machine, and the names n1 and n2 have no address
            MASTER_PORT=str(free_ports(1)[0]),  # job numbers start at 1 in every Slurm of this machine
            **{"RESTARTS": "0", **environment},
        )
        return shown.split(";")[0]

    return submit


@pytest.fixture(scope="module")
def plain(folder, small_config) -> Path:
    """The run folder of the same training without Slurm."""
    settings = [*SETTINGS, f"run.folder={folder / 'plain'}", "checkpoint.every_steps=4"]
    results_of(pretrain(2, small_config, settings, folder / "plain_output"))
    return folder / "plain"


def rank_process(job: str, rank: int) -> int:
    """Process id of a rank of a job."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = set((process / "environ").read_bytes().split(b"\0"))
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if wanted <= environment and any(word.endswith(b"pretrain_k2.py") for word in arguments):
            if b"python" in arguments[0]:
                return int(process.name)
    raise AssertionError(f"job {job} has no process of rank {rank}")


def wait_for_step(folder: Path, step: int) -> None:
    wait_for(lambda: any(event["step"] >= step for event in events_of(folder, "step")), f"step {step} in {folder}")


def wait_for(condition: Callable[[], object], what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s"
        time.sleep(0.02)


def log_of(folder: Path, job: str) -> str:
    ranks = "".join(path.read_text()[-2000:] for path in sorted((folder / "logs").glob(f"*-{job}/rank_*.log")))
    return (folder / f"{job}.log").read_text() + ranks


def test_near_its_time_limit_the_job_saves_requeues_itself_and_resumes(slurm, folder, submit, plain):
    # Slurm looks at time limits every 30 s: the signal comes 25 to 55 s after the start.
    limit = ("--time=1", "--signal=B:USR1@5")
    job, run = submit("long", "train.steps=1000000", "train.evaluate_every_steps=1000", options=limit), folder / "long"
    deadline = time.monotonic() + 400
    while not events_of(run, "resume") or len(events_of(run, "step")) < 12:
        assert time.monotonic() < deadline and slurm.facts(job)["JobState"] != "FAILED", log_of(folder, job)
        time.sleep(0.3)
    slurm.run("scancel", job)
    # Mostly one; on a slow machine a job may also meet its limit while it still starts.
    assert int(slurm.wait(job, ("CANCELLED",))["Restarts"]) >= 1

    stop, resume = events_of(run, "stop")[0], events_of(run, "resume")[0]
    assert stop["reason"] == "SIGUSR1"
    assert stop["saved_step"] == stop["step"] == resume["step"], "nothing is trained twice and nothing is lost"
    losses = {number: step["loss"] for number, step in steps_of(run).items()}
    assert list(losses) == list(range(1, len(losses) + 1))
    expected = {number: step["loss"] for number, step in steps_of(plain).items() if number in losses}
    assert len(expected) >= 12 and {number: losses[number] for number in expected} == expected


def test_asked_to_end_and_preempted_two_nodes_give_the_losses_of_a_plain_start(slurm, folder, submit, plain):
    run = folder / "nodes"
    job = submit("nodes", "checkpoint.every_steps=1000", options=("--cpus-per-task=2",))
    wait_for_step(run, 3)
    environment = (Path("/proc") / str(rank_process(job, 1)) / "environ").read_bytes().split(b"\0")
    assert b"SLURM_CPUS_PER_TASK=2" in environment, "the job's tasks have two cores, its ranks do not"
    slurm.run("scancel", "--signal=TERM", "--batch", job)
    facts = slurm.wait(job, ("COMPLETED", "FAILED"))
    assert (facts["JobState"], facts["Restarts"], facts["ExitCode"]) == ("COMPLETED", "0", "0:0"), log_of(folder, job)
    assert "asked to end" in log_of(folder, job)
    (asked,) = events_of(run, "stop")
    assert asked["saved_step"] == asked["step"] < STEPS

    # Submitted again it goes on, and makes room for a job that is more urgent, with a grace time.
    job = submit("nodes", "checkpoint.every_steps=1000")
    wait_for_step(run, asked["step"] + 2)
    options = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={folder}/%j.log", "--wrap=true")
    urgent = slurm.run("sbatch", "--parsable", *options)
    slurm.wait(urgent, ("COMPLETED",))
    facts = slurm.wait(job, ("COMPLETED", "FAILED"))
    assert (facts["JobState"], facts["Restarts"], facts["NumNodes"]) == ("COMPLETED", "1", "2"), log_of(folder, job)
    stops, resumes = events_of(run, "stop"), events_of(run, "resume")
    assert [stop["reason"] for stop in stops] == ["SIGUSR1", "SIGTERM", "finished"]
    for stop, resume in zip(stops, resumes, strict=False):
        assert stop["saved_step"] == stop["step"] == resume["step"], "nothing is trained twice and nothing is lost"
    assert events_of(run, "start")[0]["launcher"] == "srun"
    assert steps_of(run) == steps_of(plain)
    assert stored_state(run, STEPS) == stored_state(plain, STEPS)
    assert (folder / "logs" / f"k2-toy-{job}" / "rank_1.log").exists()

    # Submitted once more, as the next link of a chain would be, a finished run starts no rank.
    job = submit("nodes", "checkpoint.every_steps=1000")
    assert slurm.wait(job, ("COMPLETED", "FAILED"))["JobState"] == "COMPLETED"
    assert f"finished, {STEPS} steps" in log_of(folder, job)
    assert len(events_of(run, "start")) == 3


def test_killed_rank_and_then_a_lost_node_cost_nothing(slurm, folder, submit, plain):
    run = folder / "killed"
    job = submit("killed", "checkpoint.every_steps=4", RESTARTS="1")
    wait_for_step(run, 5)  # the last checkpoint is that of step 4
    os.kill(rank_process(job, 1), signal.SIGKILL)
    wait_for(lambda: events_of(run, "resume"), "start again in the same allocation")
    reached = events_of(run, "step")[-1]["step"]
    wait_for_step(run, reached + 1)
    os.kill(rank_process(job, 1), signal.SIGKILL)
    facts = slurm.wait(job, ("COMPLETED", "FAILED"))
    assert facts["JobState"] == "FAILED", log_of(folder, job)
    assert facts["ExitCode"] != "0:0"
    with pytest.raises(AssertionError, match="no process"):
        rank_process(job, 0)
    log = log_of(folder, job)
    assert log.count("start 0: starting 2 ranks") == 2 and "starting again; 0 more after this" in log
    assert "task 1: Killed" in log, "what srun says of a rank that the system killed is in the job's log"

    slurm.run("scontrol", "requeue", job)
    slurm.wait(job, ("RUNNING",))
    wait_for_step(run, 20)
    slurm.run("scontrol", "update", "nodename=n2", "state=down", "reason=lost")  # Slurm requeues the job by itself
    slurm.wait(job, ("PENDING",))
    with contextlib.suppress(AssertionError):  # a node that was never really gone may have come back by itself
        slurm.run("scontrol", "update", "nodename=n2", "state=resume")
    facts = slurm.wait(job, ("COMPLETED", "FAILED"))
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "2"), log_of(folder, job)
    assert [event["step"] % 4 for event in events_of(run, "resume")] == [0, 0, 0]
    assert all(f"start {number}: starting 2 ranks" in log_of(folder, job) for number in (1, 2))
    assert steps_of(run) == steps_of(plain)
    assert stored_state(run, STEPS) == stored_state(plain, STEPS)


def test_chain_of_jobs_with_two_ranks_a_node(slurm, folder, submit, plain):
    options = ("--array=1-2%1", "--ntasks-per-node=2")
    job = submit("chain", "train.steps=3", "parallel.distributed_optimizer=true", options=options, REQUEUE="0")
    last = slurm.wait(f"{job}_2", ("COMPLETED", "FAILED"))
    assert last["JobState"] == "COMPLETED"
    assert "finished, 3 steps" in log_of(folder, last["JobId"]), "the second link found nothing to do"
    (start,) = events_of(folder / "chain", "start")
    assert (start["launcher"], start["layout"]) == ("srun", "tp1-pp2-vp1-cp1-dp2")
    expected = [step["loss"] for step in steps_of(plain).values()][:3]
    assert [step["loss"] for step in steps_of(folder / "chain").values()] == pytest.approx(expected, rel=1e-5)
