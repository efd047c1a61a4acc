"""How far one record is from another, quantity by quantity: the numbers that a certificate judges.

In:  two records of the same steps. Out: {Key: Deviation}, in the order in which a step computes them, so that the first
that is too large is the nearest to the fault.

A single number deviates relative to itself. A parameter's gradient, or its weights, deviate twice: the norm of the
difference relative to their norm, and the largest difference of an element relative to the largest element. Both are
read layer by layer in blocks of rows, so that no model is too large. The clipping of gradients is undone by the norm
that each record tells, so that a wrong gradient of one parameter is not one of all.

Of weights a few elements may be left out. Adam moves an element by about the learning rate, however small its gradient
is: where that is zero but for rounding, rounding decides whether up or down, too rarely to be seen in every repeat.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from k2_megatron.certify.first_steps import FirstSteps
from k2_megatron.certify.record import Record
from k2_megatron.convert.names import Place, places
from k2_megatron.convert.numbers import to_float32
from k2_megatron.convert.source import Kind
from k2_megatron.convert.torch_dist import TorchDistSource, read_manifest
from k2_megatron.kernels.gradient_norm import clip_factor
from k2_megatron.train.layer_norms import LayerNorms

# Elements of a parameter's weights. The nearer a gradient is to zero the more rounding moves its element, so that of N
# elements N c / x or so move by more than x: the largest of a layout is beyond 8 times the largest of three repeats by
# chance in 1 of 25 parameters, the fifth largest in 1 of 25^5.
LEFT_OUT = 4
_BLOCK_ELEMENTS = 1 << 22
_ROUNDED = 2.0**-20  # of the largest element: what the updates' own rounding adds to a turned one

INITIAL_WEIGHTS = "initial weights"
LAYER_OUTPUTS = "output of each layer (RMS)"
SAMPLE_LOSSES = "loss of each sample"
LOSS = "loss"
LAYER_GRADIENTS = "gradient norm of each layer"
GRADIENT_NORM = "gradient norm"
GRADIENTS = "gradient of each parameter, norm"
GRADIENT_ELEMENTS = "gradient of each parameter, element"
WEIGHTS = "weights of each parameter, norm"
WEIGHT_ELEMENTS = "weights of each parameter, element"
HELD_OUT_LOSS = "held-out loss"
COPIES = "copies that ranks hold"
RANKS = "ranks tell the same"
TO_THE_BIT = (INITIAL_WEIGHTS, COPIES, RANKS)


class Key(NamedTuple):
    """`step` is counted from 1, 0 before the first; `parameter` of what is told of each parameter."""

    quantity: str
    step: int
    parameter: str = ""


class Deviation(NamedTuple):
    """`size` is relative, infinite where a number is not finite or should be zero; `where` the largest is."""

    size: float
    where: str


def deviations(expected: Record, found: Record, turned: float = 0.0) -> dict[Key, Deviation]:
    """Everything that is compared, of `found` against `expected`. `turned`: how far an element comes to be off
    that Adam moves the other way; LEFT_OUT such elements of each parameter's weights are not counted."""
    one, other = expected.first_steps, found.first_steps
    last = len(one.losses)
    same_start = one.initial_weights == other.initial_weights
    told = {Key(INITIAL_WEIGHTS, 0): Deviation(0.0 if same_start else math.inf, "")}
    for step in range(1, last + 1):
        told.update(_of_forward(one, other, step))
        if step == 1:
            scale = _clipping(found) and _clipping(expected) / _clipping(found)
            told.update(_of_parameters(expected.after_first_step, found.after_first_step, "exp_avg", step, scale))
        told.update(_of_backward(one, other, step))
        copies = other.unlike_copies[step - 1]
        told[Key(COPIES, step)] = Deviation(math.inf if copies else 0.0, copies)
    told.update(_of_parameters(expected.after_last_step, found.after_last_step, "main", last, turned=turned))
    if one.held_out_loss is not None and other.held_out_loss is not None:
        told[Key(HELD_OUT_LOSS, last)] = Deviation(_relative(one.held_out_loss, other.held_out_loss), "")
    told[Key(RANKS, last)] = Deviation(0.0 if found.ranks_agree else math.inf, "")
    return told


def _clipping(record: Record) -> float:
    """What the gradient of the first step was multiplied by; its norm is told as it was before."""
    largest, norm = record.facts["config"]["optimizer"].get("clip_grad_norm"), record.first_steps.grad_norms[0]
    return float(clip_factor(torch.tensor(norm), largest)) if largest else 1.0


def _of_forward(one: FirstSteps, other: FirstSteps, step: int) -> Iterator[tuple[Key, Deviation]]:
    outputs, others = (told.layers[step - 1].activation_rms for told in (one, other))
    yield Key(LAYER_OUTPUTS, step), _largest(outputs, others, [f"layer {layer}" for layer in range(len(outputs))])
    losses, others = (told.sample_losses[step - 1] for told in (one, other))
    samples = [f"sample {sample} of the batch" for sample in range(len(losses))]
    yield Key(SAMPLE_LOSSES, step), _largest(losses, others, samples)
    yield Key(LOSS, step), Deviation(_relative(one.losses[step - 1], other.losses[step - 1]), "")


def _of_backward(one: FirstSteps, other: FirstSteps, step: int) -> Iterator[tuple[Key, Deviation]]:
    layers = one.layers[step - 1]
    names = [*(f"layer {layer}" for layer in range(len(layers.gradient_norm))), "embedding", "output"]
    yield Key(LAYER_GRADIENTS, step), _largest(_norms(layers), _norms(other.layers[step - 1]), names)
    yield Key(GRADIENT_NORM, step), Deviation(_relative(one.grad_norms[step - 1], other.grad_norms[step - 1]), "")


def _norms(layers: LayerNorms) -> tuple[float, ...]:
    return *layers.gradient_norm, layers.embedding_gradient_norm, layers.output_gradient_norm


def _largest(expected: Sequence[float], found: Sequence[float], names: Sequence[str]) -> Deviation:
    assert len(expected) == len(found) == len(names), "records of other samples or layers were not refused"
    return max(map(Deviation, map(_relative, expected, found), names))


def _relative(expected: float, found: float) -> float:
    if not (math.isfinite(expected) and math.isfinite(found)):
        return math.inf
    return _ratio(abs(found - expected), abs(expected))


def _of_parameters(
    expected: Path, found: Path, kind: Kind, step: int, scale: float = 1.0, turned: float = 0.0
) -> Iterator[tuple[Key, Deviation]]:
    """`scale`: what the found numbers are multiplied by first."""
    one, other = (TorchDistSource(folder, read_manifest(folder)) for folder in (expected, found))
    by_norm, by_element = {"exp_avg": (GRADIENTS, GRADIENT_ELEMENTS), "main": (WEIGHTS, WEIGHT_ELEMENTS)}[kind]
    for place in places(one.shape):
        name = place.entry.key(one.implementation)
        if place.layer is not None:
            name = name.replace("layers.", f"layers.{place.layer}.", 1)
        norm, element = _of_parameter(one, other, kind, place, name, scale, turned)
        yield Key(by_norm, step, name), norm
        yield Key(by_element, step, name), element


def _of_parameter(
    one: TorchDistSource, other: TorchDistSource, kind: Kind, place: Place, name: str, scale: float, turned: float
) -> tuple[Deviation, Deviation]:
    rows, columns = place.entry.size(one.shape)
    squares = expected_squares = expected_largest = 0.0
    most: list[tuple[float, int]] = []  # the largest differences, and which elements they are of
    height = max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, height):
        last = min(rows, first + height)
        a, b = (
            to_float32(source.read(kind, place, first, last), source.dtypes[kind]).astype(np.float64).ravel()
            for source in (one, other)
        )
        difference = np.abs(scale * b - a)
        difference[~np.isfinite(difference)] = math.inf
        squares, expected_squares = squares + float((difference**2).sum()), expected_squares + float((a**2).sum())
        expected_largest = max(expected_largest, float(np.abs(a).max()))
        kept = min(LEFT_OUT + 1, len(difference))
        top = np.argpartition(difference, -kept)[-kept:].tolist()
        most += [(float(difference[index]), first * columns + index) for index in top]
        most = sorted(most, reverse=True)[: LEFT_OUT + 1]
    if turned:
        squares, most = _without_turned(squares, most, turned + _ROUNDED * expected_largest)
    largest, index = most[0] if most else (0.0, 0)
    row, column = divmod(index, columns)
    where = f"{name} [{row}{f', {column}' if columns > 1 else ''}]" if largest else name
    norm = Deviation(_ratio(math.sqrt(squares), math.sqrt(expected_squares)), name)
    return norm, Deviation(_ratio(largest, expected_largest), where)


def _without_turned(
    squares: float, most: list[tuple[float, int]], limit: float
) -> tuple[float, list[tuple[float, int]]]:
    """The sum of squares and the largest differences without the LEFT_OUT largest of those within `limit`."""
    left_out = [one for one in most if one[0] <= limit][:LEFT_OUT]
    return max(0.0, squares - sum(size**2 for size, _ in left_out)), [one for one in most if one not in left_out]


def _ratio(difference: float, size: float) -> float:
    if not math.isfinite(size):
        return math.inf
    return difference / size if size else math.inf if difference else 0.0
