"""What is done about a malignant spike: nothing (watch), or go back to before it and skip or defer what was read.

In:  a finding, the section [spikes], the checkpoints that exist, what was done before. Out: a decision; pure.

K2-65B's two malignant spikes were cured by going back to the checkpoint before them and moving the chunk they fell in
to the end of the order: policy "rollback" with scope "chunk". PaLM (Chowdhery et al. 2022, section 5.1) went back some
100 steps and skipped the batches: policy "skip" with scope "batches".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from k2_megatron.config import Config
from k2_megatron.config.schema import Spikes
from k2_megatron.data.schedule import DEFER, SKIP, Schedule
from k2_megatron.train.spikes.detector import Finding

ACTIONS = {"skip": SKIP, "rollback": DEFER}


@dataclass(frozen=True)
class Decision:
    """`kind` is "watch", "go back" or "stop"; `reason` in words; `checkpoint_step` where to go back to."""

    kind: str
    reason: str
    checkpoint_step: int | None = None


class Rows(Protocol):
    """What is asked of a feed: its schedule, and which rows hold a sample."""

    schedule: Schedule

    def row_range(self, first_sample: int, count: int) -> tuple[int, int]: ...


def decide(settings: Spikes, finding: Finding, checkpoint_steps: Sequence[int], rollbacks_done: int) -> Decision:
    """The declared policy, applied to one finding."""
    spike = in_words(finding)
    if is_watched(settings, finding):
        return Decision("watch", spike)
    good = [step for step in checkpoint_steps if step < finding.onset]
    if not good:
        return Decision("stop", f"{spike}; no checkpoint from before it is left to go back to")
    allowed = settings.max_rollbacks or 0
    if rollbacks_done >= allowed:
        return Decision(
            "stop", f"{spike}; spikes.max_rollbacks = {allowed} were made already, and a person should look"
        )
    return Decision("go back", f"{spike}; not over {finding.step - finding.onset} steps later", max(good))


def is_watched(settings: Spikes, finding: Finding) -> bool:
    """Whether nothing is done about it, whatever checkpoints there are."""
    return finding.kind != "malignant" or settings.policy == "watch"


def in_words(finding: Finding) -> str:
    """Its kind, and when it began."""
    name = "spike" if finding.kind == "spike" else f"{finding.kind} spike"
    return f"{name}: began at step {finding.onset}, called at {finding.trip}"


def amendment(
    config: Config, feed: Rows, rows_per_chunk: int | None, decision: Decision, finding: Finding, times_before: int = 0
) -> dict:
    """What the ledger is told: from the checkpoint on, skip or defer the samples read up to the trip, or the chunk in
    which the spike began. Each of the `times_before` that the run went back to this checkpoint doubles the samples up
    to this finding's trip, wherever that of an earlier one lay: a bad stretch of data is passed in few steps. How many
    there are left is not looked at. All is counted in the present sequence length, in which the run goes on, also from
    a checkpoint of before it had that. ValueError where there are no chunks."""
    assert decision.checkpoint_step is not None and config.spikes.policy in ACTIONS, "only going back amends"
    first = config.position_at(decision.checkpoint_step)
    fields = {
        "action": ACTIONS[config.spikes.policy],
        "from_sample": first,
        "sequence_length": config.model.sequence_length,
        "reason": decision.reason,
    }
    if config.spikes.scope == "batches":
        count = (config.position_at(finding.trip) - first) * 2**times_before
        return {**fields, "samples": (first, first + count)}
    if rows_per_chunk is None:
        raise ValueError(
            'spikes.scope = "chunk" needs data.train to be a plan, which has chunks; set spikes.scope = "batches"'
        )
    row, _ = feed.row_range(config.position_at(finding.onset - 1), 1)
    return {**fields, "chunk": int(feed.schedule.positions(row, 1)[0]) // rows_per_chunk}
