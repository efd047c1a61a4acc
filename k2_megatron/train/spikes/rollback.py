"""Go back to the checkpoint before a malignant spike and amend the data order; a kill at any moment does no harm.

The order is: `latest` names the good checkpoint; the later ones leave; the ledger gets its line. A run killed after the
first goes on from the good checkpoint over the same data, meets the spike again, and comes here again.
"""

import contextlib
import os
from functools import partial
from pathlib import Path

import torch.distributed as distributed

from k2_megatron.config import Config
from k2_megatron.data.blended import amendable
from k2_megatron.data.ledger import LedgerNotWritten
from k2_megatron.runtime.durable import persist, sync, write_file
from k2_megatron.runtime.mistakes import StopRun
from k2_megatron.train.checkpoints.folders import complete_checkpoints, free_name
from k2_megatron.train.checkpoints.manifest import CheckpointError, folder_name, step_of
from k2_megatron.train.run_data import RunData
from k2_megatron.train.spikes.detector import Finding
from k2_megatron.train.spikes.policy import Decision, amendment, decide, in_words, is_watched
from k2_megatron.train.spikes.watch import DOSSIERS

BY_ITSELF = "malignant spike"  # how the reason of an amendment begins that no person made


def decide_together(config: Config, finding: Finding, checkpoints: Path, data: RunData) -> Decision:
    """The policy's decision; where the checkpoints decide, it is taken on rank 0, which sees the folder first, and told
    to all: to stop, where the folder cannot be read for `checkpoint.retry_seconds`."""
    if is_watched(config.spikes, finding):
        return decide(config.spikes, finding, (), 0)
    decisions: list[Decision | None] = [None]
    if distributed.get_rank() == 0:
        try:
            folders = persist(
                partial(complete_checkpoints, checkpoints), config.checkpoint.retry_seconds, CheckpointError
            )
            decisions = [decide(config.spikes, finding, [*map(step_of, folders)], len(own_amendments(data)))]
        except CheckpointError as error:
            decisions = [Decision("stop", f"{in_words(finding)}; going back is not possible: {error}")]
    distributed.broadcast_object_list(decisions)
    decision = decisions[0]
    assert decision is not None, "rank 0 decides and every rank hears it"
    return decision


def go_back(config: Config, finding: Finding, decision: Decision, checkpoints: Path, data: RunData) -> dict:
    """Make the amendment and leave `latest` at the good checkpoint; returns the amendment's fields.

    StopRun when the decision is to stop, when the data has no chunks or no end to defer to, or too few rows are left.
    """
    if decision.kind == "stop":
        raise StopRun(f"{decision.reason}. The dossier is in {checkpoints.parent / DOSSIERS}")
    try:
        assert decision.checkpoint_step is not None, "going back needs a checkpoint"
        first = config.position_at(decision.checkpoint_step) * config.model.sequence_length  # in tokens
        before = sum(entry["from_sample"] * entry["sequence_length"] == first for entry in own_amendments(data))
        fields = fitting_amendment(config, finding, decision, data, before)
    except ValueError as error:
        raise StopRun(f"{decision.reason}; going back is not possible: {error}") from None
    if distributed.get_rank() == 0:
        retry_seconds = config.checkpoint.retry_seconds
        persist(partial(set_back, checkpoints, decision.checkpoint_step), retry_seconds, CheckpointError)
        persist(partial(data.ledger.amend, **fields), retry_seconds, LedgerNotWritten)
    distributed.barrier()
    return fields


def own_amendments(data: RunData) -> list[dict]:
    """What the run has written into its ledger by itself."""
    return [entry for entry in data.ledger.amendments if entry["reason"].startswith(BY_ITSELF)]


def fitting_amendment(
    config: Config, finding: Finding, decision: Decision, data: RunData, times_before: int = 0
) -> dict:
    """The amendment of the configured policy, its samples doubled as often as the data allows, at most `times_before`.
    ValueError where the data has no chunks or no end to defer to, or where too few rows would be left, or none before
    the deferred ones."""
    assert decision.checkpoint_step is not None, "going back needs a checkpoint"
    doubled = amendments_doubled(config, finding, decision, data, times_before)
    after = config.going_on(decision.checkpoint_step, config.stages)
    for fields in doubled[:-1]:
        with contextlib.suppress(ValueError):
            check_fits(after, fields, data)
            return fields
    check_fits(after, doubled[-1], data)
    return doubled[-1]


def amendments_doubled(
    config: Config, finding: Finding, decision: Decision, data: RunData, times_before: int
) -> list[dict]:
    """Those of the most samples first, and the one whose samples are not doubled last."""
    feed = amendable(data.train)
    times = range(times_before, -1, -1)
    return [amendment(config, feed, feed.order.rows_per_chunk, decision, finding, number) for number in times]


def check_fits(config: Config, fields: dict, data: RunData) -> None:
    """ValueError where the data does not allow an amendment, or it would change nothing, for a run that goes on as
    `config` says."""
    feed = amendable(data.train)
    after = feed.after(fields)
    if after.total < feed.row_range(0, config.total_samples)[1]:
        raise ValueError(
            f"skipping would leave {after.total} rows, too few for the run. Defer them, which moves them to the end "
            '(spikes.policy = "rollback"), or build a longer plan'
        )
    if after.runs == feed.schedule.runs:
        raise ValueError(
            "what would be moved to the end is all that is left of the data, and its order would stay. Build a longer "
            'plan, or go on as it is (spikes.policy = "watch")'
        )


def set_back(checkpoints: Path, good: int) -> None:
    """Make the checkpoint of step `good` the newest; later ones stay as spiked_step_*, beside those of an earlier time:
    they show what the spike did. CheckpointError where the disk does not take it; it may be tried again."""
    try:
        write_file(checkpoints / "latest", folder_name(good) + "\n")
        for folder in complete_checkpoints(checkpoints):
            if step_of(folder) > good:
                os.rename(folder, free_name(folder.with_name(f"spiked_{folder.name}")))
        sync(checkpoints)
    except OSError as error:
        raise CheckpointError(
            f"{checkpoints} could not be set back to {folder_name(good)} ({error}); make room or restore access, and "
            "start again"
        ) from None
