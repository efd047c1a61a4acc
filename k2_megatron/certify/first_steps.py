"""The first steps of a run, and all that is told of them: what two layouts are compared by."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k2_megatron.config import Config
from k2_megatron.train.checkpoints.state import weight_fingerprint
from k2_megatron.train.layer_norms import ActivationSquares, LayerNorms
from k2_megatron.train.optimizer import set_learning_rate
from k2_megatron.train.parts import Parts
from k2_megatron.train.replicas import Difference, compare_replicas
from k2_megatron.train.run_data import RunData
from k2_megatron.train.schedule import learning_rate_at
from k2_megatron.train.step import evaluate, train_step


@dataclass(frozen=True)
class FirstSteps:
    """`losses`, `grad_norms`, `sample_losses` and `layers` by step, and `unlike_copies`: which ranks hold other weights
    or moments after it than those that should hold the same, "" where none does; fingerprints of the weights before the
    first step and after the last; `held_out_loss` after the last, None where the configuration evaluates nothing."""

    initial_weights: str
    losses: list[float]
    grad_norms: list[float]
    sample_losses: list[tuple[float, ...]]
    layers: list[LayerNorms]
    unlike_copies: list[str]
    final_weights: str
    held_out_loss: float | None


def train_first_steps(
    config: Config,
    parts: Parts,
    data: RunData,
    kernels: Mapping[str, str],
    steps: int,
    save: Callable[[int], None],
) -> FirstSteps:
    """Train `steps` steps; `save` is called after the first, when each first moment is still a multiple of the clipped
    gradient, whatever optimizer keeps it, and after the last. The result is the same on every rank."""
    initial_weights = weight_fingerprint(parts.chunks, parts.device)
    activations = ActivationSquares(parts, config.model.layers, kernels["adamw"])
    results, unlike_copies = [], []
    for step in range(steps):
        set_learning_rate(parts.optimizer, learning_rate_at(config, step), config.optimizer.weight_decay)
        results.append(train_step(config, parts, data.train, step, activations=activations))
        unlike_copies.append(_first_unlike(compare_replicas(parts)))
        if step in (0, steps - 1):
            save(step + 1)
    layers = [result.layers for result in results if result.layers is not None]
    return FirstSteps(
        initial_weights,
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.sample_losses for result in results],
        layers,
        unlike_copies,
        weight_fingerprint(parts.chunks, parts.device),
        evaluate(config, parts, data.held_out) if data.held_out is not None else None,
    )


def _first_unlike(difference: Difference | None) -> str:
    if difference is None:
        return ""
    (rank, tensors), *others = difference.ranks.items()
    return f"{tensors[0]} of {rank}" + (f" and {len(others)} more" if others else "")
