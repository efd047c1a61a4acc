"""Save a run in megatron-core's torch_dist format, exactly and atomically, in the foreground or in the background.

Every rank writes and hashes its own file in a folder aside; rank 0 seals it with the manifest and publishes it. What
data-parallel (and context-parallel) ranks hold alike, they share: each byte is written once, and each rank writes about
as much as any other. Who writes what depends on names and sizes alone.

    step waits:        fingerprint of the weights, the plan of who writes what, and, in the background mode, a copy
    in the background: write, hash, exchange the hashes, publish; over a process group of its own, since training uses
                       the others at the same time

At most one save is in flight: the next one waits for it. Nothing touches the disk while ranks wait for each other in a
collective of the plan: what fails on one rank is known to all before any goes on. A save that fails is tried again from
its beginning, for `checkpoint.retry_seconds`: the state is in memory, and a file system may come back.
"""

import sys
import time
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as distributed
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import (
    ShardDistribution,
    determine_main_replica_uniform_distribution,
)
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException

from k2_megatron.config import Config
from k2_megatron.runtime.devices import device_for_threads
from k2_megatron.runtime.durable import Refusal, persist
from k2_megatron.runtime.groups import Groups
from k2_megatron.train.checkpoints import aes_lanes
from k2_megatron.train.checkpoints.folders import aside_folder, first_cause, publish, start_writing
from k2_megatron.train.checkpoints.hashing_writer import HashingWriter, SavePlanner
from k2_megatron.train.checkpoints.host_copies import HostCopies
from k2_megatron.train.checkpoints.manifest import CheckpointError, folder_name
from k2_megatron.train.checkpoints.optimizer_boxes import STATE
from k2_megatron.train.checkpoints.state import (
    fingerprint,
    layout_name,
    model_state,
    optimizer_state,
    random_state,
)
from k2_megatron.train.parts import Parts
from k2_megatron.train.watchdog import Watchdog


@dataclass(frozen=True)
class SaveResult:
    """What the journal tells of a save: `stall_seconds` is what the step waited, `seconds` until it was published."""

    step: int
    folder: Path
    stall_seconds: float
    seconds: float
    bytes: int
    weights: str


class SaveError(Refusal, CheckpointError):
    """A save that failed, on some rank."""


@dataclass(frozen=True)
class _Agreement:
    """What the ranks found out together about a state: the form of this rank's part, and who writes what they share."""

    form: list[ShardedBase]
    shares: ShardDistribution | None


class _Plan:
    """What this rank writes, decided with the others; written by `write`, as often as it takes.

    The files are those of megatron-core's `dist_checkpointing.save`. That writes some before its collectives, where a
    full disk on one rank leaves the others waiting; and its writer starts a manager process and forks one process a
    file even for a synchronous save, 6-10 s on two cores for 15 MB.
    """

    def __init__(
        self,
        replicas: distributed.ProcessGroup,
        *,
        copies: HostCopies | None,
        agreement: _Agreement | None = None,
    ) -> None:
        self.replicas = replicas
        self.copies = copies
        self.agreement = agreement
        self.tensors: dict = {}
        self.common: dict = {}
        self.weights = ""  # the fingerprint

    def take(self, state: dict, device: torch.device) -> None:
        """Decide who writes what of `state`, and make the fingerprint of its weights. No file is touched.

        A run's state keeps its form, so that what the ranks agreed on for one save holds for the next: of many ranks
        each would read what hundreds of thousands of tensors of all others are like.
        """
        sharded, self.common = save_preprocess(state, validate_access_integrity=False)
        form = [value.without_data() for value in nested_values(sharded)]
        if self.agreement is None:
            validate_sharding_integrity(determine_global_metadata(sharded)[1], self.common)  # each element once
            self.agreement = _Agreement(form, determine_main_replica_uniform_distribution(sharded, self.replicas))
        assert form == self.agreement.form, "a parameter has another shape or place than at the save before this one"
        distribute_main_replicas_with_precomputed_distribution(sharded, self.replicas, self.agreement.shares)
        named, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        shards = [shard for shard in nested_values(named) if not isinstance(shard, ShardedObject)]
        self.weights = fingerprint((shard for shard in shards if not shard.key.startswith(STATE)), device)
        if self.copies:  # training goes on changing the originals
            for shard, copy in zip(shards, self.copies.of([shard.data.detach() for shard in shards]), strict=True):
                shard.data = copy
        self.tensors = mcore_to_pyt_state_dict(named, False)

    def write_small_files(self, folder: Path) -> None:
        """What megatron-core puts beside the tensors, on one rank: what is no tensor, and the name of the format."""
        torch.save(self.common, folder / COMMON_STATE_FNAME)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))

    def write(self, folder: Path, group: distributed.ProcessGroup) -> dict[str, dict]:
        """Write this rank's share under `folder`; {file name: {"bytes", hash}}."""
        writer = HashingWriter(folder)
        torch_checkpoint.save_state_dict(
            self.tensors,
            writer,
            process_group=group,
            planner=SavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False),
        )
        return writer.files


class CheckpointWriter:
    """Saves checkpoints of one run under `checkpoints`; made on every rank alike.

    In the background mode the memory for copies is taken at once, while the first steps run, when `part_bytes` tells
    how much they will need; otherwise by the first save.
    """

    def __init__(
        self,
        checkpoints: Path,
        groups: Groups,
        *,
        asynchronous: bool,
        retry_seconds: float = 0.0,
        part_bytes: int = 0,
        watchdog: Watchdog | None = None,
    ) -> None:
        self.checkpoints = checkpoints
        self._rank = groups.rank
        if self._rank == 0 and aes_lanes.compiled() is None:
            print(
                "checkpoints are hashed by numpy, some 500 times slower: k2_megatron._cpu is not built, or was before "
                "it had their hash; build it (pip install -e .)",
                file=sys.stderr,
            )
        self._groups = groups
        self._group = distributed.new_group(backend="gloo", timeout=groups.timeout)
        self._copies = HostCopies() if asynchronous else None
        self._retry_seconds = retry_seconds
        self._watchdog = watchdog
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint", initializer=device_for_threads())
        self._agreement: _Agreement | None = None
        self._pending: Future[SaveResult] | None = None
        self._ready = self._thread.submit(self._copies.reserve, part_bytes) if self._copies else None

    def save(self, step: int, config: Config, parts: Parts, facts: dict) -> None:
        """Begin to save step `step`; `facts` go into the manifest (data position). `finished` or `wait` tell the end.

        CheckpointError, on every rank, when the save before this one or the beginning of this one failed on any rank:
        earlier checkpoints and `latest` are as they were.
        """
        assert self._pending is None, "a save is in flight; ask wait() for its result first"
        began = time.monotonic()
        if self._ready:  # memory that could not be had is asked for again by the copy, whose failure is told to all
            futures.wait([self._ready])
        plan = _Plan(self._groups.collection.dp_cp, copies=self._copies, agreement=self._agreement)
        model = model_state(parts.chunks)
        tensors, _local = optimizer_state(parts.optimizer, model, loading=False)
        state = {**model, "optimizer": tensors, **random_state(self._groups, layout_name(config))}
        self._everywhere(step, lambda: plan.take(state, parts.device))
        self._agreement = plan.agreement
        manifest = {
            "step": step,
            "consumed_samples": config.consumed_samples_at(step),
            "consumed_tokens": config.consumed_tokens_at(step),
            "layout": layout_name(config),
            "precision": config.train.precision,
            "optimizer_step": max((group.get("step", 0) for group in parts.optimizer.param_groups), default=0),
            "weights": plan.weights,
            "config": config.model_dump(exclude_none=True),
            **facts,
        }
        if self._copies:
            stall_seconds = time.monotonic() - began
            self._pending = self._thread.submit(self._write_beside, plan, manifest, began, stall_seconds)
        else:
            self._pending = Future()
            try:
                self._pending.set_result(self._write(plan, manifest, began, None))
            except CheckpointError as error:
                self._pending.set_exception(error)

    def finished(self) -> SaveResult | None:
        """The result of a save that has come to a good end since the last call; None otherwise. Never waits.

        Ranks may see the end at different times: a failure is for `failed`, and for `wait` once all know of it.
        """
        return self.wait() if self._pending is not None and self._pending.done() and not self.failed else None

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in flight has failed. If one raised at once, it would leave the others
        in the middle of a step."""
        return self._pending is not None and self._pending.done() and self._pending.exception() is not None

    def wait(self) -> SaveResult | None:
        """Wait for the save in flight, if there is one, and return its result; called on every rank at the same step.

        CheckpointError, on every rank, when it failed.
        """
        pending, self._pending = self._pending, None
        try:
            return pending.result() if pending is not None else None
        except CheckpointError:  # on all: none leaves, and has the others ended, before every rank can say why
            distributed.barrier(group=self._group)
            raise

    def _write_beside(self, plan: _Plan, manifest: dict, began: float, stall_seconds: float) -> SaveResult:
        watch = self._watchdog.beside("save in the background", manifest["step"]) if self._watchdog else nullcontext()
        with watch:
            return self._write(plan, manifest, began, stall_seconds)

    def _tried_again(self) -> None:
        if self._watchdog:
            self._watchdog.tried_again()

    def _write(self, plan: _Plan, manifest: dict, began: float, stall_seconds: float | None) -> SaveResult:
        step = manifest["step"]
        write = partial(self._write_once, plan, manifest)
        persist(write, self._retry_seconds, SaveError, say=self._rank == 0, again=self._tried_again)  # on all alike
        seconds = time.monotonic() - began
        return SaveResult(
            step=step,
            folder=self.checkpoints / folder_name(step),
            stall_seconds=seconds if stall_seconds is None else stall_seconds,
            seconds=seconds,
            bytes=sum(file["bytes"] for file in manifest["files"].values()),
            weights=manifest["weights"],
        )

    def _write_once(self, plan: _Plan, manifest: dict) -> None:
        step = manifest["step"]
        aside = aside_folder(self.checkpoints, step)

        def begin() -> None:
            plan.write_small_files(start_writing(self.checkpoints, step))

        self._everywhere(step, lambda: begin() if self._rank == 0 else None)
        files: dict[str, dict] = {}
        self._everywhere(step, lambda: files.update(plan.write(aside, self._group)))
        gathered: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(gathered, files, group=self._group)
        manifest["files"] = {name: facts for written in gathered for name, facts in written.items()}
        self._everywhere(step, lambda: publish(aside, manifest) if self._rank == 0 else None)

    def _everywhere(self, step: int, action: Callable[[], object]) -> None:
        """Run `action` on this rank; when it failed on any, raise CheckpointError on all."""
        try:
            action()
            error = None
        except (Exception, CheckpointException) as exception:
            # What failed on one rank must be known to all, or they wait for it forever. torch's CheckpointException
            # is a BaseException and carries the first cause of each rank.
            error = first_cause(exception)
        errors: list = [None] * distributed.get_world_size()
        distributed.all_gather_object(errors, error, group=self._group)
        found = next((error for error in errors if error), None)
        if found is not None:
            raise SaveError(
                f"step {step} could not be saved under {self.checkpoints}: {found}; earlier checkpoints are "
                "untouched. Make room or restore access, and start again to resume from the last one",
                f"step {step} is not saved yet ({found})",
            )
