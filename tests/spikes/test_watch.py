"""What the watch keeps of a spike: the checkpoint from before it, and a dossier that a restart does not empty."""

import json
from pathlib import Path

import numpy as np
import pytest

from k2_megatron.config.schema import Spikes
from k2_megatron.train.checkpoints.folders import apply_retention, complete_checkpoints
from k2_megatron.train.checkpoints.manifest import MANIFEST, folder_name, step_of
from k2_megatron.train.spikes.detector import Finding, State
from k2_megatron.train.spikes.layer_signals import LayerState
from k2_megatron.train.spikes.watch import KEPT_FOR, SpikeWatch

SETTINGS = Spikes(window_steps=16, benign_steps=10)
FIRST_BAD = 46  # step; loss and gradient norm stay up
BATCH = 2


class Documents:
    """A feed without documents."""

    def describe(self, _sample: int) -> list:
        return []


def watched(watch: SpikeWatch, steps: range) -> list[tuple]:
    """[(finding, the dossier written)] of a run whose loss and gradient norm go up at FIRST_BAD, and stay up."""
    found = []
    for step in steps:
        wobble, up = step * 7919 % 101 / 5000, step >= FIRST_BAD
        event = {"step": step, "loss": 2.0 + up + wobble, "grad_norm": 1.0 + 3 * up + wobble}
        event["samples"] = [(step - 1) * BATCH, step * BATCH]
        finding = watch.observe(event, [event["loss"]] * BATCH)
        if finding:
            found.append((finding, watch.write_dossier(finding, Documents(), "watch")))
    return found


def saved(checkpoints: Path, *steps: int) -> list[int]:
    """Save these steps, let older ones go, and say which are left."""
    for step in steps:
        (checkpoints / folder_name(step)).mkdir(parents=True)
        (checkpoints / folder_name(step) / MANIFEST).write_text("{}")
    return [step_of(folder) for folder in complete_checkpoints(checkpoints)]


def test_checkpoint_from_before_a_malignant_spike_is_kept_for_a_person(tmp_path):
    watch = SpikeWatch(SETTINGS, tmp_path, writer=True)
    saved(tmp_path, 20, 40, 60)
    assert [finding.kind for finding, _ in watched(watch, range(1, 70))] == ["spike", "malignant"]
    saved(tmp_path, 80, 100)
    assert apply_retention(tmp_path, 2, None, watch.pinned(tmp_path)) == [60, 20]
    again = SpikeWatch(SETTINGS, tmp_path, writer=True)
    again.resume_at(json.loads(json.dumps(watch.position())))
    assert again.pinned(tmp_path) == {40}, "a restart forgets nothing of it"
    last = FIRST_BAD + KEPT_FOR * SETTINGS.benign_steps
    watched(again, range(last, last + 1))
    assert again.pinned(tmp_path) == {40}
    watched(again, range(last + 1, last + 2))
    assert again.pinned(tmp_path) == set(), "but not for ever"


SAVE_EVERY = 100


def saving(watch: SpikeWatch, folder: Path, steps: range, layers, losses=None) -> tuple[int, list[int], Finding]:
    """(the most checkpoints there ever were, those there at the first finding or the end, that finding) of a run that
    saves every SAVE_EVERY steps and keeps two; (step -> what it tells of its layers)."""
    most, finding = 0, None
    for step in steps:
        if step % SAVE_EVERY == 1 and step > 1:
            saved(folder, step - 1)
            apply_retention(folder, 2, None, watch.pinned(folder))
            most = max(most, len(saved(folder)))
        random = np.random.default_rng(step)
        event = {"step": step, "loss": 2.0 + 0.01 * random.standard_normal()}
        event |= {"grad_norm": float(np.exp(0.03 * random.standard_normal())), "samples": [0, BATCH]}
        highest = event["loss"] + abs(random.standard_t(3))
        event |= {"layers": of_step} if (of_step := layers(step, random)) else {}
        if (finding := watch.observe(event, [event["loss"], highest])) is not None:
            break
    return most, saved(folder), finding


def test_checkpoint_from_before_what_one_layer_began_is_kept_until_it_is_called(tmp_path):
    """A layer that rises by little, told of at every tenth step, is called hundreds of steps later."""

    def creeping(step: int, random) -> dict | None:
        values = np.exp(0.01 * random.standard_normal(8))
        values[4] *= 1.2 if step >= 1500 else 1.0
        return {"activation_rms": values.tolist()} if step % 10 == 0 else None

    most, left, spike = saving(SpikeWatch(Spikes(), tmp_path, writer=True), tmp_path, range(1, 2000), creeping)
    assert (spike.kind, spike.onset) == ("spike", 1500)
    assert spike.trip > spike.onset + 3 * SAVE_EVERY, "the newest two are of after its onset"
    assert left[-1] == 1400 and most <= 4


def test_checkpoint_from_before_what_the_samples_began_is_kept_beside_that_of_the_loss(tmp_path):
    """A stop in the first steps of a spike: what was saved is of after its samples went up, and before its loss did."""
    watch = SpikeWatch(SETTINGS, tmp_path, writer=True)
    samples = LayerState(sums=(15.0,), onsets=(40,))
    noise = LayerState(sums=(0.3, 0.1, 0.0, 0.2), onsets=(27, 33, 0, 42))
    watch.state = State(loss_sum=10.0, onset=41, layers=noise, samples=samples)
    saved(tmp_path, 10, 20, 30, 40, 42)
    assert watch.pinned(tmp_path) == {20, 30, 40}
    watch.state = State(layers=LayerState(sums=(0.0, 0.0), onsets=(0, 0)))
    assert watch.pinned(tmp_path) == set()


def test_restart_between_call_and_verdict_keeps_what_the_dossier_said(tmp_path):
    whole = SpikeWatch(SETTINGS, tmp_path / "whole", writer=True)
    (tmp_path / "whole").mkdir()
    ((_, _), (verdict, path)) = watched(whole, range(1, 70))
    expected = json.loads(path.read_text())
    assert {sample["step"] for sample in expected["samples"]} == set(range(FIRST_BAD - 1, verdict.trip + 1))

    (tmp_path / "run").mkdir()
    before = SpikeWatch(SETTINGS, tmp_path / "run", writer=True)
    assert len(watched(before, range(1, verdict.trip + 1))) == 1
    again = SpikeWatch(SETTINGS, tmp_path / "run", writer=True)
    again.resume_at(json.loads(json.dumps(before.position())))
    ((_, path),) = watched(again, range(verdict.trip + 1, 70))
    assert json.loads(path.read_text()) == expected


def test_full_disk_at_a_spike_is_one_line_and_the_run_goes_on(tmp_path, capsys):
    (tmp_path / "dossiers").write_text("no folder can be made here, nor written into")
    found = watched(SpikeWatch(SETTINGS, tmp_path, writer=True), range(1, 70))
    assert [(finding.kind, path) for finding, path in found] == [("spike", None), ("malignant", None)]
    assert capsys.readouterr().err.count("; the run goes on\n") == 2


def findings(watch: SpikeWatch, steps: range, batch: int, length: int, loss=2.0, norm=1.0) -> list[str]:
    """The kinds of what is found in steps whose norms scatter by 3 %, and their losses by less."""
    found = []
    for step in steps:
        random = np.random.default_rng(step)
        event = {"step": step, "loss": loss + 0.01 * random.standard_normal(), "sequence_length": length}
        event |= {"grad_norm": norm * np.exp(0.03 * random.standard_normal())}
        finding = watch.observe({**event, "samples": [step * batch, (step + 1) * batch]}, [event["loss"] + 0.5] * batch)
        found += [finding.kind] if finding else []
    return found


def resumed(watch: SpikeWatch, folder: Path) -> SpikeWatch:
    again = SpikeWatch(watch.settings, folder, writer=True)
    again.resume_at(json.loads(json.dumps(watch.position())))
    return again


@pytest.mark.parametrize(("batch", "length", "loss"), [(32, 64, 2.0), (8, 64, 2.0), (32, 32, 2.3), (64, 32, 2.3)])
def test_smaller_batch_or_other_length_is_no_spike_and_what_follows_is_watched(tmp_path, batch, length, loss):
    before = SpikeWatch(Spikes(), tmp_path, writer=True)
    assert findings(before, range(1, 300), 64, 64) == []
    again, level = resumed(before, tmp_path), {"loss": loss, "norm": (64 / batch) ** 0.5}
    assert findings(again, range(300, 500), batch, length, **level) == []
    again = resumed(again, tmp_path)  # a restart under the same batch is none to the measure
    assert findings(again, range(500, 530), batch, length, loss + 0.5, 3 * level["norm"]) == ["spike"]
    assert findings(again, range(530, 600), batch, length, **level) == ["benign"]


def test_larger_batch_is_watched_on(tmp_path):
    watch = SpikeWatch(Spikes(), tmp_path, writer=True)
    assert findings(watch, range(1, 300), 32, 64) == []
    assert findings(watch, range(300, 320), 64, 64, norm=0.7) == []
    assert findings(watch, range(320, 350), 64, 64, loss=2.5) == ["spike"]


def test_checkpoint_from_before_a_spike_that_a_change_left_unjudged_is_kept(tmp_path):
    watch = SpikeWatch(SETTINGS, tmp_path, writer=True)
    saved(tmp_path, 40, 60)
    assert findings(watch, range(1, 46), 64, 64) == []
    assert findings(watch, range(46, 52), 64, 64, loss=3.0) == ["spike"]
    assert findings(watch, range(52, 90), 32, 64, loss=3.0) == []
    assert watch.pinned(tmp_path) == {40}
