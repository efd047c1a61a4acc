"""Global batch size and consumed samples as pure functions of the step.

A step is counted by the updates done before it: step 0 is the first update. The ramp is Megatron's: the batch grows by
`increment` each time another equal share of `samples` has been consumed, so a stage ends at the first step whose
consumed samples reach its threshold. Stages follow from the numbers alone; nothing here holds state.
"""

from collections.abc import Sequence
from typing import NamedTuple


class Stage(NamedTuple):
    """A span of steps with one global batch size, in samples."""

    first_step: int
    first_sample: int
    global_batch: int


def constant_stages(global_batch: int) -> tuple[Stage, ...]:
    """The one stage of a run without a ramp."""
    return (Stage(0, 0, global_batch),)


def ramp_stages(start: int, increment: int, samples: int, global_batch: int) -> tuple[Stage, ...]:
    """Stages from batch `start` to `global_batch`; the last one has no end. Stages of no step are left out."""
    growths = (global_batch - start) // increment
    stages: list[Stage] = []
    step = consumed = 0
    for growth in range(growths):
        batch = start + growth * increment
        threshold = -(-(growth + 1) * samples // growths)
        steps = max(0, -(-(threshold - consumed) // batch))
        if steps:
            stages.append(Stage(step, consumed, batch))
        step += steps
        consumed += steps * batch
    return (*stages, Stage(step, consumed, global_batch))


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage that update number `step` (from 0) belongs to."""
    if step < 0:
        raise ValueError(f"step {step} asked for; steps are counted from 0")
    return next(stage for stage in reversed(stages) if stage.first_step <= step)


def consumed_samples(stages: Sequence[Stage], step: int) -> int:
    """Samples consumed by the updates 0 ... step - 1."""
    stage = stage_at(stages, step)
    return stage.first_sample + (step - stage.first_step) * stage.global_batch
