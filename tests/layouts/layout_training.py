"""What each rank of a layout test runs: a few steps in the configured layout, and what they left behind."""

from collections.abc import Callable
from pathlib import Path

from training_rank import training_rank

from k2_megatron.certify.first_steps import FirstSteps, train_first_steps
from k2_megatron.train.checkpoints.save import CheckpointWriter
from k2_megatron.train.run_data import open_run_data


def train_layout(
    config_path: Path, settings: list[str], checkpoints: Path, fault: Callable[[], None] | None
) -> FirstSteps:
    """Train the configured steps; save after the first, when each moment is still a multiple of the gradient."""
    if fault is not None:
        fault()
    with training_rank(config_path, settings) as (config, _, kernels, parts):
        data = open_run_data(config)
        saver = CheckpointWriter(checkpoints, parts.groups, asynchronous=False)

        def save(step: int) -> None:
            if step == 1:
                saver.save(step, config, parts, data.position())
                saver.wait()

        return train_first_steps(config, parts, data, kernels, config.train.steps, save)
