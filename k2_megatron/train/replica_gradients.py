"""The gradients that a replica brings, before the sum over replicas: in a step that is computed again they are measured
and compared, because after the sum none can tell whose a wrong one was.

In:  what finishes the gradients of a step, in which megatron-core sums them; the groups. Out: an `Apart`, the same on
every rank, or None when all replicas bring about the same. Ordinary steps do not come here.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import torch
import torch.distributed as distributed

from k2_megatron.runtime.groups import Groups
from k2_megatron.train.model_chunks import named_parameters

NAMED = 4  # parameters of a rank that are named; usually it is one, or all


@dataclass(frozen=True)
class Apart:
    """`ranks`: {rank in words: its parameters whose gradient is far larger than in the other replicas, the furthest
    first}; where some are not finite these alone, and `finite` is False. `layer`: the decoder layer, counted from 0, in
    which all of them lie, of one rank alone; `others_norm`: the global norm without that layer's gradient. Rows of data
    enlarge the layers below as well, and the embedding."""

    ranks: dict[str, list[str]]
    layer: int | None = None
    others_norm: float = math.inf
    finite: bool = True


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 gradient that megatron-core's DistributedDataParallel accumulates beside the parameter."""
    return parameter.main_grad  # type: ignore[attr-defined]


def gradient_sizes(chunks: Sequence) -> dict[str, float]:
    """{parameter: L2 norm of its gradient} of this rank."""
    return {
        name: torch.linalg.vector_norm(gradient_of(parameter), dtype=torch.float64).item()
        for name, parameter in named_parameters(chunks)
    }


class OwnGradients:
    """Measures this rank's gradients just before `finalize` sums them with those of others."""

    def __init__(self, finalize: Callable) -> None:
        self._finalize = finalize
        self.sizes: dict[str, float] = {}

    def __call__(self, chunks: Sequence, *arguments, **keywords) -> None:
        self.sizes = gradient_sizes(chunks)
        self._finalize(chunks, *arguments, **keywords)


def find_apart(sizes: dict[str, float], groups: Groups, factor: float, squares: torch.Tensor) -> Apart | None:
    """Compare each rank's gradients with the median of the ranks that hold the same parameters for other rows; those
    `factor` times as large, or not finite, stand apart. `squares` [layers + 2]: of the gradient after the sum, by layer
    (optimizer.gradient_squares)."""
    everywhere: list = [None] * groups.world_size
    place = (groups.tensor_rank, groups.pipeline_rank, groups.context_rank)
    distributed.all_gather_object(everywhere, (place, groups.name, sizes))
    apart = apart_among(everywhere, factor)
    if apart is None or apart.layer is None:
        return apart
    others = squares.clone()
    others[apart.layer] = 0.0  # not taken from the sum, in which they may be lost
    return replace(apart, others_norm=others.sum().sqrt().item())


def apart_among(everywhere: Sequence[tuple[tuple, str, dict[str, float]]], factor: float) -> Apart | None:
    """The same of (the place in the model, its name, its gradients' sizes) of each rank, without `others_norm`."""
    replicas: dict[tuple, dict[str, dict[str, float]]] = defaultdict(dict)
    for place, name, own in everywhere:
        replicas[place][name] = own
    far, lost = {}, {}
    for alike in replicas.values():
        for name, own in alike.items():
            others = [sizes for other, sizes in alike.items() if other != name]
            times = {parameter: _times(size, [one[parameter] for one in others]) for parameter, size in own.items()}
            found = sorted((one for one in own if times[one] >= factor), key=lambda one: -times[one])
            far.update({name: found} if found else {})
            not_finite = [parameter for parameter in found if not math.isfinite(own[parameter])]
            lost.update({name: not_finite} if not_finite else {})
    layers = {_layer_of(parameter) for parameters in far.values() for parameter in parameters}
    ranks = {name: parameters[:NAMED] for name, parameters in (lost or far).items()}
    layer = layers.pop() if len(layers) == 1 and len(far) == 1 else None
    return Apart(ranks, layer, finite=not lost) if ranks else None


def _layer_of(parameter: str) -> int | None:
    kind, _, rest = parameter.partition("decoder.layers.")
    return int(rest.split(".")[0]) if not kind and rest else None


def _times(size: float, others: Sequence[float]) -> float:
    """How many times the median of the others a size is; 1 where there is nothing to compare it with."""
    sound = [other for other in others if math.isfinite(other)]
    if not sound:
        return 1.0
    if not math.isfinite(size):
        return math.inf
    usual = median(sound)
    return size / usual if usual else 1.0
