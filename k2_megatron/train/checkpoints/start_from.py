"""Begin a run with the weights of another run's checkpoint: a second stage with another RoPE base, length and data.

In:  checkpoint.start_from, a step_* folder, or a run folder (its latest). Out: model and optimizer filled, in any
layout, and where they come from, for the journal and for every checkpoint of this run.

Weights and fp32 main parameters are taken to the bit. Adam's moments begin at zero ("fresh"), or go on ("kept"); then
Adam's count of updates, which its bias correction needs, goes on too. Step, samples, schedule and random generators
are the new run's own. The record and tokenizer that from-hf left beside an imported model come along, for the way back.
"""

from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer

from k2_megatron.config import Config
from k2_megatron.config.changes import STORED_AS
from k2_megatron.train.checkpoints.folders import complete_checkpoints, latest_checkpoint
from k2_megatron.train.checkpoints.imported_record import carry_record, require_own_record
from k2_megatron.train.checkpoints.load import as_rank_0_sees, load_state, shared_problems
from k2_megatron.train.checkpoints.manifest import CheckpointError, read_manifest
from k2_megatron.train.parts import Parts

KEY = "checkpoint.start_from"


def source_of(config: Config) -> tuple[Path, dict]:
    """(the checkpoint folder that checkpoint.start_from names, its manifest). CheckpointError when there is none, or
    when its weights have another shape or precision than this configuration's."""
    assert config.checkpoint.start_from is not None, "asked for the source of a run that has none"
    path = Path(config.checkpoint.start_from)
    if not path.is_dir():
        raise CheckpointError(f"{KEY} = {str(path)!r}: there is no such folder; name a step_* folder or a run folder")
    folder: Path | None = path
    if not path.name.startswith("step_"):
        folder, _ = latest_checkpoint(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
        if folder is None:
            raise CheckpointError(f"{KEY} = {str(path)!r} holds no checkpoint; name a step_* folder or a run folder")
    assert folder is not None
    manifest = read_manifest(folder)
    require_same_shapes(config, manifest, folder)
    require_own_record(folder, manifest, Path(config.run.folder))
    return folder, manifest


def require_same_shapes(config: Config, manifest: dict, folder: Path) -> None:
    """CheckpointError, naming every key, unless the weights of `folder` fit the model and precision of `config`."""
    saved, ours = {"implementation": "k2", **manifest["config"].get("model", {})}, config.flat()
    wrong = [
        f"{key} is {was!r} there and {ours[key]!r} here"
        for key in STORED_AS
        if (was := saved.get(key.removeprefix("model."))) != ours[key]
    ]
    if manifest["precision"] != config.train.precision:
        wrong.append(f"train.precision is {manifest['precision']!r} there and {config.train.precision!r} here")
    if wrong:
        raise CheckpointError(f"{folder} does not fit this configuration: {'; '.join(wrong)}. Change one of the two")


def check_start(config: Config) -> None:
    """CheckpointError when the run would begin from another's weights and cannot."""
    if config.checkpoint.start_from and not complete_checkpoints(Path(config.run.folder) / "checkpoints"):
        source_of(config)


def start_from_checkpoint(config: Config, parts: Parts) -> dict:
    """Fill model and optimizer; where they come from. CheckpointError, the same on every rank, when that is damaged."""
    folder = as_rank_0_sees(parts.groups, lambda: source_of(config)[0])
    manifest = read_manifest(folder)
    problems = shared_problems(folder, parts.groups)
    if problems:
        raise CheckpointError(f"{KEY}: {folder} is damaged ({'; '.join(problems)}); name another checkpoint")
    kept = config.checkpoint.start_optimizer == "kept"
    updates = manifest.get("optimizer_step", manifest["step"]) if kept else 0
    load_state(folder, manifest, config, parts, updates=updates, generators=False)
    if not kept:
        _forget_moments(parts.optimizer)
    if parts.groups.rank == 0:
        carry_record(folder, manifest, Path(config.run.folder))
    return {
        "checkpoint": str(folder.resolve()),
        "step": manifest["step"],
        "consumed_tokens": manifest.get("consumed_tokens"),
        "weights": manifest["weights"],
        "optimizer": "kept" if kept else "fresh",
    }


def _forget_moments(optimizer: MegatronOptimizer) -> None:
    for part in optimizer.chained_optimizers:
        if not part.is_stub_optimizer:
            for state in part.optimizer.state.values():
                state["exp_avg"].zero_()
                state["exp_avg_sq"].zero_()


def start_report(config: Config, origin: dict) -> str:
    """What a person is told when a run begins from another's weights."""
    return (
        f"starting from the weights of {origin['checkpoint']} (step {origin['step']}), Adam's moments "
        f"{origin['optimizer']}; RoPE base {config.model.rope_base:g}, sequence length {config.model.sequence_length}"
    )


def start_plan(config: Config) -> str:
    """What the plan says of checkpoint.start_from, which may name a checkpoint that is still to be made.

    CheckpointError when it is there and does not fit.
    """
    path, moments = config.checkpoint.start_from, config.checkpoint.start_optimizer or "fresh"
    assert path is not None, "a run without a source has no plan of it"
    if not Path(path).exists():
        return f"starts from {path} (not there now: the run could not start), Adam's moments {moments}"
    folder, manifest = source_of(config)
    trained = manifest["config"]["model"]
    lines = [
        f"starts from {folder}: step {manifest['step']:,}, weights {manifest['weights']}, Adam's moments {moments}"
    ]
    for key in ("rope_base", "norm_epsilon", "sequence_length"):
        was, now = trained.get(key), getattr(config.model, key)
        if was != now:
            lines.append(f"  model.{key} was {was!r} there and is {now!r} here")
    return "\n".join(lines)
