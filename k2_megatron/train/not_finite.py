"""A loss or gradient that is not finite: it is said where; a passed-over update is counted."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch.distributed as distributed
from megatron.core.optimizer import MegatronOptimizer

from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.runtime.journal import Journal, read_events
from k2_megatron.train.model_chunks import named_parameters
from k2_megatron.train.parts import Parts
from k2_megatron.train.replica_gradients import NAMED, gradient_of
from k2_megatron.train.step import StepResult


def where_not_finite(result: StepResult, first_sample: int, parts: Parts, feed: AnyFeed) -> dict[str, dict]:
    """What an incident tells of the place, the same on every rank; of a step that was made again, whose gradient it was
    before the sum over replicas."""
    apart = result.apart if result.apart and not result.apart.finite else None
    return {
        "ranks": apart.ranks if apart else ranks_not_finite(parts),
        "samples_not_finite": samples_not_finite(first_sample, result.sample_losses, feed),
    }


def in_words(ranks: Mapping[str, Sequence[str]], samples: Iterable[int] = ()) -> str:
    """The place in a line: "gradients of decoder.layers.1... on rank 3 (...); losses of samples: 17, 18"."""
    named = [f"{', '.join(parameters)} on {rank}" for rank, parameters in ranks.items()]
    more = f" and {len(named) - NAMED} more ranks" if len(named) > NAMED else ""
    losses = ", ".join(map(str, samples)) or "none"
    return f"gradients of {'; '.join(named[:NAMED]) or 'none'}{more}; losses of samples: {losses}"


def ranks_not_finite(parts: Parts) -> dict[str, list[str]]:
    """{rank in words: its first parameters whose gradient is not finite}, the same on every rank.

    Gradients are summed over data-parallel ranks before, so ranks that hold the same parameters are named together.
    """
    mine = [name for name, parameter in named_parameters(parts.chunks) if not gradient_of(parameter).isfinite().all()]
    everywhere: list = [None] * parts.groups.world_size
    distributed.all_gather_object(everywhere, (parts.groups.name, mine[:NAMED]))
    return {name: parameters for name, parameters in everywhere if parameters}


def samples_not_finite(first_sample: int, sample_losses: Sequence[float], feed: AnyFeed) -> dict[int, list[dict]]:
    """{sample: its documents} of the first samples with a loss that is not finite; none when it is the gradient."""
    found = [sample for sample, loss in enumerate(sample_losses, start=first_sample) if not math.isfinite(loss)]
    return {sample: [asdict(span) for span in feed.describe(sample)] for sample in found[:NAMED]}


def computed_in_vain(journal: Journal) -> tuple[int, int]:
    """(step, how often it was not finite) of the step that an earlier start ended at, (0, 0) if at none; the same on
    every rank."""
    told: list = [in_vain(journal.path) if journal.is_writer else None]
    distributed.broadcast_object_list(told)
    return told[0]


def in_vain(journal: Path) -> tuple[int, int]:
    """The same, by the journal. All of it is looked through: between two starts that ended at a step lie the steps that
    were made again, and an incident of many ranks is long."""
    step, times = 0, 0

    def is_wanted(line: str) -> bool:
        return '"not finite"' in line or (times > 0 and line.startswith('{"event": "step"'))

    for event in read_events(journal, is_wanted):
        if event["event"] == "incident" and event["kind"] == "not finite":
            step, times = event["step"], times + 1 if event["step"] == step else 1
        elif event["event"] == "step" and event["step"] >= step:
            step, times = 0, 0
    return step, times


def count_as_update(optimizer: MegatronOptimizer) -> None:
    """Count an update that was passed over: Adam's step number is a function of the run's step, as after a resume."""
    for group in optimizer.param_groups:
        group["step"] = group.get("step", 0) + 1
