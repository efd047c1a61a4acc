"""What each of four ranks runs to save one state under many layouts and load each of them under every other."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedTensor, is_main_replica
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from k2_megatron.config import Config, load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.model.initialize import hash_mix
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import Device, find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoints.load import load_checkpoint
from k2_megatron.train.checkpoints.manifest import read_manifest
from k2_megatron.train.checkpoints.optimizer_boxes import built
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.checkpoints.state import model_state, optimizer_state, weight_fingerprint
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts

STEP = "step_00000003"
GATHERED = {"dp4-sharded": "dp4-sharded-gathered"}  # what megatron-core saves itself under a layout


def gathered_state(optimizer, model: dict, *, loading: bool) -> tuple[dict, dict]:
    """What `optimizer_state` was until 2026-11: megatron-core gathers each parameter whole on each replica."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "distrib_optim_fully_reshardable_mem_efficient": False,
        "chained_optim_avoid_prefix": True,
    }
    state = optimizer.sharded_state_dict(model, is_loading=loading, metadata=metadata)
    return extract_matching_values(state, lambda value: isinstance(value, ShardedBase))


def save_and_load_all(
    config_path: Path, layouts: dict[str, list[str]], source: Path, folder: Path
) -> dict[tuple[str, str], dict[str, int]]:
    """{(saved under, loaded under): {"weights" or an optimizer key: fingerprint}}; ("source", x) for the first load.

    Saves under folder / layout, and as megatron-core does under the other name of `GATHERED`.
    """
    found, saves = {}, []
    environment = read_environment()
    device = find_device(environment.local_rank)
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        for name, settings in layouts.items():
            with _built(config_path, settings, environment.world_size, device) as (config, parts):
                manifest = read_manifest(source)
                load_checkpoint(source, manifest, config, parts)
                found["source", name] = state_fingerprints(parts)
                states = {name: optimizer_state}
                if name in GATHERED:
                    states[GATHERED[name]] = gathered_state
                for save, state in states.items():
                    saver = CheckpointWriter(folder / save, parts.groups, asynchronous=False)
                    with mock.patch("k2_megatron.train.checkpoints.save.optimizer_state", state):
                        saver.save(manifest["step"], config, parts, {})
                    saver.wait()
                    saves.append(save)
        for name, settings in layouts.items():
            with _built(config_path, settings, environment.world_size, device) as (config, parts):
                for saved in saves:
                    checkpoint = folder / saved / STEP
                    load_checkpoint(checkpoint, read_manifest(checkpoint), config, parts)
                    found[saved, name] = state_fingerprints(parts)
        disconnect()
    return found


@contextmanager
def _built(config_path: Path, settings: list[str], world_size: int, device: Device) -> Iterator[tuple[Config, Parts]]:
    config = load_config(config_path, settings, world_size=world_size)
    groups = build_groups(config.parallel)
    seed_everything(config.run.seed, groups)
    kernels = dict.fromkeys(OPS, "torch")
    chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
    optimizer = build_optimizer(config, chunks, kernels, groups.collection)
    yield config, Parts(groups, chunks, optimizer, device.torch)
    distributed.barrier()
    parallel_state.destroy_model_parallel()


def state_fingerprints(parts: Parts) -> dict[str, int]:
    """The fingerprint of the weights, and of each kind of optimizer state, over all ranks; a distributed optimizer's
    as megatron-core gathers it."""
    kinds = ("exp_avg.", "exp_avg_sq.", "param.")
    totals = torch.zeros(len(kinds), dtype=torch.int64)
    distributed_ = isinstance(parts.optimizer.chained_optimizers[0], DistributedOptimizer)
    state = gathered_state if distributed_ else optimizer_state
    tensors, _ = state(parts.optimizer, model_state(parts.chunks), loading=False)
    for value in nested_values(tensors):
        for shard in built(value):
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
                (kind,) = [kind for kind in kinds if shard.key.startswith(f"optimizer.state.{kind}")]
                totals[kinds.index(kind)] += hash_mix(shard)
    distributed.all_reduce(totals)
    weights = int(weight_fingerprint(parts.chunks, parts.device), 16)
    return {"weights": weights, **dict(zip(kinds, totals.tolist(), strict=True))}
