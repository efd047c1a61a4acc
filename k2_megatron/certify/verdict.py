"""What a deviation may be, and what is: bounds from the rounding of the reference itself.

In:  the reference with its perturbed repeats, and the record of a layout. Out: a `Judged` a key, and a `Verdict`.

The bound of each number is FACTOR times the most that it moved in the repeats, in which every result was moved by a
unit in its last place, and never less than FACTOR such units of float32, in which all these numbers are kept. A number
that is a mean or a norm of others may move as they do: one number alone may by chance have moved less than it can.

The repeats' weights are compared whole; those of a layout without a few elements that Adam may have moved the other way
(deviations.py), so that a parameter of which the repeats show none has a bound as narrow as its other elements'.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from k2_megatron.certify.deviations import (
    GRADIENT_NORM,
    HELD_OUT_LOSS,
    LAYER_GRADIENTS,
    LOSS,
    SAMPLE_LOSSES,
    TO_THE_BIT,
    Deviation,
    Key,
    deviations,
)
from k2_megatron.certify.record import Record
from k2_megatron.config import Config
from k2_megatron.train.schedule import learning_rate_at

FACTOR = 8  # layouts on CPUs came to 2 in float32, to 1 in bfloat16 (dev/LOG.md)
LAST_PLACE = 2.0**-23  # of float32
_MOVES_AS = {LOSS: SAMPLE_LOSSES, HELD_OUT_LOSS: SAMPLE_LOSSES, GRADIENT_NORM: LAYER_GRADIENTS}


@dataclass(frozen=True)
class Judged:
    """`rounding` is the most that the repeats moved it, `bound` what is allowed; both relative, as `difference`."""

    quantity: str
    step: int
    parameter: str
    where: str
    difference: float
    rounding: float
    bound: float

    @property
    def same(self) -> bool:
        return self.difference <= self.bound

    @property
    def share(self) -> float:
        """Of the bound that is used up."""
        return self.difference / self.bound if self.bound else self.difference


@dataclass(frozen=True)
class Verdict:
    """Of one layout: all that was compared, in the order in which it is computed."""

    layout: str
    judged: Sequence[Judged]

    @property
    def same(self) -> bool:
        return all(one.same for one in self.judged)

    @property
    def first_different(self) -> Judged | None:
        return next((one for one in self.judged if not one.same), None)

    def worst(self) -> list[Judged]:
        """Of each quantity the one that is nearest to its bound, or furthest beyond."""
        quantities = dict.fromkeys(one.quantity for one in self.judged)
        return [max((one for one in self.judged if one.quantity == q), key=lambda one: one.share) for q in quantities]


def rounding_of(reference: Record) -> dict[Key, float]:
    """The most that the reference's repeats moved each number."""
    found: dict[Key, float] = {}
    for repeat in reference.perturbed:
        for key, deviation in deviations(reference, repeat).items():
            found[key] = max(found.get(key, 0.0), deviation.size)
    return found


def judge(reference: Record, rounding: Mapping[Key, float], record: Record) -> Verdict:
    """The verdict on a layout, recorded for the same steps."""
    config = Config.model_validate(reference.facts["config"])
    turned = 2 * sum(learning_rate_at(config, step) for step in range(reference.facts["steps"]))
    judged = [_judged(key, one, rounding) for key, one in deviations(reference, record, turned).items()]
    return Verdict(record.facts["layout"], judged)


def _judged(key: Key, deviation: Deviation, rounding: Mapping[Key, float]) -> Judged:
    if key.quantity in TO_THE_BIT:
        return Judged(*key, deviation.where, deviation.size, 0.0, 0.0)
    moved = rounding[key]
    if key.quantity in _MOVES_AS:
        moved = max(moved, rounding[Key(_MOVES_AS[key.quantity], key.step)])
    return Judged(*key, deviation.where, deviation.size, moved, FACTOR * max(moved, LAST_PLACE))


def require_same_steps(reference: Record, record: Record) -> None:
    """ValueError when one of the two was computed of other data, by another recipe or for fewer steps."""
    for key, meaning in (
        ("fingerprint", "configuration (fingerprint of what shapes the training)"),
        ("steps", "number of steps"),
        ("data", "training data"),
        ("held_out", "held-out data"),
    ):
        one, other = reference.facts[key], record.facts[key]
        if one != other:
            raise ValueError(
                f"{record.folder} is of another {meaning} than {reference.folder}: {other}, not {one}; "
                "record both with the same configuration, files and --steps"
            )


def require_reference(reference: Record) -> None:
    """ValueError where the reference, or a repeat of it, came to no numbers to compare with."""
    for record in (reference, *reference.perturbed):
        told = record.first_steps
        for step, numbers in enumerate(zip(told.losses, told.grad_norms, strict=True), 1):
            if not all(map(math.isfinite, numbers)):
                raise ValueError(
                    f"{record.folder} has loss {numbers[0]} and gradient norm {numbers[1]} in step {step}: there is "
                    "nothing to compare with; see whether the run trains"
                )
        if not record.ranks_agree or any(told.unlike_copies):
            raise ValueError(f"{record.folder}: its own ranks tell different numbers; take another layout as reference")
