"""The lives of a run: from each start to its stop, or to the last sign of one that was killed.

In:  what a journal tells. Out: a `Life` a start: where it went on, what was changed, what it trained, how it ended.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from k2_megatron.report.goodput import by_hand
from k2_megatron.report.reading import Rare, Told

KILLED = "killed, or ended by an error: no stop is told"
OPEN = "no stop is told: it is at work, or was killed"


@dataclass(frozen=True)
class Life:
    """One start of the run. Times are in seconds since 1970; `told` are its rare events, `tellings` which of the steps
    it told."""

    number: int
    told: Sequence[Rare]
    tellings: slice
    ended: float
    is_last: bool

    @property
    def start(self) -> Mapping:
        return self.told[0].event

    @property
    def began(self) -> float:
        return self.told[0].time

    @cached_property
    def resume(self) -> Mapping | None:
        return self._first("resume")

    @cached_property
    def origin(self) -> Mapping | None:
        """Where its first weights came from, if from another run."""
        return self._first("start_from")

    def _first(self, kind: str) -> Mapping | None:
        return next((rare.event for rare in self.told if rare.kind == kind), None)

    @property
    def end(self) -> str:
        """How it ended, in words."""
        stop = self._first("stop")
        if stop is not None:
            return str(stop.get("reason"))
        incidents = [rare.event for rare in self.told if rare.kind == "incident"]
        last = incidents[-1] if incidents and self.told[-1].event is incidents[-1] else None
        if last is not None and not last.get("made_again"):
            return f"ended by an incident: {last.get('kind')}"
        return OPEN if self.is_last else KILLED

    @property
    def changes(self) -> list[str]:
        """What was changed between the start before and this one, in words."""
        if self.resume is None:
            return []
        found = []
        layout = self.start.get("layout")
        if self.resume.get("saved_layout") not in (None, layout):
            found.append(f"layout {self.resume['saved_layout']} → {layout}")
        for change in self.resume.get("changes", ()):
            found.append(f"{change.get('key')}: {change.get('was')!r} → {change.get('now')!r}")
        moved = self.resume.get("position_change")
        for key in ("global_batch", "sequence_length"):
            if moved and moved[key][0] != moved[key][1]:
                found.append(f"{key}: {moved[key][0]} → {moved[key][1]} from step {moved['from_step'] + 1} on")
        return [*found, *map(str, self.resume.get("doubts", ()))]


def lives_of(told: Told) -> list[Life]:
    """The lives, in order."""
    count = max((rare.life for rare in told.rare), default=0)
    own = [[rare for rare in told.rare if rare.life == number] for number in range(1, count + 1)]
    lives = []
    for number, rares in enumerate(own, start=1):
        tellings = np.flatnonzero(told.columns["life"] == number)
        span = slice(int(tellings[0]), int(tellings[-1]) + 1) if len(tellings) else slice(0, 0)
        times = [rare.time for rare in rares if not by_hand(rare.event)]
        times += told.columns["time"][span][-1:].tolist()
        lives.append(Life(number, rares, span, float(np.nanmax([*times, 0.0])), number == count))
    return lives
