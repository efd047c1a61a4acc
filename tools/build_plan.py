"""A recipe and its token files to a plan: which row is trained when.

    python tools/build_plan.py examples/toy/data.toml --output runs/toy_data/train --held-out runs/toy_data/held_out

The folders are what data.train and data.held_out of a configuration name. --held-out goes with a recipe whose
held_out_fraction is more than 0. The same recipe and token files give the same bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from k2_megatron.data.build import build_plans
from k2_megatron.data.recipe import load_recipe
from k2_megatron.runtime.tool import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the recipe, a TOML file")
    parser.add_argument("--output", type=Path, required=True, help="folder of the training plan; must not exist")
    parser.add_argument("--held-out", type=Path, help="folder of the held-out plan; must not exist")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"--threads {options.threads}: 1 or more")
    return run_tool("build_plan", lambda: build(options), interrupted="stopped; no plan was written")


def build(options: argparse.Namespace) -> int:
    start = time.monotonic()
    plan = build_plans(
        load_recipe(options.recipe), options.output, options.held_out, threads=options.threads, report=print
    )
    for source in plan["sources"]:
        print(f"  {source['name']:24} {source['rows_used']:12} rows, {source['repeats']:7.3f} times its own")
    rows = plan["rows_per_chunk"] * len(plan["chunk_order"])
    print(f"{options.output}: {rows} rows of {plan['sequence_length']} tokens, {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
