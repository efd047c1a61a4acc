"""Faults put into a real run: found within a few steps, judged, told of in a dossier; and none found where none is."""

import json
import shutil
from functools import partial
from pathlib import Path

import injected_faults
import pytest
from injected_faults import BAD_ROWS, BATCH, WATCHED
from rank_processes import pretrain, results_of
from run_results import events_of, steps_of

STEPS, LEFT_AT = 150, 100
FAULTY = range(111, 123)  # steps
WITHIN_STEPS = 5
SETTINGS = [*WATCHED, f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def half(small_config, tmp_path_factory) -> Path:
    """The run folder of a run that left after step 100."""
    folder = tmp_path_factory.mktemp("half") / "run"
    leave = partial(injected_faults.leave_after, LEFT_AT)
    results_of(pretrain(1, small_config, [*SETTINGS, f"run.folder={folder}"], folder.with_name("output"), fault=leave))
    return folder


@pytest.fixture
def went_on(half, small_config, tmp_path):
    """went_on(fault) -> the run folder of the same run, gone on to its end with the fault."""

    def go_on(fault) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(half, folder)
        results_of(pretrain(1, small_config, [*SETTINGS, f"run.folder={folder}"], tmp_path / "output", fault=fault))
        return folder

    return go_on


# Which signals may be named first, and what comes of it within 20 steps
FOUND = {
    "garbage_rows": ("benign", ""),
    "one_garbage_row": ("benign", ""),
    "repeated_tokens": ("benign", ""),
    "label_noise": ("benign", ""),
    "learning_rate_jump": ("malignant", "activation_rms"),
    "flipped_weight_bit": ("malignant", "activation_rms of layer 3"),
    "corrupted_moment": ("benign", "activation_rms of layer 2"),
}


@pytest.mark.parametrize("fault", injected_faults.SPIKES, ids=lambda fault: fault.__name__)
def test_fault_is_found_and_judged(went_on, fault):
    folder = went_on(partial(fault, FAULTY))
    kind, first_signal = FOUND[fault.__name__]
    found = events_of(folder, "spike")
    assert [event["kind"] for event in found] == ["spike", kind]
    spike = found[0]
    delay = spike["trip"] - FAULTY[0] + 1
    told = f"{fault.__name__}: called after {delay} steps, {found[1]['kind']} at step {found[1]['step']}"
    print(told)
    assert delay <= WITHIN_STEPS, told
    assert FAULTY[0] <= spike["onset"] <= FAULTY[1], told
    if first_signal:
        assert spike["layers"][0]["signal"].startswith(first_signal), spike["layers"]
    dossier = json.loads((folder / "dossiers" / spike["dossier"]).read_text())
    assert dossier["kind"] == kind, "the verdict takes the place of the call"
    recovered = dossier["recovered"]
    if dossier["over"]:
        assert max(recovered.values()) == dossier["step"], recovered
    else:
        lasting = {signal for signal, step in recovered.items() if step is None}
        assert lasting, "what is not over has a signal that is not back"
        assert kind == "benign" or "loss" in lasting, recovered


def test_no_false_alarm_in_a_clean_run(went_on):
    folder = went_on(None)
    assert sorted(steps_of(folder)) == list(range(1, STEPS + 1))
    assert events_of(folder, "spike") == []


def test_dossier_names_the_rows_that_did_it(went_on):
    folder = went_on(partial(injected_faults.garbage_rows, FAULTY))
    (path,) = (folder / "dossiers").iterdir()
    dossier = json.loads(path.read_text())
    assert (dossier["onset"], dossier["trip"]) == (111, 114)
    suspects = dossier["samples"]
    assert {suspect["step"] for suspect in suspects} == {110, 111, 112, 113, 114}
    assert len(suspects) == 5 * BATCH
    losses = [suspect["loss"] for suspect in suspects]
    assert losses == sorted(losses, reverse=True)
    bad = {(step - 1) * BATCH + row for step in (111, 112, 113, 114) for row in BAD_ROWS}
    assert {suspect["sample"] for suspect in suspects[: len(bad)]} == bad
    assert losses[len(bad) - 1] > losses[len(bad)] + 1.0
    for suspect in suspects:
        assert suspect["step"] == suspect["sample"] // BATCH + 1
        assert all(span["end_token"] > span["first_token"] for span in suspect["documents"])
        assert sum(span["end_token"] - span["first_token"] for span in suspect["documents"]) == 33
    told = {step["step"]: step for step in dossier["steps"]}
    assert told == {
        number: {key: step[key] for key in told[number]} for number, step in steps_of(folder).items() if number in told
    }
    assert {"loss", "grad_norm", "learning_rate", "samples", "layers"} < told[112].keys()
    assert FAULTY[-1] < dossier["recovered"]["loss"] <= dossier["step"] == 131
