"""What a person is told at the start of a resumed run and at the end of a finished one."""

from pathlib import Path

from k2_megatron.config import Config
from k2_megatron.train.checkpoint_state import layout_name
from k2_megatron.train.journal import read_events, read_steps
from k2_megatron.train.schedule import learning_rate_at


def resume_report(config: Config, manifest: dict, folder: Path, doubts: list[str]) -> str:
    """Where the run goes on, from what, and every setting that differs from the saved one."""
    step = manifest["step"]
    lines = [*doubts, f"resuming from {folder}"]
    if manifest["layout"] != layout_name(config):
        lines.append(f"  saved under {manifest['layout']}, going on under {layout_name(config)}")
    if step < config.train.steps:
        lines.append(
            f"  next: step {step + 1}, sample {config.consumed_samples_at(step)}, "
            f"learning rate {learning_rate_at(config, step):.4e}"
        )
    saved = Config.model_validate(manifest["config"])
    for key, (now, was) in config.differences(saved).items():
        if not key.startswith(("parallel.", "run.folder")):
            lines.append(f"  {key} was {was!r}, is {now!r} (changes no weight)")
    return "\n".join(lines)


def summary_text(config: Config, journal: Path) -> str:
    """The finished run in a few lines, from its journal."""
    steps = read_steps(journal)
    held_out = [event["held_out_loss"] for event in read_events(journal) if event["event"] == "evaluation"]
    if not steps:
        return f"finished: {config.run.folder}; its journal could not be written and tells of no step"
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
    return "\n".join(lines)
