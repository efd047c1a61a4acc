"""The gradients that a replica brings, before the sum over replicas: in a step that is computed again they are measured
and compared, because after the sum none can tell whose a wrong one was.

In:  what finishes the gradients of a step, in which megatron-core sums them; the groups. Out: an `Apart`, the same on
every rank, or None when all replicas bring about the same. Ordinary steps do not come here.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as distributed

from k2_megatron.runtime.groups import Groups
from k2_megatron.train.checkpoint_state import named_parameters

NAMED = 4  # parameters of a rank that are named; usually it is one, or all


@dataclass(frozen=True)
class Apart:
    """`ranks`: {rank in words: its parameters whose gradient is far larger than in the other replicas, the furthest
    first}; `in_part`: most gradients of these ranks are like the others', which rows of data cannot do; `finite`: those
    that are named are numbers."""

    ranks: dict[str, list[str]]
    in_part: bool
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


def find_apart(sizes: dict[str, float], groups: Groups, factor: float) -> Apart | None:
    """Compare each rank's gradients with the median of the ranks that hold the same parameters for other rows; those
    `factor` times as large, or not finite, stand apart."""
    everywhere: list = [None] * groups.world_size
    distributed.all_gather_object(everywhere, ((groups.tensor_rank, groups.pipeline_rank), groups.name, sizes))
    return apart_among(everywhere, factor)


def apart_among(everywhere: Sequence[tuple[tuple[int, int], str, dict[str, float]]], factor: float) -> Apart | None:
    """The same of (the place in the model, its name, its gradients' sizes) of each rank."""
    replicas: dict[tuple[int, int], dict[str, dict[str, float]]] = defaultdict(dict)
    for place, name, own in everywhere:
        replicas[place][name] = own
    ranks, in_part, finite = {}, True, True
    for alike in replicas.values():
        for name, own in alike.items():
            others = [sizes for other, sizes in alike.items() if other != name]
            times = {parameter: _times(size, [one[parameter] for one in others]) for parameter, size in own.items()}
            far = sorted((parameter for parameter in own if times[parameter] >= factor), key=lambda one: -times[one])
            if far:
                ranks[name] = far[:NAMED]
                in_part = in_part and median(times.values()) < math.sqrt(factor)
                finite = finite and all(math.isfinite(own[parameter]) for parameter in far)
    return Apart(ranks, in_part, finite) if ranks else None


def _times(size: float, others: Sequence[float]) -> float:
    """How many times the median of the others a size is; 1 where there is nothing to compare it with."""
    sound = [other for other in others if math.isfinite(other)]
    if not sound or size == 0.0:
        return 1.0
    usual = median(sound)
    return size / usual if usual and math.isfinite(size) else math.inf
