"""A long run under faults: one every twenty steps on average, started again each time, as a batch script would.

    python tests/faults/soak.py --folder /tmp/soak                      `make soak`; 2,000 steps, some 90 minutes
    python tests/faults/soak.py --folder /tmp/soak --steps 200 --step-seconds 0.5

In:  how many steps, how far apart the faults are, a seed. A step is drawn out to `--step-seconds`, as one that a device
computes while the processor waits: a step of the small model itself lasts a tenth of what starting again does. Two
seconds are still a twelfth of K2-65B's step, and a hang counts as one after 10 s and three steps, whatever they last.
The faults are of all kinds that a run meets but one: a slow rank, which costs what it is made to cost.
Out: where the wall time went; goodput, the wall time of the run without faults (its start, saves and evaluations
included) as a share of the wall time under faults less the steps that were repeated; each fault with how often, and
what was lost against the run without faults, to the bit: steps, weights, moments, generators, journal, ledger; and
processes, shared memory and temporary files that were left behind. Exit code 0 when that is nothing.
"""

import argparse
import errno
import itertools
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve()
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parents[2])]  # tests/ and the checkout, when started as a program

from aimed_kills import PLACES, SAVE_PLACES  # noqa: E402
from drill import LAYOUTS, compare, hashed_small_run, last_step  # noqa: E402
from drill_faults import (  # noqa: E402
    KILLS,
    OTHERS,
    Fault,
    Life,
    Strike,
    aimed_kill,
    ends_by_itself,
    flip_a_bit,
    gradient_not_finite,
    gradient_too_large,
    hangs,
    loop_for_ever,
)
from rank_processes import Rank  # noqa: E402
from run_results import events_of  # noqa: E402
from soak_report import SHARED_MEMORY, left_behind, seconds_without_faults, where_time_went  # noqa: E402

RANKS, EVERY_STEPS = 2, 5  # between two saves
NOT_FINITE_TWICE = "gradient not finite on one rank, twice"
TOO_LARGE = "gradient too large on one rank, for ever"
SETTINGS = [
    *LAYOUTS[2],  # two replicas, a sharded optimizer, compared to the bit in every step
    *("train.evaluate_every_steps=100", f"checkpoint.every_steps={EVERY_STEPS}", "checkpoint.keep_last=3"),
    "checkpoint.retry_seconds=1.0",
    *("log.layers_every_steps=10", "watchdog.pause_seconds=30.0"),
]
PASSING_SHARE = 0.25  # of the lives: a gradient is wrong once, or a write fails once, which ends nothing
WRITE_FAILED_ONCE = "a write of a save fails, once"
TRIED_AGAIN = "trying again"  # what a run says of a save that failed
HUGE, FEWEST_BEFORE_HUGE = 1e30, 24  # a gradient that is finite, and after how many steps that is noticed
TIMED_SHARE = 0.05  # of the run without faults, at its beginning; its other steps are not drawn out
LIFE_SECONDS, WHOLE_SECONDS = 900.0, 3600.0  # by then they must be over; some ten times what they take


@dataclass
class Soak:
    """What came of it: faults by name, complaints about how ranks ended, the wall time."""

    faults: Counter = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)
    wall_seconds: float = 0.0


def in_rank(
    step_seconds: float,
    scratch: Path,
    passing: Callable[[], None] | None,
    arm: Callable[[], None] | None,
    drawn_out_steps: int = sys.maxsize,
) -> None:
    """Before a rank trains: its steps last so long, its temporary files lie in `scratch`, its faults are set."""
    import tempfile

    import pretrain_k2

    tempfile.tempdir = str(scratch)
    train_step = pretrain_k2.train_step

    def drawn_out(config, parts, feed, step, **more):
        began = time.monotonic()
        result = train_step(config, parts, feed, step, **more)
        if step < drawn_out_steps:
            time.sleep(max(0.0, began + step_seconds - time.monotonic()))
        return result

    pretrain_k2.train_step = drawn_out
    if passing is not None:
        passing()
    if arm is not None:
        arm()


def _gradient_wrong_once(call: int, value: float) -> None:
    """One gradient of rank 0, before the sum over replicas."""
    import k2_megatron.train.step as step

    finalize, calls = step.finalize_model_grads, []

    def spoiled(model, *arguments, **keywords):
        calls.append(1)
        if len(calls) == call and os.environ["RANK"] == "0":
            next(model[0].parameters()).main_grad.view(-1)[3] = value
        finalize(model, *arguments, **keywords)

    step.finalize_model_grads = spoiled


def _disk_fails(error: int, always: bool, save: int, _rank: str = "") -> None:
    """In the `save`-th writing of a checkpoint, and with `always` in all that follow."""
    from k2_megatron.train.checkpoints.save import _Plan

    write, saves = _Plan.write, []

    def on_failing_disk(self, *arguments, **keywords):
        saves.append(1)
        if len(saves) == save or (always and len(saves) > save):
            raise OSError(error, os.strerror(error))
        return write(self, *arguments, **keywords)

    _Plan.write = on_failing_disk


# {name: (what is armed, how the ranks must end, whether it counts saves)}
ARMED: dict[str, tuple[Callable[[int, str], None], Strike, bool]] = {
    NOT_FINITE_TWICE: (gradient_not_finite, partial(ends_by_itself, 5), False),
    TOO_LARGE: (gradient_too_large, partial(ends_by_itself, 3), False),
    "bit flipped in one replica": (flip_a_bit, partial(ends_by_itself, 3), False),
    "one rank hangs in computing": (loop_for_ever, hangs, False),
    "disk full": (partial(_disk_fails, errno.ENOSPC, True), partial(ends_by_itself, 2), True),
    "disk broken": (partial(_disk_fails, errno.EIO, True), partial(ends_by_itself, 2), True),
}


def fault_at(kind: str | tuple[str, bool, int] | Fault, reach: int, chance: random.Random) -> Fault:
    """The fault of a kind, some `reach` steps into the life of a run."""
    save = -(-reach // EVERY_STEPS)
    if isinstance(kind, Fault):
        return kind
    if isinstance(kind, tuple):
        return aimed_kill(*kind, save if kind[0] in SAVE_PLACES else reach)
    what, strike, counts_saves = ARMED[kind]
    call = partial(what, save if counts_saves else reach, str(chance.randrange(RANKS)))
    return Fault(kind, strike, lambda _chance, _output: call)


def passing_fault(steps_before: int, apart: float, chance: random.Random) -> Callable[[], None]:
    """What ends no life: a gradient that is not finite or far too large, or a write that fails, once."""
    call = chance.randrange(1, int(apart))
    if chance.random() < 1 / 3:
        return partial(_disk_fails, errno.EIO, False, -(-call // EVERY_STEPS))
    noticed = steps_before >= FEWEST_BEFORE_HUGE and chance.random() < 0.5
    return partial(_gradient_wrong_once, call, HUGE if noticed else math.nan)


def kinds() -> list[str | tuple[str, bool, int] | Fault]:
    """Those that end a run."""
    aimed = [(place, background, rank) for place, background in PLACES for rank in range(RANKS)]
    return [*KILLS, *KILLS, *(fault for fault in OTHERS if fault.arm is None), *ARMED, *aimed]


class Told:
    """Counts the journal's events of a kind as it grows."""

    def __init__(self, journal: Path, kind: str) -> None:
        self._journal, self._mark, self._offset, self.count = journal, f'"event": "{kind}"'.encode(), 0, 0

    def now(self) -> int:
        if self._journal.exists():
            with self._journal.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            self.count += whole.count(self._mark)
        return self.count


def soak(config: Path, folder: Path, steps: int, apart: float, step_seconds: float, seed: int) -> Soak:
    """Train `steps` steps in `folder`/run under faults `apart` steps apart; start again until the run is finished."""
    run, scratch, found = folder / "run", folder / "scratch", Soak()
    scratch.mkdir()
    Rank(print, (), {}, folder / "imports").finish()  # the server's imports are no part of a run
    chance, began, deck = random.Random(seed), time.monotonic(), []
    told = Told(run / "journal.jsonl", "step")
    for number in itertools.count():
        deck = deck or chance.sample(kinds(), len(kinds()))
        if deck[-1] == TOO_LARGE and last_step(run) < FEWEST_BEFORE_HUGE:  # none knows yet what is usual
            deck = [deck.pop(), *deck]
        reach = min(1 + int(chance.expovariate(1 / apart)), 5 * int(apart))
        fault = fault_at(deck.pop(), reach, chance)
        background = number % 2 == 1 if fault.background is None else fault.background
        output, known = folder / "lives" / f"{number}", told.now()
        passing = None
        if not fault.arm and chance.random() < PASSING_SHARE:
            passing = passing_fault(last_step(run), apart, chance)
        arm = partial(in_rank, step_seconds, scratch, passing, fault.arm(chance, output) if fault.arm else None)
        settings = [*SETTINGS, f"train.steps={steps}", f"run.folder={run}"]
        life = Life(config, [*settings, f"checkpoint.asynchronous={str(background).lower()}"], RANKS, output, arm)
        # What is armed strikes by itself, and may come too late for this run.
        struck = (lambda: False) if fault.arm else (lambda known=known, reach=reach: told.now() >= known + reach)
        life.wait(struck, LIFE_SECONDS)
        if life.ended and set(life.codes) == {0}:
            break
        time.sleep(0.0 if fault.arm else chance.uniform(0.0, step_seconds))
        complaint = fault.strike(life, run, chance)
        if set(life.codes) == {0} and last_step(run) == steps:
            break
        found.faults[fault.name] += 1
        found.faults[WRITE_FAILED_ONCE] += not fault.arm and TRIED_AGAIN in life.told(0)
        found.complaints += [f"{fault.name}: {complaint} (life {number})"] if complaint else []
        if number % 10 == 9:
            print(f"{number + 1} faults, step {last_step(run)}, {time.monotonic() - began:.0f} s", flush=True)
    found.wall_seconds = time.monotonic() - began
    again = Counter(event["kind"] for event in events_of(run, "incident") if event.get("made_again"))
    found.faults["gradient not finite on one rank, once"] = again["not finite"] - found.faults[NOT_FINITE_TWICE]
    found.faults["gradient huge on one rank, once"] = again["in doubt"] - 2 * found.faults[TOO_LARGE]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--apart", type=float, default=20.0, help="steps between two faults, on average")
    parser.add_argument("--step-seconds", type=float, default=2.0, help="what a step lasts at least")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, required=True, help="an empty folder for the runs")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True)
    config = hashed_small_run(folder, train_documents=120)
    whole = [*SETTINGS, f"train.steps={arguments.steps}", f"run.folder={folder / 'whole'}"]
    shared_memory = {path.name for path in SHARED_MEMORY.iterdir()}
    found = soak(config, folder, arguments.steps, arguments.apart, arguments.step_seconds, arguments.seed)
    print("the same run without faults, to compare with", flush=True)
    began, timed = time.time(), max(EVERY_STEPS, int(TIMED_SHARE * arguments.steps))
    arm = partial(in_rank, arguments.step_seconds, folder / "scratch", None, None, timed + 1)
    life = Life(config, whole, RANKS, folder / "whole_output", arm)
    life.wait(lambda: life.ended, WHOLE_SECONDS)
    assert set(life.codes) == {0}, [rank.finish() for rank in life.ranks]
    lost = compare(folder / "whole", folder / "run", arguments.steps) + left_behind(folder, shared_memory)
    print(*(f"{count:5}  {name}" for name, count in sorted(found.faults.items()) if count), sep="\n")
    print(f"{sum(found.faults.values()):5}  faults in {arguments.steps} steps")
    print(f"ended otherwise than they should: {'; '.join(found.complaints) or 'none'}")
    without_faults = seconds_without_faults(folder / "whole", began, arguments.steps, timed)
    print(*where_time_went(found.wall_seconds, folder / "run", without_faults), sep="\n")
    print(f"lost: {'; '.join(lost) or 'nothing'}")
    return 1 if lost or found.complaints else 0


if __name__ == "__main__":
    sys.exit(main())
