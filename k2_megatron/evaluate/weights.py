"""This rank's part of a checkpoint's model, for evaluation: built once, filled from one checkpoint after another."""

from datetime import timedelta
from pathlib import Path

import torch.distributed as distributed
from megatron.core.transformer.module import Float16Module

from k2_megatron.config import Config
from k2_megatron.kernels.dispatch import choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.devices import Device
from k2_megatron.runtime.groups import Groups
from k2_megatron.train.checkpoints.load import as_rank_0_sees, load_weights, shared_problems
from k2_megatron.train.checkpoints.manifest import MANIFEST, CheckpointError
from k2_megatron.train.parts import ModelParts

WAITING_SECONDS = 600.0  # for the other ranks, which a load leaves about together: it ends in collectives


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

    The same on every rank: Damaged names what is wrong with the files, Removed tells that they went meanwhile, by what
    rank 0 sees; CheckpointError when the files are sound and the weights are not what was saved.
    """
    problem = None
    try:
        load_weights(folder, parts.chunks, parts.device)
    except (CheckpointError, OSError) as error:
        problem = str(error)
    problems = _problems_of_all(folder, problem, parts.groups)
    if not problems:
        return
    _refuse_removed(folder, parts.groups)
    damage = shared_problems(folder, parts.groups)
    _refuse_removed(folder, parts.groups)
    if damage:
        raise Damaged(f"{folder.name} is damaged ({'; '.join(damage)})")
    raise CheckpointError(problems[0])


def _refuse_removed(folder: Path, groups: Groups) -> None:
    if not as_rank_0_sees(groups, (folder / MANIFEST).is_file):
        raise Removed(f"{folder.name} was removed meanwhile")


def _problems_of_all(folder: Path, problem: str | None, groups: Groups) -> list[str]:
    """What the ranks found wrong in loading. Told in the store: a rank that still loads may wait in a collective that
    the others have left, and another collective would be taken for that one."""
    store = distributed.distributed_c10d._get_default_store()
    keys = [f"loaded/{folder.name}/{rank}" for rank in range(groups.world_size)]
    store.set(keys[groups.rank], problem or "")
    try:
        store.wait(keys, timedelta(seconds=WAITING_SECONDS))
    except distributed.DistStoreError:
        raise CheckpointError(
            f"{problem or folder.name + ' was loaded'}; other ranks have told nothing of theirs for "
            f"{WAITING_SECONDS:.0f} s. Give the command again: what stands in the results is not computed again"
        ) from None
    return [text for text in (store.get(key).decode() for key in keys) if text]
