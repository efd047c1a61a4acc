"""K2-65B's cure on a real plan: the chunk in which a malignant spike began goes to the end, by itself and by hand."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import injected_faults
import numpy as np
import pytest
from loaded_tool import loaded_tool
from rank_processes import REPOSITORY, pretrain, results_of
from run_results import events_of, steps_of, stored_state
from small_run import write_text

from k2_megatron.data.build import build_plans
from k2_megatron.data.inspected_run import Run
from k2_megatron.data.ledger import Ledger
from k2_megatron.data.manifest import manifest_of_foreign_files
from k2_megatron.data.recipe import load_recipe
from k2_megatron.runtime.journal import Journal
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.spikes.by_hand import steps_made
from k2_megatron.train.verify_data import verify_lines

STEPS, CHUNKS, STEPS_PER_CHUNK, BATCH = 72, 6, 12, 8
BAD_CHUNK = 3  # steps 37 to 48, where it does harm; deferred to steps 61 to 72, it does none
HARMFUL_SAMPLES = range(54 * BATCH)
PAGE = REPOSITORY / "docs" / "when_something_goes_wrong.md"
SETTINGS = [
    f"train.steps={STEPS}",
    f"train.micro_batch={BATCH}",
    *injected_faults.STEADY,
    f"checkpoint.every_steps={STEPS_PER_CHUNK}",
    "spikes.window_steps=16",
    "spikes.benign_steps=8",
]
BY_ITSELF = ["spikes.policy=rollback", "spikes.scope=chunk", "spikes.max_rollbacks=1"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> Path:
    """A plan of six chunks of twelve steps."""
    folder = tmp_path_factory.mktemp("plan")
    write_text(folder)
    manifest_of_foreign_files(str(folder / "train"))
    (folder / "recipe.toml").write_text(
        f"sequence_length = 32\nchunks = {CHUNKS}\nrows_per_chunk = {STEPS_PER_CHUNK * BATCH}\nseed = 3\n"
        f'[sources.speeches]\ntokens = "{folder / "train"}"\nshare = 1.0\n'
    )
    build_plans(load_recipe(folder / "recipe.toml"), folder / "plan", None)
    return folder / "plan"


def harmful_chunk(then=None) -> None:
    """The rows of one chunk are random bytes when they are read where the plan first had them."""
    from k2_megatron.data.feed import Feed

    read = Feed._read

    def tokens(self, first_sample, count):
        rows = read(self, first_sample, count).copy()
        for number in range(count):
            sample = first_sample + number
            chunk = self.schedule.positions(sample, 1)[0] // (STEPS_PER_CHUNK * BATCH)
            if chunk == BAD_CHUNK and sample in HARMFUL_SAMPLES:
                rows[number] = np.random.default_rng(sample).integers(1, 256, rows.shape[1])
        return rows

    Feed._read = tokens
    if then is not None:
        then()


def killed_before_the_ledger_is_told() -> None:
    import k2_megatron.train.spikes.rollback as rollback

    rollback.sync = lambda _folder: os.kill(os.getpid(), signal.SIGKILL)


def killed_after_the_ledger_was_told() -> None:
    from k2_megatron.data.ledger import Ledger

    amend = Ledger.amend

    def and_die(self, *arguments, **fields):
        amend(self, *arguments, **fields)
        os.kill(os.getpid(), signal.SIGKILL)

    Ledger.amend = and_die


@pytest.fixture(scope="module")
def run(small_config, plan, tmp_path_factory):
    """run(name, settings, fault) -> (the folder, the outcome of its rank)."""
    base = tmp_path_factory.mktemp("runs")

    def once(name: str, settings: list[str], fault):
        given = [*SETTINGS, f"data.train={plan}", f"run.folder={base / name}", *settings]
        return base / name, pretrain(1, small_config, given, base / f"{name}_output", fault=fault)[0]

    return once


@pytest.fixture(scope="module")
def whole(run) -> Path:
    """The run that meets the chunk, goes back and defers it, without a stop."""
    folder, outcome = run("whole", BY_ITSELF, harmful_chunk)
    results_of([outcome])
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert steps_of(folder) == steps_of(whole)
    assert stored_state(folder, STEPS) == stored_state(whole, STEPS)


def test_chunk_of_the_spike_is_deferred_to_the_end(whole):
    kinds = [event["kind"] for event in events_of(whole, "spike")]
    assert kinds == ["spike", "malignant"], "and none after the rollback"
    (back,) = events_of(whole, "rollback")
    assert (back["step"], back["amendment"]["chunk"]) == (36, BAD_CHUNK)
    (entry,) = Ledger(whole).amendments
    assert (entry["action"], entry["chunk"], entry["from_sample"]) == ("defer", BAD_CHUNK, 36 * BATCH)
    assert entry["reason"].startswith("malignant spike: began at step 37")
    feed = Run(whole).feed
    rows = STEPS_PER_CHUNK * BATCH
    order = [int(feed.schedule.positions(number * rows, 1)[0]) // rows for number in range(CHUNKS)]
    assert order == [0, 1, 2, 4, 5, 3]
    assert (whole / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}\n"
    lines = list(verify_lines(Run(whole), contents=True))
    assert any("chain" in line for line in lines), lines


@pytest.mark.parametrize("kill", [killed_before_the_ledger_is_told, killed_after_the_ledger_was_told])
def test_kill_within_the_rollback_changes_nothing(run, whole, kill):
    name = kill.__name__
    folder, outcome = run(name, BY_ITSELF, partial(harmful_chunk, kill))
    assert outcome.exit_code == -signal.SIGKILL
    assert not events_of(folder, "rollback")
    results_of([run(name, BY_ITSELF, harmful_chunk)[1]])
    assert len(Ledger(folder).amendments) == 1
    assert_same(folder, whole)


def tool(command: str) -> subprocess.CompletedProcess:
    """A line of the page, as a person types it."""
    name, *arguments = shlex.split(command, comments=True)
    assert name == "python"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )


def page_lines(*beginnings: str) -> list[str]:
    """The page's lines of commands that begin so."""
    found = [line.strip() for line in PAGE.read_text().splitlines() if re.match(r" {4,6}python tools/", line)]
    return [line for line in found if line.startswith(tuple(f"python tools/{beginning}" for beginning in beginnings))]


def with_values(line: str, run: Path, **values: object) -> str:
    for name, value in {"RUN": run, **values}.items():
        line = re.sub(rf"\b{name}\b", str(value), line)
    return line


def test_going_back_by_hand_as_the_page_says_is_what_the_run_does_by_itself(run, whole, tmp_path):
    folder, outcome = run("watching", [], partial(harmful_chunk, partial(injected_faults.leave_after, 50)))
    results_of([outcome])
    _called, verdict = events_of(folder, "spike")
    assert verdict["kind"] == "malignant"
    (line,) = page_lines("roll_back.py RUN --before ONSET --defer chunk")
    done = tool(with_values(line, folder, ONSET=verdict["onset"]))
    assert done.returncode == 0, done.stderr
    assert f"set back from step 50 to step 36; defer chunk from sample {36 * BATCH}" in done.stdout
    (entry,) = Ledger(folder).amendments
    assert entry["reason"].startswith("by hand: ")
    assert (folder / "checkpoints" / "spiked_step_00000048").is_dir()
    told = tool(f"python tools/run_state.py {folder / 'config.toml'} --set train.steps=48")
    assert told.returncode == 10, f"what was set back from its end has steps to do: {told.stdout}"
    assert "step 36 of 48, saved at 36" in told.stdout
    results_of([run("watching", [], harmful_chunk)[1]])
    assert_same(folder, whole)


def test_commands_of_the_page_on_spikes_and_replay_run(whole, tmp_path):
    values = {"N": 40, "CONFIG": whole / "config.toml", "spikes.html": tmp_path / "spikes.html"}
    said = {}
    lines = page_lines("find_spikes", "replay", "inspect_data", "run_state")
    assert len(lines) >= 5
    for line in lines:
        if "--launch" not in line:  # needs an allocation
            done = tool(with_values(line, whole, **values))
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            said[line.split()[1]] = done.stdout
    assert "spikes in 72 steps" in said["tools/find_spikes.py"]
    assert "equal to the bit: steps 37 to 48, and the weights of step 48" in said["tools/replay.py"]
    assert (tmp_path / "spikes.html").is_file()


def test_full_disk_while_going_back_by_hand_is_told_and_the_same_command_does_the_rest(
    whole, tmp_path, capsys, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    roll_back, before = loaded_tool("roll_back"), (folder / "ledger.jsonl").read_text()
    # The chunk of step 61 is the last: there is nothing to put before it
    monkeypatch.setattr(
        sys, "argv", ["roll_back.py", str(folder), "--before", "61", "--defer", "chunk", "--reason", "x"]
    )
    assert roll_back.main() == 2
    assert "is all that is left of the data" in capsys.readouterr().err
    arguments = [str(folder), "--before", "49", "--defer", "chunk", "--reason", "x"]

    def no_room(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "argv", ["roll_back.py", *arguments])
    with monkeypatch.context() as full:
        full.setattr(Ledger, "_write", no_room)
        assert roll_back.main() == 3
    assert "give the same command again" in capsys.readouterr().err
    assert (folder / "ledger.jsonl").read_text() == before
    # Next the journal has no room; then the command is killed before it writes there. The chunk has moved by now.
    with monkeypatch.context() as full:
        full.setattr(Journal, "_write", no_room)
        assert roll_back.main() == 3
    assert "does what is left, and nothing twice" in capsys.readouterr().err
    with monkeypatch.context() as killed:
        killed.setattr(Journal, "write", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
        assert roll_back.main() == 130
    told = tool(f"python tools/run_state.py {folder / 'config.toml'} --set run.folder={folder}")
    assert told.returncode == 10, f"a job that asks whether it is finished has steps to do: {told.stdout}"
    assert f"a save at step {STEPS}, the newest checkpoint is that of step_00000048" in told.stdout
    capsys.readouterr()
    assert roll_back.main() == 0
    assert "the ledger had this line already" in capsys.readouterr().out
    assert len(Ledger(folder).amendments) == 2
    assert (folder / "checkpoints" / "latest").read_text() == "step_00000048\n"
    assert [event["step"] for event in events_of(folder, "rollback")][-1:] == [48]


def test_steps_that_were_passed_over_can_be_gone_back_before(whole, tmp_path):
    """They are no step events, and are the likeliest to be bad."""
    folder = shutil.copytree(whole, tmp_path / "run")
    with (folder / "journal.jsonl").open("a") as journal:
        journal.write(json.dumps({"event": "incident", "kind": "not finite", "step": STEPS + 3}) + "\n")
    assert (steps_made(whole), steps_made(folder)) == (STEPS, STEPS + 3)
    (folder / "journal.jsonl").unlink()
    newest = max(complete_checkpoints(folder / "checkpoints"))
    assert steps_made(folder) == int(newest.name.removeprefix("step_"))


def test_going_back_by_hand_says_what_is_missing_and_changes_nothing(whole, capsys, monkeypatch):
    roll_back = loaded_tool("roll_back")
    before = (whole / "ledger.jsonl").read_text()
    for arguments, text in (
        ("--before 12", "no checkpoint from before step 12 is kept"),
        ("--before 40 --defer batches", "--to is None: with batches it is the last step whose batch goes"),
        ("--before 40 --to 60 --skip batches", "skipping would leave"),
        ("--before 40 --to 41", "--to 41 goes with --defer batches or --skip batches"),
        ("--before 40 --to 41 --defer chunk", "--to 41 goes with --defer batches or --skip batches"),
        (f"--before {STEPS + 2}", f"--before {STEPS + 2}: the run has made {STEPS} steps"),
    ):
        monkeypatch.setattr(sys, "argv", ["roll_back.py", str(whole), *arguments.split(), "--reason", "x"])
        assert roll_back.main() == 2
        assert text in capsys.readouterr().err
    assert (whole / "ledger.jsonl").read_text() == before
    assert (whole / "checkpoints" / "latest").read_text() == f"step_{STEPS:08d}\n"
