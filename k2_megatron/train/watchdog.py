"""A thread in every rank that notices when the rank makes no progress, tells where it stands, and ends it.

In:  what the training loop says it is doing. Out: heartbeats/rank_NNNNN.json, rewritten every few seconds; when a limit
is passed, incidents/step_NNNNNNNN/rank_NNNNN.txt with the stacks of all threads, an "incident" in the journal that
names the ranks behind, and exit code 4, so that the launcher ends the job instead of paying for a hung one.

The limit of a step follows from the recent ones, by sample; that of a pause (evaluation, save, ...) from the longest of
its kind, with more patience: file systems stall. What has not been measured yet gets a fixed limit. All ranks hang
together when one does (they wait for it), so each ends itself; one that is stopped by the system cannot, and is killed
by its launcher (run_local_ranks, srun).
"""

import contextlib
import faulthandler
import json
import linecache
import math
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import FrameType

from k2_megatron.config.schema import Watchdog as Settings
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.mistakes import HUNG
from k2_megatron.train.journal import Journal

HEARTBEATS = "heartbeats"  # the folder in the run folder
STEP = "step"
RECENT_STEPS = 50
FEWEST_STEPS = 3  # before that, the first step with its compilations decides too much
REPORT_SECONDS = 2.5  # at most, until the other ranks have said where they are
GRACE_SECONDS = 5.0  # between the report and the end, for the other ranks to make theirs
# If even this thread cannot run (a library holds the interpreter's lock), the interpreter's own timer ends the rank.
BACKSTOP_SECONDS = 20.0
_OURS = str(Path(__file__).resolve().parents[2]) + os.sep
# In the text of a line: it waits for other ranks, or for a device whose queue holds a collective
_WAITING = (".wait()", ".item()", ".tolist()", ".cpu()", "synchronize(")


@dataclass(frozen=True)
class Progress:
    """What the rank does: a phase of the loop, after `step` finished steps, since a time of the monotonic clock; how
    long it may last."""

    phase: str
    step: int
    since: float
    limit: float


@dataclass(frozen=True)
class Place:
    """Where a thread is, in words, and whether it waits for other ranks or for the device there."""

    text: str
    waits: bool


def step_limit_seconds(settings: Settings, recent: Sequence[float], samples: int = 1) -> float:
    """How long a step may last, given the seconds a sample of the recent ones, and the samples of this one."""
    if len(recent) < FEWEST_STEPS:
        return pause_limit_seconds(settings, max(recent) * samples if recent else None)
    return settings.minimum_seconds + min(settings.step_factor * median(recent) * samples, settings.pause_seconds)


def pause_limit_seconds(settings: Settings, longest: float | None) -> float:
    """How long a pause may last, given the longest of its kind in this start, if there was one."""
    if longest is None:
        return settings.pause_seconds
    return min(settings.pause_minimum_seconds + settings.step_factor * longest, settings.pause_seconds)


def collective_timeout_seconds(settings: Settings) -> float:
    """The libraries' own limit for a collective: above each of the watchdog, which tells more when it ends a run."""
    longest = settings.minimum_seconds + settings.pause_seconds
    return longest + REPORT_SECONDS + GRACE_SECONDS + 2 * BACKSTOP_SECONDS


class Watchdog:
    """Started at once; `stop` ends it. `at` is called by the loop, from its own thread. `samples_at` gives the samples
    of the step that follows a number of steps: a growing batch is no hang."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        rank: int,
        world_size: int,
        samples_at: Callable[[int], int] = lambda _step: 1,
    ) -> None:
        self._settings, self._folder, self._rank, self._samples_at = settings, folder, rank, samples_at
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)  # seconds a sample
        self._longest: dict[str, float] = {}  # seconds of each phase but the steps
        self._progress = Progress("start", 0, time.monotonic(), settings.pause_seconds)
        self._heartbeats = folder / HEARTBEATS
        self._heartbeats.mkdir(parents=True, exist_ok=True)
        self._world_size = world_size
        self._main_thread = threading.main_thread().ident
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int, usual_seconds: float = 0.0) -> None:
        """The rank begins `phase` after `step` finished steps; the one that ends is one more to measure by. A pause may
        begin with waiting for what goes on beside the steps: that usually takes `usual_seconds`."""
        now, ended = time.monotonic(), self._progress
        seconds = now - ended.since
        if ended.phase == STEP:
            self._recent.append(seconds / self._samples_at(ended.step))
        else:
            self._longest[ended.phase] = max(seconds, self._longest.get(ended.phase, 0.0))
        if phase == STEP:
            limit = step_limit_seconds(self._settings, self._recent, self._samples_at(step))
        else:
            earlier = self._longest.get(phase)
            limit = pause_limit_seconds(self._settings, None if earlier is None else max(earlier, usual_seconds))
        self._progress = Progress(phase, step, now, limit)
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS + BACKSTOP_SECONDS, exit=True, file=sys.stderr)

    def leaving(self) -> None:
        """The rank does what is left to do before it ends, wherever it was; that is no step."""
        self.at("end", self._progress.step)

    def stop(self) -> None:
        """The run leaves: nothing is watched any more."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        (self._heartbeats / _file_name(self._rank, "json")).unlink(missing_ok=True)

    def _watch(self) -> None:
        interval = min(1.0, self._settings.heartbeat_seconds, self._settings.minimum_seconds / 4)
        last_heartbeat = -math.inf
        while not self._stopped.wait(interval):
            progress, now = self._progress, time.monotonic()
            if now >= last_heartbeat + self._heartbeat_seconds(progress):
                self._write_heartbeat(progress, now)
                last_heartbeat = now
            limit = progress.limit
            if now - progress.since > limit and progress is self._progress:
                frame = sys._current_frames().get(self._main_thread or 0)
                self._write_heartbeat(progress, now, place_of(frame))
                try:
                    self._report(progress, now - progress.since, limit, last_collective(frame))
                except Exception as error:  # such as a disk that is gone: the end must come whatever the report does
                    _say(f"rank {self._rank}: hung in {progress.phase}, and could not tell all of it: {error}")
                if self._stopped.wait(GRACE_SECONDS) or progress is not self._progress:
                    _say(f"rank {self._rank}: it went on after all, and so does the run")
                    continue
                os._exit(HUNG)  # the main thread waits inside a library and cannot be asked to leave

    def _heartbeat_seconds(self, progress: Progress) -> float:
        """Between two heartbeats: several within a limit, or a rank could not be told from one that is silent."""
        return min(self._settings.heartbeat_seconds, progress.limit / 8)

    def _write_heartbeat(self, progress: Progress, now: float, place: Place | None = None) -> None:
        beat = {
            "rank": self._rank,
            "host": platform.node(),
            "pid": os.getpid(),
            "phase": progress.phase,
            "step": progress.step,
            "seconds_in_phase": round(now - progress.since, 3),
            "time": time.time(),
            "every_seconds": round(self._heartbeat_seconds(progress), 3),
            **({"place": place.text, "waits": place.waits} if place else {}),
        }
        try:
            write_file(self._heartbeats / _file_name(self._rank, "json"), json.dumps(beat))
        except OSError as error:  # a full disk must not look like a hang
            _say(f"rank {self._rank}: heartbeat cannot be written: {error}")

    def _report(self, progress: Progress, seconds: float, limit: float, collective: str | None) -> None:
        """Stacks into a file; from the lowest rank alive, the incident into the journal and onto stderr."""
        facts = {
            "phase": progress.phase,
            "step": progress.step,
            "seconds": round(seconds, 1),
            "limit_seconds": round(limit, 1),
            "last_collective": collective,
        }
        incident = self._folder / "incidents" / f"step_{progress.step:08d}"
        try:
            incident.mkdir(parents=True, exist_ok=True)
            with (incident / _file_name(self._rank, "txt")).open("w") as file:
                file.write(f"rank {self._rank} on {platform.node()}, process {os.getpid()}: {json.dumps(facts)}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        beats = self._beats_of_all()
        behind = ranks_behind(beats, self._world_size, time.time())
        if self._rank == min([beat["rank"] for beat in beats if beat["rank"] not in behind] or [self._rank]):
            named = ", ".join(f"rank {rank} ({why})" for rank, why in behind.items()) or "none: all wait for each other"
            _say(
                f"no progress for {seconds:.0f} s in {progress.phase} after step {progress.step} (limit "
                f"{limit:.0f} s); last collective {facts['last_collective']}. Behind: {named}. "
                f"Stacks of every rank: {incident}"
            )
            places = {beat["rank"]: beat["place"] for beat in beats if "place" in beat}
            journal = Journal(self._folder, writer=True)
            journal.write("incident", kind="hang", behind=behind, places=places, stacks=str(incident), **facts)
            journal.close()

    def _beats_of_all(self) -> list[dict]:
        """The heartbeats when every rank has reported where it is, or when those that can have had the time to."""
        deadline = time.monotonic() + REPORT_SECONDS
        while True:
            # An earlier start may have had more ranks.
            beats = [beat for beat in read_heartbeats(self._heartbeats) if beat["rank"] < self._world_size]
            if sum("place" in beat for beat in beats) == self._world_size or time.monotonic() >= deadline:
                return beats
            time.sleep(0.1)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal or log that is gone
        print(text, file=sys.stderr, flush=True)


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
            while caller is not None and caller.f_globals.get("__name__", "").startswith(("torch.", "contextlib")):
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


def ranks_behind(beats: Sequence[dict], world_size: int, now: float) -> dict[int, str]:
    """{rank: why} of the ranks that others wait for: those that give no sign, those at an earlier step, and those that
    do not wait themselves while others do."""
    furthest = max((beat["step"] for beat in beats), default=0)
    behind = dict.fromkeys(set(range(world_size)) - {beat["rank"] for beat in beats}, "gave no sign since the start")
    for beat in beats:
        if "place" not in beat and now - beat["time"] > 3 * beat["every_seconds"] + GRACE_SECONDS:
            behind[beat["rank"]] = _silence(beat, now)  # clocks of hosts may differ by less
        elif beat["step"] < furthest:
            behind[beat["rank"]] = f"at step {beat['step']} of {furthest}, in {beat['phase']}"
    if behind or not any(beat.get("waits") for beat in beats):
        return behind
    at_work = {beat["rank"]: beat["place"] for beat in beats if "waits" in beat and not beat["waits"]}
    # All that say where they are wait: for those that do not say it, stopped in a pause, where heartbeats are rarer
    return at_work or {beat["rank"]: _silence(beat, now) for beat in beats if "place" not in beat}


def _silence(beat: dict, now: float) -> str:
    return f"silent for {now - beat['time']:.0f} s on {beat['host']}, last in {beat['phase']}"


def _file_name(rank: int, suffix: str) -> str:
    return f"rank_{rank:05d}.{suffix}"
