"""Ranks that hold the same hold the same bits: compared, so that a bit which flipped in one does not pass unseen.

In:  what a rank trains with. Out: None, or a `Difference`, the same on every rank.

Data-parallel replicas hold everything alike; tensor-parallel ranks the weights that they do not share out, the norms'.
Each tensor is reduced to the wrapping int64 sum of its bits seen as integers: one read of it, and a flipped bit always
changes the sum. The sums are gathered over the ranks that hold copies; with three or more the majority says which
rank is wrong. A sharded optimizer has no replicas of its state, and each update writes the weights of every replica
anew: there a flip lives no longer than a step, and only comparing in that step finds it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.mistakes import StopRun
from k2_megatron.train.model_chunks import named_parameters
from k2_megatron.train.parts import Parts

NAMED = 4  # tensors named a rank
_INTEGERS = {2: torch.int16, 4: torch.int32}  # by bytes an element


@dataclass(frozen=True)
class Difference:
    """`ranks`: {rank in words: its first tensors that differ}; `told_apart` is False when no majority says which of
    the ranks are wrong, and all that differ are named."""

    ranks: dict[str, list[str]]
    told_apart: bool

    def __str__(self) -> str:
        named = "; ".join(f"{rank} in {', '.join(tensors)}" for rank, tensors in self.ranks.items())
        return named if self.told_apart else f"{named} (which of them is right cannot be told)"


@dataclass(frozen=True)
class Replicated:
    """A tensor that other ranks hold as well: data-parallel ones, and with `everywhere` tensor-parallel ones too."""

    name: str
    tensor: torch.Tensor
    everywhere: bool


def compare_replicas(parts: Parts) -> Difference | None:
    """Compare weights, and main parameters and moments where they are not sharded, to the bit; None when all agree."""
    collection, replicated = parts.groups.collection, list(replicated_tensors(parts))
    if collection.tp_dp_cp.size() == 1:
        return None
    sums = torch.stack([_sum_of_bits(one.tensor) for one in replicated])
    everywhere = torch.tensor([one.everywhere for one in replicated], device=sums.device)
    wrong, told_apart = torch.zeros_like(everywhere), True
    for group, held in ((collection.dp_cp, ~everywhere), (collection.tp_dp_cp, everywhere)):
        if group.size() > 1:
            wrong[held], told = _unlike(sums[held], group)
            told_apart = told_apart and told
    found = wrong.any().to(torch.int32).reshape(1)
    distributed.all_reduce(found, op=distributed.ReduceOp.MAX)
    if not found.item():
        return None
    names = [one.name for one, differs in zip(replicated, wrong.tolist(), strict=True) if differs]
    by_rank: list = [None] * parts.groups.world_size
    distributed.all_gather_object(by_rank, (parts.groups.name, names[:NAMED], told_apart))
    return Difference(
        ranks={rank: tensors for rank, tensors, _ in by_rank if tensors},
        told_apart=all(told for _, _, told in by_rank),
    )


def _unlike(mine: torch.Tensor, group: distributed.ProcessGroup) -> tuple[torch.Tensor, bool]:
    """(which of this rank's sums [tensors] are wrong, whether a majority says so) among the copies of a group; without
    one, which of them differ."""
    gathered = [torch.empty_like(mine) for _ in range(group.size())]
    distributed.all_gather(gathered, mine, group=group)
    copies = torch.stack(gathered)  # [ranks, tensors]
    majority, told_apart = majority_of(copies)
    return (mine != majority if told_apart else (copies != copies[0]).any(dim=0)), told_apart


def stop_when_different(difference: Difference | None, step: int, saved_step: int, journal: Journal) -> None:
    """StopRun, after an incident in the journal, when there is a difference: what goes on from it is not the run."""
    if difference is None:
        return
    journal.write(
        "incident",
        kind="replicas differ",
        step=step,
        ranks=difference.ranks,
        told_apart=difference.told_apart,
        saved_step=saved_step,
    )
    raise StopRun(
        f"step {step}: replicas differ, which no computation of ours does: {difference}. Nothing of this "
        "was saved. Exclude the host of the rank that is wrong, and start again"
    )


def majority_of(sums: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(the values [tensors] that more than half of the replicas hold, whether there is one for every tensor), of
    sums [replicas, tensors]."""
    majority, _ = sums.median(dim=0)  # what more than half hold is also the middle one
    holders = (sums == majority).sum(dim=0)
    return majority, bool((2 * holders > len(sums)).all())


def replicated_tensors(parts: Parts) -> Iterator[Replicated]:
    """All that other ranks hold as well, in the same order on each."""
    weights: dict[torch.Tensor, Replicated] = {}  # by main parameter
    told: set[torch.Tensor] = set()
    for name, parameter in named_parameters(parts.chunks):
        weight = Replicated(name, parameter.detach(), not getattr(parameter, "tensor_model_parallel", False))
        weights[getattr(parameter, "main_param", parameter)] = weight
        told.add(parameter)
        yield weight
    for part in parts.optimizer.chained_optimizers:
        if part.is_stub_optimizer or isinstance(part, DistributedOptimizer):
            continue
        for group in part.optimizer.param_groups:
            for main in group["params"]:
                weight = weights[main]
                if main not in told:  # a float32 parameter is its own main parameter
                    yield Replicated(f"main parameter of {weight.name}", main.detach(), weight.everywhere)
                for moment, value in sorted(part.optimizer.state[main].items()):
                    yield Replicated(f"{moment} of {weight.name}", value, weight.everywhere)


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Wrapping int64 sum of a contiguous tensor's bits, in words of 64: on a CPU 20 times as fast as by elements."""
    flat, in_a_word = tensor.view(-1), 8 // tensor.element_size()
    if flat.storage_offset() % in_a_word:  # a word must begin at a multiple of its size, and with the first element
        flat = flat.clone()
    words = len(flat) // in_a_word * in_a_word
    total = flat[:words].view(torch.int64).sum()
    return total + flat[words:].view(_INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
