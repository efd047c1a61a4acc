"""Set a stopped run back to the checkpoint before a step, and skip or defer the rows that led into a spike.

    python tools/roll_back.py runs/k2_65b_stage1 --before 151 --defer chunk --reason "loss spike"
    python tools/roll_back.py runs/k2_65b_stage1 --before 151 --to 163 --skip batches --reason "damaged documents"
    python tools/roll_back.py runs/k2_65b_stage1 --before 151 --reason "to see it again"

What a run does by itself under spikes.policy, by hand: --before is the first bad step (a dossier's "onset"), --to the
last one whose batch goes ("trip"). Later checkpoints stay as spiked_step_*; the ledger and the journal get a line.
Start the run again to go on. Exit code: 0 done; 2 not possible, and nothing was changed; 3 a disk failed while it was
done. The same command again does what a failure or a kill left, and nothing twice.
"""

import argparse
import sys
from pathlib import Path

from k2_megatron.config.schema import Spikes
from k2_megatron.runtime.tool import run_tool
from k2_megatron.train.spikes.by_hand import Request, go_back_by_hand


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
    return run_tool("roll_back", lambda: roll_back(options))


def roll_back(options: argparse.Namespace) -> int:
    scope, policy = options.defer or options.skip, None
    if scope:
        policy = Spikes(policy="rollback" if options.defer else "skip", scope=scope, max_rollbacks=1)
    went = go_back_by_hand(options.run, Request(options.before, options.reason, policy, options.to))
    amended = f"; {went.amended['action']} {scope} from sample {went.amended['from_sample']}" if went.amended else ""
    if went.is_repeated:
        amended += " (the ledger had this line already; to amend once more, give another --reason)"
    print(f"{options.run}: set back from step {went.reached} to step {went.step}{amended}. Start it again to go on")
    return 0


if __name__ == "__main__":
    sys.exit(main())
