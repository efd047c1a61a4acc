"""What this rank spends a step on, by phase.

In:  a step that is measured. Out: seconds of this rank's own work in each phase; stragglers.py compares the ranks.

Ranks that work together wait for the slowest, so that all their steps are as long as its steps. What tells them apart
is the work alone: waiting for tensor- and context-parallel neighbours is taken off, and the gathering of new weights by
the distributed optimizer; messages between stages and the reduction of gradients lie outside of megatron-core's timers
of forward and backward.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.tensor_parallel import layers, mappings

PHASES = {"forward-compute": "forward", "backward-compute": "backward"}  # megatron-core's timers, by our names
OPTIMIZER = "optimizer"
WAITS = {"params-all-gather": OPTIMIZER}  # megatron-core's timers of what is waiting, and the phase that they lie in
# Every name by which a collective of a forward or backward pass is called; two modules bind theirs when imported.
_COLLECTIVES = (
    (distributed, "all_reduce"),
    (distributed, "all_gather_into_tensor"),
    (mappings, "dist_all_gather_func"),
    (mappings, "dist_reduce_scatter_func"),
    (layers, "dist_all_gather_func"),
    (layers, "dist_reduce_scatter_func"),
)


class StepPhases:
    """megatron-core's `timers`, and the waits for neighbours within them; marks on a CUDA stream cost no wait."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._waits: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[str, Any] = {}
        self._open_waits: dict[str, Any] = {}

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        return _Timer(self, PHASES.get(name), WAITS.get(name))

    def begin(self) -> None:
        """Measure anew: a step begins, or is made again."""
        for marks in (self._spans, self._waits, self._open, self._open_waits):
            marks.clear()

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

    @contextmanager
    def updating(self, optimizer: MegatronOptimizer) -> Iterator[None]:
        """Measure the update of the weights."""
        for part in optimizer.chained_optimizers:
            part.config.timers = self
        self.start(OPTIMIZER)
        try:
            yield
        finally:
            self.stop(OPTIMIZER)
            for part in optimizer.chained_optimizers:
                part.config.timers = None

    def begin_waiting(self, phase: str) -> None:
        self._open_waits[phase] = self._mark()

    def end_waiting(self, phase: str) -> None:
        self._waits[phase].append((self._open_waits.pop(phase), self._mark()))

    def collect(self, data_seconds: float) -> dict[str, float]:
        """Seconds by phase since `begin`, of which `data_seconds` were spent on waiting for rows."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = {"data": data_seconds}
        for phase in (*PHASES.values(), OPTIMIZER):
            found[phase] = self._sum(self._spans[phase]) - self._sum(self._waits[phase])
        found["forward"] = max(0.0, found["forward"] - data_seconds)  # rows are fetched within it
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
    waits_in: str | None

    def start(self, barrier: bool = False) -> None:
        if self.phase:
            self.phases.start(self.phase)
        if self.waits_in:
            self.phases.begin_waiting(self.waits_in)

    def stop(self, barrier: bool = False) -> None:
        if self.phase:
            self.phases.stop(self.phase)
        if self.waits_in:
            self.phases.end_waiting(self.waits_in)


@dataclass(frozen=True)
class _Handle:
    phases: StepPhases
    work: Any

    def wait(self) -> None:
        self.phases.wait_for(self.work)
