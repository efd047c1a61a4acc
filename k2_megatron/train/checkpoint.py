"""Save and load a run in megatron-core's torch_dist format, exactly and atomically.

Save: every rank writes and hashes its own file in a folder aside; rank 0 seals it with the manifest and publishes it.
Load: the ranks share the work of checking every file's hash, load what their layout needs, and compare a fingerprint
of the loaded weights with the one taken when they were saved.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.optimizer import MegatronOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from k2_megatron.config import Config
from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.seeds import restore_random_states
from k2_megatron.train.checkpoint_files import (
    CheckpointError,
    HashingWriter,
    complete_checkpoints,
    latest_checkpoint,
    publish,
    read_manifest,
    set_damaged_aside,
    start_writing,
    verify_files,
)
from k2_megatron.train.checkpoint_state import (
    model_state,
    optimizer_state,
    random_state,
    restore_optimizer,
    unwrapped,
    weight_fingerprint,
)


class _HashedSave(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist strategy, written in this process by a writer that hashes.

    megatron-core's own writer starts a manager process and forks one process a file even for a synchronous save,
    6-10 s on two cores for 15 MB; this one writes the same files directly.
    """

    def __init__(self) -> None:
        super().__init__("torch_dist", 1, thread_count=1)
        self.files: dict[str, dict] = {}

    def save(self, sharded_state_dict, checkpoint_dir) -> None:
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded_state_dict, self.keep_only_main_replica)
        writer = HashingWriter(Path(checkpoint_dir))
        torch_checkpoint.save_state_dict(
            mcore_to_pyt_state_dict(named, False),
            writer,
            planner=MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        self.files = writer.files


@dataclass(frozen=True)
class SaveResult:
    """What the journal tells of a save: where, how long the step waited, how many bytes were written."""

    folder: Path
    seconds: float
    bytes: int
    weights: str


def save_checkpoint(
    checkpoints: Path,
    step: int,
    config: Config,
    groups: Groups,
    chunks: Sequence,
    optimizer: MegatronOptimizer,
    device: torch.device,
    facts: dict,
) -> SaveResult:
    """Write step `step` under `checkpoints` and publish it. `facts` go into the manifest (data position, versions).

    A failure on any rank leaves the earlier checkpoints and `latest` as they were and raises CheckpointError on all.
    """
    began = time.monotonic()
    weights = weight_fingerprint(chunks, device)
    aside = checkpoints / f".{checkpoint_name(step)}.writing"
    error = _everywhere(lambda: start_writing(checkpoints, step) if groups.rank == 0 else None)
    strategy = _HashedSave()
    if error is None:
        model = model_state(chunks)
        tensors, _local = optimizer_state(optimizer, model, loading=False)
        state = {**model, "optimizer": tensors, **random_state(groups, layout_name(config))}
        error = _everywhere(lambda: dist_checkpointing.save(state, str(aside), sharded_strategy=strategy))
    files = _gather_files(strategy.files)
    manifest = {
        "step": step,
        "consumed_samples": config.consumed_samples_at(step),
        "consumed_tokens": config.consumed_tokens_at(step),
        "layout": layout_name(config),
        "precision": config.train.precision,
        "weights": weights,
        "config": config.model_dump(exclude_none=True),
        **facts,
        "files": files,
    }
    if error is None:
        error = _everywhere(lambda: publish(aside, manifest) if groups.rank == 0 else None)
    if error is not None:
        raise CheckpointError(
            f"step {step} could not be saved under {checkpoints}: {error}; earlier checkpoints are untouched. "
            "Make room or restore access, and start again to resume from the last one"
        )
    total = sum(file["bytes"] for file in files.values())
    return SaveResult(checkpoints / checkpoint_name(step), time.monotonic() - began, total, weights)


def find_checkpoint(checkpoints: Path, groups: Groups) -> tuple[Path | None, list[str]]:
    """(the newest sound checkpoint or None, what was found wrong on the way), the same on every rank.

    Every file of the candidate is hashed, the ranks sharing the work. A damaged checkpoint is set aside under another
    name and the one before it is tried. CheckpointError when there are checkpoints and none is sound.
    """
    doubts: list[str] = []
    while True:
        if doubts and not complete_checkpoints(checkpoints):
            raise CheckpointError(
                f"no sound checkpoint is left in {checkpoints}: {'; '.join(doubts)}. "
                "Put one back, or remove the folder to start over"
            )
        folder, doubt = latest_checkpoint(checkpoints)
        if doubt and not doubts:
            doubts.append(doubt)
        if folder is None:
            return None, []
        problems = _agree(_problems_of(folder, groups))
        if not problems:
            return folder, doubts
        doubts.append(f"{folder.name} is damaged ({'; '.join(problems)}) and was set aside")
        if groups.rank == 0:
            set_damaged_aside(folder)
        distributed.barrier()


def _problems_of(folder: Path, groups: Groups) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except CheckpointError as error:
        return [str(error)] if groups.rank == 0 else []
    return verify_files(folder, manifest, groups.rank, groups.world_size)


def load_checkpoint(
    folder: Path, config: Config, groups: Groups, chunks: Sequence, optimizer: MegatronOptimizer, device: torch.device
) -> dict:
    """Load `folder`, found sound by `find_checkpoint`, into model and optimizer, in this layout; returns its manifest.

    CheckpointError, the same on every rank, when it does not fit this run or the weights do not arrive as saved.
    """
    manifest = read_manifest(folder)
    if manifest["precision"] != config.train.precision:
        raise CheckpointError(
            f"{folder} was trained in {manifest['precision']}, this configuration asks for {config.train.precision}; "
            f'set train.precision = "{manifest["precision"]}"'
        )
    model = model_state(chunks)
    tensors, local = optimizer_state(optimizer, model, loading=True)
    same_layout = manifest["layout"] == layout_name(config)
    state = {**model, "optimizer": tensors, **(random_state(groups, layout_name(config)) if same_layout else {})}
    loaded = dist_checkpointing.load(state, str(folder))
    for name, chunk in zip(model, chunks, strict=True):
        unwrapped(chunk).load_state_dict(loaded[name])
    restore_optimizer(optimizer, loaded["optimizer"], local, manifest["step"])
    if same_layout:
        restore_random_states(loaded["random"])
    _check_fingerprint(folder, manifest["weights"], chunks, device)
    return manifest


def load_weights(folder: Path, chunks: Sequence, device: torch.device) -> None:
    """Load the weights alone, for evaluation; CheckpointError when they do not arrive as they were saved."""
    model = model_state(chunks)
    loaded = dist_checkpointing.load(dict(model), str(folder))
    for name, chunk in zip(model, chunks, strict=True):
        unwrapped(chunk).load_state_dict(loaded[name])
    _check_fingerprint(folder, read_manifest(folder)["weights"], chunks, device)


def _check_fingerprint(folder: Path, saved: str, chunks: Sequence, device: torch.device) -> None:
    found = weight_fingerprint(chunks, device)
    if found != saved:
        raise CheckpointError(
            f"{folder}: the weights in memory have fingerprint {found}, those saved had {saved}; "
            "this is a defect of loading or of the machine's memory: do not go on, try another node"
        )


def layout_name(config: Config) -> str:
    """The layout in one word, such as tp2-pp2-vp1-cp1-dp4."""
    parallel = config.parallel
    return (
        f"tp{parallel.tensor}-pp{parallel.pipeline}-vp{parallel.virtual_pipeline}"
        f"-cp{parallel.context}-dp{parallel.data}"
    )


def checkpoint_name(step: int) -> str:
    return f"step_{step:08d}"


def _everywhere(action) -> str | None:
    """Run `action` on this rank; return the first error of any rank, on all of them."""
    try:
        action()
        error = None
    except (Exception, CheckpointException) as exception:
        # What failed on one rank must be known to all, or they wait for it forever. torch's CheckpointException is
        # a BaseException and carries the first cause of each rank.
        error = _first_cause(exception)
    errors = _agree([error] if error else [])
    return errors[0] if errors else None


def _first_cause(exception: BaseException) -> str:
    if isinstance(exception, CheckpointException):
        rank, (cause, _trace) = next(iter(exception.failures.items()))
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(exception).__name__}: {exception}"


def _agree(mine: list[str]) -> list[str]:
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    return [item for rank_items in gathered for item in rank_items]


def _gather_files(mine: dict[str, dict]) -> dict[str, dict]:
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, mine)
    return {name: facts for files in gathered for name, facts in files.items()}
