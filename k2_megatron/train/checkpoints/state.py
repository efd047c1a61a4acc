"""What a checkpoint holds: weights, Adam moments and main parameters by global name, generators by rank.

Only tensors are stored, each under its parameter's global name, so that any layout loads any other; learning rate,
batch and data position are functions of the step and of the configuration, which stand in the manifest.

megatron-core's three optimizers name the fp32 main parameters differently and wrap the state differently; here they
meet in one naming: `optimizer.state.{exp_avg, exp_avg_sq, param}.<parameter>`. In a float32 run a parameter is its own
main parameter and "param" repeats it, so that a run can go on with or without the distributed optimizer.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
import torch.distributed as distributed
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from k2_megatron.config import Config
from k2_megatron.model.initialize import hash_mix
from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.seeds import random_states
from k2_megatron.train.checkpoints.optimizer_boxes import STATE, built, optimizer_boxes
from k2_megatron.train.model_chunks import unwrapped

_MAIN = f"{STATE}param."
_MAIN_FLOAT16 = f"{STATE}fp32_param."


def model_state(chunks: Sequence) -> dict:
    """The sharded weights, one entry a chunk, keyed as megatron-core's optimizer expects several chunks."""
    if len(chunks) == 1:
        return {"model": unwrapped(chunks[0]).sharded_state_dict()}
    return {f"model{index}": unwrapped(chunk).sharded_state_dict() for index, chunk in enumerate(chunks)}


def optimizer_state(optimizer: MegatronOptimizer, model: dict, *, loading: bool) -> tuple[dict, dict]:
    """(sharded tensors to store or load, the local rest that `load_state_dict` wants beside them)."""
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            # Moments of zeros where no update has made them: the first steps may have been passed over.
            part.init_state_fn(part.optimizer, part.config)
    shared = [part for part in optimizer.chained_optimizers if isinstance(part, DistributedOptimizer)]
    if shared:
        return _distributed_state(optimizer, shared, model)
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata={"chained_optim_avoid_prefix": True})
    sharded, local = extract_matching_values(state, lambda value: isinstance(value, ShardedBase))
    dict_list_map_inplace(_with_common_name, sharded)
    if not loading and not any(value.key.startswith(_MAIN) for value in nested_values(sharded)):
        weights, _ = extract_matching_values(
            model, lambda value: isinstance(value, ShardedTensor | ShardedTensorFactory)
        )
        sharded["main"] = dict_list_map_outplace(lambda value: replace(value, key=_MAIN + value.key), weights)
    return sharded, local


def _distributed_state(
    optimizer: MegatronOptimizer, parts: Sequence[DistributedOptimizer], model: dict
) -> tuple[dict, dict]:
    held = (shard for part in parts if not part.is_stub_optimizer for shard in optimizer_boxes(part, model))
    return {"boxes": {str(number): shard for number, shard in enumerate(held)}}, optimizer.state_dict()


def _with_common_name(value: ShardedBase) -> ShardedBase:
    return replace(value, key=value.key.replace(_MAIN_FLOAT16, _MAIN)) if _MAIN_FLOAT16 in value.key else value


def restore_optimizer(optimizer: MegatronOptimizer, loaded: dict, local: dict, step: int) -> None:
    """Hand loaded tensors and local settings back to the optimizer; its step count is the run's.

    The distributed optimizer's tensors were loaded in place.
    """
    loaded.pop("boxes", None)
    state = merge(loaded, local)

    def unwrap(value):
        return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value

    dict_list_map_inplace(unwrap, state)
    groups = state["optimizer"]["param_groups"] if "optimizer" in state else state["param_groups"]
    for group in groups:
        group["step"] = step
    optimizer.load_state_dict(state)


def part_bytes(chunks: Sequence, groups: Groups) -> int:
    """The bytes of this rank's part of the state, somewhat more rather than less: weights, and main parameters and both
    moments in float32, shared by data- and context-parallel ranks."""
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    largest = max((parameter.numel() for parameter in parameters), default=0)
    held = sum(parameter.numel() * (parameter.element_size() + 3 * 4) for parameter in parameters)
    return held // groups.collection.dp_cp.size() + 4 * largest


def layout_name(config: Config) -> str:
    """The layout in one word, such as tp2-pp2-vp1-cp1-dp4."""
    parallel = config.parallel
    return (
        f"tp{parallel.tensor}-pp{parallel.pipeline}-vp{parallel.virtual_pipeline}"
        f"-cp{parallel.context}-dp{parallel.data}"
    )


def random_state(groups: Groups, layout: str) -> dict:
    """This rank's generators. The layout stands in the key: another layout has other ranks and seeds anew."""
    return {
        "random": ShardedObject(f"random_states.{layout}", random_states(), (groups.world_size,), (groups.rank,), 0)
    }


def weight_fingerprint(chunks: Sequence, device: torch.device) -> str:
    """The fingerprint of the weights in memory; the first of replicas stands for all."""
    held = (shard for value in nested_values(model_state(chunks)) for shard in built(value))
    return fingerprint((shard for shard in held if is_main_replica(shard.replica_id)), device)


def fingerprint(weights: Iterable[ShardedBase], device: torch.device) -> str:
    """A 64-bit sum over all weights of mix(name, global index, bits): equal in every layout, on every rank.

    `weights` are this rank's: among all ranks each element once. Wrapping addition commutes, so neither the cut nor the
    order matters; a flipped bit or two exchanged values change it.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for shard in weights:
        if isinstance(shard, ShardedTensor):
            total += hash_mix(shard)
    distributed.all_reduce(total)  # int64 SUM wraps
    return f"{int(total) & (1 << 64) - 1:016x}"
