"""A loss or gradient that is not finite: the step is made again, and it is said where; a passed-over update is counted.

Nothing of such a step has been applied: weights, moments and rows are what they were, so that it can be computed again
at once. A machine's passing error then leaves no trace, and the run is to the bit what it would have been.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
import torch.distributed as distributed
from megatron.core.optimizer import MegatronOptimizer

from k2_megatron.data.feed import Feed
from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.seeds import random_states, restore_random_states
from k2_megatron.train.checkpoint_state import unwrapped
from k2_megatron.train.step import StepResult

NAMED = 4  # parameters of a rank, and samples, that are named; usually it is one, or all


def made_again(
    attempt: Callable[[], StepResult], reruns: int, tell: Callable[[StepResult], None]
) -> tuple[StepResult, float]:
    """(the result of `attempt`, the seconds it took); while that is not finite, of the same step made again, at most
    `reruns` times. Each result that is not kept is told of while its gradients are still there."""
    generators = random_states()
    began, result = time.monotonic(), attempt()
    for _ in range(reruns):
        if result.finite:
            break
        tell(result)
        restore_random_states(generators)
        began, result = time.monotonic(), attempt()
    return result, time.monotonic() - began


def where_not_finite(
    result: StepResult, first_sample: int, chunks: Sequence, groups: Groups, feed: Feed
) -> dict[str, dict]:
    """What an incident tells of the place, the same on every rank."""
    return {
        "ranks": ranks_not_finite(chunks, groups),
        "samples_not_finite": samples_not_finite(first_sample, result.sample_losses, feed),
    }


def in_words(told: Mapping[str, dict]) -> str:
    """The place in a line: "gradients of decoder.layers.1... on rank 3 (...); losses of samples: 17, 18"."""
    ranks = [f"{', '.join(parameters)} on {rank}" for rank, parameters in told["ranks"].items()]
    more = f" and {len(ranks) - NAMED} more ranks" if len(ranks) > NAMED else ""
    samples = ", ".join(map(str, told["samples_not_finite"])) or "none"
    return f"gradients of {'; '.join(ranks[:NAMED]) or 'none'}{more}; losses of samples: {samples}"


def ranks_not_finite(chunks: Sequence, groups: Groups) -> dict[str, list[str]]:
    """{rank in words: its first parameters whose gradient is not finite}, the same on every rank.

    Gradients are summed over data-parallel ranks before, so ranks that hold the same parameters are named together.
    """
    mine = [
        name
        for chunk in chunks
        for name, parameter in unwrapped(chunk).named_parameters()
        if not gradient_of(parameter).isfinite().all()
    ]
    everywhere: list = [None] * groups.world_size
    distributed.all_gather_object(everywhere, (groups.name, mine[:NAMED]))
    return {name: parameters for name, parameters in everywhere if parameters}


def samples_not_finite(first_sample: int, sample_losses: Sequence[float], feed: Feed) -> dict[int, list[dict]]:
    """{sample: its documents} of the first samples with a loss that is not finite; none when it is the gradient."""
    found = [sample for sample, loss in enumerate(sample_losses, start=first_sample) if not math.isfinite(loss)]
    return {sample: [asdict(span) for span in feed.describe(sample)] for sample in found[:NAMED]}


def gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    """The fp32 gradient that megatron-core's DistributedDataParallel accumulates beside the parameter."""
    return parameter.main_grad  # type: ignore[attr-defined]


def count_as_update(optimizer: MegatronOptimizer) -> None:
    """Count an update that was passed over: Adam's step number is a function of the run's step, as after a resume."""
    for group in optimizer.param_groups:
        group["step"] = group.get("step", 0) + 1
