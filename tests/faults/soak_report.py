"""What came of a soak: where its time went, and what it left behind.

In:  the run folders under faults and without, wall seconds. Out: lines to print.
"""

import contextlib
import os
from datetime import datetime
from pathlib import Path

import psutil
from run_results import events_of

from k2_megatron.runtime.journal import read_events

SHARED_MEMORY = Path("/dev/shm")


def seconds_without_faults(whole: Path, began: float, steps: int, timed: int) -> float:
    """What `steps` steps take that are drawn out like the first `timed` of the run in `whole`, from its start at
    `began` (seconds since 1970), saves and evaluations included."""
    at = [
        datetime.fromisoformat(event["time"]).timestamp() - event["step_seconds"]
        for event in events_of(whole, "step")[: timed + 1]
    ]
    return at[0] - began + (at[timed] - at[0]) / timed * steps


def where_time_went(wall: float, run: Path, without_faults: float) -> list[str]:
    """The `wall` seconds of a soak in parts, and goodput, given what the run takes without faults."""
    kept: dict[int, float] = {}
    repeated = down = 0.0
    tellings, last_told, new_life = 0, None, False
    for event in read_events(run / "journal.jsonl"):
        if event["event"] == "start":
            new_life = True
        elif event["event"] == "step":
            at, seconds = datetime.fromisoformat(event["time"]).timestamp(), event["step_seconds"]
            if new_life and last_told is not None:
                down += at - seconds - last_told
            tellings, last_told, new_life = tellings + 1, at, False
            repeated += kept.pop(event["step"], 0.0)
            kept[event["step"]] = seconds
    useful = sum(kept.values())
    parts = {
        "steps that were kept": useful,
        "steps that were repeated": repeated,
        "from the last step before a fault to the next": down,
        "saving, evaluating, first start": wall - useful - repeated - down,
    }
    lines = [f"{what:46} {seconds:8.1f} s  {100 * seconds / wall:5.1f} %" for what, seconds in parts.items()]
    lines += [f"{'wall time':46} {wall:8.1f} s", f"{tellings - len(kept)} steps repeated, {len(kept)} kept"]
    return [
        *lines,
        f"{'wall time without faults':46} {without_faults:8.1f} s",
        f"goodput {100 * without_faults / (wall - repeated):.1f} %: the wall time without faults, of that with faults "
        f"less repeated steps; with them {100 * without_faults / wall:.1f} %",
    ]


def left_behind(folder: Path, shared_memory: set[str]) -> list[str]:
    """Processes of ranks, temporary files, and shared memory that no living process of the machine holds."""
    ranks = [
        f"process {process.pid}"
        for server in psutil.Process().children()
        for process in server.children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE
    ]
    new = {path for path in SHARED_MEMORY.iterdir() if path.is_file() and path.name not in shared_memory}
    memory = [str(path) for path in sorted(new) if new and str(path) not in _held()]
    return ranks + memory + [str(path) for path in (folder / "scratch").rglob("*")]


def _held() -> str:
    """The names of all that living processes have open or mapped."""
    held = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            held.append((process / "maps").read_text())
            held += [os.readlink(link) for link in (process / "fd").iterdir()]
    return "\n".join(held)
