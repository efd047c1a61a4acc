"""Repeat steps of a run from the checkpoint before them, and compare what is computed with the journal, to the bit.

    python tools/replay.py runs/k2_65b_stage1 --step 12345
    python tools/replay.py runs/k2_65b_stage1 --step 12345 --launch "srun --ntasks=480"

Losses, gradient norms and samples of every step up to the first saved one at or after N are compared, and the
fingerprint of the weights wherever the run had saved. A difference means that one of the two computations went wrong in
the machine (silent corruption), or that something in the run is not deterministic: replay again, on other nodes, to
tell which. N may be the step after the last one, at which the run crashes: it is computed, and not compared.
Steps are repeated under the settings and in the layout that computed them, and judged where device and kernels are the
same too: others round otherwise. With train.gradient_leaves fewer data-parallel ranks, started by --launch, come to the
same bits as well. The run itself is only read: what is trained goes to a folder beside it, which all
nodes see. Exit code: 0 equal, 1 different, 2 not possible.
"""

import argparse
import shlex
import sys
from pathlib import Path

from k2_megatron.runtime.tool import run_tool
from k2_megatron.train.replay import replay

PRETRAIN = Path(__file__).resolve().parents[1] / "pretrain_k2.py"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--step", type=int, required=True, help="the step to look at, numbered as in the journal")
    parser.add_argument("--launch", default="", help='what starts the ranks, such as "srun --ntasks=16"; else local')
    parser.add_argument("--folder", type=Path, help="an empty folder for the replay, which is then kept")
    arguments = parser.parse_args()
    return run_tool("replay", lambda: replay_steps(arguments))


def replay_steps(arguments: argparse.Namespace) -> int:
    launch = shlex.split(arguments.launch)
    return replay(arguments.run, arguments.step, launch, arguments.folder, pretrain=PRETRAIN)


if __name__ == "__main__":
    sys.exit(main())
