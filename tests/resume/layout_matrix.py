"""What each of four ranks runs to save one state under many layouts and load each of them under every other."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as distributed
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica

from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.model.initialize import hash_mix
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoint import load_checkpoint
from k2_megatron.train.checkpoint_save import CheckpointWriter
from k2_megatron.train.checkpoint_state import model_state, optimizer_state, weight_fingerprint
from k2_megatron.train.optimizer import build_optimizer, wrap_model

STEP = "step_00000003"


def save_and_load_all(
    config_path: Path, layouts: dict[str, list[str]], source: Path, folder: Path
) -> dict[tuple[str, str], dict[str, int]]:
    """{(saved under, loaded under): {"weights" or an optimizer key: fingerprint}}; ("source", x) for the first load.

    Saves under folder / layout.
    """
    found = {}
    environment = read_environment()
    device = find_device(environment.local_rank)
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        for name, settings in layouts.items():
            with _built(config_path, settings, environment.world_size) as (config, groups, chunks, optimizer):
                manifest = load_checkpoint(source, config, groups, chunks, optimizer, device.torch)
                found["source", name] = state_fingerprints(chunks, optimizer)
                saver = CheckpointWriter(folder / name, groups, asynchronous=False)
                saver.save(manifest["step"], config, chunks, optimizer, device.torch, {})
                saver.wait()
        for name, settings in layouts.items():
            with _built(config_path, settings, environment.world_size) as (config, groups, chunks, optimizer):
                for saved in layouts:
                    load_checkpoint(folder / saved / STEP, config, groups, chunks, optimizer, device.torch)
                    found[saved, name] = state_fingerprints(chunks, optimizer)
        disconnect()
    return found


@contextmanager
def _built(config_path: Path, settings: list[str], world_size: int) -> Iterator[tuple]:
    config = load_config(config_path, settings, world_size=world_size)
    groups = build_groups(config.parallel)
    seed_everything(config.run.seed, groups)
    kernels = dict.fromkeys(OPS, "torch")
    chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
    yield config, groups, chunks, build_optimizer(config, chunks, kernels, groups.collection)
    distributed.barrier()
    parallel_state.destroy_model_parallel()


def state_fingerprints(chunks, optimizer) -> dict[str, int]:
    """The fingerprint of the weights, and of each kind of optimizer state, over all ranks."""
    kinds = ("exp_avg.", "exp_avg_sq.", "param.")
    totals = torch.zeros(len(kinds), dtype=torch.int64)
    tensors, _ = optimizer_state(optimizer, model_state(chunks), loading=False)
    for value in nested_values(tensors):
        for shard in nested_values(value.build()) if isinstance(value, ShardedTensorFactory) else [value]:
            if isinstance(shard, ShardedTensor) and is_main_replica(shard.replica_id):
                (kind,) = [kind for kind in kinds if shard.key.startswith(f"optimizer.state.{kind}")]
                totals[kinds.index(kind)] += hash_mix(shard)
    distributed.all_reduce(totals)
    weights = int(weight_fingerprint(chunks, torch.device("cpu")), 16)
    return {"weights": weights, **dict(zip(kinds, totals.tolist(), strict=True))}
