"""The saves of one run: how far it is saved, what the journal is told of each, and which older ones may go.

In:  the folder of checkpoints, how the run saves, the journal. Out: two steps that the loop goes by:
`saved_step`, which is published (all ranks know of it after `wait`), and `kept_step`, the same or still being written.
"""

import sys
import time
from pathlib import Path

from k2_megatron.config import Config
from k2_megatron.config.schema import Checkpoint
from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.mistakes import StopRun
from k2_megatron.train.checkpoints.folders import apply_retention
from k2_megatron.train.checkpoints.manifest import CheckpointError
from k2_megatron.train.checkpoints.save import CheckpointWriter, SaveResult
from k2_megatron.train.checkpoints.state import part_bytes
from k2_megatron.train.events import checkpoint_fields
from k2_megatron.train.parts import Parts
from k2_megatron.train.spikes.watch import SpikeWatch
from k2_megatron.train.watchdog import Watchdog


class Saves:
    """Begins at `step`, that of the checkpoint that the run goes on from, or 0; made on every rank alike."""

    def __init__(
        self,
        checkpoints: Path,
        settings: Checkpoint,
        parts: Parts,
        journal: Journal,
        watchdog: Watchdog,
        step: int,
    ) -> None:
        self._settings, self._journal, self._watchdog = settings, journal, watchdog
        self._writer = CheckpointWriter(
            checkpoints,
            parts.groups,
            asynchronous=settings.asynchronous,
            retry_seconds=settings.retry_seconds,
            part_bytes=part_bytes(parts.chunks, parts.groups),
            watchdog=watchdog,
        )
        self.saved_step = self.kept_step = step
        self._seconds = 0.0

    @property
    def failed(self) -> bool:
        """Whether this rank knows that the save in flight has failed; `wait` tells all."""
        return self._writer.failed

    def begin(self, step: int, config: Config, parts: Parts, facts: dict) -> None:
        """Begin to save `step`; `facts` go into the manifest."""
        began = time.monotonic()
        self._writer.save(step, config, parts, facts)
        self._seconds = time.monotonic() - began
        self.kept_step = step

    def look(self) -> None:
        """Tell of a save that has come to its end, if one has. Never waits."""
        self._tell(self._writer.finished())

    def wait(self) -> None:
        """Wait for the save in flight, if there is one, and tell of it. CheckpointError, on all ranks, if it failed."""
        with self._watchdog.waiting():
            saved = self._writer.wait()
        self._tell(saved)

    def go_back(self, step: int) -> None:
        """The run goes on from the checkpoint of `step`, which is an earlier one."""
        self.saved_step = self.kept_step = step

    def take_seconds(self) -> float:
        """What the run waited for the last save, where that came after this was asked before."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def remove_older(self, spikes: SpikeWatch) -> None:
        """Let older checkpoints go. To be called where no rank is in a step: removing a large one may outlast its
        limit. One that cannot be removed does not end a run."""
        if not self._journal.is_writer:
            return
        checkpoints, keep = self._writer.checkpoints, self._settings
        try:
            apply_retention(checkpoints, keep.keep_last, keep.keep_every_steps, spikes.pinned(checkpoints))
        except (CheckpointError, OSError) as error:
            print(f"older checkpoints stay until the next save: {error}", file=sys.stderr, flush=True)

    def let_end(self, error: BaseException | None) -> None:
        """The run ends, by `error` if there is one. Where all ranks stop together the save in flight is waited for:
        what it holds was sound. Another error is one rank's, and a save needs them all."""
        if error is None:
            return
        self._watchdog.leaving()
        if isinstance(error, StopRun):
            try:
                self.wait()
            except CheckpointError as failed:
                print(failed, file=sys.stderr, flush=True)
            last = f"the last save was step {self.saved_step}" if self.saved_step else "nothing had been saved"
            error.args = (f"{error}; {last}",)  # known only now

    def _tell(self, saved: SaveResult | None) -> None:
        if saved is not None:
            self._journal.write("checkpoint", **checkpoint_fields(saved))
            self.saved_step = saved.step
