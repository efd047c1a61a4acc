"""Repeat steps of a run from the checkpoint before them, and compare what is computed with the journal, to the bit.

    python tools/replay.py runs/k2_65b_stage1 --step 12345
    python tools/replay.py runs/k2_65b_stage1 --step 12345 --launch "srun --ntasks=480"

Losses, gradient norms and samples of every step up to the first saved one at or after N are compared, and there the
fingerprint of the weights. A difference means that one of the two computations went wrong in the machine (silent
corruption), or that something in the run is not deterministic: replay again, on other nodes, to tell which.
Steps are repeated in the layout, and on the device and with the kernels, that computed them: others round otherwise.
The run itself is only read: what is trained goes to a folder aside. Exit code: 0 equal, 1 different, 2 not possible.
"""

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from k2_megatron.config import load_config
from k2_megatron.runtime.durable import write_file
from k2_megatron.train.checkpoint_files import complete_checkpoints
from k2_megatron.train.checkpoint_manifest import step_of
from k2_megatron.train.checkpoint_state import layout_name
from k2_megatron.train.journal import JOURNAL, read_events, read_steps
from k2_megatron.train.run_folder import CONFIG

EQUAL, DIFFERENT, NOT_POSSIBLE = 0, 1, 2
COMPARED = ("loss", "grad_norm", "learning_rate", "samples")
PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain_k2.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--step", type=int, required=True, help="the step to look at, numbered as in the journal")
    parser.add_argument("--launch", default="", help='what starts the ranks, such as "srun --ntasks=16"; else local')
    parser.add_argument("--folder", type=Path, help="an empty folder for the replay, which is then kept")
    arguments = parser.parse_args()
    try:
        return replay(arguments.run, arguments.step, shlex.split(arguments.launch), arguments.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return NOT_POSSIBLE


def replay(run: Path, step: int, launch: list[str], kept: Path | None) -> int:
    """Repeat and compare; ValueError when the run does not hold what that needs."""
    journal = run / JOURNAL
    if not journal.is_file():
        raise ValueError(f"{journal} does not exist: {run} is no run folder")
    told = read_steps(journal)
    if step not in told:
        raise ValueError(f"step {step} is not in {journal}, which goes to step {max(told, default=0)}")
    before = [folder for folder in complete_checkpoints(run / "checkpoints") if step_of(folder) < step]
    if not before:
        raise ValueError(f"no checkpoint from before step {step} is kept in {run / 'checkpoints'}")
    start, weights = before[0], saved_weights(journal)
    end = min((saved for saved in weights if step <= saved and saved in told), default=step)
    steps, starts = range(step_of(start) + 1, end + 1), starts_of(journal)
    layouts, now = (
        {starts[number]["layout"] for number in steps if number in starts},
        layout_name(load_config(run / CONFIG)),
    )
    if layouts - {now}:
        raise ValueError(
            f"steps {steps[0]} to {end} were computed in layout {' and '.join(sorted(layouts))}, and {run / CONFIG} "
            f"says {now}: another layout rounds otherwise. Choose a step that {now} computed, or start the run in the "
            "other one"
        )
    with tempfile.TemporaryDirectory(prefix="replay_") as scratch:
        folder = kept or Path(scratch)
        prepare(run, start, folder)
        command = [sys.executable, str(PRETRAIN), str(run / CONFIG), "--until", str(end)]
        # A replay looks on; it must not go back by itself.
        sets = [f"run.folder={folder}", "spikes.policy=watch", "spikes.scope=", "spikes.max_rollbacks="]
        print(f"from {start.name} to step {end}")
        code = subprocess.run([*launch, *command, *(part for key in sets for part in ("--set", key))]).returncode
        if code:
            raise ValueError(f"the replay itself ended with exit code {code}; what it said stands above")
        again = read_steps(folder / JOURNAL)
        found = compare(told, again, step_of(start), end, weights.get(end), saved_weights(folder / JOURNAL).get(end))
        if found == DIFFERENT:
            refuse_other_machines(steps, starts, starts_of(folder / JOURNAL))
        return found


def starts_of(journal: Path) -> dict[int, dict]:
    """{step: the "start" event of the processes that computed it last}."""
    starts, start = {}, None
    for event in read_events(journal):
        if event["event"] == "start":
            start = event
        elif event["event"] == "step" and start is not None:
            starts[event["step"]] = start
    return starts


def refuse_other_machines(steps: range, starts: dict[int, dict], again: dict[int, dict]) -> None:
    """ValueError where other devices or kernels repeated the steps: they may differ, and nothing is wrong."""
    for step in steps:
        if step in starts and step in again and (was := computed_by(starts[step])) != (now := computed_by(again[step])):
            raise ValueError(f"no judgement: step {step} was computed by {was}, and repeated by {now}; use the former")


def computed_by(start: dict) -> str:
    """Device and kernels of a "start" event, without the reasons for choosing them."""
    kernels = ", ".join(f"{op} {choice.split(':')[0]}" for op, choice in sorted(start["kernels"].items()))
    return f"{start['device']} ({kernels})"


def saved_weights(journal: Path) -> dict[int, str]:
    """{step: the last fingerprint told of a checkpoint of it}."""
    return {event["step"]: event["weights"] for event in read_events(journal) if event["event"] == "checkpoint"}


def prepare(run: Path, start: Path, folder: Path) -> None:
    """A run folder that resumes from `start`: its checkpoint by a link, the ledger by a copy."""
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / start.name).symlink_to(start.resolve(), target_is_directory=True)
    write_file(checkpoints / "latest", start.name + "\n")
    if (run / "ledger.jsonl").exists():
        shutil.copy(run / "ledger.jsonl", folder / "ledger.jsonl")


def compare(told: dict, again: dict, start: int, end: int, weights: str | None, weights_again: str | None) -> int:
    """Print what differs, first the first; the exit code."""
    differences = 0
    for step in range(start + 1, end + 1):
        if (step in told) != (step in again):
            differences += 1
            print(f"step {step}: finite in {'the run' if step in told else 'the replay'} alone")
            continue
        for key in COMPARED if step in told else ():
            if told[step][key] != again[step][key]:
                differences += 1
                print(f"step {step}: {key} was {told[step][key]!r}, is {again[step][key]!r}")
    if weights is not None and weights != weights_again:
        differences += 1
        print(f"step {end}: the weights had fingerprint {weights}, have {weights_again}")
    if differences:
        print(f"different: {differences} values in steps {start + 1} to {end}, the first listed first")
        return DIFFERENT
    with_weights = f", and the weights of step {end} ({weights})" if weights else "; weights were not saved there"
    print(f"equal to the bit: steps {start + 1} to {end}{with_weights}")
    return EQUAL


if __name__ == "__main__":
    sys.exit(main())
