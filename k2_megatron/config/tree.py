"""Config: the frozen tree of one run, with every number that follows from it.

In: valid sections. Out: derived numbers as properties and functions of the step. Nothing that can be computed is ever
asked for in a file, so there is one place for each number. Steps are counted from 0: `global_batch_at(step)` is the
batch of the update that follows `step` finished ones.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from k2_megatron.config import batch
from k2_megatron.config.changes import HARMLESS
from k2_megatron.config.checks import problems_of
from k2_megatron.config.problems import raise_problems
from k2_megatron.config.schema import (
    Checkpoint,
    Data,
    Log,
    Model,
    Optimizer,
    Parallel,
    Run,
    Spikes,
    Stage,
    Train,
    Watchdog,
)
from k2_megatron.config.toml_text import toml_document


class Config(BaseModel):
    """One run, whole and consistent: constructing it checks all sections against each other (ValueError)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run: Run
    model: Model
    parallel: Parallel = Field(default_factory=Parallel)
    data: Data
    train: Train
    optimizer: Optimizer
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    spikes: Spikes = Field(default_factory=Spikes)
    watchdog: Watchdog = Field(default_factory=Watchdog)
    log: Log = Field(default_factory=Log)

    @model_validator(mode="after")
    def _sections_agree(self) -> "Config":
        raise_problems("configuration", problems_of(self))
        return self

    # Layout

    @property
    def model_parallel_size(self) -> int:
        """Ranks that hold one replica of the model: tensor * pipeline * context."""
        return self.parallel.tensor * self.parallel.pipeline * self.parallel.context

    @property
    def world_size(self) -> int:
        """Ranks of the whole run."""
        return self.model_parallel_size * self.parallel.data

    @property
    def layers_per_chunk(self) -> int:
        """Transformer layers in one model chunk (a stage holds virtual_pipeline of them)."""
        return self.model.layers // (self.parallel.pipeline * self.parallel.virtual_pipeline)

    # Batches, samples and tokens

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Spans of steps with one global batch and one sequence length each; the last has no end."""
        train = self.train
        return batch.stages_of(train.global_batch, self.model.sequence_length, train.batch_ramp, train.history)

    def global_batch_at(self, step: int) -> int:
        """Sequences in update number `step` (from 0), over all data-parallel ranks."""
        return batch.stage_at(self.stages, step).global_batch

    def micro_batches_at(self, step: int) -> int:
        """Micro-batches that each data-parallel rank accumulates in update number `step` (from 0)."""
        return self.global_batch_at(step) // (self.train.micro_batch * self.parallel.data)

    def consumed_samples_at(self, step: int) -> int:
        """Samples consumed when `step` updates are done: the number of the next update's first sample, which after a
        change of the sequence length is counted in the new one."""
        return batch.consumed_samples(self.stages, step)

    def sequence_length_at(self, step: int) -> int:
        """Tokens of a sequence in update number `step` (from 0)."""
        return batch.stage_at(self.stages, step).sequence_length

    def position_at(self, step: int) -> int:
        """`consumed_samples_at`, counted in sequences of the present length, rounded up."""
        stage = batch.stage_at(self.stages, step)
        samples = batch.samples_until(stage, step)
        return batch.carried_over(samples, stage.sequence_length, self.model.sequence_length)

    def consumed_tokens_at(self, step: int) -> int:
        """Trained positions (samples * their length) when `step` updates are done."""
        return sum(self.tokens_by_length_at(step).values())

    def tokens_by_length_at(self, step: int) -> dict[int, int]:
        """{sequence length: tokens trained in it} when `step` updates are done."""
        found: dict[int, int] = {}
        for stage, first, end in batch.parts(self.stages, step):
            length = stage.sequence_length
            found[length] = found.get(length, 0) + (end - first) * length
        return found

    @property
    def tokens_per_step(self) -> int:
        """Tokens in one update of the full global batch."""
        return self.train.global_batch * self.model.sequence_length

    @property
    def total_samples(self) -> int:
        """The number of the sample after the run's last: where the length never changed, the sequences of the run."""
        return self.consumed_samples_at(self.train.steps)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.consumed_tokens_at(self.train.steps)

    def going_on(self, step: int, done: Sequence[Stage]) -> "Config":
        """This configuration for a run that has done `step` updates in the stages `done`: where batch or length are not
        what they were, a stage begins, at the first sample that holds no token trained on."""
        history = batch.going_on(batch.planned_stages(self.train, self.model.sequence_length), done, step)
        return self.model_copy(update={"train": self.train.model_copy(update={"history": history})})

    @property
    def last_change(self) -> batch.Stage | None:
        """The stage that began when batch or length were changed last; None in a run that kept them."""
        planned = batch.planned_stages(self.train, self.model.sequence_length)
        return batch.last_change(self.train.history or (), planned)

    # Checkpoints

    @property
    def checkpoints(self) -> int:
        """Checkpoints that the whole run writes, the one after the last step included."""
        return -(-self.train.steps // self.checkpoint.every_steps)

    # The tree as text

    def to_toml(self) -> str:
        """The resolved tree as TOML: every value written out, defaults included. `load_config` reads it back equal."""
        return toml_document(self.model_dump(exclude_none=True))

    def flat(self) -> dict[str, Any]:
        """Every value under its dotted key; tables inside a section stay whole."""
        tree = self.model_dump()
        return {f"{name}.{key}": value for name, section in tree.items() for key, value in section.items()}

    @property
    def fingerprint(self) -> str:
        """Names the training itself: two configurations share it when, on the same data, they train the same weights
        up to rounding, whatever the layout, the kernels, the paths and what is saved or shown. 16 hex digits."""
        shaping = {key: value for key, value in self.flat().items() if key not in HARMLESS}
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()[:16]
