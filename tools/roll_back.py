"""Set a stopped run back to the checkpoint before a step, and skip or defer the rows that led into a spike.

    python tools/roll_back.py runs/k2_65b_stage1 --before 151 --defer chunk --reason "loss spike"
    python tools/roll_back.py runs/k2_65b_stage1 --before 151 --to 163 --skip batches --reason "damaged documents"
    python tools/roll_back.py runs/k2_65b_stage1 --before 151 --reason "to see it again"

What a run does by itself under spikes.policy, by hand: --before is the first bad step (a dossier's "onset"), --to the
last one whose batch goes ("trip"). Later checkpoints stay as spiked_step_*; the ledger and the journal get a line.
Start the run again to go on. Exit code: 0 done; 2 not possible, and nothing was changed; 3 a disk failed
while it was done: the same command again, when there is room, does what is left.
"""

import argparse
import math
import sys
from pathlib import Path

from k2_megatron.config import Config, load_run_config
from k2_megatron.config.schema import Spikes
from k2_megatron.runtime.journal import JOURNAL, Journal, read_events, read_steps
from k2_megatron.runtime.tool import run_tool
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import step_of
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.run_folder import CONFIG, hold_run_folder
from k2_megatron.train.spikes.detector import Finding
from k2_megatron.train.spikes.policy import Decision
from k2_megatron.train.spikes.rollback import fitting_amendment, set_back


class Unfinished(ValueError):
    """Going back began, and did not come to its end."""

    exit_code = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--before", type=int, required=True, metavar="STEP", help="the first step that is bad")
    parser.add_argument("--to", type=int, metavar="STEP", help="the last step whose batch goes, with batches")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--defer", choices=["chunk", "batches"], help="move these rows to the end of the plan")
    what.add_argument("--skip", choices=["chunk", "batches"], help="leave these rows out")
    parser.add_argument("--reason", required=True, help="for the ledger and the journal")
    options = parser.parse_args()
    return run_tool("roll_back", lambda: tell_of_going_back(options))


def tell_of_going_back(options: argparse.Namespace) -> int:
    print(roll_back(options))
    return 0


def roll_back(options: argparse.Namespace) -> str:
    """Do it; the sentence that tells what was done. ValueError, with nothing changed, where it cannot be; Unfinished
    where a disk does not take it. In this order: a run started in between reads the same rows again, no others."""
    if not (options.run / CONFIG).is_file():
        raise ValueError(f"{options.run / CONFIG} does not exist: {options.run} is no run folder")
    if options.to is not None and "batches" not in (options.defer, options.skip):
        raise ValueError(f"--to {options.to} goes with --defer batches or --skip batches: leave it out, or name one")
    reached = steps_made(options.run)
    if options.before > reached + 1:
        raise ValueError(f"--before {options.before}: the run has made {reached} steps; nothing after them can be bad")
    config = load_run_config(options.run / CONFIG)
    config = config.model_copy(update={"run": config.run.model_copy(update={"folder": str(options.run)})})
    checkpoints = options.run / "checkpoints"
    with hold_run_folder(config):
        before = [step for step in map(step_of, complete_checkpoints(checkpoints)) if step < options.before]
        if not before:
            raise ValueError(f"no checkpoint from before step {options.before} is kept in {checkpoints}")
        good, data, fields = max(before), open_run_data(config, writer=True), None
        if options.defer or options.skip:
            fields = amendment_by_hand(config, options, good, data)
        try:
            set_back(checkpoints, good)
            if fields:
                data.ledger.amend(**fields)
        except (ValueError, OSError) as error:
            raise Unfinished(
                f"the run may be set back to step {good} already, but its rows are as they were: {error}. Do not "
                "start it; make room, and give the same command again"
            ) from None
        journal = Journal(options.run, writer=True)
        reached = max(read_steps(journal.path), default=good)
        told = {"amendment": fields, "reason": by_hand(options.reason), "ledger": data.ledger.mark()}
        journal.write("rollback", from_step=reached, step=good, **told)
        journal.close()
    amended = (
        f"; {fields['action']} {options.defer or options.skip} from sample {fields['from_sample']}" if fields else ""
    )
    return f"{options.run}: set back from step {reached} to step {good}{amended}. Start it again to go on"


def steps_made(run: Path) -> float:
    """The last step that the journal or a checkpoint tells of, passed over or not; without end where neither does."""
    steps = [step_of(folder) for folder in complete_checkpoints(run / "checkpoints")]
    if (run / JOURNAL).is_file():
        steps += [event["step"] for event in read_events(run / JOURNAL) if event["event"] in ("step", "incident")]
    return max(steps, default=math.inf)


def amendment_by_hand(config: Config, options: argparse.Namespace, good: int, data) -> dict:
    """What the run would write into its ledger by itself, with this reason."""
    scope = options.defer or options.skip
    if scope == "batches" and (options.to is None or options.to < options.before):
        raise ValueError(
            f"--to is {options.to}: with batches it is the last step whose batch goes, and not before --before"
        )
    policy = Spikes(policy="rollback" if options.defer else "skip", scope=scope, max_rollbacks=1)
    finding = Finding("by hand", options.before, options.before, options.to or options.before, 0.0, 0.0, 0.0, 0.0)
    decision = Decision("go back", by_hand(options.reason), good)
    return fitting_amendment(config.model_copy(update={"spikes": policy}), finding, decision, data)


def by_hand(reason: str) -> str:
    return f"by hand: {reason}"


if __name__ == "__main__":
    sys.exit(main())
