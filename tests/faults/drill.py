"""Kill a run again and again at random instants, and require what an uninterrupted run gives, to the bit.

    python tests/faults/drill.py --kills 50 --folder /tmp/drill       what `make drill` runs; ends with a table

In:  a configuration, a number of kills, a seed. Each life of the run is a set of rank processes. Out: for each kind of
kill how many were tried and survived, the seconds until training went on, and what was lost (nothing).
"""

import argparse
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]  # tests/ and the checkout, when started as a program

from rank_processes import Rank, pretrain, rank_environment, results_of, run_pretrain  # noqa: E402
from run_results import events_of, steps_of, stored_state  # noqa: E402
from small_run import write_small_config, write_text  # noqa: E402
from torch.distributed import TCPStore  # noqa: E402

from k2_megatron.data.ledger import Ledger  # noqa: E402

STEPS = 60
SETTINGS = [
    f"train.steps={STEPS}",
    "checkpoint.every_steps=4",
    "checkpoint.keep_last=3",
    "train.evaluate_every_steps=10",
]
LAYOUTS = (["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel.data=2", "parallel.distributed_optimizer=true"])
# What is killed, and when: each is tried in turn
KINDS = ("all ranks, any instant", "all ranks, while saving", "one rank, any instant", "one rank, while saving")
END_SECONDS = 60.0  # ranks left alone by a killed one must be gone by then


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def text(self) -> str:
        seconds = sorted(self.seconds)
        recovery = f"{seconds[len(seconds) // 2]:.1f} / {seconds[-1]:.1f}" if seconds else "-"
        lost = "; ".join(self.lost) or "nothing"
        return f"{self.fault:34} {self.tried:>5} {self.survived:>8}   {recovery:>13}   {lost}"


class Life:
    """The ranks of a run from one start to its end or its killing."""

    def __init__(self, config: Path, settings: list[str], world_size: int, output: Path) -> None:
        arguments = [str(config), *(part for setting in settings for part in ("--set", setting))]
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.ranks = [
            Rank(run_pretrain, (arguments,), rank_environment(rank, world_size, self._store.port), output / f"{rank}")
            for rank in range(world_size)
        ]

    @property
    def ended(self) -> bool:
        return all(rank.process.exitcode is not None for rank in self.ranks)

    def kill(self, victims: list[int]) -> bool:
        """SIGKILL the victims, wait for the rest. Whether nobody was left behind and nobody claimed success."""
        for victim in victims:
            if self.ranks[victim].process.exitcode is None:
                os.kill(self.ranks[victim].process.pid, signal.SIGKILL)
        deadline = time.monotonic() + END_SECONDS
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.02)
        in_time = self.ended
        for rank in self.ranks:
            rank.kill()
        return in_time and all(rank.process.exitcode != 0 for rank in self.ranks)


def drill(config: Path, folder: Path, kills: int, seed: int, layout: list[str]) -> dict[str, Row]:
    """Kill `kills` times, over as many runs as that takes; the last of each is compared with an uninterrupted run."""
    rows = {kind: Row(kind) for kind in KINDS}
    settings = [*SETTINGS, *layout]
    results_of(pretrain(2, config, [*settings, f"run.folder={folder / 'whole'}"], folder / "whole_output"))
    chance = random.Random(seed)
    kinds, round_number = _in_turn(chance), 0
    while kills > 0:
        run = folder / f"killed_{round_number}"
        tried: list[Row] = []
        kills = _one_run(config, [*settings, f"run.folder={run}"], run, kills, chance, kinds, rows, tried)
        differences = compare(folder / "whole", run)
        for row in tried:
            row.survived += not differences
            row.lost += [f"{difference} (see {run})" for difference in differences]
        if not differences:
            shutil.rmtree(run)
        round_number += 1
    return rows


def _in_turn(chance: random.Random) -> Iterator[str]:
    while True:
        yield from chance.sample(KINDS, len(KINDS))


def _one_run(config, settings, run: Path, kills: int, chance, kinds, rows, tried: list[Row]) -> int:
    """Start, kill, start again ... until the run ends by itself or the kills are used up; how many are left."""
    killed_at: tuple[Row, float] | None = None
    for life_number in range(1000):
        known = len(events_of(run, "step"))
        life = Life(config, settings, 2, run.with_name(f"{run.name}_output_{life_number}"))
        while len(events_of(run, "step")) == known and not life.ended:
            time.sleep(0.01)
        if killed_at is not None:
            killed_at[0].seconds.append(time.monotonic() - killed_at[1])
        if kills == 0:
            outcomes = [rank.finish() for rank in life.ranks]
            assert all(outcome.exit_code == 0 for outcome in outcomes), outcomes
            return 0
        kind = next(kinds)
        if not _reach(kind, life, run, chance):
            assert all(rank.process.exitcode == 0 for rank in life.ranks), [rank.finish() for rank in life.ranks]
            return kills
        victims = [0, 1] if kind.startswith("all") else [chance.randrange(2)]
        kills -= 1
        row = rows[kind]
        row.tried += 1
        tried.append(row)
        killed_at = (row, time.monotonic())
        if not life.kill(victims):
            row.lost.append(f"a rank outlived the killed one, or called it success ({run}, life {life_number})")
    raise AssertionError(f"{run} makes no progress")


def _reach(kind: str, life: Life, run: Path, chance: random.Random) -> bool:
    """Wait for the instant of a kill of this kind; False when the run ended before."""
    if kind.endswith("saving"):
        while not any((run / "checkpoints").glob(".step_*.writing")):
            if life.ended:
                return False
        time.sleep(chance.uniform(0.0, 0.15))  # a save of this size takes about that long
    else:
        deadline = time.monotonic() + chance.uniform(0.0, 1.0)
        while time.monotonic() < deadline and not life.ended:
            time.sleep(0.005)
    return not life.ended


def compare(whole: Path, run: Path) -> list[str]:
    """What differs between two finished runs: nothing, when the kills did no harm."""
    differences = []
    if steps_of(run) != steps_of(whole):
        differences.append("losses or gradient norms in the journal")
    if stored_state(run, STEPS) != stored_state(whole, STEPS):
        differences.append("weights, moments or generators")
    if Ledger(run).positions[-1]["chain"] != Ledger(whole).positions[-1]["chain"]:
        differences.append("the chain of consumed samples")
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    if left:
        differences.append(f"left behind: {left}")
    return differences


def table(rows: list[Row]) -> str:
    head = f"{'fault':34} {'tried':>5} {'survived':>8}   {'s to go on':>13}   lost"
    return "\n".join([head, f"{'':49}   {'median / most':>13}", *(row.text() for row in rows)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for the runs")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    write_text(arguments.folder)
    config = write_small_config(arguments.folder, arguments.folder)
    total = {kind: Row(kind) for kind in KINDS}
    for number, layout in enumerate(LAYOUTS):
        share = arguments.kills // len(LAYOUTS) + (number < arguments.kills % len(LAYOUTS))
        rows = drill(config, arguments.folder / f"layout_{number}", share, arguments.seed + number, layout)
        for kind, row in rows.items():
            total[kind].tried += row.tried
            total[kind].survived += row.survived
            total[kind].seconds += row.seconds
            total[kind].lost += row.lost
        print(f"{' '.join(layout)}: {share} kills done", flush=True)
    print(table(list(total.values())))
    return 0 if all(row.survived == row.tried and not row.lost for row in total.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
