"""What a checkpoint holds: weights, Adam moments and main parameters by global name, generators by rank.

Only tensors are stored, each under its parameter's global name, so that any layout loads any other; learning rate,
batch and data position are functions of the step and of the configuration, which stand in the manifest.

megatron-core's three optimizers name the fp32 main parameters differently and wrap the state differently; here they
meet in one naming: `optimizer.state.{exp_avg, exp_avg_sq, param}.<parameter>`, "param" for bfloat16 runs alone (in a
float32 run the parameter is its own main parameter).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as distributed
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_inplace,
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

from k2_megatron.model.initialize import hash_mix
from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.seeds import random_states

# "Fully reshardable": moments are stored by parameter, not as slices of flat buffers.
_OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
    "chained_optim_avoid_prefix": True,
}
_MAIN = "optimizer.state.param."
_MAIN_FLOAT16 = "optimizer.state.fp32_param."


def model_state(chunks: Sequence) -> dict:
    """The sharded weights, one entry a chunk, keyed as megatron-core's optimizer expects several chunks."""
    if len(chunks) == 1:
        return {"model": chunks[0].sharded_state_dict()}
    return {f"model{index}": chunk.sharded_state_dict() for index, chunk in enumerate(chunks)}


def optimizer_state(optimizer: MegatronOptimizer, model: dict, *, loading: bool, float32: bool) -> tuple[dict, dict]:
    """(sharded tensors to store or load, the local rest that `load_state_dict` wants beside them)."""
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=_OPTIMIZER_FORMAT)
    sharded, local = extract_matching_values(state, lambda value: isinstance(value, ShardedBase))

    def rename(value):
        key = value.key.replace(_MAIN_FLOAT16, _MAIN)
        if float32 and key.startswith(_MAIN):
            key = key.removeprefix(_MAIN)  # the parameter itself: stored once, under its own name
        return value if key == value.key else replace(value, key=key)

    if float32 and not loading:
        sharded, _main = extract_matching_values(sharded, lambda value: not value.key.startswith(_MAIN))
    dict_list_map_inplace(rename, sharded)
    return sharded, local


def restore_optimizer(optimizer: MegatronOptimizer, loaded: dict, local: dict, step: int) -> None:
    """Hand loaded tensors and local settings back to the optimizer; its step count is the run's."""
    state = merge(loaded, local)

    def unwrap(value):
        return value.unwrap() if isinstance(value, LocalNonpersistentObject) else value

    dict_list_map_inplace(unwrap, state)
    groups = state["optimizer"]["param_groups"] if "optimizer" in state else state["param_groups"]
    for group in groups:
        group["step"] = step
    optimizer.load_state_dict(state)


def random_state(groups: Groups, layout: str) -> dict:
    """This rank's generators. The layout stands in the key: another layout has other ranks and seeds anew."""
    return {
        "random": ShardedObject(f"random_states.{layout}", random_states(), (groups.world_size,), (groups.rank,), 0)
    }


def weight_fingerprint(chunks: Sequence, device: torch.device) -> str:
    """A 64-bit sum over all weights of mix(name, global index, bits): equal in every layout, on every rank.

    Wrapping addition commutes, so neither the cut nor the order matters; a flipped bit or two exchanged values change
    it. Replicated weights count once.
    """
    total = torch.zeros((), dtype=torch.int64, device=device)
    for value in nested_values(model_state(chunks)):
        shards = nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]
        for shard in shards:
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
                total += hash_mix(shard)
    distributed.all_reduce(total)  # int64 SUM wraps
    return f"{int(total) & (1 << 64) - 1:016x}"
