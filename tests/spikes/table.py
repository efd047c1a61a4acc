"""What the spike detector and its policies do with faults put into a real run, measured: one command, one table.

    python tests/spikes/table.py --folder /tmp/spikes                   `make spikes`; some 8 minutes

In:  a small real model on real text. Out: for each fault, short and long, after how many steps it was called and what
it was judged; what each policy did with a malignant one, whether the run was sound afterwards and whether its steps
can be repeated to the bit; false alarms in 5,000 clean steps. Exit code 1 where something is not as it should be.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]  # tests/ and the checkout, when started as a program

import injected_faults  # noqa: E402
import numpy as np  # noqa: E402
from injected_faults import BATCH, WATCHED, leave_after  # noqa: E402
from rank_processes import REPOSITORY, Rank, results_of, run_pretrain  # noqa: E402
from run_results import events_of, steps_of  # noqa: E402
from small_run import write_small_config, write_text  # noqa: E402

from k2_megatron.data.build import build_plans  # noqa: E402
from k2_megatron.data.ledger import Ledger  # noqa: E402
from k2_megatron.data.manifest import manifest_of_foreign_files  # noqa: E402
from k2_megatron.data.recipe import load_recipe  # noqa: E402

FIRST, LEFT_AT = 111, 100  # the first faulty step; the step from which each run goes on
SHORT, LONG = 12, 40  # faulty steps; spikes.benign_steps is 20
WITHIN_STEPS = 6
RUN_SECONDS = 3600.0  # by then a run must be over; some ten times what 5,000 steps take
CHUNKS, ROWS_PER_CHUNK = 12, 20 * BATCH
POISONED = range((FIRST - 1) * BATCH, (FIRST - 1 + LONG) * BATCH)  # samples, and there rows of the plan
POLICIES = (
    ("watch", []),
    ("skip, batches", ["spikes.policy=skip", "spikes.scope=batches", "spikes.max_rollbacks=9"]),
    ("rollback, batches", ["spikes.policy=rollback", "spikes.scope=batches", "spikes.max_rollbacks=9"]),
    ("rollback, chunk", ["spikes.policy=rollback", "spikes.scope=chunk", "spikes.max_rollbacks=9"]),
)


def poisoned_rows() -> None:
    """Rows of the plan are random bytes where they are read first, and do no harm at the end."""
    from k2_megatron.data.feed import Feed

    read = Feed._read

    def tokens(self, first_sample, count):
        rows = read(self, first_sample, count).copy()
        for number in range(count):
            sample = first_sample + number
            if self.schedule.positions(sample, 1)[0] in POISONED and sample < POISONED.stop:
                rows[number] = np.random.default_rng(sample).integers(1, 256, rows.shape[1])
        return rows

    Feed._read = tokens


class Runs:
    """Starts runs in a folder, over the same text or a plan of it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        write_text(folder, train_documents=120)
        self.folder, self.config = folder, write_small_config(folder, folder)

    def start(self, name: str, settings: Sequence[str], fault: Callable[[], None] | None, code: int = 0) -> Path:
        run = self.folder / name
        given = [*WATCHED, f"run.folder={run}", *settings]
        arguments = ([str(self.config), *(part for setting in given for part in ("--set", setting))], fault)
        ended = Rank(run_pretrain, arguments, {}, self.folder / f"{name}_output").finish(RUN_SECONDS)
        if ended.exit_code != code:
            results_of([ended])
        return run

    def plan(self) -> Path:
        manifest_of_foreign_files(str(self.folder / "train"))
        recipe = self.folder / "recipe.toml"
        recipe.write_text(
            f"sequence_length = 32\nchunks = {CHUNKS}\nrows_per_chunk = {ROWS_PER_CHUNK}\nseed = 3\n"
            f'[sources.speeches]\ntokens = "{self.folder / "train"}"\nshare = 1.0\n'
        )
        build_plans(load_recipe(recipe), self.folder / "plan", None)
        return self.folder / "plan"


def faults(runs: Runs) -> list[str]:
    """A line a fault; what was not found, or found where nothing is, is marked."""
    half = runs.start("half", ["train.steps=200"], partial(leave_after, LEFT_AT))
    lines = [f"{'fault':20} {'steps':>5}  {'called after':>12}  {'judged':9}  at step   first signal"]
    for fault in injected_faults.SPIKES:
        for length in (SHORT, LONG):
            name = f"{fault.__name__}_{length}"
            shutil.copytree(half, runs.folder / name)
            run = runs.start(name, ["train.steps=200"], partial(fault, range(FIRST, FIRST + length)))
            lines.append(f"{fault.__name__:20} {length:>5}  {_found(events_of(run, 'spike'))}")
            print(lines[-1], flush=True)
    return lines


def _found(events: Sequence[dict]) -> str:
    called = [event for event in events if event["kind"] == "spike"]
    if not called or called[0]["onset"] < FIRST:
        return f"WRONG: {[(event['kind'], event['onset']) for event in events]}"
    delay, verdict = called[0]["trip"] - FIRST + 1, events[1] if len(events) > 1 else None
    signal = called[0]["layers"][0]["signal"] if called[0]["layers"] else "loss, gradient norm"
    judged = f"{verdict['kind']:9}  {verdict['step']:>7}" if verdict else f"{'not over':9}  {'':>7}"
    late = "  WRONG: late" if delay > WITHIN_STEPS else ""
    return f"{delay:>6} steps  {judged}   {signal}{late}"


def policies(runs: Runs) -> list[str]:
    """A line a policy, over the same malignant poison in a plan; the last over a fault that is not in the data."""
    plan, lines = runs.plan(), []
    steps = CHUNKS * ROWS_PER_CHUNK // BATCH
    common = [f"data.train={plan}", "checkpoint.every_steps=20"]
    for name, settings in POLICIES:
        # Skipped rows are missing at the end.
        own = [*common, *settings, f"train.steps={steps - 80 if 'skip' in name else steps}"]
        run = runs.start(name.replace(", ", "_"), own, poisoned_rows)
        last = max(steps_of(run))
        malignant = [event for event in events_of(run, "spike") if event["kind"] == "malignant"]
        back = [f"{event['from_step']} -> {event['step']}" for event in events_of(run, "rollback")]
        told = [f"{entry['action']} {entry.get('chunk', entry.get('samples'))}" for entry in Ledger(run).amendments]
        again = _replayed(run, last if back else LEFT_AT)  # what a replay reads is not poisoned
        sound = malignant and (name == "watch") != bool(back) and "equal" in again
        lines.append(
            f"{name:20} {len(malignant)} malignant; back: {', '.join(back) or 'no'}; ledger: {', '.join(told) or '-'}; "
            f"loss at {last}: {steps_of(run)[last]['loss']:.3f}; {again}{'' if sound else '  WRONG'}"
        )
        print(lines[-1], flush=True)
    limited = [*common, f"train.steps={steps - 60}", *POLICIES[1][1][:2], "spikes.max_rollbacks=1"]
    jump = partial(injected_faults.learning_rate_jump, range(FIRST, FIRST + LONG))
    run = runs.start("limited", limited, jump, code=3)
    asked = "max_rollbacks = 1 were made already" in (runs.folder / "limited_output" / "stderr").read_text()
    told = f"{len(events_of(run, 'rollback'))} rollback, then it stops and asks (code 3)"
    lines.append(f"{'not in the data':20} {told}{'' if asked else '  WRONG'}")
    print(lines[-1], flush=True)
    return lines


def _replayed(run: Path, step: int) -> str:
    command = [sys.executable, str(REPOSITORY / "tools" / "replay.py"), str(run), "--step", str(step)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    return "replayed: " + (ended.stdout + ended.stderr).strip().splitlines()[-1].split(", and the weights")[0]


def clean(runs: Runs, steps: int) -> str:
    """False alarms, with the settings that a run has by default."""
    run = runs.start("clean", [f"train.steps={steps}", "spikes.window_steps=", "spikes.benign_steps="], None)
    found, again = events_of(run, "spike"), events_of(run, "incident")
    layers = len(next(iter(steps_of(run).values()))["layers"]["gradient_norm"])
    return (
        f"{len(found)} false alarms in {len(steps_of(run))} clean steps of {layers} layers, {len(again)} of them in "
        f"doubt{'  WRONG' if found or again else ''}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clean-steps", type=int, default=5000)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for the runs")
    arguments = parser.parse_args()
    runs = Runs(arguments.folder)
    lines = [*faults(runs), "", *policies(runs), "", clean(runs, arguments.clean_steps)]
    print("", *lines, sep="\n")
    return 1 if any("WRONG" in line for line in lines) else 0


if __name__ == "__main__":
    sys.exit(main())
