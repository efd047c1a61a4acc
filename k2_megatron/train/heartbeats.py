"""Where each rank stands: the heartbeats that all write, the place of a thread in words, and who is behind.

In:  heartbeats/rank_NNNNN.json of all ranks, stacks of this one. Out: {rank: why} of those that the others wait for.
"""

import json
import linecache
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

HEARTBEATS = "heartbeats"  # the folder in the run folder
_OURS = str(Path(__file__).resolve().parents[2]) + os.sep
# In the text of a line: it waits for other ranks, or for a device whose queue holds a collective
_WAITING = (".wait()", ".item()", ".tolist()", ".cpu()", "synchronize(")
_BETWEEN = ("torch.", "contextlib", "typing_extensions", "warnings")  # modules of wrappers around a collective


@dataclass(frozen=True)
class Place:
    """Where a thread is, in words, and whether it waits for other ranks or for the device there."""

    text: str
    waits: bool


def place_of(frame: FrameType | None) -> Place | None:
    """The place of a thread's innermost frame: the collective it is in, or the line, and ours that called it."""
    if frame is None:
        return None
    collective = last_collective(frame)
    if collective:
        return Place(f"waits in {collective}", True)
    ours: FrameType | None = frame
    while ours is not None and not ours.f_code.co_filename.startswith(_OURS):
        ours = ours.f_back
    line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
    waits = any(word in line for word in _WAITING)
    text = f"{'waits' if waits else 'is'} at {_line_of(frame)}"
    return Place(text if ours in (None, frame) else f"{text}, called from {_line_of(ours)}", waits)


def _line_of(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def last_collective(frame: FrameType | None) -> str | None:
    """The call of torch.distributed that a thread's stack is in, as "all_reduce at k2_megatron/train/step.py:120"."""
    found = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("torch.distributed.distributed_c10d") and frame.f_code.co_name != "wrapper":
            caller = frame.f_back
            while caller is not None and caller.f_globals.get("__name__", "").startswith(_BETWEEN):
                caller = caller.f_back
            where = f" at {caller.f_code.co_filename}:{caller.f_lineno}" if caller else ""
            found = f"{frame.f_code.co_name}{where}"
        frame = frame.f_back
    return found


def read_heartbeats(folder: Path) -> list[dict]:
    """The heartbeats of all ranks, by rank; one being rewritten is passed over."""
    beats = []
    for path in sorted(folder.glob("rank_*.json")):
        try:
            beats.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return beats


def ranks_behind(beats: Sequence[dict], world_size: int, now: float, grace_seconds: float) -> dict[int, str]:
    """{rank: why} of the ranks that others wait for: those that give no sign, those at an earlier step, and those that
    do not wait themselves while others do. By `grace_seconds` clocks of hosts may differ, and heartbeats be late."""
    furthest = max((beat["step"] for beat in beats), default=0)
    behind = dict.fromkeys(set(range(world_size)) - {beat["rank"] for beat in beats}, "gave no sign since the start")
    for beat in beats:
        if "place" not in beat and now - beat["time"] > 3 * beat["every_seconds"] + grace_seconds:
            behind[beat["rank"]] = _silence(beat, now)
        elif beat["step"] < furthest:
            behind[beat["rank"]] = f"at step {beat['step']} of {furthest}, in {beat['phase']}"
    if behind or not any(beat.get("waits") for beat in beats):
        return behind
    at_work = {beat["rank"]: beat["place"] for beat in beats if "waits" in beat and not beat["waits"]}
    # All that say where they are wait: for those that do not say it, stopped in a pause, where heartbeats are rarer
    return at_work or {beat["rank"]: _silence(beat, now) for beat in beats if "place" not in beat}


def _silence(beat: dict, now: float) -> str:
    return f"silent for {now - beat['time']:.0f} s on {beat['host']}, last in {beat['phase']}"


def rank_file(rank: int, suffix: str) -> str:
    """The name of a rank's file in a folder of all ranks'."""
    return f"rank_{rank:05d}.{suffix}"
