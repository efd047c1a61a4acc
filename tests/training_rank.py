"""A rank with model and optimizer, built as pretrain_k2.py builds them, for tests that call its parts themselves."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from k2_megatron.config import Config, load_config
from k2_megatron.kernels.dispatch import OPS, choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import Device, find_device
from k2_megatron.runtime.groups import build_groups, connect, disconnect
from k2_megatron.runtime.launch import read_environment, single_rank
from k2_megatron.runtime.seeds import seed_everything
from k2_megatron.train.optimizer import build_optimizer, wrap_model
from k2_megatron.train.parts import Parts

TORCH_KERNELS = dict.fromkeys(OPS, "torch")


class TrainingRank(NamedTuple):
    """What the parts of a run are given."""

    config: Config
    device: Device
    kernels: Mapping[str, str]
    parts: Parts


@contextmanager
def training_rank(
    config_path: Path, settings: Sequence[str], kernels: Mapping[str, str] | None = None
) -> Iterator[TrainingRank]:
    """The rank that the environment tells of, or one alone; `kernels`: other backends than the configuration's."""
    environment = read_environment()
    config = load_config(config_path, settings, world_size=environment.world_size if environment else None)
    environment = environment or single_rank()
    device = find_device(environment.local_rank)
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        groups = build_groups(config.parallel)
        seed_everything(config.run.seed, groups)
        if kernels is None:
            kernels = choose_backends(config.model.kernels, device.type)
        chunks = wrap_model(config, build_model(config, kernels, groups.collection), groups.collection)
        optimizer = build_optimizer(config, chunks, kernels, groups.collection)
        yield TrainingRank(config, device, kernels, Parts(groups, chunks, optimizer, device.torch))
        disconnect()
