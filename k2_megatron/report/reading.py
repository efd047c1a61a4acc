"""A journal, read once, line by line: its steps as columns of numbers, the rare events whole, and where the time went.

In:  journal.jsonl, of a run that is over, was killed, or writes at this moment. Out: a `Told`.

A step may be told several times: a telling stands unless a resume or rollback went on from before it, or the step was
told again. Memory grows by some hundred bytes a step; what a step tells of its layers is not kept (see matrices.py).
"""

from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from math import nan
from pathlib import Path

import numpy as np

from k2_megatron.report.goodput import Account
from k2_megatron.runtime.journal import Standing, read_events

OF_A_STATE = ("evaluation", "checkpoint")  # they tell of weights, which may be taken back
MEASURES = (
    "loss",
    "grad_norm",
    "highest_sample_loss",
    "learning_rate",
    "consumed_tokens",
    "sequence_length",
    "step_seconds",
    "data_seconds",
    "tokens_per_second",
    "model_flops_utilization",
)
LAYER_SIGNALS = ("gradient_norm", "activation_rms")  # of the layers of a step
NEED_STEP = ("step", "resume", "rollback", "evaluation", "spike", "phases")
NUMBER = (int, float)
# What is reckoned with, and so must be of its type: a journal may be of another version, or written by other hands
KEYS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "step": {"step_seconds": NUMBER},
    "resume": {"changes": list, "doubts": list, "position_change": (dict, type(None))},
    "checkpoint": {"stall_seconds": NUMBER},
    "evaluation": {"held_out_loss": NUMBER},
    "spike": {"trip": int, "onset": int},
    "rollback": {"from_step": int},
    "incident": {"kind": str},
    "phases": {"seconds": dict},
}


@dataclass(frozen=True)
class Rare:
    """An event that is kept whole: in the `life`th life of the run (0: before its first start), when `tellings` steps
    had been told. `stands` is False where the weights that it tells of were taken back."""

    event: Mapping
    time: float
    life: int
    tellings: int
    stands: bool

    @property
    def kind(self) -> str:
        return self.event["event"]


@dataclass(frozen=True)
class Told:
    """What a journal tells. `columns` has a number of every telling of a step, in the order of the journal, NaN where
    it does not say; besides MEASURES "step", "batch" (sequences), "time" (seconds since 1970) and "life"."""

    columns: Mapping[str, np.ndarray]
    stands: np.ndarray  # [tellings] bool
    rare: tuple[Rare, ...]
    account: Account
    ledger_marks: tuple[tuple[dict, str], ...]  # (how the ledger ended, which event says so), where that changes
    events: int
    layer_tellings: int  # of those that stand, how many tell of the layers
    phases_stand: np.ndarray  # [phases events] bool

    @cached_property
    def steps(self) -> np.ndarray:
        """The steps that stand, ascending."""
        return self.standing("step").astype(np.int64)

    def standing(self, name: str) -> np.ndarray:
        """A column, of the steps that stand."""
        return self.columns[name][self.stands]

    def of_kind(self, *kinds: str) -> list[Rare]:
        return [rare for rare in self.rare if rare.kind in kinds]

    def last(self, kind: str) -> Rare | None:
        """The last event of a kind that stands."""
        return next((rare for rare in reversed(self.rare) if rare.kind == kind and rare.stands), None)


def seconds_of(event: Mapping) -> float:
    """When an event was written, in seconds since 1970; NaN where it does not say."""
    try:
        return datetime.fromisoformat(event["time"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return nan


def number_of(event: Mapping, key: str) -> float:
    """A number of an event; NaN where there is none."""
    value = event.get(key)
    return float(value) if isinstance(value, int | float) else nan


def read_told(path: Path) -> Told:
    """Read a journal. What is no whole line is passed over; without a journal nothing is told."""
    return told_of(read_events(path) if path.is_file() else ())


def told_of(events: Iterable[dict]) -> Told:
    """What these events, in the order of a journal, tell."""
    columns = {name: array("d") for name in ("step", "batch", "time", "life", *MEASURES)}
    rare: list[tuple[dict, float, int, int]] = []
    # Of each kind which of them: a save in the background is told of after later steps, so kinds are kept apart
    standing: dict[str, Standing[int]] = {kind: Standing() for kind in ("step", "phases", *OF_A_STATE)}
    account, marks, mark = Account(), [], None
    count = life = phases = 0
    tell_of_layers = array("b")
    for event in sound_events(events):
        kind, time = event["event"], seconds_of(event)
        count += 1
        for of_kind in standing.values():
            of_kind.take_back(event)
        account.tell(event, time)
        if kind == "start":
            life += 1
        if isinstance(event.get("ledger"), dict) and event["ledger"] != mark:
            mark = event["ledger"]
            marks.append((mark, f"the journal tells of {kind} {event.get('step', '')}".rstrip()))
        if kind == "step":
            standing[kind].told.append((event["step"], len(columns["step"])))
            _append(columns, event, time, life)
            tell_of_layers.append("layers" in event)
            continue
        if kind == "phases":
            standing[kind].told.append((event["step"], phases))
            phases += 1
            if not event.get("slow"):
                continue
            event = {key: value for key, value in event.items() if key != "seconds"}
        elif kind in OF_A_STATE and "step" in event:
            standing[kind].told.append((event["step"], len(rare)))
        rare.append((event, time, life, len(columns["step"])))
    stands = _flags(len(columns["step"]), standing["step"])
    return Told(
        columns={name: np.array(column) for name, column in columns.items()},
        stands=stands,
        rare=_with_standing(rare, _flags(len(rare), *(standing[kind] for kind in OF_A_STATE))),
        account=account,
        ledger_marks=tuple(marks),
        events=count,
        layer_tellings=int(np.array(tell_of_layers, dtype=bool)[stands].sum()),
        phases_stand=_flags(phases, standing["phases"]),
    )


def _flags(count: int, *standing: Standing[int]) -> np.ndarray:
    flags = np.zeros(count, dtype=bool)
    for of_kind in standing:
        flags[[place for _, place in of_kind.told]] = True
    return flags


def _with_standing(rare: list[tuple[dict, float, int, int]], stand: np.ndarray) -> tuple[Rare, ...]:
    return tuple(
        Rare(*told, stands=told[0]["event"] not in OF_A_STATE or bool(stands))
        for told, stands in zip(rare, stand, strict=True)
    )


def sound_events(events: Iterable[dict]) -> Iterator[dict]:
    """The events but those whose kind is no text, or whose step is no number or lacks where it must be. What is of
    another type than this version writes (see KEYS) is left out of an event, as if it were not told."""
    for event in events:
        kind, step = event["event"], event.get("step", 0)
        if not isinstance(kind, str) or type(step) is not int or ("step" not in event and kind in NEED_STEP):
            continue
        wrong = [key for key, of in KEYS.get(kind, {}).items() if key in event and not isinstance(event[key], of)]
        if kind == "step" and "layers" in event and not _tells_of_layers(event.get("layers")):
            wrong.append("layers")
        yield {key: value for key, value in event.items() if key not in wrong} if wrong else event


def _tells_of_layers(layers: object) -> bool:
    return isinstance(layers, dict) and all(isinstance(layers.get(signal), list) for signal in LAYER_SIGNALS)


def _append(columns: Mapping[str, array], event: Mapping, time: float, life: int) -> None:
    samples = event.get("samples")
    columns["step"].append(event["step"])
    columns["time"].append(time)
    columns["life"].append(life)
    columns["batch"].append(samples[1] - samples[0] if isinstance(samples, list) and len(samples) == 2 else nan)
    for name in MEASURES:
        columns[name].append(number_of(event, name))
