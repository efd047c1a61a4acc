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
import math
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from k2_megatron.config.schema import Watchdog as Settings
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.mistakes import HUNG
from k2_megatron.train.heartbeats import (
    HEARTBEATS,
    Place,
    last_collective,
    place_of,
    rank_file,
    ranks_behind,
    read_heartbeats,
)

STEP = "step"
WAITING = "waiting for the background"
RECENT_STEPS = 50
FEWEST_STEPS = 3  # before that, the first step with its compilations decides too much
LIKE = {"end": "checkpoint"}  # a pause that comes once, and the one that it is measured by: both remove checkpoints
REPORT_SECONDS = 2.5  # at most, until the other ranks have said where they are
GRACE_SECONDS = 5.0  # between the report and the end, for the other ranks to make theirs; what clocks may differ by
# If even this thread cannot run (a library holds the interpreter's lock), the interpreter's own timer ends the rank.
BACKSTOP_SECONDS = 20.0


@dataclass(frozen=True)
class Progress:
    """What a thread of the rank does: a phase of the loop, or what goes on beside it, after `step` finished steps,
    since a time of the monotonic clock; how long it may last."""

    phase: str
    step: int
    since: float
    limit: float
    thread: int


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
    """The libraries' own limit for a collective, and the launcher's for the last rank to leave: above each of the
    watchdog, which tells more when it ends a run."""
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
        self._longest: dict[str | None, float] = {}  # seconds of each phase but the steps
        self._main_thread = threading.main_thread().ident or 0
        self._progress = self._begun("start", 0, settings.pause_seconds)
        self._beside: Progress | None = None
        self._heartbeats = folder / HEARTBEATS
        self._heartbeats.mkdir(parents=True, exist_ok=True)
        self._world_size = world_size
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int) -> None:
        """The rank begins `phase` after `step` finished steps; the one that ends is one more to measure by."""
        self._measure(self._progress)
        if phase == STEP:
            limit = step_limit_seconds(self._settings, self._recent, self._samples_at(step))
        else:
            kind = phase if phase in self._longest else LIKE.get(phase)
            limit = pause_limit_seconds(self._settings, self._longest.get(kind))
        self._watch_from_now(self._begun(phase, step, limit))

    @contextlib.contextmanager
    def beside(self, phase: str, step: int) -> Iterator[None]:
        """Within it this thread does `phase` of step `step` beside the loop's: it has the limit of a pause."""
        limit = pause_limit_seconds(self._settings, self._longest.get(phase))
        self._beside = self._begun(phase, step, limit, threading.get_ident())
        try:
            yield
            self._measure(self._beside)  # a save that failed says nothing of how long one takes
        finally:
            self._beside = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it the loop waits for what goes on beside it, whose own limit holds; the time of the phase begins anew
        after it."""
        phase = self._progress
        self._watch_from_now(self._begun(WAITING, phase.step, math.inf))
        try:
            yield
        finally:
            self._watch_from_now(replace(phase, since=time.monotonic()))

    def tried_again(self) -> None:
        """What this thread does has failed, on all ranks alike, and begins anew: so does its time."""
        if self._beside is not None and self._beside.thread == threading.get_ident():
            self._beside = replace(self._beside, since=time.monotonic())
            self._set_backstop()
        else:
            self._watch_from_now(replace(self._progress, since=time.monotonic()))

    def leaving(self) -> None:
        """The rank does what is left to do before it ends, wherever it was; that is no step."""
        self.at("end", self._progress.step)

    def stop(self) -> None:
        """The run leaves: nothing is watched any more."""
        self._stopped.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()
        (self._heartbeats / rank_file(self._rank, "json")).unlink(missing_ok=True)

    def _begun(self, phase: str, step: int, limit: float, thread: int | None = None) -> Progress:
        return Progress(phase, step, time.monotonic(), limit, thread or self._main_thread)

    def _measure(self, ended: Progress) -> None:
        seconds = time.monotonic() - ended.since
        if ended.phase == STEP:
            self._recent.append(seconds / self._samples_at(ended.step))
        else:
            self._longest[ended.phase] = max(seconds, self._longest.get(ended.phase, 0.0))

    def _watch_from_now(self, progress: Progress) -> None:
        self._progress = progress
        self._set_backstop()

    def _set_backstop(self) -> None:
        limit = min(self._progress.limit, collective_timeout_seconds(self._settings))  # no limit where the loop waits
        faulthandler.dump_traceback_later(limit + GRACE_SECONDS + BACKSTOP_SECONDS, exit=True, file=sys.stderr)

    def _watch(self) -> None:
        interval = min(1.0, self._settings.heartbeat_seconds, self._settings.minimum_seconds / 4)
        last_heartbeat = -math.inf
        while not self._stopped.wait(interval):
            progress, now = self._progress, time.monotonic()
            if now >= last_heartbeat + self._heartbeat_seconds(progress):
                self._write_heartbeat(progress, now)
                last_heartbeat = now
            for watched in (progress, self._beside):
                if watched is not None and now - watched.since > watched.limit and self._goes_on(watched):
                    self._end_unless_it_goes_on(watched, now)

    def _goes_on(self, progress: Progress) -> bool:
        return progress is self._progress or progress is self._beside

    def _end_unless_it_goes_on(self, hung: Progress, now: float) -> None:
        frame = sys._current_frames().get(hung.thread)
        self._write_heartbeat(hung, now, place_of(frame))
        try:
            self._report(hung, now - hung.since, last_collective(frame))
        except Exception as error:  # such as a disk that is gone: the end must come whatever the report does
            _say(f"rank {self._rank}: hung in {hung.phase}, and could not tell all of it: {error}")
        if self._stopped.wait(GRACE_SECONDS) or not self._goes_on(hung):
            _say(f"rank {self._rank}: it went on after all, and so does the run")
        else:
            os._exit(HUNG)  # the thread waits inside a library and cannot be asked to leave

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
            write_file(self._heartbeats / rank_file(self._rank, "json"), json.dumps(beat))
        except OSError as error:  # a full disk must not look like a hang
            _say(f"rank {self._rank}: heartbeat cannot be written: {error}")

    def _report(self, progress: Progress, seconds: float, collective: str | None) -> None:
        """Stacks into a file; from the lowest rank alive, the incident into the journal and onto stderr."""
        facts = {
            "phase": progress.phase,
            "step": progress.step,
            "seconds": round(seconds, 1),
            "limit_seconds": round(progress.limit, 1),
            "last_collective": collective,
        }
        incident = self._folder / "incidents" / f"step_{progress.step:08d}"
        try:
            incident.mkdir(parents=True, exist_ok=True)
            with (incident / rank_file(self._rank, "txt")).open("w") as file:
                file.write(f"rank {self._rank} on {platform.node()}, process {os.getpid()}: {json.dumps(facts)}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
        beats = self._beats_of_all()
        behind = ranks_behind(beats, self._world_size, time.time(), GRACE_SECONDS)
        if self._rank == min([beat["rank"] for beat in beats if beat["rank"] not in behind] or [self._rank]):
            named = ", ".join(f"rank {rank} ({why})" for rank, why in behind.items()) or "none: all wait for each other"
            _say(
                f"no progress for {seconds:.0f} s in {progress.phase} after step {progress.step} (limit "
                f"{progress.limit:.0f} s); last collective {facts['last_collective']}. Behind: {named}. "
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
