"""The watch on a running training: its state, and what it writes down about each spike.

In:  the journal's step events, the losses of their samples, the manifest of the checkpoint resumed from. Out: findings,
and a dossier a spike in the run folder's dossiers/: when, the steps around it with their layers, which samples led into
it with their losses and documents, and which signals recovered when.
"""

import json
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from k2_megatron.config.schema import Spikes
from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.journal import Journal
from k2_megatron.train.checkpoints.folders import complete_checkpoints
from k2_megatron.train.checkpoints.manifest import step_of
from k2_megatron.train.spikes.ceiling import Ceiling, ceiling
from k2_megatron.train.spikes.detector import Finding, State, batch_of, observe, restore
from k2_megatron.train.spikes.layer_signals import signals
from k2_megatron.train.spikes.policy import Decision

DOSSIERS = "dossiers"
# A checkpoint from before a malignant spike that nothing was done about is kept for this many times benign_steps, for a
# person to go back to: with the default 10,000 steps, some two days of a run of 65B.
KEPT_FOR = 100
SAMPLES_DESCRIBED = 256  # the documents of more would make the dossier unreadable; tools/inspect_data.py tells the rest
_OF_A_STEP = ("step", "loss", "grad_norm", "highest_sample_loss", "learning_rate", "samples", "layers")


@dataclass(frozen=True)
class Watched:
    """A step as the journal has it, the loss of each of its samples, and the signals that were disturbed after it."""

    event: dict
    sample_losses: Sequence[float]
    disturbed: tuple[str, ...]

    @property
    def step(self) -> int:
        return self.event["step"]


class SpikeWatch:
    """Equal on every rank; `writer` alone writes dossiers."""

    def __init__(self, settings: Spikes, folder: Path, *, writer: bool) -> None:
        self.settings = settings
        self.state = State()
        self._malignant: tuple[int, ...] = ()  # onsets of spikes judged so, or never: to go back before
        self._folder, self._writer = folder / DOSSIERS, writer
        self._steps: deque[Watched] = deque(maxlen=settings.window_steps + settings.benign_steps)

    def position(self) -> dict:
        """What a checkpoint's manifest keeps."""
        return {"spikes": self.state.plain(), "malignant_spikes": self._malignant}

    def resume_at(self, manifest: dict) -> None:
        """Go on with the state of a checkpoint; a checkpoint from elsewhere has none."""
        self.state = restore(manifest["spikes"]) if "spikes" in manifest else State()
        self._malignant = tuple(manifest.get("malignant_spikes", ()))
        self._steps.clear()

    def observe(self, event: dict, sample_losses: Sequence[float]) -> Finding | None:
        """Take in one step event of the journal, and the loss of each of the step's samples."""
        before, values = self.state, (event["step"], event["loss"], event["grad_norm"], event.get("layers"))
        self.state, finding = observe(before, self.settings, *values, max(sample_losses), batch_of(event))
        # What is judged and not over is measured anew: its sums are gone, and it is not.
        lasts = finding and finding.kind != "spike" and not finding.over
        disturbed = _disturbed(before if lasts else self.state, self.settings.threshold, event)
        oldest = event["step"] - KEPT_FOR * self.settings.benign_steps
        self._malignant = tuple(onset for onset in self._malignant if onset >= oldest)
        if finding and finding.kind == "malignant":
            self._malignant += (finding.onset,)
        elif not finding and before.trip is not None and self.state.trip is None and before.began is not None:
            self._malignant += (before.began,)  # the batch was changed before it was judged
        kept = {key: event[key] for key in _OF_A_STEP if key in event}
        self._steps.append(Watched(kept, sample_losses, disturbed))
        return finding

    def ceiling(self) -> Ceiling:
        """Above what the next step is in doubt."""
        return ceiling(self.state, self.settings.suspect_factor)

    def pinned(self, checkpoints: Path) -> set[int]:
        """The checkpoints to go back to, which retention must leave alone: from before what is going on now, as it may
        turn out malignant, and from before each spike that did, for KEPT_FOR times benign_steps."""
        onsets = (*self._malignant, *beginnings(self.state, self.settings.threshold))
        saved = [step_of(folder) for folder in complete_checkpoints(checkpoints)]
        before = [[step for step in saved if step < onset] for onset in onsets]
        return {max(steps) for steps in before if steps}

    def tell(
        self, finding: Finding, decision: Decision, feed: AnyFeed, journal: Journal, say: Callable[[str], None]
    ) -> None:
        """Tell of a spike and of what is done about it: a dossier, the journal, the console."""
        dossier = self.write_dossier(finding, feed, decision.reason)
        journal.write("spike", dossier=dossier and dossier.name, decision=decision.kind, **asdict(finding))
        say(f"step {finding.step}: {decision.reason} ({decision.kind})")

    def write_dossier(self, finding: Finding, feed: AnyFeed, decision: str) -> Path | None:
        """Write what is known of the spike, with what was written when it was called: a restart has forgotten those
        steps. None where the disk does not take it, which does not end a run."""
        if not self._writer:
            return None
        path = self._folder / f"spike_step_{finding.onset:08d}.json"
        try:
            self._folder.mkdir(exist_ok=True)
            earlier = self._written_before(path)
            samples = sorted(
                [*earlier["samples"], *self._samples(finding, feed)], key=lambda sample: sample["loss"], reverse=True
            )
            dossier = {
                **asdict(finding),
                "decision": decision,
                "settings": self.settings.model_dump(),
                "recovered": {**earlier["recovered"], **self._recovered(finding)},
                "samples": samples[:SAMPLES_DESCRIBED],
                "steps": [*earlier["steps"], *(watched.event for watched in self._steps)],
            }
            write_file(path, json.dumps(dossier, indent=1))
        except OSError as error:
            print(f"dossier: cannot write {path} ({error}); the run goes on", file=sys.stderr, flush=True)
            return None
        return path

    def _written_before(self, path: Path) -> dict:
        """Of a dossier that is there, the steps before those remembered, their samples, and what they disturbed; that
        is over, when it does not show in a step remembered since."""
        first = self._steps[0].step
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError):  # none, or one that a kill cut
            found = {"steps": [], "samples": [], "recovered": {}}
        steps = [step for step in found["steps"] if step["step"] < first]
        recovered = {signal: first if step is None else step for signal, step in found["recovered"].items()}
        return {
            "steps": steps,
            "samples": [sample for sample in found["samples"] if sample["step"] < first],
            "recovered": recovered if steps else {},
        }

    def _samples(self, finding: Finding, feed: AnyFeed) -> list[dict]:
        """The samples of the batches from the one before the onset to the trip, the highest loss first."""
        suspects = [
            (loss, watched.step, sample)
            for watched in self._steps
            if finding.onset - 1 <= watched.step <= finding.trip
            for sample, loss in zip(range(*watched.event["samples"]), watched.sample_losses, strict=True)
        ]
        return [
            {
                "sample": sample,
                "step": step,
                "loss": loss,
                "documents": [asdict(span) for span in feed.describe(sample)],
            }
            for loss, step, sample in sorted(suspects, reverse=True)[:SAMPLES_DESCRIBED]
        ]

    def _recovered(self, finding: Finding) -> dict[str, int | None]:
        """{signal disturbed since the onset: the first step at which it was not any more, None while it is}."""
        since = [watched for watched in self._steps if watched.step >= finding.onset]
        last = {signal: watched.step for watched in since for signal in watched.disturbed}
        return {signal: step + 1 if step < finding.step else None for signal, step in last.items()}


def beginnings(state: State, threshold: float) -> set[int]:
    """The steps, four at most, before which the run may have to go back: where the spike that was called began, where
    loss and norm left zero, and the earliest that a layer or the samples did, of all and of those that are up. Among
    many some are always a little above zero; a checkpoint for each of them would be too many."""
    own = sorted(zip(state.own_onsets, state.own_sums, strict=True))
    risen = [onset for onset, total in own if total > 0]
    up = [onset for onset, total in own if total >= threshold / 2]
    return {step for step in (state.began, state.onset, *risen[:1], *up[:1]) if step is not None}


def _disturbed(state: State, threshold: float, event: dict) -> tuple[str, ...]:
    named = [name for name, total in (("loss", state.loss_sum), ("grad_norm", state.norm_sum)) if total > 0]
    named += ["highest_sample_loss" for total in state.samples.sums if total >= threshold / 2]
    if state.layers.sums and "layers" in event:
        totals = zip(signals(event["layers"]), state.layers.sums, strict=True)
        named += [name for name, total in totals if total >= threshold / 2]  # as in the detector
    return tuple(named)
