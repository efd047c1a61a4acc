"""Global batch, sequence length and consumed samples as pure functions of the step.

A step is counted by the updates done before it: step 0 is the first update. The ramp is Megatron's: the batch grows by
`increment` each time another equal share of `samples` has been consumed, so a stage ends at the first step whose
consumed samples reach its threshold. Stages follow from the numbers alone; nothing here holds state.

A run that is resumed under another batch or length begins a stage there. Samples are counted in sequences of the
stage's own length S: sample n begins n S tokens after the first one, so that a position can be counted in any length.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from k2_megatron.config.schema import BatchRamp, Stage


def stages_of(
    global_batch: int, sequence_length: int, ramp: BatchRamp | None, history: Sequence[Stage] | None
) -> tuple[Stage, ...]:
    """All stages of a run; the last has no end. What a ramp has still to come keeps its steps after a change."""
    planned = constant_stages(global_batch, sequence_length)
    if ramp is not None:
        planned = ramp_stages(ramp.start, ramp.increment, ramp.samples, global_batch, sequence_length)
    if not history:
        return planned
    stages = [*history]
    for stage in planned:
        if stage.first_step > history[-1].first_step:
            first_sample = consumed_samples(stages, stage.first_step)
            stages.append(stage.model_copy(update={"first_sample": first_sample}))
    return tuple(stages)


def planned_stages(train: Any, sequence_length: int) -> tuple[Stage, ...]:
    """The stages that a configuration's section `train` plans, of whatever has been changed meanwhile."""
    return stages_of(train.global_batch, sequence_length, train.batch_ramp, None)


def stages_of_saved(config: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages of a configuration that a checkpoint holds. ValueError where it does not tell them."""
    try:
        train, length = config["train"], config["model"]["sequence_length"]
        ramp = BatchRamp.model_validate(train["batch_ramp"]) if train.get("batch_ramp") else None
        history = [Stage.model_validate(stage) for stage in train.get("history") or ()]
        return stages_of(train["global_batch"], length, ramp, history)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its configuration tells of no batch and sequence length ({error!r})") from None


def constant_stages(global_batch: int, sequence_length: int) -> tuple[Stage, ...]:
    """The one stage of a run without a ramp."""
    return (_stage(0, 0, global_batch, sequence_length),)


def ramp_stages(start: int, increment: int, samples: int, global_batch: int, sequence_length: int) -> tuple[Stage, ...]:
    """Stages from batch `start` to `global_batch`; the last one has no end. Stages of no step are left out."""
    growths = (global_batch - start) // increment
    stages: list[Stage] = []
    step = consumed = 0
    for growth in range(growths):
        batch = start + growth * increment
        threshold = -(-(growth + 1) * samples // growths)
        steps = max(0, -(-(threshold - consumed) // batch))
        if steps:
            stages.append(_stage(step, consumed, batch, sequence_length))
        step += steps
        consumed += steps * batch
    return (*stages, _stage(step, consumed, global_batch, sequence_length))


def _stage(first_step: int, first_sample: int, global_batch: int, sequence_length: int) -> Stage:
    return Stage(
        first_step=first_step, first_sample=first_sample, global_batch=global_batch, sequence_length=sequence_length
    )


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that update number `step` (from 0) belongs to."""
    if step < 0:
        raise ValueError(f"step {step} asked for; steps are counted from 0")
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def consumed_samples(stages: Sequence[Stage], step: int) -> int:
    """The first sample of update number `step`: where all stages have one length, the samples consumed before it."""
    return samples_until(stage_at(stages, step), step)


def samples_until(stage: Stage, step: int) -> int:
    """The sample after the last that `stage` reads in the updates before `step`."""
    return stage.first_sample + (step - stage.first_step) * stage.global_batch


def parts(stages: Sequence[Stage], step: int) -> list[tuple[Stage, int, int]]:
    """(stage, its first sample, the one after its last) of what the updates 0 ... step - 1 read."""
    ends = [*(stage.first_step for stage in stages[1:]), step]
    return [
        (stage, stage.first_sample, samples_until(stage, min(end, step)))
        for stage, end in zip(stages, ends, strict=True)
        if stage.first_step < step
    ]


def carried_over(samples: int, sequence_length: int, new_sequence_length: int) -> int:
    """The position after `samples` sequences in sequences of another length: the first that holds no token trained on.

    It is counted in tokens and rounded up: less than one new sequence is left out, and no token is trained twice. A
    changed global batch needs no rule: samples are numbered one by one.
    """
    return -(-samples * sequence_length // new_sequence_length)


def going_on(planned: Sequence[Stage], done: Sequence[Stage], step: int) -> tuple[Stage, ...] | None:
    """The history of a run that went through `done` for `step` updates, and goes on as a run of the stages `planned`
    would at that step; None where `planned` itself tells all of it."""
    if step == 0:
        return None
    now, before = stage_at(planned, step), stage_at(done, step)
    past = [stage for stage in done if stage.first_step < step]
    if past and (now.global_batch, now.sequence_length) != (before.global_batch, before.sequence_length):
        length = past[-1].sequence_length
        first_sample = carried_over(samples_until(past[-1], step), length, now.sequence_length)
        past.append(_stage(step, first_sample, now.global_batch, now.sequence_length))
    else:
        past = [stage for stage in done if stage.first_step <= step]
    return None if past == [stage for stage in planned if stage.first_step <= step] else tuple(past)


def last_change(history: Sequence[Stage], planned: Sequence[Stage]) -> Stage | None:
    """The last stage of a history that somebody's change began; a ramp's growth is none."""
    for was, now in reversed(list(pairwise(history))):
        grown = [stage_at(planned, now.first_step + more).global_batch for more in (-1, 0)]
        if was.sequence_length != now.sequence_length or [was.global_batch, now.global_batch] != grown:
            return now
    return None


def follows(history: Sequence[Stage], planned: Sequence[Stage]) -> bool:
    """Whether each stage of a history begins where the one before it ends, and the last is as planned there."""
    first, last = history[0], history[-1]
    now = stage_at(planned, last.first_step)
    return (
        (first.first_step, first.first_sample) == (0, 0)
        and (last.global_batch, last.sequence_length) == (now.global_batch, now.sequence_length)
        and all(
            was.first_step < then.first_step
            and then.first_sample
            == carried_over(samples_until(was, then.first_step), was.sequence_length, then.sequence_length)
            for was, then in pairwise(history)
        )
    )
