"""The signals of the layers: gradient norms and output sizes, each watched like the loss, all of them at once. The
highest loss of a sample is watched in the same way, by itself.

In:  what a step event tells of the layers, the values of the steps before. Out: each signal's deviation and cumulative
sum, as in detector.py, on logarithms: norms scatter, and grow, by factors.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from k2_megatron.train.spikes.measure import ALLOWANCE, TALLEST

# A layer's norm moves by some per cent for reasons of its own (warm-up, a new learning rate): less than this, times
# ALLOWANCE, never counts, however quiet the layer was before.
SMALLEST_DEVIATION = 0.05
NAMED = 8  # signals named in a finding


@dataclass(frozen=True)
class LayerState:
    """`logs`: the last undisturbed values, a tuple a step; `sums`: the cumulative sum of each signal; `onsets`: the
    step at which each sum left zero, 0 while it is zero; `waits`: of each signal that is not judged, as it may have
    come to rest at a new level, the values that are missing until all of `logs` are of that; the wait ends where the
    signal is back within half the allowance of its median (sizes grow over a window by more than nothing)."""

    logs: tuple[tuple[float, ...], ...] = ()
    sums: tuple[float, ...] = ()
    onsets: tuple[int, ...] = ()
    waits: tuple[int, ...] = ()


@dataclass(frozen=True)
class Deviation:
    """A signal that lies `deviation` robust standard deviations above its `usual` value."""

    signal: str
    value: float
    usual: float
    deviation: float

    @property
    def words(self) -> str:
        return f"{self.signal} {self.deviation:.1f} above {self.usual:.4g}"


def signals(layers: Mapping[str, Sequence[float] | float]) -> dict[str, float]:
    """{"activation_rms of layer 3": 0.71, "embedding_gradient_norm": 0.2, ...} of a step event's "layers"."""
    found: dict[str, float] = {}
    for name, values in layers.items():
        if isinstance(values, float | int):
            found[name] = float(values)
        else:
            found.update({f"{name} of layer {number}": value for number, value in enumerate(values, start=1)})
    return found


def observe_layers(
    state: LayerState, window_steps: int, threshold: float, step: int, layers: Mapping | None
) -> tuple[LayerState, tuple[Deviation, ...]]:
    """(the state with new sums, the signals that deviate most); nothing is judged before the window is full, nor of a
    step that tells of no layers."""
    if layers is None or len(state.logs) < window_steps:
        return state, ()
    named = signals(layers)
    values, window = np.array(_logarithms(named)), np.array(state.logs)
    usual = np.median(window, axis=0)
    spread = 1.4826 * np.median(np.abs(window - usual), axis=0)
    deviations = (values - usual) / np.maximum(spread, SMALLEST_DEVIATION)
    waits = np.array(state.waits or (0,) * len(values))
    waits[deviations < ALLOWANCE / 2] = 0
    deviations[waits > 0] = 0.0
    before = np.array(state.sums) if state.sums else np.zeros(len(values))
    sums = np.clip(before + np.minimum(deviations, TALLEST) - ALLOWANCE, 0.0, threshold)
    onsets = [
        (onset or step) if total > 0 else 0
        for total, onset in zip(sums, state.onsets or [0] * len(values), strict=True)
    ]
    names = list(named)
    most = [index for index in np.argsort(-deviations, kind="stable")[:NAMED] if deviations[index] > ALLOWANCE]
    found = tuple(
        Deviation(names[i], named[names[i]], round(math.exp(usual[i]), 6), round(float(deviations[i]), 2)) for i in most
    )
    return replace(state, sums=tuple(sums.tolist()), onsets=tuple(onsets), waits=tuple(waits.tolist())), found


def with_layers(state: LayerState, window_steps: int, layers: Mapping | None) -> LayerState:
    """The state after an undisturbed step."""
    if layers is None:
        return state
    logs = (*state.logs, _logarithms(signals(layers)))[-window_steps:]
    return replace(state, logs=logs, waits=tuple(max(0, missing - 1) for missing in state.waits))


def after_benign(state: LayerState, window_steps: int) -> LayerState:
    """The state after a spike that was judged benign. Signals often come to rest at another level, which is then the
    usual one: those that it disturbed are measured anew unless they come back, and the others watched on."""
    missing = zip(state.sums, state.waits or (0,) * len(state.sums), strict=True)
    waits = tuple(window_steps if total > 0 else more for total, more in missing) or state.waits
    return replace(state, sums=(), onsets=(), waits=waits)


def still_up(state: LayerState, threshold: float) -> list[bool]:
    """Of each signal, whether it is disturbed: of many one or another is always a little above zero."""
    return [total >= threshold / 2 for total in state.sums]


def _logarithms(named: Mapping[str, float]) -> tuple[float, ...]:
    return tuple(math.log(max(value, 1e-30)) for value in named.values())
