"""Find and load the checkpoint a run goes on from, in whatever layout it was saved.

The ranks share the work of checking every file's hash, load what their layout needs, and compare a fingerprint of the
loaded weights with the one taken when they were saved. Saving is in save.py.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

from k2_megatron.config import Config
from k2_megatron.runtime.collector import collector_paused
from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.seeds import restore_random_states
from k2_megatron.train.checkpoints.folders import (
    candidate_checkpoints,
    first_cause,
    set_damaged_aside,
    set_incomplete_aside,
    set_later_aside,
)
from k2_megatron.train.checkpoints.manifest import (
    MANIFEST,
    CheckpointError,
    CheckpointVersionError,
    read_manifest,
    verify_files,
)
from k2_megatron.train.checkpoints.pickles import EXTRA_STATE, EXTRA_STATE_REFUSED, pickle_problems
from k2_megatron.train.checkpoints.restricted_loading import RestrictedLoading
from k2_megatron.train.checkpoints.state import (
    layout_name,
    model_state,
    optimizer_state,
    random_state,
    restore_optimizer,
    weight_fingerprint,
)
from k2_megatron.train.model_chunks import unwrapped
from k2_megatron.train.parts import Parts


def find_checkpoint(checkpoints: Path, groups: Groups, *, set_aside: bool = True) -> tuple[Path | None, list[str]]:
    """(the newest sound checkpoint or None, what was found wrong on the way), the same on every rank.

    Rank 0 says which is tried, since the ranks may see a shared folder differently. Every file of it is hashed, the
    ranks sharing the work. A damaged checkpoint is set aside under another name and the one before it is tried; so are
    those later than the one found. Who only reads, beside a run that may be alive, renames nothing (`set_aside` False).
    CheckpointError when there are checkpoints and none is sound.
    """
    candidates, doubt = as_rank_0_sees(groups, partial(candidate_checkpoints, checkpoints))
    doubts: list[str] = [doubt] if doubt else []
    if set_aside:
        incomplete = as_rank_0_sees(groups, partial(set_incomplete_aside, checkpoints))
        doubts += [f"{name} has no {MANIFEST}: it was set aside under this name" for name in incomplete]
    for folder in candidates:
        problems = shared_problems(folder, groups)
        if not problems:
            if set_aside:
                later = as_rank_0_sees(groups, partial(set_later_aside, checkpoints, folder))
                doubts += [f"{name} is later than {folder.name}: it was set aside under this name" for name in later]
            return folder, doubts
        damage = f"{folder.name} is damaged ({'; '.join(problems)})"
        if set_aside:
            as_rank_0_sees(groups, partial(_set_aside, folder, damage))
        doubts.append(f"{damage} and was {'set aside' if set_aside else 'passed over'}")
    if doubts:
        raise CheckpointError(
            f"no sound checkpoint is left in {checkpoints}: {'; '.join(doubts)}. "
            "Put one back, or remove the folder to start over"
        )
    return None, []


def as_rank_0_sees(groups: Groups, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, told to all; when it fails there, CheckpointError on all."""
    told: list = [None, None]
    if groups.rank == 0:
        try:
            told[0] = action()
        except (ValueError, OSError) as error:
            told[1] = str(error)
    distributed.broadcast_object_list(told)
    if told[1] is not None:
        raise CheckpointError(told[1])
    return told[0]


def _set_aside(folder: Path, damage: str) -> None:
    try:
        set_damaged_aside(folder)
    except CheckpointError as error:
        raise CheckpointError(f"{damage}; {error}") from None


def shared_problems(folder: Path, groups: Groups) -> list[str]:
    """What is wrong with the files of `folder`, every rank having hashed its share; the same list on every rank.

    CheckpointVersionError, on every rank, when another version of this project wrote it: that is no damage.
    """
    try:
        mine, refusal = _problems_of(folder, groups), None
    except CheckpointVersionError as error:
        mine, refusal = [], str(error)
    gathered: list = [None] * distributed.get_world_size()
    distributed.all_gather_object(gathered, (mine, refusal))
    refusals = [refusal for _, refusal in gathered if refusal]
    if refusals:
        raise CheckpointVersionError(refusals[0])
    return list(dict.fromkeys(problem for problems, _ in gathered for problem in problems))


def _problems_of(folder: Path, groups: Groups) -> list[str]:
    try:
        manifest = read_manifest(folder)
    except CheckpointVersionError:
        raise
    except CheckpointError as error:  # on any rank: its share of the files would go unchecked
        return [str(error)]
    problems = verify_files(folder, manifest, groups.rank, groups.world_size)
    return problems or (pickle_problems(folder) if groups.rank == 0 else [])


def load_checkpoint(folder: Path, manifest: dict, config: Config, parts: Parts) -> None:
    """Load `folder`, found sound by `find_checkpoint`, into model and optimizer, in this layout.

    CheckpointError, the same on every rank, when it does not fit this run or the weights do not arrive as saved.
    """
    if manifest["precision"] != config.train.precision:
        raise CheckpointError(
            f"{folder} was trained in {manifest['precision']}, this configuration asks for {config.train.precision}; "
            f'set train.precision = "{manifest["precision"]}"'
        )
    updates = manifest.get("optimizer_step", manifest["step"])
    same_layout = manifest["layout"] == layout_name(config)
    load_state(folder, manifest, config, parts, updates=updates, generators=same_layout)


def load_state(folder: Path, manifest: dict, config: Config, parts: Parts, *, updates: int, generators: bool) -> None:
    """Fill model, optimizer (which has made `updates` updates) and, of the same layout alone, the generators.

    CheckpointError when the weights do not arrive as saved.
    """
    model = model_state(parts.chunks)
    tensors, local = optimizer_state(parts.optimizer, model, loading=True)
    state = {**model, "optimizer": tensors, **(random_state(parts.groups, layout_name(config)) if generators else {})}
    loaded = _read(state, folder)
    for name, chunk in zip(model, parts.chunks, strict=True):
        unwrapped(chunk).load_state_dict(loaded[name])
    restore_optimizer(parts.optimizer, loaded.get("optimizer", {}), local, updates)  # a rank may hold nothing of it
    if generators:
        restore_random_states(loaded["random"])
    _check_fingerprint(folder, manifest["weights"], parts.chunks, parts.device)


def load_weights(folder: Path, chunks: Sequence, device: torch.device) -> None:
    """Load the weights alone, for evaluation; CheckpointError when they do not arrive as they were saved."""
    model = model_state(chunks)
    loaded = _read(dict(model), folder)
    for name, chunk in zip(model, chunks, strict=True):
        unwrapped(chunk).load_state_dict(loaded[name])
    _check_fingerprint(folder, read_manifest(folder)["weights"], chunks, device)


def _read(state: dict, folder: Path) -> dict:
    try:
        with collector_paused():
            loaded = dist_checkpointing.load(state, str(folder), sharded_strategy=RestrictedLoading())
    except (CheckpointException, CheckpointingException) as error:
        raise CheckpointError(f"{folder} does not load: {first_cause(error)}; use another checkpoint") from None
    for part in loaded.values():
        for key, value in part.items() if isinstance(part, dict) else ():
            if str(key).endswith(EXTRA_STATE) and not (value is None or (torch.is_tensor(value) and not value.numel())):
                raise CheckpointError(f"{folder}: {key} holds data ({EXTRA_STATE_REFUSED}); use another checkpoint")
    return loaded


def _check_fingerprint(folder: Path, saved: str, chunks: Sequence, device: torch.device) -> None:
    found = weight_fingerprint(chunks, device)
    if found != saved:
        raise CheckpointError(
            f"{folder}: the weights in memory have fingerprint {found}, those saved had {saved}; "
            "this is a defect of loading or of the machine's memory: do not go on, try another node"
        )
