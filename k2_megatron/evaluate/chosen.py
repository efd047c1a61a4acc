"""Which checkpoints of a run are evaluated, and each one's configuration in the layout of this evaluation."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from k2_megatron.config import Config
from k2_megatron.config.load import config_of_tables
from k2_megatron.train.checkpoints.folders import complete_checkpoints, latest_checkpoint
from k2_megatron.train.checkpoints.manifest import read_manifest, step_of

# What --set may change: how it is computed, not what. All else is the checkpoint's own.
SETTABLE = ("parallel.", "model.kernels", "model.loss_chunk_tokens", "train.deterministic")
# Of training alone, and checked against a layout that is not this one
_LEFT_OUT = ("history", "batch_ramp", "compare_replicas_every_steps")
_SHOWN = 8  # steps in an error


def chosen_checkpoints(
    run: Path, *, steps: Sequence[int] = (), newest: bool = False, every: int | None = None
) -> list[Path]:
    """The folders asked for, by step: those of `steps`, the newest one, those at multiples of `every` times the
    distance between two, or all. ValueError where there are none, naming what there is."""
    checkpoints = run / "checkpoints"
    if not run.is_dir():
        raise ValueError(f"{run} is no run folder; give the folder that a run's run.folder names, such as runs/toy")
    folders = {step_of(folder): folder for folder in reversed(complete_checkpoints(checkpoints))}
    if not folders:
        raise ValueError(f"{checkpoints} holds no checkpoint; train first, or give another run folder")
    missing = [step for step in steps if step not in folders]
    if missing:
        raise ValueError(f"{checkpoints} has no checkpoint of step {_listed(missing)}; it has {_listed([*folders])}")
    if steps:
        return [folders[step] for step in sorted(set(steps))]
    if newest:
        latest, _ = latest_checkpoint(checkpoints)
        return [latest or [*folders.values()][-1]]
    if every is None:
        return [*folders.values()]
    distance = every * read_manifest([*folders.values()][-1])["config"]["checkpoint"]["every_steps"]
    found = [folder for step, folder in folders.items() if step % distance == 0]
    if not found:
        raise ValueError(
            f"--every {every}: {checkpoints} has no checkpoint at a multiple of {distance} steps; it has "
            f"{_listed([*folders])}"
        )
    return found


def _listed(steps: Sequence[int]) -> str:
    if len(steps) <= _SHOWN:
        return ", ".join(map(str, steps))
    half = _SHOWN // 2
    return f"{', '.join(map(str, steps[:half]))} ... {', '.join(map(str, steps[-half:]))} ({len(steps)} in all)"


def evaluation_config(
    manifest: dict[str, Any], overrides: Sequence[str], micro_batch: int | None, world_size: int | None
) -> Config:
    """The configuration that trained a checkpoint, in the layout that `overrides` ask for (one rank, or data
    parallelism over the ranks there are). ValueError where they change what is computed, or do not fit."""
    for override in overrides:
        if not override.startswith(SETTABLE):
            raise ValueError(
                f"--set {override}: an evaluation takes parallel.*, model.kernels, model.loss_chunk_tokens and "
                "train.deterministic; all else is the checkpoint's own"
            )
    tables = {
        section: {key: value for key, value in table.items() if value is not None}
        for section, table in manifest["config"].items()
        if section != "parallel"
    }
    for key in _LEFT_OUT:
        tables["train"].pop(key, None)
    if micro_batch is not None:
        tables["train"]["micro_batch"] = micro_batch
    return config_of_tables(f"step {manifest['step']}", tables, overrides, world_size)
