"""Faults other than kills, each with what must come of it."""

import itertools
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from rank_processes import pretrain, results_of
from run_results import events_of, steps_of, stored_state

STEPS = 9
RANK, BAD = "rank 0 (tensor 0, pipeline 0, context 0, data 0)", "embedding.word_embeddings.weight"
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every_steps=3", "train.evaluate_every_steps=9"]


def settings(folder: Path, *more: str) -> list[str]:
    return [*SETTINGS, f"run.folder={folder}", *more]


@pytest.fixture(scope="module")
def whole(small_config, tmp_path_factory) -> Path:
    """The run folder of a run in which nothing went wrong."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    results_of(pretrain(1, small_config, settings(folder), folder.with_name("output")))
    return folder


def assert_same(folder: Path, whole: Path) -> None:
    assert steps_of(folder) == steps_of(whole)
    assert stored_state(folder, STEPS) == stored_state(whole, STEPS)


def _gradient_not_finite_at_step_5(calls_spoiled: tuple[int, ...] = (5, 6)) -> None:
    """In the step and when it is made again."""
    import k2_megatron.train.step as step

    finalize, calls = step.finalize_model_grads, []

    def spoiled(model, *arguments, **keywords):
        finalize(model, *arguments, **keywords)
        calls.append(1)
        if len(calls) in calls_spoiled:
            next(model[0].parameters()).main_grad.view(-1)[3] = float("nan")

    step.finalize_model_grads = spoiled


def _not_finite_once_and_time_in_marks() -> None:
    """A second passes from each mark of a phase to the next, so that the marks of an attempt tell its time."""
    from k2_megatron.train import phases

    marks = itertools.count()
    phases.StepPhases._mark = lambda self: float(next(marks))
    _gradient_not_finite_at_step_5((5,))


def test_gradient_that_is_not_finite_once_leaves_no_trace(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    fault, measured = _not_finite_once_and_time_in_marks, "log.phases_every_steps=1"
    (ended,) = pretrain(1, small_config, settings(folder, measured), tmp_path / "output", fault=fault)
    assert ended.exit_code == 0, ended.stderr
    (incident,) = events_of(folder, "incident")
    assert (incident["kind"], incident["step"], incident["made_again"]) == ("not finite", 5, True)
    assert f"step 5: not finite: gradients of {BAD} on {RANK}" in ended.stdout
    assert_same(folder, whole)
    backward = [event["seconds"]["backward"] for event in events_of(folder, "phases")]
    assert backward == [backward[0]] * len(backward), "the attempt that was not kept counts in no measurement"


def test_gradient_that_is_not_finite_stops_the_run_with_its_place(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    ended = pretrain(1, small_config, settings(folder), tmp_path / "first", fault=_gradient_not_finite_at_step_5)[0]
    assert ended.exit_code == 5
    assert "step 5" in ended.stderr
    assert "samples 32 to 39" in ended.stderr
    assert f"not finite, 2 times; gradients of {BAD} on {RANK}" in ended.stderr
    incidents = events_of(folder, "incident")
    assert [(incident["step"], incident["made_again"]) for incident in incidents] == [(5, True), (5, False)]
    assert [incident["ranks"] for incident in incidents] == [{RANK: [BAD]}] * 2
    # The third computation, in the next start, is the last.
    fault = partial(_gradient_not_finite_at_step_5, (2, 3, 4))
    ended = pretrain(1, small_config, settings(folder), tmp_path / "second", fault=fault)[0]
    assert ended.exit_code == 5
    assert f"not finite, 1 times; gradients of {BAD} on {RANK}" in ended.stderr
    assert [incident["step"] for incident in events_of(folder, "incident")] == [5, 5, 5]
    # It came from the machine, not from the data: started again, the run is as if it had not happened.
    results_of(pretrain(1, small_config, settings(folder), tmp_path / "third"))
    assert_same(folder, whole)


def test_gradient_that_is_not_finite_is_passed_over_when_asked(small_config, tmp_path, whole):
    straight, stopped, more = tmp_path / "straight", tmp_path / "stopped", "spikes.not_finite_steps=1"
    for folder, fault, extra in ((straight, _gradient_not_finite_at_step_5, []), (stopped, _spoil_and_leave, [])):
        output = folder.with_name(f"{folder.name}_output")
        results_of(pretrain(1, small_config, settings(folder, more, *extra), output, fault=fault))
    assert events_of(stopped, "stop")[0]["step"] == 6
    results_of(pretrain(1, small_config, settings(stopped, more), tmp_path / "again"))
    # A resumed run counts Adam's updates from the run's step; the one that passed a step over must count alike.
    assert_same(stopped, straight)
    steps = steps_of(straight)
    assert sorted(steps) == [1, 2, 3, 4, 6, 7, 8, 9]
    assert {number: steps[number] for number in range(1, 5)} == {
        number: step for number, step in steps_of(whole).items() if number < 5
    }
    assert steps[6] != steps_of(whole)[6]


def test_restart_grants_no_more_steps_to_pass_over(small_config, tmp_path):
    """Step 5 is passed over and saved, step 6 would be the second in a row."""
    folder, more = tmp_path / "run", ["spikes.not_finite_steps=1", "checkpoint.every_steps=5"]
    results_of(pretrain(1, small_config, settings(folder, *more), tmp_path / "first", fault=_spoil_and_leave_after_5))
    assert events_of(folder, "stop")[0]["saved_step"] == 5
    fault = partial(_gradient_not_finite_at_step_5, (1, 2))
    ended = pretrain(1, small_config, settings(folder, *more), tmp_path / "second", fault=fault)[0]
    assert ended.exit_code == 5, ended.stderr
    assert "step 6: " in ended.stderr


def _spoil_and_leave_after_5() -> None:
    _spoil_and_leave(5)


def _spoil_and_leave(after: int = 6) -> None:
    _gradient_not_finite_at_step_5()
    import pretrain_k2

    train = pretrain_k2.train
    pretrain_k2.train = lambda config, environment, device, until, given, ending: train(
        config, environment, device, after, given, ending
    )


def _clock_that_jumps() -> None:
    """One hour forward when step 4 begins, two back when step 7 does."""
    import pretrain_k2

    train_step, clock, calls = pretrain_k2.train_step, time.time, []

    def then(*arguments, **more):
        calls.append(1)
        return train_step(*arguments, **more)

    pretrain_k2.train_step = then
    time.time = lambda: clock() + (0 if len(calls) < 4 else 3600 if len(calls) < 7 else -3600)


def test_clock_that_jumps_by_an_hour_changes_nothing(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    given = settings(folder, "watchdog.heartbeat_seconds=0.05")
    ended = pretrain(2, small_config, [*given, "parallel.pipeline=2"], tmp_path / "output", fault=_clock_that_jumps)
    assert [rank.exit_code for rank in ended] == [0, 0], ended[0].stderr
    assert events_of(folder, "incident") == []
    losses = [{number: step["loss"] for number, step in steps_of(run).items()} for run in (folder, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _journal_unwritable() -> None:
    from k2_megatron.runtime.journal import Journal

    opened = Journal.__init__

    def on_full_device(self, folder, *, writer):
        opened(self, folder, writer=writer)
        if writer:
            self._file = open("/dev/full", "wb", buffering=0)

    Journal.__init__ = on_full_device


def test_unwritable_journal_does_not_stop_training(small_config, tmp_path, whole):
    folder = tmp_path / "run"
    ended = pretrain(1, small_config, settings(folder), tmp_path / "output", fault=_journal_unwritable)[0]
    assert ended.exit_code == 0, ended.stderr
    assert "journal: cannot write" in ended.stderr
    assert stored_state(folder, STEPS) == stored_state(whole, STEPS)


def test_full_disk_stops_with_the_earlier_checkpoint_whole(small_config, tmp_path, whole):
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step_00000003").iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(1.5 * size)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here: needs root")
    try:
        folder = disk / "run"
        ended = pretrain(1, small_config, settings(folder, "checkpoint.retry_seconds=0"), tmp_path / "first")[0]
        assert ended.exit_code == 2
        assert "step 6 could not be saved" in ended.stderr, ended.stderr
        assert (folder / "checkpoints" / "latest").read_text() == "step_00000003\n"
        subprocess.run(["mount", "-o", f"remount,size={5 * size}", str(disk)], check=True)
        results_of(pretrain(1, small_config, settings(folder), tmp_path / "second"))
        assert_same(folder, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
