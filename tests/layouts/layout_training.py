"""What each rank of a layout test runs: a few steps in the configured layout, and what they left behind."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training_rank import training_rank

from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.checkpoints.state import weight_fingerprint
from k2_megatron.train.layer_norms import ActivationSquares, LayerNorms
from k2_megatron.train.optimizer import set_learning_rate
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
    with training_rank(config_path, settings) as (config, _, kernels, parts):
        data = open_run_data(config)
        initial_weights = weight_fingerprint(parts.chunks, parts.device)
        activations = ActivationSquares(parts, config.model.layers, kernels["adamw"])
        results = []
        for step in range(config.train.steps):
            set_learning_rate(parts.optimizer, learning_rate_at(config, step), config.optimizer.weight_decay)
            results.append(train_step(config, parts, data.train, step, activations=activations))
            if step == 0:
                saver = CheckpointWriter(checkpoints, parts.groups, asynchronous=False)
                saver.save(1, config, parts, data.position())
                saver.wait()
        training = Training(
            initial_weights,
            [result.loss for result in results],
            [result.grad_norm for result in results],
            [result.sample_losses for result in results],
            [result.layers for result in results],
            weight_fingerprint(parts.chunks, parts.device),
            evaluate(config, parts, data.held_out),
        )
    return training
