"""Every decision of pretrain.sbatch, with srun and scontrol played by small programs: runs where there is no Slurm."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import REPOSITORY

# srun notes each call and ends with the next of `codes`; python stands for tools/run_state.py and ends with `state`.
SRUN = """#!/bin/bash
echo "$*" >> calls
echo "${SRUN_CPUS_PER_TASK:-}" > cpus
read -r code < <(sed -n "$(wc -l < calls)p" codes)
if [[ $code == wait ]]; then
    trap 'echo USR1 >> signals; exit 0' USR1
    touch waiting
    while :; do sleep 0.05; done
fi
if [[ $code == *+143 ]]; then
    echo "srun: error: n1: task 0: Exited with exit code ${code%+143}" >&2
    echo "srun: error: n2: task 1: Terminated" >&2
    code=143
fi
exit "$code"
"""
PYTHON = """#!/bin/bash
if [[ -e slow ]]; then touch asked; sleep 1; fi
cat told 2> /dev/null
if [[ -e states ]]; then echo >> asked_times; sed -n "$(wc -l < asked_times)p" states; fi
exit "$(cat state)"
"""
SCANCEL = """#!/bin/bash
echo "$*" >> cancelled
"""
SCONTROL = """#!/bin/bash
[[ -e refuse ]] && exit 1
echo "$*" >> requeues
"""


@pytest.fixture
def batch(tmp_path):
    """A function that starts the script in a folder of its own with these exit codes of srun."""
    for name, text in (("srun", SRUN), ("python", PYTHON), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def start(codes: list, state: int = 10, **environment: str) -> subprocess.Popen:
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "state").write_text(str(state))
        given = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "k2", **environment}
        script = REPOSITORY / "examples" / "k2_65b" / "pretrain.sbatch"
        return subprocess.Popen(["bash", script], cwd=tmp_path, env=given, stdout=subprocess.PIPE, text=True)

    return start


def count(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("codes", "restarts", "starts", "code"),
    [
        ([0], 3, 1, 0),
        ([137, 0], 3, 2, 0),
        ([137, 1, 137], 2, 3, 137),
        ([137], 0, 1, 137),
        ([2], 3, 1, 2),
        ([3], 3, 1, 3),
        (["2+143"], 3, 1, 2),  # what a real srun does: the ranks it ends count more than the one that knew why
        (["3+143"], 3, 1, 3),
        (["1+143", 0], 3, 2, 0),
        (["5+143", 0], 3, 2, 0),  # not finite: the machine may have erred
        ([5, 0], 0, 1, 5),
    ],
)
def test_crashes_are_restarted_and_mistakes_are_not(batch, tmp_path, codes, restarts, starts, code):
    ended = batch(codes, RESTARTS=str(restarts))
    ended.communicate(timeout=30)
    assert (ended.returncode, count(tmp_path / "calls")) == (code, starts)
    assert count(tmp_path / "requeues") == 0


@pytest.mark.parametrize(
    ("codes", "cancels"),
    # The next link makes a step again that was not finite in one start.
    [([0], 0), ([2], 1), ([3], 1), ([5, 5], 1), ([1, 5], 0), ([137, 137], 0)],
    ids=str,
)
@pytest.mark.parametrize(
    "chain", [{"SLURM_ARRAY_JOB_ID": "6", "REQUEUE": "0"}, {"SLURM_ARRAY_JOB_ID": "6"}, {"REQUEUE": "0"}], ids=str
)
def test_chain_ends_where_starting_again_would_not_help(batch, tmp_path, codes, cancels, chain):
    (tmp_path / "told").write_text("runs/k2: step 12 of 100, saved at 10; last event: incident\n")
    batch(codes, RESTARTS="1", **chain).communicate(timeout=30)
    assert count(tmp_path / "cancelled") == (cancels if len(chain) == 2 else 0)
    if (tmp_path / "cancelled").exists():
        assert (tmp_path / "cancelled").read_text() == "--state=PENDING 6\n"


@pytest.mark.parametrize(("steps", "starts", "code"), [((7, 7, 7, 7), 2, 5), ((7, 8, 7, 9), 5, 0)])
def test_step_that_is_not_finite_is_tried_in_two_starts(batch, tmp_path, steps, starts, code):
    """A step that is not finite again and again is no error of the machine; another step is."""
    # The state is asked for before the first start, after each end with code 5, and at the end.
    (tmp_path / "states").write_text("".join(f"run: step {step} of 99, saved at 4; last\n" for step in (0, *steps, 99)))
    ended = batch([*[5 for _ in steps], 0], RESTARTS="9")
    told, _ = ended.communicate(timeout=30)
    assert (ended.returncode, count(tmp_path / "calls")) == (code, starts)
    assert ("not finite in 2 starts after step 7" in told) == (code == 5)


@pytest.mark.parametrize(("given", "cpus"), [({"SLURM_CPUS_PER_TASK": "12"}, "12"), ({}, "")])
def test_ranks_get_the_cores_that_the_job_asked_for(batch, tmp_path, given, cpus):
    """From Slurm 22.05 on srun takes no notice of SLURM_CPUS_PER_TASK."""
    batch([0], **given).communicate(timeout=30)
    assert (tmp_path / "cpus").read_text().strip() == cpus


def test_finished_run_starts_nothing(batch, tmp_path):
    ended = batch([1], state=0)
    ended.communicate(timeout=30)
    assert (ended.returncode, count(tmp_path / "calls")) == (0, 0)


@pytest.mark.parametrize(("state", "requeue", "requeues"), [(10, "1", 1), (0, "1", 0), (10, "0", 0)])
def test_time_limit_is_passed_on_and_requeues_what_is_unfinished(batch, tmp_path, state, requeue, requeues):
    process = batch(["wait"], REQUEUE=requeue)
    wait_for(tmp_path / "waiting")
    (tmp_path / "state").write_text(str(state))
    process.send_signal(signal.SIGUSR1)
    process.communicate(timeout=30)
    assert (tmp_path / "signals").read_text() == "USR1\n"
    assert (process.returncode, count(tmp_path / "requeues")) == (0, requeues)


@pytest.mark.parametrize(("number", "requeues"), [(signal.SIGUSR1, 1), (signal.SIGTERM, 0)])
def test_signal_before_the_ranks_are_started_starts_none(batch, tmp_path, number, requeues):
    (tmp_path / "slow").touch()
    process = batch([0])
    wait_for(tmp_path / "asked")
    process.send_signal(number)
    process.communicate(timeout=30)
    assert (process.returncode, count(tmp_path / "calls"), count(tmp_path / "requeues")) == (0, 0, requeues)


def test_job_that_cannot_be_requeued_does_not_end_as_a_success(batch, tmp_path):
    (tmp_path / "refuse").touch()
    process = batch(["wait"])
    wait_for(tmp_path / "waiting")
    process.send_signal(signal.SIGUSR1)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "it could not be requeued: submit it again" in told


def test_asked_to_end_has_the_ranks_save_and_neither_starts_them_again_nor_requeues(batch, tmp_path):
    process = batch(["wait", 0], RESTARTS="3")
    wait_for(tmp_path / "waiting")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (tmp_path / "signals").read_text() == "USR1\n"
    assert (process.returncode, count(tmp_path / "calls"), count(tmp_path / "requeues")) == (0, 1, 0)


@pytest.mark.parametrize(
    ("told", "code", "requeues"),
    [
        ("step 3 of 9, saved at 3; stopped by SIGTERM at 12:00", 0, 1),  # the grace time of a preemption
        ("step 3 of 9, saved at 3; stopped by --until at 12:00", 0, 0),
        ("step 3 of 9, saved at 2; stopped by SIGTERM at 12:00", 2, 0),
        ("step 3 of 9, saved at 3; stopped by SIGTERM at 11:00", 143, 1),  # again, before the ranks had begun
        ("step 3 of 9, saved at 3; stopped by SIGTERM at 11:00", 1, 0),  # an earlier start; this one came to nothing
        ("step 3 of 9, saved at 3; stopped by SIGTERM at 11:00", 137, 0),
    ],
)
def test_ranks_that_were_preempted_are_requeued(batch, tmp_path, told, code, requeues):
    (tmp_path / "told").write_text(told)
    ended = batch([code], RESTARTS="0")
    ended.communicate(timeout=30)
    assert (ended.returncode, count(tmp_path / "requeues")) == (code, requeues)


@pytest.mark.parametrize(("until", "code"), [("4", 10), ("3", 0), (None, 10)])
def test_run_state_takes_what_the_ranks_take(small_config, tmp_path, monkeypatch, capsys, until, code):
    """The batch script gives both the same arguments; at --until it neither starts ranks nor requeues."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import run_state

    (tmp_path / "journal.jsonl").write_text('{"event": "checkpoint", "time": "12:00", "step": 3}\n')
    given = [str(small_config), "--set", f"run.folder={tmp_path}", *(["--until", until] if until else [])]
    monkeypatch.setattr(sys, "argv", ["run_state.py", *given])
    assert run_state.main() == code
    assert "saved at 3" in capsys.readouterr().out


def test_run_state_takes_the_layout_from_the_job(small_config, tmp_path):
    """A sharded optimizer needs replicas, and how many there are follows from the job's tasks."""
    tool = [sys.executable, str(REPOSITORY / "tools" / "run_state.py"), str(small_config)]
    command = [*tool, "--set", f"run.folder={tmp_path / 'run'}", "--set", "parallel.distributed_optimizer=true"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    for tasks, code in (({"SLURM_NTASKS": "2"}, 10), ({}, 2)):
        ended = subprocess.run(command, env={**environment, **tasks}, capture_output=True, text=True)
        assert ended.returncode == code, ended.stderr


def test_run_state_of_a_journal_that_tells_of_nothing_yet(small_config, tmp_path):
    (tmp_path / "journal.jsonl").touch()
    command = [sys.executable, str(REPOSITORY / "tools" / "run_state.py"), str(small_config)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command += ["--set", f"run.folder={tmp_path}"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout.partition(":")[2]) == (
        10,
        " started, and its journal tells of nothing yet; 5 steps to do\n",
    )
