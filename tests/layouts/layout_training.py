"""What each rank of a layout test runs: a few steps in the configured layout, and what they left behind."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS, choose_backend
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoint_save import CheckpointWriter
from k2_megatron.train.checkpoint_state import weight_fingerprint
from k2_megatron.train.layer_norms import ActivationSquares, LayerNorms
from k2_megatron.train.optimizer import build_optimizer, set_learning_rate, wrap_model
from k2_megatron.train.run_data import open_run_data
from k2_megatron.train.schedule import learning_rate_at
from k2_megatron.train.step import evaluate, train_step


@dataclass(frozen=True)
class Training:
    """`losses`, `grad_norms`, `sample_losses` and `layers` by step; fingerprints of the weights before the first step
    and after the last."""

    initial_weights: str
    losses: list[float]
    grad_norms: list[float]
    sample_losses: list[tuple[float, ...]]
    layers: list[LayerNorms]
    final_weights: str
    held_out_loss: float


def train_layout(
    config_path: Path, settings: list[str], checkpoints: Path, fault: Callable[[], None] | None
) -> Training:
    """Train the configured steps; save after the first, when each moment is still a multiple of the gradient."""
    if fault is not None:
        fault()
    environment = read_environment()
    config = load_config(config_path, settings, world_size=environment.world_size)
    device = find_device(environment.local_rank)
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        groups = build_groups(config.parallel)
        seed_everything(config.run.seed, groups)
        data = open_run_data(config)
        kernels = {op: choose_backend(op, config.model.kernels.backend(op), device.type).backend for op in OPS}
        chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        initial_weights = weight_fingerprint(chunks, device.torch)
        activations = ActivationSquares(groups, chunks, config.model.layers, kernels["adamw"], device.torch)
        results = []
        for step in range(config.train.steps):
            set_learning_rate(optimizer, learning_rate_at(config, step), config.optimizer.weight_decay)
            results.append(train_step(config, groups, chunks, optimizer, data.train, step, device.torch, activations))
            if step == 0:
                saver = CheckpointWriter(checkpoints, groups, asynchronous=False)
                saver.save(1, config, chunks, optimizer, device.torch, data.position())
                saver.wait()
        training = Training(
            initial_weights,
            [result.loss for result in results],
            [result.grad_norm for result in results],
            [result.sample_losses for result in results],
            [result.layers for result in results],
            weight_fingerprint(chunks, device.torch),
            evaluate(config, groups, chunks, data.held_out, device.torch),
        )
        disconnect()
    return training
