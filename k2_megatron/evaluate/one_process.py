"""A trained checkpoint as one model in this process, whatever layout trained it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from k2_megatron.config import Config
from k2_megatron.config.schema import Kernels, Parallel
from k2_megatron.kernels.dispatch import choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import single_rank
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.checkpoints.load import find_checkpoint, load_weights
from k2_megatron.train.checkpoints.manifest import CheckpointError, read_manifest


@contextmanager
def loaded_model(run_folder: Path) -> Iterator[tuple[Config, int, torch.nn.Module]]:
    """(configuration, step, model in evaluation mode) of the newest sound checkpoint of a run.

    ValueError when the folder holds none, or its files are damaged.
    """
    device = find_device(local_rank=0)
    with cpu_stands_in_for_cuda(device.type):
        connect(single_rank(), device, timeout_seconds=60.0)
        try:
            groups = build_groups(Parallel())
            folder, doubts = find_checkpoint(run_folder / "checkpoints", groups, set_aside=False)
            if folder is None:
                raise CheckpointError(f"{run_folder / 'checkpoints'} holds no checkpoint; train first")
            for doubt in doubts:
                print(doubt)
            manifest = read_manifest(folder)
            trained = Config.model_validate(manifest["config"])
            config = trained.model_copy(update={"parallel": Parallel()})
            seed_everything(config.run.seed, groups)
            kernels = choose_backends(Kernels(), device.type)
            (model,) = build_model(config, kernels, groups.collection, initialize=False)
            load_weights(folder, [model], device.torch)
            model.eval()
            yield config, manifest["step"], model
        finally:
            disconnect()
