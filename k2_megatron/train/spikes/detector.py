"""Find a spike in the signals of a run, one step at a time; width counts before height.

In:  (state, settings, step, loss, gradient norm, what the step tells of layers, samples and batch). Out: (the next
state, a finding or None). The state is a plain value that a checkpoint's manifest stores, so that a resumed run goes on
watching as if it had never stopped.

Each signal has a deviation: its distance above the rolling median, in robust standard deviations (1.4826 times the
median absolute deviation, Rousseeuw & Croux 1993). The deviations are added up by a one-sided cumulative sum (Page
1954) whose steps are bounded: a needle of any height counts as one step, and a spike must last to be called one. The
spike began when the sum last left zero, and is over when the sums are back at zero.

Any signal calls a spike: beside loss and gradient norm, each layer, and the highest loss of a sample, in which one bad
row of a large batch shows. Loss and gradient norm alone make one malignant, and patience with them counts from where
they began: a layer that stays at a new level while they are as before has changed, and the run is none the worse for
it. What a layer began longer than benign_steps before them is no part of their spike.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any, Protocol

from k2_megatron.train.spikes.layer_signals import (
    Deviation,
    LayerState,
    after_benign,
    observe_layers,
    still_up,
    with_layers,
)
from k2_megatron.train.spikes.measure import ALLOWANCE, TALLEST

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
    step at which one of these sums left zero; `trip`: the step at which the spike was called one; `began`: its
    first step, by all signals; `layers`, `samples`: sums and onsets of their own; `batch`: (samples, tokens of
    each) of the last step, None where it is not known."""

    losses: tuple[float, ...] = ()
    log_norms: tuple[float, ...] = ()
    loss_sum: float = 0.0
    norm_sum: float = 0.0
    onset: int | None = None
    began: int | None = None
    trip: int | None = None
    layers: LayerState = field(default_factory=LayerState)
    samples: LayerState = field(default_factory=LayerState)
    batch: tuple[int, int] | None = None

    @property
    def own_sums(self) -> tuple[float, ...]:
        """The cumulative sums of the signals that have onsets of their own."""
        return (*self.layers.sums, *self.samples.sums)

    @property
    def own_onsets(self) -> tuple[int, ...]:
        """The step at which each of them left zero, 0 while it is zero."""
        return (*self.layers.onsets, *self.samples.onsets)

    def plain(self) -> dict[str, Any]:
        """The state as JSON takes it; `restore` gives it back equal."""
        return asdict(self)


def restore(plain: dict[str, Any]) -> State:
    """The state that `State.plain` returned."""
    values: dict[str, Any] = {key: tuple(plain[key]) for key in ("losses", "log_norms")}
    for key in ("layers", "samples"):
        kept = plain.get(key, asdict(LayerState()))  # an earlier version did not watch them
        of_signals = (tuple(kept.get(name, ())) for name in ("sums", "onsets", "waits"))
        values[key] = LayerState(tuple(map(tuple, kept["logs"])), *of_signals)
    if plain.get("batch"):
        values["batch"] = tuple(plain["batch"])
    if "began" not in plain and plain["trip"] is not None:  # an earlier version had one onset for both
        values["began"] = plain["onset"]
    return State(**{**plain, **values})


@dataclass(frozen=True)
class Finding:
    """`kind`: "spike" when it is called one, then "benign" (over within benign_steps) or "malignant" (not over).

    Steps are numbered from 1 as in the journal. `loss_deviation` and `norm_deviation` are this step's, in robust
    standard deviations; `usual_loss` and `usual_norm` the medians they are measured from; `layers` are the signals of
    layers and samples that deviate most; `over`: all signals are back, which they need not be for a benign verdict.
    """

    kind: str
    step: int
    onset: int
    trip: int
    loss_deviation: float
    norm_deviation: float
    usual_loss: float
    usual_norm: float
    layers: tuple[Deviation, ...] = ()
    over: bool = False

    def __post_init__(self) -> None:
        # What is skipped ends with the trip: before the onset it would hold none of the rows that did it.
        assert self.onset <= self.trip, f"called at step {self.trip}, before it began at step {self.onset}"


def observe(
    state: State,
    settings: Settings,
    step: int,
    loss: float,
    grad_norm: float,
    layers: Mapping | None = None,
    highest_sample_loss: float | None = None,
    batch: tuple[int, int] | None = None,
) -> tuple[State, Finding | None]:
    """Take in one finished step (finite values), with what it tells of the layers and of its samples, if it does.
    Nothing is judged before the window is full; of a `batch` (samples, tokens of each) to which the medians do not
    apply it begins anew."""
    if _is_another_measure(state.batch, batch):
        state = State()
    following, finding = _observed(state, settings, step, loss, grad_norm, layers, highest_sample_loss)
    return replace(following, batch=batch), finding


def batch_of(event: Mapping) -> tuple[int, int] | None:
    """(samples, tokens of each) of a step event; None of one that does not tell them."""
    if "samples" not in event or "sequence_length" not in event:
        return None
    first, end = event["samples"]
    return end - first, event["sequence_length"]


def _is_another_measure(was: tuple[int, int] | None, now: tuple[int, int] | None) -> bool:
    """A smaller batch has larger norms (one divided by the root of its size), another length other losses. In one that
    grows, as in a ramp, norms fall, and it is watched on."""
    return was is not None and now is not None and (now[0] < was[0] or now[1] != was[1])


def _observed(
    state: State,
    settings: Settings,
    step: int,
    loss: float,
    grad_norm: float,
    layers: Mapping | None,
    highest_sample_loss: float | None,
) -> tuple[State, Finding | None]:
    samples = None if highest_sample_loss is None else {"highest_sample_loss": highest_sample_loss}
    log_norm = math.log(max(grad_norm, 1e-30))  # norms scatter by factors: their logarithm has a symmetric noise
    window, threshold = settings.window_steps, settings.threshold
    if len(state.losses) < window:
        return _with_values(state, window, loss, log_norm, layers, samples), None
    usual_loss, loss_deviation = deviation(state.losses, loss, SMALLEST_RELATIVE_DEVIATION)
    usual_norm, norm_deviation = deviation(state.log_norms, log_norm, SMALLEST_RELATIVE_DEVIATION, relative=False)
    loss_sum = _accumulated(state.loss_sum, loss_deviation, threshold)
    norm_sum = _accumulated(state.norm_sum, norm_deviation, threshold)
    of_layers, deviating = observe_layers(state.layers, window, threshold, step, layers)
    of_samples, also_deviating = observe_layers(state.samples, window, threshold, step, samples)
    deviating = tuple(sorted((*deviating, *also_deviating), key=lambda signal: -signal.deviation))
    onset = (step if state.onset is None else state.onset) if max(loss_sum, norm_sum) > 0 else None
    measured = replace(state, loss_sum=loss_sum, norm_sum=norm_sum, onset=onset, layers=of_layers, samples=of_samples)
    if state.trip is None:
        measured = following = _called(measured, settings, step)
        kind = None if following.trip is None else "spike"
    else:
        following, kind = _judged(measured, settings, step)
    finding = None
    if kind:
        assert measured.trip is not None, "what is found was called"
        usual, over = (usual_loss, math.exp(usual_norm)), _is_over(measured, threshold)
        first = _first_step(measured, settings)
        # A layer had called one, long before: what loss and norm began after that is first told of now.
        trip = measured.trip if first <= measured.trip else step
        finding = Finding(kind, step, first, trip, loss_deviation, norm_deviation, *usual, deviating, over)
    # Until a spike is called, what looks like noise is noise, and the medians bear some outliers. During a spike the
    # measure stands still, so that a spike cannot become its own norm; after a malignant one it begins anew.
    if following.trip is None and kind != "malignant":
        following = _with_values(following, window, loss, log_norm, layers, samples)
    return following, finding


def _called(state: State, settings: Settings, step: int) -> State:
    """The state with the spike that this step makes one, or as it was."""
    if max(state.loss_sum, state.norm_sum, *state.own_sums) < settings.threshold:
        return state
    # Among many layers some sum leaves zero at most steps, for a step: those that reached the threshold count.
    sums = zip(state.own_onsets, state.own_sums, strict=True)
    began = [since for since, total in sums if total >= settings.threshold]
    if state.onset is not None and _tells(state, settings.threshold):
        began.append(state.onset)
    began = [since for since in began if not _is_another(since, state, settings)]
    return replace(state, began=min(began), trip=step)


def _judged(state: State, settings: Settings, step: int) -> tuple[State, str | None]:
    """A spike is on: is it over, or has it lasted too long?"""
    threshold = settings.threshold
    over, tells = _is_over(state, threshold), _tells(state, threshold)
    since = state.onset if tells else state.began
    assert since is not None, "a sum above zero has an onset, and what was called began"
    if not over and step - since < settings.benign_steps:
        return state, None
    # Told once. Under "watch" the new level of the loss becomes the norm as well.
    if not over and tells:
        return State(), "malignant"
    layers, samples = (after_benign(signals, settings.window_steps) for signals in (state.layers, state.samples))
    return replace(state, onset=None, began=None, trip=None, layers=layers, samples=samples), "benign"


def _first_step(state: State, settings: Settings) -> int:
    """At which the spike that was called began: where loss and norm did, when they came too late to be part of it."""
    assert state.began is not None, "a spike was called that never began"
    return state.onset if state.onset is not None and _is_another(state.began, state, settings) else state.began


def _is_another(began: int, state: State, settings: Settings) -> bool:
    """Whether what a signal of its own began at that step is no part of what loss and norm tell of now: it came longer
    before than a spike may last that is benign."""
    return (
        state.onset is not None and _tells(state, settings.threshold) and state.onset - began >= settings.benign_steps
    )


def _tells(state: State, threshold: float) -> bool:
    """Whether loss or gradient norm are up by more than noise takes them."""
    return max(state.loss_sum, state.norm_sum) >= threshold / 2


def _is_over(state: State, threshold: float) -> bool:
    own = (*still_up(state.layers, threshold), *still_up(state.samples, threshold))
    return max(state.loss_sum, state.norm_sum) == 0 and not any(own)


def deviation(values: Sequence[float], value: float, smallest: float, *, relative: bool = True) -> tuple[float, float]:
    """(the median of `values`, how far `value` lies above it in robust standard deviations)."""
    middle = median(values)
    spread = 1.4826 * median(abs(other - middle) for other in values)
    return middle, (value - middle) / max(spread, smallest * abs(middle) if relative else smallest)


def _accumulated(total: float, deviation: float, threshold: float) -> float:
    # Bounded by the threshold, so that the sum falls back to zero soon after the spike is over.
    return min(threshold, max(0.0, total + min(deviation, TALLEST) - ALLOWANCE))


def _with_values(
    state: State, window: int, loss: float, log_norm: float, layers: Mapping | None, samples: Mapping | None
) -> State:
    return replace(
        state,
        losses=(*state.losses, loss)[-window:],
        log_norms=(*state.log_norms, log_norm)[-window:],
        layers=with_layers(state.layers, window, layers),
        samples=with_layers(state.samples, window, samples),
    )
