"""What each rank spends a step on, and who is slow: the straggler report.

In:  a step that is measured. Out: seconds of this rank's own work by phase, every rank's beside each other, and the
rank that takes longer than its like, if one does.

Ranks that work together wait for the slowest, so that all their steps are as long as its steps. What tells them apart
is the work alone: waiting for tensor- and context-parallel neighbours is taken off, and messages between stages and the
reduction of gradients lie outside of megatron-core's timers of forward and backward. The distributed optimizer gathers
the new weights within "optimizer", which there is as long as that of the slowest rank. Compared are ranks of one
pipeline stage, whose work is the same.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.distributed as distributed
from megatron.core.tensor_parallel import layers, mappings

from k2_megatron.runtime.groups import Groups

PHASES = {"forward-compute": "forward", "backward-compute": "backward", "optimizer": "optimizer"}
SLOW_RATIO = 1.5  # times the median of the others; clocks of equal machines differ by some per cent
SMALLEST_SHARE = 0.05  # of the work of a step: a phase that is slower by less holds nobody up
# Every name by which a collective of a forward or backward pass is called; two modules bind theirs when imported.
_COLLECTIVES = (
    (distributed, "all_reduce"),
    (distributed, "all_gather_into_tensor"),
    (mappings, "dist_all_gather_func"),
    (mappings, "dist_reduce_scatter_func"),
    (layers, "dist_all_gather_func"),
    (layers, "dist_reduce_scatter_func"),
)


@dataclass(frozen=True)
class Straggler:
    """A rank whose `phase` took `ratio` times the median of its like, `seconds` more than that."""

    rank: int
    place: str
    phase: str
    ratio: float
    seconds: float


class StepPhases:
    """megatron-core's `timers`, and the waits for neighbours within them; marks on a CUDA stream cost no wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._waits: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[str, Any] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return _Timer(self, PHASES.get(name))

    def start(self, phase: str) -> None:
        self._open[phase] = self._mark()

    def stop(self, phase: str) -> None:
        self._spans[phase].append((self._open.pop(phase), self._mark()))

    @contextmanager
    def within(self, settings) -> Iterator[None]:
        """Measure what runs under `settings`, a model chunk's configuration."""
        right = [(module, name, getattr(module, name)) for module, name in _COLLECTIVES]
        settings.timers = self
        for module, name, function in right:
            setattr(module, name, self._timed(function))
        try:
            yield
        finally:
            settings.timers = None
            for module, name, function in right:
                setattr(module, name, function)

    def collect(self, data_seconds: float) -> dict[str, float]:
        """Seconds by phase since the last call, of which `data_seconds` were spent on waiting for rows."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = {"data": data_seconds}
        for phase in PHASES.values():
            found[phase] = self._sum(self._spans[phase]) - self._sum(self._waits[phase])
        found["forward"] = max(0.0, found["forward"] - data_seconds)  # rows are fetched within it
        self._spans.clear()
        self._waits.clear()
        return found

    def _timed(self, function):
        def collective(*arguments, **keywords):
            phase, began = next(iter(self._open), None), self._mark()
            work = function(*arguments, **keywords)
            if keywords.get("async_op"):
                return _Handle(self, work)
            if phase:
                self._waits[phase].append((began, self._mark()))
            return work

        return collective

    def wait_for(self, work) -> None:
        phase, began = next(iter(self._open), None), self._mark()
        work.wait()
        if phase:
            self._waits[phase].append((began, self._mark()))

    def _mark(self):
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _sum(self, spans: Sequence[tuple[Any, Any]]) -> float:
        if self._device.type != "cuda":
            return sum(end - start for start, end in spans)
        return sum(start.elapsed_time(end) for start, end in spans) / 1000


@dataclass(frozen=True)
class _Timer:
    phases: StepPhases
    phase: str | None

    def start(self, barrier: bool = False) -> None:
        if self.phase:
            self.phases.start(self.phase)

    def stop(self, barrier: bool = False) -> None:
        if self.phase:
            self.phases.stop(self.phase)


@dataclass(frozen=True)
class _Handle:
    phases: StepPhases
    work: Any

    def wait(self) -> None:
        self.phases.wait_for(self.work)


def gather_phases(seconds: Mapping[str, float], groups: Groups) -> tuple[dict[str, list[float]], Straggler | None]:
    """({phase: seconds of each rank}, the straggler), the same on every rank."""
    everywhere: list = [None] * groups.world_size
    distributed.all_gather_object(everywhere, (dict(seconds), groups.pipeline_rank, groups.name))
    by_rank, stages, places = zip(*everywhere, strict=True)
    told = {phase: [round(of_rank[phase], 6) for of_rank in by_rank] for phase in seconds}
    return told, slowest(by_rank, stages, places)


def slowest(by_rank: Sequence[Mapping[str, float]], stages: Sequence[int], places: Sequence[str]) -> Straggler | None:
    """The rank and phase that lie furthest above the median of the other ranks of its stage; None when alike."""
    found = []
    for rank, seconds in enumerate(by_rank):
        others = [other for number, other in enumerate(by_rank) if stages[number] == stages[rank] and number != rank]
        if not others:
            continue
        step = sum(median(other[phase] for other in others) for phase in seconds)
        for phase, value in seconds.items():
            usual = median(other[phase] for other in others)
            if value > SLOW_RATIO * usual and value - usual > SMALLEST_SHARE * step:
                ratio = round(value / max(usual, 1e-9), 2)
                found.append(Straggler(rank, places[rank], phase, ratio, round(value - usual, 6)))
    return max(found, key=lambda straggler: straggler.seconds, default=None)
