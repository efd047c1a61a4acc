"""The watch on a running training: its state, and what it writes down about each spike.

In:  the journal's step events, the manifest of the checkpoint resumed from. Out: findings, and a dossier a spike in the
run folder's dossiers/: when, which samples and documents were read before it, the steps around it, how it ended.
"""

import json
from collections import deque
from dataclasses import asdict
from pathlib import Path

from k2_megatron.config.schema import Spikes
from k2_megatron.data.feed import Feed
from k2_megatron.runtime.durable import write_file
from k2_megatron.train.checkpoint_files import complete_checkpoints, step_of
from k2_megatron.train.spikes.detector import Finding, State, observe, restore

DOSSIERS = "dossiers"
SAMPLES_DESCRIBED = 256  # the documents of more would make the dossier unreadable; tools/inspect_data.py tells the rest
_OF_A_STEP = ("step", "loss", "grad_norm", "learning_rate", "samples")


class SpikeWatch:
    """Equal on every rank; `writer` alone writes dossiers."""

    def __init__(self, settings: Spikes, folder: Path, *, writer: bool) -> None:
        self.settings = settings
        self.state = State()
        self._folder, self._writer = folder / DOSSIERS, writer
        self._steps: deque[dict] = deque(maxlen=settings.window_steps + settings.benign_steps)

    def position(self) -> dict:
        """What a checkpoint's manifest keeps."""
        return {"spikes": self.state.plain()}

    def resume_at(self, manifest: dict) -> None:
        """Go on with the state of a checkpoint; a checkpoint from elsewhere has none."""
        self.state = restore(manifest["spikes"]) if "spikes" in manifest else State()
        self._steps.clear()

    def observe(self, event: dict) -> Finding | None:
        """Take in one step event of the journal."""
        self._steps.append({key: event[key] for key in _OF_A_STEP})
        signals = (event["step"], event["loss"], event["grad_norm"], event.get("layers"))
        self.state, finding = observe(self.state, self.settings, *signals)
        return finding

    def pinned(self, checkpoints: Path) -> set[int]:
        """The checkpoint to go back to if what is going on turns out malignant: retention must leave it alone."""
        if self.state.onset is None:
            return set()
        before = [step for step in map(step_of, complete_checkpoints(checkpoints)) if step < self.state.onset]
        return set(before[:1])

    def write_dossier(self, finding: Finding, feed: Feed, decision: str) -> Path | None:
        """Write what is known of the spike, in place of what was written when it was called."""
        if not self._writer:
            return None
        self._folder.mkdir(exist_ok=True)
        path = self._folder / f"spike_step_{finding.onset:08d}.json"
        dossier = {
            **asdict(finding),
            "decision": decision,
            "settings": self.settings.model_dump(),
            "steps": list(self._steps),
            "documents": self._documents(finding, feed),
        }
        write_file(path, json.dumps(dossier, indent=1))
        return path

    def _documents(self, finding: Finding, feed: Feed) -> dict[int, list[dict]]:
        """{sample: the documents it holds} of the batches from the one before the onset to the trip."""
        steps = [step for step in self._steps if finding.onset - 1 <= step["step"] <= finding.trip]
        samples = [sample for step in steps for sample in range(*step["samples"])]
        return {sample: [asdict(span) for span in feed.describe(sample)] for sample in samples[:SAMPLES_DESCRIBED]}
