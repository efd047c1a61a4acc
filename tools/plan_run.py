"""Print what a configuration would run, without running it.

    python tools/plan_run.py examples/k2_65b/stage1.toml [--set section.key=value ...] [--ranks N] [--dry-run]

The plan comes from formulas alone and needs no data, no GPU and no other ranks. --dry-run also builds every distinct
rank of the layout with fake tensors and compares.
"""

import argparse
import sys

from k2_megatron.runtime.quiet import silence_dependencies
from k2_megatron.runtime.tool import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", help="the run's TOML file")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--ranks", type=int, help="plan for this many ranks; data parallelism follows")
    parser.add_argument("--dry-run", action="store_true", help="build every distinct rank with fake tensors")
    arguments = parser.parse_args()
    return run_tool("plan_run", lambda: plan(arguments))


def plan(arguments: argparse.Namespace) -> int:
    silence_dependencies()
    from k2_megatron.config import load_config
    from k2_megatron.plan.text import plan_text

    config = load_config(arguments.config, arguments.overrides, arguments.ranks)
    print(plan_text(config))
    if arguments.dry_run:
        from k2_megatron.plan.dry_run import dry_run_text

        print(f"\n{dry_run_text(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
