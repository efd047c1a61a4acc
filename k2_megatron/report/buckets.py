"""Many numbers of many steps reduced to few that can be drawn, so that none of the largest and smallest disappears.

In:  numbers by step, ascending. Out: one value a bucket of so many steps; the extremes each at their own step.
"""

from dataclasses import dataclass

import numpy as np

POINTS = 2_000  # as many steps are drawn one by one
BUCKETS = 1_000  # of a longer run


@dataclass(frozen=True)
class Buckets:
    """Of each bucket that has a finite number: its first and last step, the extremes and where they are, the median,
    the 95th percentile. `width`: steps of a bucket; 1 where nothing had to be reduced."""

    width: int
    first: np.ndarray
    last: np.ndarray
    minimum: np.ndarray
    minimum_at: np.ndarray
    median: np.ndarray
    p95: np.ndarray
    maximum: np.ndarray
    maximum_at: np.ndarray

    def __len__(self) -> int:
        return len(self.first)

    @property
    def extremes(self) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of the smallest and the largest number of each bucket, in the order of their steps: a line
        through them looks as one through all numbers does."""
        places = np.stack([self.minimum_at, self.maximum_at], axis=1)
        values = np.stack([self.minimum, self.maximum], axis=1)
        order = np.argsort(places, axis=1, kind="stable")
        places, values = (np.take_along_axis(of, order, axis=1).ravel() for of in (places, values))
        once = np.ones(len(places), dtype=bool)
        once[1::2] = places[1::2] != places[::2]
        return places[once], values[once]


def width_for(steps: int, points: int = POINTS, buckets: int = BUCKETS) -> int:
    """How many steps a bucket has, for a run of so many."""
    return 1 if steps <= points else -(-steps // buckets)


def reduce(steps: np.ndarray, values: np.ndarray, width: int) -> Buckets:
    """Numbers by step (ascending) in buckets of `width` steps, counted from the first one; what is not finite is left
    out."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not len(steps):
        return Buckets(width, *[np.zeros(0)] * 8)
    numbers = (steps - steps[0]) // width
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    ends = np.append(starts[1:], len(steps))
    rows = []
    for start, end in zip(starts, ends, strict=True):
        part = values[start:end]
        low, high = int(np.argmin(part)), int(np.argmax(part))
        median, p95 = (part[0], part[0]) if width == 1 else np.percentile(part, (50, 95))
        extremes = (part[low], steps[start + low], median, p95, part[high], steps[start + high])
        rows.append((steps[start], steps[end - 1], *extremes))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    return Buckets(width, *columns)


def running_median(values: np.ndarray, window: int) -> np.ndarray:
    """The median of each value and those around it, `window` (odd) in all; at the ends of fewer, as many before as
    after, for the first values of a falling loss are far above the next ones. NaN where there is no number."""
    half, found = window // 2, np.full(len(values), np.nan)
    for place in range(len(values)):
        reach = min(half, place, len(values) - 1 - place)
        around = values[place - reach : place + reach + 1]
        around = around[~np.isnan(around)]
        if len(around):
            found[place] = np.median(around)
    return found
