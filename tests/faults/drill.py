"""Wound a run again and again at random instants, and require what an uninterrupted run gives, to the bit.

    python tests/faults/drill.py --kills 50 --others 30 --folder /tmp/drill     `make drill`; ends with a table

In:  a configuration, how many kills and how many other faults, a seed. Each life of the run is a set of rank processes;
every other one saves in the background. The kills are at first one of each rank at each place of aimed_kills.py, in one
layout or another, then at random instants.
Out: for each fault how often it was tried and survived, the steps that had to be repeated, the seconds until training
went on, and what was lost (nothing). What does not come to an end within its time ends the drill.
"""

import argparse
import itertools
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]  # tests/ and the checkout, when started as a program

from aimed_kills import PLACES  # noqa: E402
from drill_faults import KILLS, OTHERS, Fault, Life, aimed_kill  # noqa: E402
from rank_processes import pretrain, results_of  # noqa: E402
from run_results import differences, events_of, events_told  # noqa: E402
from small_run import write_small_config, write_text  # noqa: E402

from k2_megatron.config import load_config  # noqa: E402
from k2_megatron.data.manifest import manifest_of_foreign_files  # noqa: E402

STEPS = 60
RUN_SECONDS = 600.0  # all lives of one run together: some ten times what they take
SETTINGS = [
    *("train.evaluate_every_steps=10", "checkpoint.every_steps=4", "checkpoint.keep_last=3"),
    *("watchdog.minimum_seconds=15.0", "watchdog.pause_seconds=40.0", "checkpoint.retry_seconds=10.0"),
]
SHARDED = "parallel.distributed_optimizer=true"
LAYOUTS = (
    ["parallel.tensor=2"],
    ["parallel.pipeline=2"],
    ["parallel.data=2", SHARDED, "train.compare_replicas_every_steps=1"],
    ["parallel.tensor=2", "parallel.pipeline=2"],
    ["parallel.tensor=2", "parallel.data=2", SHARDED, "train.compare_replicas_every_steps=1"],
)


@dataclass
class Row:
    """One line of the table."""

    fault: str
    tried: int = 0
    survived: int = 0
    steps_repeated: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def add(self, other: "Row") -> None:
        self.tried += other.tried
        self.survived += other.survived
        self.steps_repeated += other.steps_repeated
        self.seconds += other.seconds
        self.lost += other.lost

    def text(self) -> str:
        seconds = sorted(self.seconds)
        recovery = f"{seconds[len(seconds) // 2]:.1f} / {seconds[-1]:.1f}" if seconds else "-"
        repeated = str(max(self.steps_repeated)) if self.steps_repeated else "-"
        lost = "; ".join(self.lost) or "nothing"
        return f"{self.fault:54} {self.tried:>5} {self.survived:>8} {repeated:>8}   {recovery:>13}   {lost}"


@dataclass
class Wound:
    """A fault that was made: its row, when, and how many steps had been trained by then."""

    row: Row
    at: float
    steps: int


def drill(
    config: Path, folder: Path, faults: Sequence[Fault], seed: int, layout: list[str], steps: int = STEPS
) -> dict[str, Row]:
    """Make every one of `faults`, over as many runs as that takes; each run is compared with an uninterrupted one."""
    rows = {fault.name: Row(fault.name) for fault in faults}
    settings = [*SETTINGS, *layout, f"train.steps={steps}"]
    world_size = load_config(config, settings).world_size
    results_of(pretrain(world_size, config, [*settings, f"run.folder={folder / 'whole'}"], folder / "whole_output"))
    chance, left, number = random.Random(seed), list(faults), 0
    chance.shuffle(left)
    while left:
        run = folder / f"wounded_{number}"
        wounds = _one_run(config, [*settings, f"run.folder={run}"], world_size, run, steps, left, chance, rows)
        assert wounds, f"{left[0].name} cannot be made under {layout}"
        lost = compare(folder / "whole", run, steps)
        for wound in wounds:
            wound.row.survived += not lost
            wound.row.lost += [f"{difference} (see {run})" for difference in lost]
        if not lost:
            shutil.rmtree(run)
        number += 1
    return rows


def _one_run(config, settings, world_size, run: Path, steps: int, left: list[Fault], chance, rows) -> list[Wound]:
    """Start, wound, start again ... until the run ends by itself; takes the faults it made out of `left`."""
    wounds: list[Wound] = []
    deadline = time.monotonic() + RUN_SECONDS
    for number in itertools.count():
        assert time.monotonic() < deadline, f"{run} does not end within {RUN_SECONDS:.0f} s, {number} lives"
        fault = left[0] if left else None
        output = run.with_name(f"{run.name}_output_{number}")
        arm = fault.arm(chance, output) if fault and fault.arm else None
        known = events_told(run, "step")
        background = number % 2 == 1 if fault is None or fault.background is None else fault.background
        saving = f"checkpoint.asynchronous={str(background).lower()}"
        life = Life(config, [*settings, saving], world_size, output, arm)
        life.wait(lambda known=known: events_told(run, "step") > known)
        if wounds and len(wounds[-1].row.seconds) < wounds[-1].row.tried:
            _went_on(wounds[-1], run)
        if fault is None:
            assert life.end(), f"{run} does not end"
        else:
            early = life.ended and not fault.arm
            assert not early or set(life.codes) == {0}, [rank.finish() for rank in life.ranks]
            complaint = None if early else fault.strike(life, run, chance)
            if life.codes != [0] * world_size or "asked" in fault.name:
                row = rows[fault.name]
                row.tried += 1
                row.lost += [f"{complaint} ({run}, life {number})"] if complaint else []
                wounds.append(Wound(row, time.monotonic(), last_step(run)))
                left.pop(0)
        if life.codes == [0] * world_size and last_step(run) == steps and events_of(run, "stop"):
            return wounds
        assert fault is not None, [rank.finish() for rank in life.ranks]
    raise AssertionError("unreachable")


def _went_on(wound: Wound, run: Path) -> None:
    wound.row.seconds.append(time.monotonic() - wound.at)
    resumes = events_of(run, "resume")
    wound.row.steps_repeated.append(wound.steps - (resumes[-1]["step"] if resumes else 0))


def last_step(run: Path) -> int:
    return max((event["step"] for event in events_of(run, "step")[-1:]), default=0)


def compare(whole: Path, run: Path, steps: int) -> list[str]:
    """What differs between two finished runs, or was left behind: nothing, when the faults did no harm."""
    left = [path.name for path in (run / "checkpoints").iterdir() if path.name.startswith(".")]
    return differences(whole, run, steps) + ([f"left behind: {left}"] if left else [])


def table(rows: Sequence[Row]) -> str:
    head = f"{'fault':54} {'tried':>5} {'survived':>8} {'repeated':>8}   {'s to go on':>13}   lost"
    units = f"{'':54} {'':5} {'':8} {'steps':>8}   {'median / most':>13}"
    return "\n".join([head, units, *(row.text() for row in rows)])


def hashed_small_run(folder: Path, train_documents: int = 40) -> Path:
    """The configuration of a run over tokens of its own in `folder`, with their hashes."""
    write_text(folder, train_documents)
    manifest_of_foreign_files(str(folder / "train"))
    return write_small_config(folder, folder)


def in_turn(faults: Sequence[Fault], chance: random.Random) -> Iterator[Fault]:
    """Every fault once in random order, again and again."""
    while True:
        yield from chance.sample(faults, len(faults))


def share(total: int, number: int) -> int:
    """The part of `total` that layout `number` gets."""
    return total // len(LAYOUTS) + (number < total % len(LAYOUTS))


def deal_kills(total: int, world_sizes: Sequence[int], chance: random.Random) -> list[list[Fault]]:
    """The kills of each layout: every place for every rank in one of them, and then others at random instants."""
    hands: list[list[Fault]] = [[] for _ in world_sizes]
    room = [share(total, number) for number in range(len(world_sizes))]
    for rank in reversed(range(max(world_sizes))):  # first those that few layouts have
        for place, background in chance.sample(PLACES, len(PLACES)):
            free = [
                number for number, size in enumerate(world_sizes) if rank < size and len(hands[number]) < room[number]
            ]
            if free:
                hand = min((hands[number] for number in free), key=len)
                hand.append(aimed_kill(place, background, rank))
    for hand, most in zip(hands, room, strict=True):
        others = in_turn(KILLS, chance)
        hand += [next(others) for _ in range(most - len(hand))]
    return hands


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--others", type=int, default=30, help="faults that are no kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--layouts", type=int, nargs="*", default=range(len(LAYOUTS)), help="numbers; default all")
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for the runs")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # one that is ended prints what it did by then
    arguments.folder.mkdir(parents=True)
    config = hashed_small_run(arguments.folder)
    aimed = [aimed_kill(place, background, 0) for place, background in PLACES]
    total = {fault.name: Row(fault.name) for fault in (*KILLS, *aimed, *OTHERS)}
    world_sizes = [load_config(config, layout).world_size for layout in LAYOUTS]
    hands = deal_kills(arguments.kills, world_sizes, random.Random(arguments.seed))
    try:
        for number in arguments.layouts:
            layout, chance = LAYOUTS[number], random.Random(f"{arguments.seed} {number}")
            made = in_turn([fault for fault in OTHERS if fault.fits(layout)], chance)
            others = [next(made) for _ in range(share(arguments.others, number))]
            folder = arguments.folder / f"layout_{number}"
            rows = drill(config, folder, hands[number] + others, arguments.seed + number, layout)
            for name, row in rows.items():
                total[name].add(row)
            lost = "; ".join(item for row in rows.values() for item in row.lost) or "nothing"
            made_here = f"{len(hands[number])} kills and {len(others)} other faults"
            print(f"{' '.join(layout)}: {made_here} done, lost: {lost}", flush=True)
    finally:  # also of a drill that is cut short
        print(table([row for row in total.values() if row.tried]), flush=True)
    return 0 if all(row.survived == row.tried and not row.lost for row in total.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
