"""Find a spike in the losses and gradient norms of a run, one step at a time; width counts before height.

In:  (state, settings, step, loss, gradient norm). Out: (the next state, a finding or None). The state is a plain value
that a checkpoint's manifest stores, so that a resumed run goes on watching as if it had never stopped.

Each signal has a deviation: its distance above the rolling median, in robust standard deviations (1.4826 times the
median absolute deviation, Rousseeuw & Croux 1993). The deviations are added up by a one-sided cumulative sum (Page
1954) whose steps are bounded: a needle of any height counts as one step, and a spike must last to be called one. The
spike began when the sum last left zero, and is over when both sums are back at zero.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Protocol

# Deviations below this add nothing: independent noise and slow drift stay around zero.
ALLOWANCE = 3.0
# One step adds at most this much less the allowance, however tall it is.
TALLEST = 8.0
# A signal without noise (a synthetic one) has no deviation to measure by; take this fraction of its level.
SMALLEST_RELATIVE_DEVIATION = 1e-3


class Settings(Protocol):
    """The keys of section [spikes] that the detector reads."""

    @property
    def window_steps(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def benign_steps(self) -> int: ...


@dataclass(frozen=True)
class State:
    """`losses`, `log_norms`: the last undisturbed values; `loss_sum`, `norm_sum`: the cumulative sums; `onset`: the
    step at which a sum left zero; `trip`: the step at which the spike was called one."""

    losses: tuple[float, ...] = ()
    log_norms: tuple[float, ...] = ()
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    onset: int | None = None
    trip: int | None = None

    def plain(self) -> dict[str, Any]:
        """The state as JSON takes it; `restore` gives it back equal."""
        return asdict(self)


def restore(plain: dict[str, Any]) -> State:
    """The state that `State.plain` returned."""
    return State(**{**plain, "losses": tuple(plain["losses"]), "log_norms": tuple(plain["log_norms"])})


@dataclass(frozen=True)
class Finding:
    """`kind`: "spike" when it is called one, then "benign" (over within benign_steps) or "malignant" (not over).

    Steps are numbered from 1 as in the journal. `loss_deviation` and `norm_deviation` are this step's, in robust
    standard deviations; `usual_loss` and `usual_norm` the medians they are measured from.
    """

    kind: str
    step: int
    onset: int
    trip: int
    loss_deviation: float
    norm_deviation: float
    usual_loss: float
    usual_norm: float


def observe(state: State, settings: Settings, step: int, loss: float, grad_norm: float) -> tuple[State, Finding | None]:
    """Take in one finished step (finite values). Nothing is judged before the window is full."""
    log_norm = math.log(max(grad_norm, 1e-30))  # norms scatter by factors: their logarithm has a symmetric noise
    if len(state.losses) < settings.window_steps:
        return _with_values(state, settings.window_steps, loss, log_norm), None
    usual_loss, loss_deviation = deviation(state.losses, loss, SMALLEST_RELATIVE_DEVIATION)
    usual_norm, norm_deviation = deviation(state.log_norms, log_norm, SMALLEST_RELATIVE_DEVIATION, relative=False)
    loss_sum = _accumulated(state.loss_sum, loss_deviation, settings.threshold)
    norm_sum = _accumulated(state.norm_sum, norm_deviation, settings.threshold)
    disturbed = loss_sum > 0 or norm_sum > 0
    onset = (state.onset if state.onset is not None else step) if disturbed else None
    following = replace(state, loss_sum=loss_sum, norm_sum=norm_sum, onset=onset)

    def finding(kind: str, trip: int) -> Finding:
        began = state.onset if state.onset is not None else step
        return Finding(kind, step, began, trip, loss_deviation, norm_deviation, usual_loss, math.exp(usual_norm))

    if state.trip is None:
        if max(loss_sum, norm_sum) >= settings.threshold:
            return replace(following, trip=step), finding("spike", step)
        # Until a spike is called, what looks like noise is noise: the medians bear some outliers.
        return _with_values(following, settings.window_steps, loss, log_norm), None
    # During a spike the measure stands still, so that a spike cannot become its own norm.
    assert state.onset is not None, "a spike was called that never began"
    if not disturbed:
        recovered = replace(following, trip=None)
        return _with_values(recovered, settings.window_steps, loss, log_norm), finding("benign", state.trip)
    if step - state.onset >= settings.benign_steps:
        # Told once. What follows is measured anew: under "watch", the new level becomes the norm.
        return State(), finding("malignant", state.trip)
    return following, None


def deviation(values: Sequence[float], value: float, smallest: float, *, relative: bool = True) -> tuple[float, float]:
    """(the median of `values`, how far `value` lies above it in robust standard deviations)."""
    middle = median(values)
    spread = 1.4826 * median(abs(other - middle) for other in values)
    return middle, (value - middle) / max(spread, smallest * abs(middle) if relative else smallest)


def _accumulated(total: float, deviation: float, threshold: float) -> float:
    # Bounded by the threshold, so that the sum falls back to zero soon after the spike is over.
    return min(threshold, max(0.0, total + min(deviation, TALLEST) - ALLOWANCE))


def _with_values(state: State, window: int, loss: float, log_norm: float) -> State:
    return replace(state, losses=(*state.losses, loss)[-window:], log_norms=(*state.log_norms, log_norm)[-window:])
