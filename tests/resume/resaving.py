"""What each rank of a resharding test runs, and the faults that a resume must not survive unseen."""

from pathlib import Path

import k2_megatron.train.checkpoint as checkpoint
import k2_megatron.train.step as step
from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoint import load_checkpoint
from k2_megatron.train.checkpoint_save import CheckpointWriter
from k2_megatron.train.optimizer import build_optimizer, wrap_model


def load_and_save(config_path: Path, settings: list[str], source: Path, checkpoints: Path) -> None:
    """Load `source` in this layout and save it again under `checkpoints`, untrained."""
    environment = read_environment()
    config = load_config(config_path, settings, world_size=environment.world_size)
    device = find_device(environment.local_rank)
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        groups = build_groups(config.parallel)
        seed_everything(config.run.seed, groups)
        kernels = dict.fromkeys(OPS, "torch")
        chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        manifest = load_checkpoint(source, config, groups, chunks, optimizer, device.torch)
        saver = CheckpointWriter(checkpoints, groups, asynchronous=False)
        saver.save(manifest["step"], config, chunks, optimizer, device.torch, {})
        saver.wait()
        disconnect()


def optimizer_not_restored() -> None:
    """The run goes on with moments of zero."""
    checkpoint.restore_optimizer = lambda *_unused: None


def second_moment_not_restored() -> None:
    """One of the two moments is lost."""
    right = checkpoint.restore_optimizer

    def without(optimizer, *rest) -> None:
        right(optimizer, *rest)
        for part in optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                state["exp_avg_sq"].zero_()

    checkpoint.restore_optimizer = without


def optimizer_step_not_restored() -> None:
    """Adam's bias correction begins anew."""
    right = checkpoint.restore_optimizer
    checkpoint.restore_optimizer = lambda optimizer, loaded, local, _step: right(optimizer, loaded, local, 0)


def next_sample_is_the_first() -> None:
    """The data begins anew."""
    right = step.micro_batches

    def from_start(config, groups, feed, first_sample, *rest):
        return right(config, groups, feed, first_sample - config.consumed_samples_at(3), *rest)

    step.micro_batches = from_start
