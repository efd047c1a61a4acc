"""What a journal tells of every layer and of every rank, reduced to pictures of a few hundred columns.

In:  a journal and what its first reading told (reading.py). Out: matrices of the largest and the median value of each
row in each bucket of steps, of the tellings that stand. One bucket is in memory at a time.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from k2_megatron.report.buckets import width_for
from k2_megatron.report.reading import LAYER_SIGNALS, Told, sound_events
from k2_megatron.runtime.journal import read_events

COLUMNS = 400
WORK = ("data", "forward", "backward", "optimizer")  # the phases of a step; saving is none


@dataclass(frozen=True)
class Matrix:
    """`largest` and `median` [rows, buckets] of the values told of in each bucket, NaN where a row is not told of;
    `first` and `last` are the buckets' steps. `width`: steps, or reports, of a bucket."""

    width: int
    first: np.ndarray
    last: np.ndarray
    largest: np.ndarray
    median: np.ndarray


@dataclass(frozen=True)
class Matrices:
    """`layers`: {signal: matrix by layer}; beside the gradient norms of layers stand, as first and last row, those of
    the embedding and of the output projection. `work`: seconds of own work by rank; `latest`: {phase: seconds by rank}
    of the last report, of step `latest_step`."""

    layers: Mapping[str, Matrix]
    work: Matrix | None
    latest: Mapping[str, Sequence[float]]
    latest_step: int | None


class Reducer:
    """Takes vectors by step, ascending, `width` of them to a bucket."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._steps: list[int] = []
        self._held: list[Sequence[float]] = []
        self._columns: list[tuple[int, int, np.ndarray, np.ndarray]] = []

    def take(self, step: int, values: Sequence[float]) -> None:
        if len(self._steps) == self._width:
            self._reduce()
        self._steps.append(step)
        self._held.append(values)

    def matrix(self) -> Matrix | None:
        """What was taken; None where nothing was."""
        if self._steps:
            self._reduce()
        if not self._columns:
            return None
        first, last, largest, median = zip(*self._columns, strict=True)
        return Matrix(self._width, np.array(first), np.array(last), _side_by_side(largest), _side_by_side(median))

    def _reduce(self) -> None:
        held = _side_by_side(self._held)  # [rows, steps]
        held[~np.isfinite(held)] = np.nan
        told = ~np.isnan(held).all(axis=1)
        largest, median = np.full((2, len(held)), np.nan)
        largest[told], median[told] = np.nanmax(held[told], axis=1), np.nanmedian(held[told], axis=1)
        self._columns.append((self._steps[0], self._steps[-1], largest, median))
        self._steps, self._held = [], []


def _side_by_side(columns: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """Vectors as columns, the shorter ones filled up with NaN: a layout of more ranks has more rows."""
    height = max(map(len, columns))
    if height == min(map(len, columns)):
        return np.array(columns, dtype=float).T.copy()
    filled = np.full((height, len(columns)), np.nan)
    for number, column in enumerate(columns):
        filled[: len(column), number] = column
    return filled


def read_matrices(path: Path, told: Told) -> Matrices:
    """Of the journal that `told` was read from, as far as it was read: the run may have written more since."""
    if not (told.layer_tellings or len(told.phases_stand)):
        return Matrices({}, None, {}, None)
    return matrices_of(islice(sound_events(read_events(path)), told.events), told)


def matrices_of(events: Iterable[dict], told: Told) -> Matrices:
    """Of the events that `told` was made of."""
    width = width_for(told.layer_tellings, COLUMNS, COLUMNS)
    layers = {signal: Reducer(width) for signal in LAYER_SIGNALS}
    work = Reducer(width_for(int(told.phases_stand.sum()), COLUMNS, COLUMNS))
    step = report = 0
    latest: Mapping[str, Sequence[float]] = {}
    latest_step = None
    for event in events:
        if event["event"] == "step":
            if told.stands[step] and "layers" in event:
                for signal, values in _of_layers(event["layers"]):
                    layers[signal].take(event["step"], values)
            step += 1
        elif event["event"] == "phases":
            if told.phases_stand[report] and event.get("seconds"):
                latest, latest_step = event["seconds"], event["step"]
                work.take(latest_step, np.sum([latest[phase] for phase in WORK if phase in latest], axis=0).tolist())
            report += 1
    found = {signal: reducer.matrix() for signal, reducer in layers.items()}
    return Matrices({signal: matrix for signal, matrix in found.items() if matrix}, work.matrix(), latest, latest_step)


def _of_layers(told: Mapping) -> Iterable[tuple[str, Sequence[float]]]:
    yield "activation_rms", told["activation_rms"]
    ends = (told.get("embedding_gradient_norm", np.nan), told.get("output_gradient_norm", np.nan))
    yield "gradient_norm", [ends[0], *told["gradient_norm"], ends[1]]
