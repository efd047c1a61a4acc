"""Where a run goes on in its data after a checkpoint, also when its batch or its sequence length is another from there.

In: the configuration of this start, and the manifest of the checkpoint. Out: the configuration to go on with, which
knows what the run went through (train.history), so that the position stays a function of the step; what a change means.
"""

from typing import Any

from k2_megatron.config import Config
from k2_megatron.config.batch import samples_until, stages_of_saved
from k2_megatron.data.ledger import Ledger
from k2_megatron.train.checkpoints.manifest import CheckpointError, is_imported

# What decides, with the step, which samples are next
KEYS = ("train.global_batch", "train.batch_ramp", "model.sequence_length")


def going_on_from(config: Config, manifest: dict[str, Any]) -> Config:
    """`config` with the past of a checkpoint. CheckpointError where that does not tell its batch and length."""
    try:
        # The stages of one that was brought in were not trained here.
        done = config.stages if is_imported(manifest) else stages_of_saved(manifest["config"])
        return config.going_on(manifest["step"], done)
    except ValueError as error:
        raise CheckpointError(f"the checkpoint of step {manifest['step']} cannot be gone on from: {error}") from None


def taken_before(config: Config, ledger: Ledger) -> set[str]:
    """The keys of batch and length, where a change to the present values was taken by --set once, and saved: a run that
    was set back to before it goes on under it, and need not be told again."""
    told = ledger.last_change
    if told is None:
        return set()
    now = {
        "global_batch": config.global_batch_at(told["from_step"]),
        "sequence_length": config.model.sequence_length,
    }
    return set(KEYS) if now == {key: told[key] for key in now} else set()


def refuse_in_the_past(entry: dict[str, Any], manifest: dict[str, Any]) -> None:
    """ValueError where an amendment that the checkpoint of `manifest` was not trained under holds from a sample that it
    has trained: the numbers of the samples after that would be those of other rows."""
    consumed, length = manifest["consumed_samples"], manifest["config"]["model"]["sequence_length"]
    if entry["from_sample"] * entry["sequence_length"] < consumed * length:
        raise ValueError(
            f"an amendment from sample {entry['from_sample']} of {entry['sequence_length']} tokens on, and the "
            f"checkpoint of step {manifest['step']} has trained up to sample {consumed} of {length}: rows would be "
            "trained twice, others never"
        )


def change_at(config: Config, step: int) -> dict[str, Any] | None:
    """What changes in the data after `step` updates, [before, from then on]; None where nothing does."""
    history = config.train.history or ()
    changed = config.last_change
    if changed is None or changed != history[-1] or changed.first_step != step:
        return None
    was, now = history[-2:]
    read = samples_until(was, step)
    return {
        "from_step": step,
        "global_batch": [was.global_batch, now.global_batch],
        "sequence_length": [was.sequence_length, now.sequence_length],
        "next_sample": [read, now.first_sample],
        "tokens_left_out": now.first_sample * now.sequence_length - read * was.sequence_length,
    }


def change_text(change: dict[str, Any]) -> str:
    """The same in words; steps are numbered from 1, as everywhere on the console."""
    words = []
    for key in ("global_batch", "sequence_length"):
        was, now = change[key]
        if was != now:
            words.append(f"{key.replace('_', ' ')} {was:,} -> {now:,}")
    read, first = change["next_sample"]
    text = f"{', '.join(words)} from step {change['from_step'] + 1:,} on: next sample {first:,}"
    was, now = change["sequence_length"]
    if was != now:
        text += f" of {now:,} tokens, after {read:,} of {was:,}; {change['tokens_left_out']:,} tokens left out"
    return text
