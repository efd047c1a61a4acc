"""Say how far a run is, from its journal: for people, and for the batch scripts that decide whether to go on.

    python tools/run_state.py examples/toy/toy.toml

The arguments are those of pretrain_k2.py. Exit code 0: finished, or at --until. 10: steps are left to do (or it never
started). 2: the configuration cannot be read.
"""

import argparse
import os
import sys
from pathlib import Path

from k2_megatron.config import load_config
from k2_megatron.runtime.arguments import step_number
from k2_megatron.runtime.journal import JOURNAL, read_events
from k2_megatron.runtime.tool import run_tool
from k2_megatron.train.checkpoints.folders import latest_checkpoint
from k2_megatron.train.checkpoints.manifest import step_of

FINISHED, UNFINISHED = 0, 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--until", type=step_number, metavar="STEP", help="where the run stops before its last step")
    arguments = parser.parse_args()
    return run_tool("run_state", lambda: state(arguments))


def state(arguments: argparse.Namespace) -> int:
    # In a batch script the layout follows from the job's tasks, as it will for the ranks.
    tasks = os.environ.get("SLURM_NTASKS")
    config = load_config(arguments.config, arguments.overrides, world_size=int(tasks) if tasks else None)
    folder = Path(config.run.folder)
    if not (folder / JOURNAL).is_file():
        print(f"{folder}: not started, {config.train.steps} steps to do")
        return UNFINISHED
    return _tell(folder, config.train.steps, arguments.until)


def _tell(folder: Path, total: int, until: int | None) -> int:
    reached, saved, last = 0, 0, {}
    for event in read_events(folder / JOURNAL):
        if event["event"] in ("step", "resume", "rollback"):
            reached = event["step"]
        if event["event"] in ("checkpoint", "resume", "rollback"):
            saved = event["step"]
        last = event
    newest, _ = latest_checkpoint(folder / "checkpoints")
    if newest is not None and step_of(newest) < saved:  # going back was interrupted, or somebody moved the last ones
        print(f"{folder}: the journal tells of a save at step {saved}, the newest checkpoint is that of {newest.name}")
        saved = step_of(newest)
    if saved >= total:
        print(f"{folder}: finished, {total} steps")
        return FINISHED
    if not last:
        print(f"{folder}: started, and its journal tells of nothing yet; {total} steps to do")
        return UNFINISHED
    what = f"stopped by {last['reason']}" if last.get("event") == "stop" else f"last event: {last.get('event')}"
    print(f"{folder}: step {reached} of {total}, saved at {saved}; {what} at {last.get('time')}")
    return FINISHED if until is not None and saved >= until else UNFINISHED


if __name__ == "__main__":
    sys.exit(main())
