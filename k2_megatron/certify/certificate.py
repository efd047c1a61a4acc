"""The certificate: a table to read and certificate.json, which holds all that the table says and more.

In:  the reference and the verdicts. Out: text, and a tree of plain values for strict JSON.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2_megatron.certify.deviations import (
    COPIES,
    GRADIENT_ELEMENTS,
    GRADIENTS,
    HELD_OUT_LOSS,
    INITIAL_WEIGHTS,
    LAYER_OUTPUTS,
    LEFT_OUT,
    LOSS,
    RANKS,
    SAMPLE_LOSSES,
    TO_THE_BIT,
    WEIGHT_ELEMENTS,
    WEIGHTS,
)
from k2_megatron.certify.record import Record
from k2_megatron.certify.verdict import FACTOR, LAST_PLACE, Judged, Verdict
from k2_megatron.data.ledger import now
from k2_megatron.runtime.durable import write_file

_WIDTHS = (35, 11, 11, 11)
_UNLIKE = {
    INITIAL_WEIGHTS: "the fingerprints differ",
    RANKS: "losses, norms or weights differ from rank to rank",
}


@dataclass(frozen=True)
class Certificate:
    """`records` are those that were judged, in the order of `verdicts`; `seconds` all of it took."""

    reference: Record
    records: Sequence[Record]
    verdicts: Sequence[Verdict]
    seconds: float

    @property
    def same(self) -> bool:
        return all(verdict.same for verdict in self.verdicts)


def table(reference: Record, verdict: Verdict, record: Record) -> str:
    """One layout for people: of each quantity the number that is nearest to its bound."""
    facts, base = record.facts, reference.facts
    lines = [
        f"{verdict.layout}, {ranks_text(facts)}, against {base['layout']}, {ranks_text(base)}: "
        f"steps 1 to {facts['steps']}, {facts['config']['train']['precision']}",
        _columns("", "difference", "rounding", "bound", "           nearest to its bound"),
    ]
    lines += [_line(one) for one in verdict.worst()]
    first = verdict.first_different
    if first is not None:
        lines.append(f"  first different: {_whereabouts(first)}. {_meaning(first, verdict)}".rstrip())
    return "\n".join(lines)


def ranks_text(facts: dict[str, Any]) -> str:
    return f"{facts['ranks']} rank" + ("s" if facts["ranks"] > 1 else "")


def last_line(certificate: Certificate, path: Path) -> str:
    """The verdict in one line."""
    verdicts = certificate.verdicts
    different = [verdict.layout for verdict in verdicts if not verdict.same]
    against = certificate.reference.facts["layout"]
    if different:
        return f"DIFFERENT from {against}: {', '.join(different)} ({len(different)} of {len(verdicts)}); {path}"
    names = ", ".join(verdict.layout for verdict in verdicts)
    return f"SAME as {against}, to rounding: {names}; {path}"


def write_certificate(certificate: Certificate, path: Path) -> None:
    """Write certificate.json. What is infinite is written as text: JSON has no such number."""
    write_file(path, json.dumps(_tree(certificate), indent=1, allow_nan=False) + "\n")


def _columns(quantity: str, *cells: str) -> str:
    *numbers, place = cells
    widths = _WIDTHS[1:]
    return (f"  {quantity:<{_WIDTHS[0]}}" + "".join(map("{:>{}}".format, numbers, widths)) + f"  {place}").rstrip()


def _line(one: Judged) -> str:
    place = f"step {one.step}" + (f", {one.where}" if one.where else "") if one.difference else ""
    if one.quantity in TO_THE_BIT:
        cells = ("none" if one.same else "yes", "", "to the bit")
        if not one.same:
            place = _UNLIKE.get(one.quantity, place)
    else:
        cells = (_number(one.difference), _number(one.rounding), _number(one.bound))
    return _columns(one.quantity, *cells, f"{'same' if one.same else 'DIFFERENT':<9}  {place}")


def _number(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _whereabouts(one: Judged) -> str:
    step = f" in step {one.step}" if one.step else ""
    return f"{one.quantity}{step}" + (f", {one.where}" if one.where else "")


def _meaning(first: Judged, verdict: Verdict) -> str:
    """What the first difference says, by what comes before it in a step; nothing where it says no more than it is."""
    if first.quantity == INITIAL_WEIGHTS:
        return "The weights were not the same before anything was computed: look at how they are initialized."
    if first.quantity == RANKS:
        return ""
    if first.quantity == HELD_OUT_LOSS:
        return "All of training was the same: look at the evaluation."
    if first.quantity == COPIES:
        return "What is computed from was the same: look at whether each copy's gradients are added up over ranks."
    if first.quantity in (WEIGHTS, WEIGHT_ELEMENTS):
        return "The losses and gradients were the same: look at the update."
    if first.step > 1:
        return "The first step was the same, gradients included."
    if first.quantity in (LAYER_OUTPUTS, SAMPLE_LOSSES):
        return _of_forward(first, verdict)
    if first.quantity == LOSS:
        return "The losses of all samples were the same: look at how they are added up over ranks."
    wrong = {one.parameter for one in verdict.judged if one.quantity in (GRADIENTS, GRADIENT_ELEMENTS) and not one.same}
    if not wrong:
        return "The losses were the same, and each gradient: look at how the norms are added up."
    parameters = sum(one.quantity == GRADIENTS for one in verdict.judged)
    return (
        f"The losses were the same, and the gradients of {len(wrong)} of {parameters} parameters are not: look at the "
        "backward pass, and at how gradients are added up over ranks, or clipped."
    )


def _of_forward(first: Judged, verdict: Verdict) -> str:
    losses = [one for one in verdict.judged if one.quantity in (SAMPLE_LOSSES, LOSS) and one.step == 1]
    same = {one.quantity: one.same for one in losses}
    if first.quantity == LAYER_OUTPUTS and all(same.values()):
        return "The losses of all samples were the same: look at how the outputs of layers are added up."
    if first.quantity == SAMPLE_LOSSES and same[LOSS]:
        return "Their mean was the same: look at the order in which they are told."
    return "The weights were the same: look at the forward pass, or at which samples each rank reads."


def _tree(certificate: Certificate) -> dict[str, Any]:
    reference = certificate.reference
    return {
        "verdict": "same" if certificate.same else "different",
        "time": now(),
        "seconds": certificate.seconds,
        "bounds": (
            f"{FACTOR} times the largest deviation of the reference's perturbed repeats, each result of which is moved "
            f"by up to one unit in its last place, and at least {FACTOR} times 2^-23; of each parameter's weights "
            f"{LEFT_OUT} elements are not counted that differ by no more than twice the learning rates together"
        ),
        "factor": FACTOR,
        "least_rounding": LAST_PLACE,
        "repeats": len(reference.perturbed),
        "seed": reference.facts["config"]["run"]["seed"],
        "reference": _of_record(reference),
        "layouts": [
            {
                **_of_record(record),
                "verdict": "same" if verdict.same else "different",
                "first_different": _of_judged(verdict.first_different) if verdict.first_different else None,
                "quantities": [_of_judged(one) for one in verdict.worst()],
                "compared": [_of_judged(one) for one in verdict.judged],
            }
            for record, verdict in zip(certificate.records, certificate.verdicts, strict=True)
        ],
    }


def _of_record(record: Record) -> dict[str, Any]:
    told = record.first_steps
    return {
        **{key: value for key, value in record.facts.items() if key != "repeat"},
        "initial_weights": told.initial_weights,
        "final_weights": told.final_weights,
        "losses": [_plain(loss) for loss in told.losses],
    }


def _of_judged(one: Judged) -> dict[str, Any]:
    return {
        "quantity": one.quantity,
        "step": one.step,
        "where": one.where,
        "difference": _plain(one.difference),
        "rounding": one.rounding,
        "bound": one.bound,
        "same": one.same,
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
