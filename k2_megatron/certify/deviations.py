"""How far one record is from another, quantity by quantity: the numbers that a certificate judges.

In:  two records of the same steps. Out: {Key: Deviation}, in the order in which a step computes them, so that the first
that is too large is the nearest to the fault.

A single number deviates relative to itself. A parameter's gradient, or its weights, deviate twice: the norm of the
difference relative to their norm, and the largest difference of an element relative to the largest element. Both are
read layer by layer in blocks of rows, so that no model is too large. The clipping of gradients is undone by the norm
that each record tells, so that a wrong gradient of one parameter is not one of all.
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

_BLOCK_ELEMENTS = 1 << 22

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
RANKS = "ranks tell the same"
TO_THE_BIT = (INITIAL_WEIGHTS, RANKS)


class Key(NamedTuple):
    """`step` is counted from 1, 0 before the first; `parameter` of what is told of each parameter."""

    quantity: str
    step: int
    parameter: str = ""


class Deviation(NamedTuple):
    """`size` is relative to `of`, infinite where a number is not finite or should be zero; `where` the largest is."""

    size: float
    where: str
    of: float = 1.0


def deviations(expected: Record, found: Record) -> dict[Key, Deviation]:
    """Everything that is compared, of `found` against `expected`."""
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
    told.update(_of_parameters(expected.after_last_step, found.after_last_step, "main", last))
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
    expected: Path, found: Path, kind: Kind, step: int, scale: float = 1.0
) -> Iterator[tuple[Key, Deviation]]:
    """`scale`: what the found numbers are multiplied by first."""
    one, other = (TorchDistSource(folder, read_manifest(folder)) for folder in (expected, found))
    by_norm, by_element = {"exp_avg": (GRADIENTS, GRADIENT_ELEMENTS), "main": (WEIGHTS, WEIGHT_ELEMENTS)}[kind]
    for place in places(one.shape):
        name = place.entry.key(one.implementation)
        if place.layer is not None:
            name = name.replace("layers.", f"layers.{place.layer}.", 1)
        norm, element = _of_parameter(one, other, kind, place, name, scale)
        yield Key(by_norm, step, name), norm
        yield Key(by_element, step, name), element


def _of_parameter(
    one: TorchDistSource, other: TorchDistSource, kind: Kind, place: Place, name: str, scale: float
) -> tuple[Deviation, Deviation]:
    rows, columns = place.entry.size(one.shape)
    squares = expected_squares = largest = expected_largest = 0.0
    where, height = name, max(1, _BLOCK_ELEMENTS // columns)
    for first in range(0, rows, height):
        last = min(rows, first + height)
        a, b = (
            to_float32(source.read(kind, place, first, last), source.dtypes[kind]).astype(np.float64)
            for source in (one, other)
        )
        difference = np.abs(scale * b - a)
        difference[~np.isfinite(difference)] = math.inf
        squares, expected_squares = squares + float((difference**2).sum()), expected_squares + float((a**2).sum())
        expected_largest = max(expected_largest, float(np.abs(a).max()))
        if (most := float(difference.max())) > largest:
            row, column = np.unravel_index(difference.argmax(), difference.shape)
            largest, where = most, f"{name} [{first + row}{f', {column}' if columns > 1 else ''}]"
    norms = math.sqrt(squares), math.sqrt(expected_squares)
    element = Deviation(_ratio(largest, expected_largest), where, expected_largest)
    return Deviation(_ratio(*norms), name, norms[1]), element


def _ratio(difference: float, size: float) -> float:
    if not math.isfinite(size):
        return math.inf
    return difference / size if size else math.inf if difference else 0.0
