"""What a person is told at the start of a resumed run and at the end of a finished one."""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from k2_megatron.config import Config
from k2_megatron.config.changes import Change, changes
from k2_megatron.runtime.journal import read_events, read_steps
from k2_megatron.train.checkpoints.manifest import MANIFEST, CheckpointError, is_imported
from k2_megatron.train.checkpoints.start_from import require_same_shapes
from k2_megatron.train.checkpoints.state import layout_name
from k2_megatron.train.position import change_at, change_text
from k2_megatron.train.schedule import learning_rate_at

_OF_IMPORTED = ("model.rope_base", "model.norm_epsilon", "model.sequence_length")  # besides the shapes


def resume_changes(config: Config, manifest: dict, folder: Path, given: Collection[str]) -> list[Change]:
    """Every setting that differs from the one the checkpoint was saved under, and what becomes of it.

    `given` are the keys that --set names. CheckpointError when one is refused, the same on every rank.
    """
    imported = is_imported(manifest)
    lacking = [] if imported else [key for key in ("data", "chain") if not isinstance(manifest.get(key), str)]
    if lacking:
        raise CheckpointError(
            f"{folder / MANIFEST} does not say what data it was trained on (it lacks {', '.join(lacking)}), so that no "
            "run can go on from it; begin one of another run.folder with its weights (checkpoint.start_from)"
        )
    found = list(changes(config.model_dump(exclude_none=True), manifest["config"], given))
    if imported:
        require_same_shapes(config, manifest, folder)
        found = [_of_imported(change) for change in found if change.key in _OF_IMPORTED]
    refused = [change for change in found if change.outcome == "refused"]
    if refused:
        whose = "is an imported model" if imported else "was saved by a run"
        raise CheckpointError(
            f"{folder} {whose} of another configuration: {'; '.join(map(str, refused))}. "
            "Give run.folder another name, or undo these changes to resume"
        )
    if manifest["step"] > config.train.steps:
        raise CheckpointError(f"{folder} is of step {manifest['step']}, train.steps = {config.train.steps} ends before")
    return found


def _of_imported(change: Change) -> Change:
    """Its training is ours to choose, its length of sequences with it; the function that its weights compute is not."""
    if change.key != "model.sequence_length":
        return change
    return replace(change, outcome="accepted", reason="an imported model may be trained at any length")


def resume_report(config: Config, manifest: dict, folder: Path, doubts: list[str], found: list[Change]) -> str:
    """Where the run goes on, from what, every setting that differs from the saved one; what it means to the data."""
    step = manifest["step"]
    lines = [*doubts, f"resuming from {folder}"]
    if manifest["layout"] != layout_name(config):
        layouts = f"saved under {manifest['layout']}, going on under {layout_name(config)}"
        lines.append(f"  {layouts}: random generators are seeded anew")
    if step < config.train.steps:
        lines.append(
            f"  next: step {step + 1}, sample {config.consumed_samples_at(step)}, "
            f"learning rate {learning_rate_at(config, step):.4e}"
        )
    lines += [f"  {change.outcome}: {change}" for change in found]
    told, ours = manifest.get("consumed_samples"), config.consumed_samples_at(step)
    if is_imported(manifest) and told not in (None, ours):
        lines.append(f"  the imported run had consumed {told:,} samples; by this configuration it is {ours:,}")
    moved = change_at(config, step)
    return "\n".join([*lines, *([f"  {change_text(moved)}"] if moved else [])])


def summary_text(config: Config, journal: Path) -> str:
    """The finished run in a few lines, from its journal."""
    steps = read_steps(journal) if journal.is_file() else {}
    if not steps:
        return f"finished: {config.run.folder}; its journal could not be written, or was removed, and tells of no step"
    held_out = [event["held_out_loss"] for event in read_events(journal) if event["event"] == "evaluation"]
    first, last = steps[min(steps)], steps[max(steps)]
    # The median is what a step costs; the first steps also warm up caches and threads.
    speeds = sorted(event["tokens_per_second"] for event in steps.values())
    lines = [
        f"finished: {config.run.folder}",
        f"  training loss {first['loss']:.4f} at step {first['step']}, {last['loss']:.4f} at step {last['step']}",
    ]
    if held_out:
        lines.append(f"  held-out loss {held_out[-1]:.4f}")
    lines.append(f"  {speeds[len(speeds) // 2]:,.0f} tokens/s (median step), {last['consumed_tokens']:,} tokens in all")
    lines.append(f"  its report: python tools/report_run.py {config.run.folder}")
    return "\n".join(lines)


def stopped_text(reason: str, step: int) -> str:
    """A run that is not finished."""
    kept = "saved" if step else "nothing to save"
    return f"stopped by {reason} after step {step}; {kept}, start again to resume"
