"""A loss or gradient that is not finite: where it is, and the count that keeps a passed-over update in its place."""

import math
from collections.abc import Sequence
from dataclasses import asdict

import torch
import torch.distributed as distributed
from megatron.core.optimizer import MegatronOptimizer

from k2_megatron.data.feed import Feed
from k2_megatron.runtime.groups import Groups
from k2_megatron.train.checkpoint_state import unwrapped

NAMED = 4  # parameters of a rank, and samples, that are named; usually it is one, or all


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
