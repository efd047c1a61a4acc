"""The straggler report: which rank holds the others up, and in what.

In:  the seconds of each rank's own work by phase (phases.py), report by report. Out: those of all ranks beside each
other, and the rank that takes longer than its like, if one does.

Compared are ranks of one pipeline stage, whose work is the same; a rank alone in its stage with the other stages, but
for the last. That has the output layer and the loss, whose work is known by formula alone: alone in it a rank is
compared with the others' time and a generous share for these, and the first of two stages with the last; they must be
slow in several reports in a row. Beside this each rank is compared with itself: with what it took in earlier
reports, while the others take what they took. So a stage is found that is slow as a whole.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median

import numpy as np
import torch.distributed as distributed

from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.journal import Journal

REPORTS_KEPT, FEWEST_REPORTS = 16, 4  # of each rank, to be compared with; before that it is not compared with itself
SLOW_RATIO = 1.5  # times the median of the others; clocks of equal machines differ by some per cent
OUTPUT_MARGIN = 3.0  # times its share of FLOPs: what the output layer and the loss may take, which read much memory
SMALLEST_SHARE = 0.05  # of the work of a step: a phase that is slower by less holds nobody up


@dataclass(frozen=True)
class Straggler:
    """A rank whose `phase` took `ratio` times what is usual, `seconds` more than that: the median of its like, or of
    itself in earlier reports (`before`)."""

    rank: int
    place: str
    phase: str
    ratio: float
    seconds: float
    before: bool = False

    @property
    def words(self) -> str:
        usual = "its own earlier median" if self.before else "the median of its like"
        return f"{self.place} is slow in {self.phase}, {self.ratio} times {usual}"


class StragglerReports:
    """The reports of a run, the same on every rank. `output_share`: the output layer's work, in the work of a stage's
    layers."""

    def __init__(self, groups: Groups, output_share: float, journal: Journal, say: Callable[[str], None]) -> None:
        self._groups, self._output_share, self._journal, self._say = groups, output_share, journal, say
        self._earlier: deque[Sequence[Mapping[str, float]]] = deque(maxlen=REPORTS_KEPT)

    def tell(self, step: int, seconds: Mapping[str, float]) -> None:
        """Tell journal and console how long each rank took for its work in `step`, this one `seconds` by phase."""
        every_rank, slow = self._gather(seconds)
        self._journal.write("phases", step=step, slow=slow and asdict(slow), seconds=every_rank)
        if slow:
            self._say(f"step {step}: {slow.words}")

    def _gather(self, seconds: Mapping[str, float]) -> tuple[dict[str, list[float]], Straggler | None]:
        """({phase: seconds of each rank}, the straggler)."""
        everywhere: list = [None] * self._groups.world_size
        own = (dict(seconds), self._groups.pipeline_rank, self._groups.name)
        distributed.all_gather_object(everywhere, own)
        by_rank, stages, places = zip(*everywhere, strict=True)
        slow = slowest(by_rank, stages, places, tuple(self._earlier), self._output_share)
        self._earlier.append(by_rank)
        return {phase: [round(of_rank[phase], 6) for of_rank in by_rank] for phase in seconds}, slow


def slowest(
    by_rank: Sequence[Mapping[str, float]],
    stages: Sequence[int],
    places: Sequence[str],
    earlier: Sequence[Sequence[Mapping[str, float]]] = (),
    output_share: float | None = None,
) -> Straggler | None:
    """The rank and phase that lie furthest above what is usual; None when all are alike."""
    found, themselves = [], _of_themselves(by_rank, earlier)
    for rank, seconds in enumerate(by_rank):
        usual_now = [(_of_its_like(rank, by_rank, stages), False), (themselves[rank], True)]
        if output_share is not None:
            usual_now.append((_by_formula(rank, by_rank, stages, earlier, output_share), False))
        for usual, before in usual_now:
            for phase, more in _slow_phases(seconds, usual).items():
                ratio = round(seconds[phase] / max(usual[phase], 1e-9), 2)
                found.append(Straggler(rank, places[rank], phase, ratio, round(more, 6), before))
    return max(found, key=lambda straggler: straggler.seconds, default=None)


def _slow_phases(seconds: Mapping[str, float], usual: Mapping[str, float]) -> dict[str, float]:
    """{phase: seconds more than usual} of those in which a rank is slow."""
    more = {phase: seconds[phase] - usual_seconds for phase, usual_seconds in usual.items()}
    smallest = SMALLEST_SHARE * sum(usual.values())
    slower = [phase for phase in usual if seconds[phase] > SLOW_RATIO * usual[phase]]
    return {phase: more[phase] for phase in slower if more[phase] > smallest}


def _of_its_like(rank: int, by_rank: Sequence[Mapping[str, float]], stages: Sequence[int]) -> dict[str, float]:
    """{phase: the median of the ranks with the same work}; without ranks in its stage, of those of other stages."""
    others = [other for number, other in enumerate(by_rank) if stages[number] == stages[rank] and number != rank]
    phases = list(by_rank[rank])
    last = max(stages)
    if not others and stages[rank] < last:
        inner = [other for number, other in enumerate(by_rank) if stages[number] < last and number != rank]
        others, phases = inner, _but_rows(phases)
    return {phase: median(other[phase] for other in others) for phase in phases} if others else {}


def _by_formula(
    rank: int,
    by_rank: Sequence[Mapping[str, float]],
    stages: Sequence[int],
    earlier: Sequence[Sequence[Mapping[str, float]]],
    output_share: float,
) -> dict[str, float]:
    """{phase in which it was slow in the last reports too: what is usual by formula} of a rank that is alone in the
    last stage, and of one that has the last stage alone to be compared with, whose ranks have more to do."""
    last = max(stages)
    is_last = stages[rank] == last
    others = [number for number, stage in enumerate(stages) if stage != stages[rank]]
    if not others or stages.count(stages[rank]) > 1 or not (is_last or set(stages) == {stages[rank], last}):
        return {}
    factor = 1 + OUTPUT_MARGIN * output_share if is_last else 1.0
    reports = [by_rank, *earlier[-(FEWEST_REPORTS - 1) :]]
    usual_in = [
        {phase: factor * median(report[other][phase] for other in others) for phase in _but_rows(report[rank])}
        for report in reports
    ]
    slow = [set(_slow_phases(report[rank], usual)) for report, usual in zip(reports, usual_in, strict=True)]
    always = set.intersection(*slow) if len(reports) == FEWEST_REPORTS else set()
    return {phase: usual_in[0][phase] for phase in always}


def _but_rows(phases: Iterable[str]) -> list[str]:
    return [phase for phase in phases if phase != "data"]  # the first and last stage read rows


def _of_themselves(
    by_rank: Sequence[Mapping[str, float]], earlier: Sequence[Sequence[Mapping[str, float]]]
) -> list[dict[str, float]]:
    """Of each rank {phase: its own median in earlier reports, times how much longer the others take now than they
    took}: a batch that grows, or a file system that is slow for all, makes no straggler. A phase that took no time in a
    report did not take place before it, as saving mostly does not: it is compared with those in which it did."""
    usual: list[dict[str, float]] = [{} for _ in by_rank]
    if len(by_rank) < 2 or not earlier:
        return usual
    for phase in by_rank[0]:
        now = np.array([of_rank[phase] for of_rank in by_rank])
        before = np.array([[of_rank[phase] for of_rank in report] for report in earlier])  # [reports, ranks]
        # Most ranks have it in the same reports: medians are taken once for all of these.
        took_place, alike = np.unique(before > 0, axis=1, return_inverse=True)
        for number, reports in enumerate(took_place.T):
            if reports.sum() < FEWEST_REPORTS:
                continue
            medians = np.median(before[reports], axis=0)
            compared = np.flatnonzero(medians > 0)  # with all ranks of these reports among them
            grown = dict(zip(compared, _medians_of_the_others(now[compared] / medians[compared]), strict=True))
            for rank in np.flatnonzero(alike.ravel() == number):
                usual[rank][phase] = float(medians[rank] * max(1.0, grown[rank]))
    return usual


def _medians_of_the_others(values: np.ndarray) -> np.ndarray:
    """Of each value the median of the others, 1 where there are none."""
    others = len(values) - 1
    if others == 0:
        return np.ones(1)
    order = np.argsort(values)
    place = np.argsort(order)  # of each value among all, sorted
    middle = [values[order[which + (place <= which)]] for which in ((others - 1) // 2, others // 2)]
    return (middle[0] + middle[1]) / 2
