"""Where the wall time of a run went, by its journal; goodput is the share of the steps that stand.

In:  the events of a journal, one after the other. Out: seconds of each part, which add up to the wall time.

The wall time is from the first start event to the last event of a life of the run (what is done by hand to a stopped
run is none). Steps are their step_seconds, and stand or do not; waiting for saves is the stall_seconds of checkpoints.
What tells no seconds takes the time from the event before it to its own: an evaluation, a computation that was not
applied, a hang. A start lasts until its first step begins, a going back from the event before it until the next step
begins. From the last event of a life to the next start the run was down: a step that a kill interrupted is in that, as
the journal does not tell of it, and so is what a start does before its start event. The rest is between the steps.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

WORDS = {
    "kept": "steps that stand",
    "repeated": "steps that were taken back or made again",
    "in vain": "computations of a step that were not applied",
    "starting": "starts: loading, until the first step begins",
    "saving": "waiting for saves",
    "evaluation": "evaluation of held-out data",
    "going back": "going back to an earlier checkpoint",
    "hung": "hangs, until the watchdog ended them",
    "down": "between two starts: stopped, queued, or being started",
    "between": "the rest: between steps",
}
_GAPS = {"evaluation": "evaluation", "rollback": "going back"}
_INCIDENTS = {"in doubt": "in vain", "not finite": "in vain", "hang": "hung"}


@dataclass
class Account:
    """Takes in the events of a journal in their order."""

    began: float = math.nan  # the first start
    ended: float = math.nan  # the last event of a life
    seconds: dict[str, float] = field(default_factory=dict)  # of all parts but the steps' and the rest
    _until_step: str | None = None  # what the time belongs to until the next step begins

    def tell(self, event: Mapping, time: float) -> None:
        kind = event["event"]
        if math.isnan(time) or by_hand(event) or (math.isnan(self.began) and kind != "start"):
            return
        gap = 0.0 if math.isnan(self.ended) else max(0.0, time - self.ended)
        stall = event.get("stall_seconds", 0.0) if kind == "checkpoint" else 0.0
        if kind == "start":
            self.began = time if math.isnan(self.began) else self.began
            self._add("down", gap)
            self._until_step = "starting"
        elif self._until_step:
            took = event.get("step_seconds", 0.0) if kind == "step" else stall
            self._add(self._until_step, max(0.0, gap - took))
            self._until_step = None if kind == "step" else self._until_step
        elif kind in _GAPS:
            self._add(_GAPS[kind], gap)
            self._until_step = "going back" if kind == "rollback" else None
        elif kind == "incident":
            self._add(_INCIDENTS.get(event.get("kind", ""), "between"), gap)
        if stall:
            self._add("saving", stall)
        self.ended = time

    def _add(self, part: str, seconds: float) -> None:
        if part != "between":
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    @property
    def wall(self) -> float:
        """Seconds in all; 0 where nothing is told."""
        return 0.0 if math.isnan(self.began) else self.ended - self.began


def by_hand(event: Mapping) -> bool:
    """Whether it was done to a run that is not at work: tools/inspect_data.py amend, tools/roll_back.py."""
    return event["event"] == "amendment" or (event["event"] == "rollback" and "reason" in event)


def parts_of(account: Account, step_seconds: np.ndarray, stands: np.ndarray) -> dict[str, float]:
    """{part: seconds}, by the keys of WORDS: those that took any, and the steps that stand. The rest is negative where
    the clock of the journal was set back."""
    parts = {
        "kept": float(np.nansum(step_seconds[stands])),
        "repeated": float(np.nansum(step_seconds[~stands])),
        **account.seconds,
    }
    parts["between"] = account.wall - sum(parts.values())
    return {part: parts[part] for part in WORDS if part == "kept" or abs(parts.get(part, 0.0)) >= 5e-4}


def goodput_of(account: Account, step_seconds: np.ndarray, stands: np.ndarray) -> float | None:
    """The share of the wall time in steps that stand; None where no time is told."""
    return float(np.nansum(step_seconds[stands])) / account.wall if account.wall > 0 else None
