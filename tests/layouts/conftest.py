"""`train`: a function that trains the small run in a layout, each layout once a session."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from layout_training import train_layout
from rank_processes import results_of, run_ranks
from small_run import checkpoint_tensors, overrides

from k2_megatron.certify.first_steps import FirstSteps


@dataclass(frozen=True)
class Trained:
    """What rank 0 reports, whether all ranks report the same, and the (clipped) gradient of the first step by name."""

    training: FirstSteps
    ranks_agree: bool
    gradients: dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def train(small_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Trained]:
    """train(ranks, settings, fault=None) -> Trained."""
    known: dict[tuple, Trained] = {}

    def once(ranks: int, settings: dict[str, object], fault: Callable[[], None] | None = None) -> Trained:
        key = (ranks, tuple(sorted(settings.items())), fault)
        if key not in known:
            known[key] = _train(ranks, settings, fault, small_config, tmp_path_factory.mktemp("layout"))
        return known[key]

    return once


def _train(ranks: int, settings: dict, fault: Callable[[], None] | None, config: Path, folder: Path) -> Trained:
    arguments = (config, overrides(settings), folder / "checkpoints", fault)
    results = results_of(run_ranks(train_layout, ranks, arguments, folder))
    # The first moment after one step from zero is (1 - beta1) times the gradient, whatever optimizer kept it.
    moment, beta1 = "optimizer.state.exp_avg.", 0.9
    tensors = checkpoint_tensors(folder / "checkpoints" / "step_00000001")
    gradients = {
        name.removeprefix(moment): tensor / (1 - beta1) for name, tensor in tensors.items() if name.startswith(moment)
    }
    return Trained(results[0], all(result == results[0] for result in results), gradients)
