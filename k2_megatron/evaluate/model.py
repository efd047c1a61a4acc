"""This rank's part of a checkpoint's model, for evaluation: built once, filled from one checkpoint after another."""

from pathlib import Path

from megatron.core.transformer.module import Float16Module

from k2_megatron.config import Config
from k2_megatron.kernels.dispatch import choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.devices import Device
from k2_megatron.runtime.groups import Groups
from k2_megatron.train.checkpoints.load import load_weights, shared_problems
from k2_megatron.train.checkpoints.manifest import MANIFEST, CheckpointError, CheckpointVersionError
from k2_megatron.train.parts import ModelParts


class Damaged(CheckpointError):
    """A checkpoint whose files are not as they were written."""


class Removed(CheckpointError):
    """A checkpoint that is not there any more: retention of a run that goes on."""


def build_parts(config: Config, groups: Groups, device: Device) -> ModelParts:
    """The model in the layout of `config`, its weights undefined, wrapped for its precision as training wraps it."""
    kernels = choose_backends(config.model.kernels, device.type)
    chunks = build_model(config, kernels, groups.collection, initialize=False)
    if config.train.precision == "bfloat16":
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    return ModelParts(groups, chunks, device.torch)


def fill(folder: Path, parts: ModelParts) -> None:
    """Load the weights, and compare their fingerprint with the manifest's: so the files need not be hashed, six
    sevenths of which are the optimizer's.

    The same on every rank: Damaged names what is wrong with the files, Removed tells that they went meanwhile;
    CheckpointError when the files are sound and the weights are not what was saved.
    """
    try:
        load_weights(folder, parts.chunks, parts.device)
    except CheckpointVersionError:
        raise
    except (CheckpointError, OSError) as error:
        if not (folder / MANIFEST).is_file():
            raise Removed(f"{folder.name} was removed meanwhile") from None
        problems = shared_problems(folder, parts.groups)
        if not (folder / MANIFEST).is_file():
            raise Removed(f"{folder.name} was removed meanwhile") from None
        if problems:
            raise Damaged(f"{folder.name} is damaged ({'; '.join(problems)})") from None
        raise CheckpointError(str(error)) from None
