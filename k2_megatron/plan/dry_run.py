"""Build every distinct rank of a layout in this one process, without its memory or its machines.

In: a Config. Out: one `RankGroup` for each set of ranks that hold the same parameters, with the bytes that they need.
Fake process groups (torch's "fake" backend answers for a world of any size) and fake tensors (shapes without storage)
let megatron-core build the real model: K2-65B at 480 ranks takes seconds and a few hundred MB. The counts are compared
with the formulas of this folder, so that neither can drift.

All (tensor, pipeline) places are built; data-parallel and context-parallel ranks are copies of these. Gradient buffers
come from megatron-core's DistributedDataParallel, padding included; the optimizer's state does not exist before the
first step, so it is counted from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from k2_megatron.config import Config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model.build import build_model
from k2_megatron.plan.memory import ADAM_BYTES, MAIN_WEIGHT_BYTES
from k2_megatron.plan.parameters import rank_parameters
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.groups import Groups, build_groups, disconnect
from k2_megatron.train.gradient_tree import TreeSummedGradients
from k2_megatron.train.optimizer import wrap_model

GIB = 2**30


@dataclass(frozen=True)
class RankGroup:
    """Ranks whose models have the same parameters; `first_rank` is the one that was measured. Sizes are a rank's."""

    first_rank: int
    ranks: int
    stages: tuple[int, ...]
    parameters: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int

    @property
    def model_state_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes


def dry_run(config: Config) -> list[RankGroup]:
    """Build the model of every (tensor, pipeline) place and group the ranks by what they hold, first stage first.

    Uses up this process: afterwards the CPU stands in for CUDA in it. ValueError where it already is part of a run.
    """
    if distributed.is_initialized():
        raise ValueError("a dry run needs a process of its own, and this one is already connected to other ranks")
    places: dict[tuple, list[tuple[int, int]]] = {}
    for stage in range(config.parallel.pipeline):
        for tensor_rank in range(config.parallel.tensor):
            with _fake_rank(config, tensor_rank, stage) as groups:
                chunks = _build(config, groups)
                built = sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
                counted = rank_parameters(config, stage).total
                assert built == counted, (
                    f"{groups.name} was built with {built:,} parameters; the formula says {counted:,}"
                )
                places.setdefault(_signature(chunks), []).append((tensor_rank, stage))
    copies = config.parallel.data * config.parallel.context
    return [_measure(config, same, len(same) * copies) for same in places.values()]


def dry_run_text(config: Config) -> str:
    """What `pretrain_k2.py --dry-run` prints: parameters and bytes a rank, and how many ranks are like it."""
    groups = dry_run(config)
    kinds = ("weights", "gradients", "optimizer", "total")
    head = f"{'first rank':>10}{'ranks':>7}  {'stages':<12}{'parameters':>16}"
    lines = [
        f"built {config.world_size} ranks, {len(groups)} different; GiB a rank",
        head + "".join(f"{k:>12}" for k in kinds),
    ]
    for group in groups:
        sizes = (group.weight_bytes, group.gradient_bytes, group.optimizer_bytes, group.model_state_bytes)
        cells = "".join(f"{size / GIB:>12.3f}" for size in sizes)
        stages = ", ".join(map(str, group.stages))
        lines.append(f"{group.first_rank:>10}{group.ranks:>7}  {stages:<12}{group.parameters:>16,}{cells}")
    return "\n".join(lines)


def _measure(config: Config, places: list[tuple[int, int]], ranks: int) -> RankGroup:
    """Sizes of the first of several like places, from the buffers that megatron-core makes for it."""
    with _fake_rank(config, *places[0]) as groups:
        # The weights are in their precision already, so Float16Module would change nothing; torch cannot convert
        # modules of fake tensors, hence the request for float32 here, which leaves it out.
        plain = config.model_copy(update={"train": config.train.model_copy(update={"precision": "float32"})})
        wrapped = wrap_model(plain, _build(config, groups), groups.collection)
        parameters = [parameter for chunk in wrapped for parameter in chunk.parameters()]
        gradients = [buffer.grad_data for chunk in wrapped for buffer in chunk.buffers]
        sharers = config.parallel.data * config.parallel.context if config.parallel.distributed_optimizer else 1
        state_bytes = MAIN_WEIGHT_BYTES[config.train.precision] + ADAM_BYTES
        return RankGroup(
            first_rank=groups.rank,
            ranks=ranks,
            stages=tuple(sorted({stage for _, stage in places})),
            parameters=sum(parameter.numel() for parameter in parameters),
            weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
            gradient_bytes=sum(gradient.numel() * gradient.element_size() for gradient in gradients)
            + sum(chunk.waiting_bytes for chunk in wrapped if isinstance(chunk, TreeSummedGradients)),
            optimizer_bytes=sum(gradient.numel() for gradient in gradients) * state_bytes // sharers,
        )


@contextmanager
def _fake_rank(config: Config, tensor_rank: int, stage: int) -> Iterator[Groups]:
    """Be the rank at this place, its data and context rank 0, in a world that answers without being there."""
    # tensor ranks are adjacent and stages outermost, as build_groups lays them out
    rank = tensor_rank + stage * (config.world_size // config.parallel.pipeline)
    distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=config.world_size)
    try:
        with cpu_stands_in_for_cuda("cpu"), FakeTensorMode(allow_non_fake_inputs=True):
            groups = build_groups(config.parallel)
            assert (groups.tensor_rank, groups.pipeline_rank) == (tensor_rank, stage), f"{groups.name} is elsewhere"
            yield groups
    finally:
        disconnect()


def _build(config: Config, groups: Groups) -> list[torch.nn.Module]:
    return build_model(config, dict.fromkeys(OPS, "torch"), groups.collection, initialize=False)


def _signature(chunks: list[torch.nn.Module]) -> tuple:
    """Names, shapes and types of all parameters: equal when two ranks hold the same sort of thing."""
    return tuple(
        (index, name, tuple(parameter.shape), parameter.dtype)
        for index, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    )
