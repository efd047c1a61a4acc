"""tools/replay.py: steps made again are equal to the bit; what a machine did wrong, or does differently, shows."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from loaded_tool import loaded_tool
from rank_processes import REPOSITORY, Rank, pretrain, run_pretrain

from k2_megatron.config import load_config
from k2_megatron.data.ledger import Ledger
from k2_megatron.runtime.journal import read_steps
from k2_megatron.train import replay

STEPS = 9
SETTINGS = [f"train.steps={STEPS}", "checkpoint.every_steps=3", "train.evaluate_every_steps=9"]


def _flip_a_weight_bit_after_step_4() -> None:
    import torch

    import pretrain_k2
    from k2_megatron.train.model_chunks import unwrapped

    train_step = pretrain_k2.train_step

    def and_flip(config, parts, feed, step, **more):
        result = train_step(config, parts, feed, step, **more)
        if step == 3:
            weight = unwrapped(parts.chunks[0]).decoder.layers[1].mlp.linear_fc2.weight
            bits = weight.data.view(-1).view(torch.int32)
            bits[5] ^= 1 << 22  # the highest bit of the fraction
        return result

    pretrain_k2.train_step = and_flip


def _gradient_differs_in_its_last_bit_in_step_5() -> None:
    """As of a kernel that adds in another order now and then."""
    import torch

    import k2_megatron.train.step as step

    finalize, calls = step.finalize_model_grads, []

    def and_differ(model, *arguments, **keywords):
        finalize(model, *arguments, **keywords)
        calls.append(1)
        if len(calls) == 5:
            next(model[0].parameters()).main_grad.view(-1).view(torch.int32)[:] ^= 1

    step.finalize_model_grads = and_differ


def _dies_in_step_8() -> None:
    import pretrain_k2

    train_step = pretrain_k2.train_step

    def dies(config, parts, feed, step, **more):
        if step == 7:
            os._exit(1)
        return train_step(config, parts, feed, step, **more)

    pretrain_k2.train_step = dies


@pytest.fixture(scope="module")
def run(small_config, tmp_path_factory):
    """run(*settings, fault=None, folder=None) -> the folder of a run under these settings."""

    def go(*more: str, fault=None, folder: Path | None = None, exit_code: int = 0) -> Path:
        folder = folder or tmp_path_factory.mktemp("replayed") / "run"
        output = folder.with_name(f"output_{len(list(folder.parent.iterdir()))}")
        (ended,) = pretrain(1, small_config, [*SETTINGS, f"run.folder={folder}", *more], output, fault=fault)
        assert ended.exit_code == exit_code, ended.stderr
        return folder

    return go


@pytest.fixture(scope="module")
def whole(run) -> Path:
    """A run in which nothing went wrong."""
    return run()


@pytest.fixture
def replayed(tmp_path, monkeypatch, capfd):
    """replayed(run, step) -> (exit code, what was said), with the ranks forked instead of started anew."""
    tool = loaded_tool("replay")

    def forked(command: list[str]):
        assert command[:2] == [sys.executable, str(REPOSITORY / "pretrain_k2.py")]
        output = tmp_path / f"output_{len(list(tmp_path.iterdir()))}"
        ended = Rank(run_pretrain, (command[2:],), {}, output).finish()
        sys.stderr.write(ended.stderr)
        return SimpleNamespace(returncode=ended.exit_code)

    def go(folder: Path, step: int) -> tuple[int, str]:
        monkeypatch.setattr(replay.subprocess, "run", forked)
        monkeypatch.setattr(sys, "argv", ["replay.py", str(folder), "--step", str(step)])
        code = tool.main()
        monkeypatch.undo()
        assert not list(folder.parent.glob(".replay_of*"))
        said = capfd.readouterr()
        return code, said.out + said.err

    return go


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_sound_step_is_equal_to_the_bit_and_the_run_untouched(whole):
    before = files(whole)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(REPOSITORY / "tools" / "replay.py"), str(whole), "--step", "5"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "from step_00000003 to step 6" in done.stdout
    assert "equal to the bit: steps 4 to 6, and the weights of step 6 (" in done.stdout
    assert files(whole) == before
    assert [path.name for path in whole.parent.iterdir() if path.name.startswith(".")] == []


def test_flipped_weight_bit_shows_with_the_first_step_that_computed_with_it(run, replayed):
    code, said = replayed(run(fault=_flip_a_weight_bit_after_step_4), 5)
    assert code == 1, said
    assert "\nstep 5: loss was" in said, "the first step computed with the flipped bit"
    assert "\nstep 4: " not in said
    assert "step 6: the weights had fingerprint" in said


def test_what_is_not_deterministic_shows(run, replayed):
    code, said = replayed(run(fault=_gradient_differs_in_its_last_bit_in_step_5), 4)
    assert code == 1, said
    assert "\nstep 4: " not in said and "\nstep 5: loss was" not in said
    assert "\nstep 5: grad_norm was" in said and "\nstep 6: grad_norm was" in said
    assert "step 6: the weights had fingerprint" in said


def test_weights_are_compared_at_every_save_between(whole, tmp_path, replayed):
    """Retention has removed the checkpoint nearest to the step: the replay begins earlier."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    code, said = replayed(folder, 8)
    assert code == 0, said
    assert "from step_00000003 to step 9" in said
    assert "equal to the bit: steps 4 to 9, and the weights of step 6 (" in said and ", step 9 (" in said


def test_steps_before_the_first_save_are_replayed_from_the_beginning(whole, tmp_path, replayed):
    code, said = replayed(whole, 2)
    assert code == 0, said
    assert (
        "from the beginning to step 3" in said and "equal to the bit: steps 1 to 3, and the weights of step 3" in said
    )
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    for step in (3, 6):
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    code, said = replayed(folder, 8)
    assert code == 2
    assert "no checkpoint from before step 8 is kept in" in said and "the last was of step 6" in said


def test_step_that_crashes_is_computed_and_not_compared(run, replayed):
    folder = run(fault=_dies_in_step_8, exit_code=1)
    code, said = replayed(folder, 8)
    assert code == 0, said
    assert "equal to the bit: steps 7 to 7; weights were not saved there" in said
    assert "step 8, which the run did not finish: loss " in said


def test_steps_are_repeated_under_the_settings_of_their_time(run, replayed):
    """Changed on a resume, once by --set, once in the size of a micro-batch, which rounds otherwise."""
    folder = run("train.steps=12", fault=partial(_leave_after, 6))
    changed = ("optimizer.learning_rate=1e-3", "train.micro_batch=4", "train.steps=12")
    run(*changed, folder=folder)
    for step, expected in ((5, "steps 4 to 6"), (8, "steps 7 to 9"), (11, "steps 10 to 12"), (2, "steps 1 to 3")):
        code, said = replayed(folder, step)
        assert code == 0, said
        assert f"equal to the bit: {expected}" in said
    shutil.rmtree(folder / "checkpoints" / "step_00000006")
    code, said = replayed(folder, 8)
    assert code == 2
    assert "train.micro_batch, optimizer.learning_rate changed after step 6" in said


def test_steps_around_a_changed_batch_and_length_are_repeated_under_theirs(run, replayed):
    folder = run(fault=partial(_leave_after, 6))
    run("train.global_batch=16", "model.sequence_length=64", folder=folder)
    for step, expected in ((5, "steps 4 to 6"), (8, "steps 7 to 9"), (2, "steps 1 to 3")):
        code, said = replayed(folder, step)
        assert code == 0, said
        assert f"equal to the bit: {expected}" in said


def _leave_after(step: int) -> None:
    import pretrain_k2

    train = pretrain_k2.train
    pretrain_k2.train = lambda config, environment, device, _until, given, ending: train(
        config, environment, device, step, given, ending
    )


def test_branch_that_a_rollback_left_is_not_compared_with(whole, tmp_path, replayed):
    """It had saved a step that the branch which stands did not."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    journal = folder / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    (first,) = (number for number, line in enumerate(lines) if '"event": "step"' in line and '"step": 7,' in line)
    left = [
        *(json.dumps({**json.loads(line), "loss": 9.0}) + "\n" for line in lines[first:] if '"event": "step"' in line),
        *(json.dumps({"event": "checkpoint", "step": step, "weights": "left"}) + "\n" for step in (8, 9)),
        '{"event": "rollback", "from_step": 9, "step": 6}\n',
    ]
    journal.write_text("".join([*lines[:first], *left, *lines[first:]]))
    code, said = replayed(folder, 8)
    assert code == 0, said
    assert "equal to the bit: steps 7 to 9, and the weights of step 9 (" in said
    journal.write_text("".join([*lines[:first], *left]))
    code, said = replayed(folder, 8)
    assert code == 2 and "which goes to step 6" in said


def test_rows_that_were_moved_since_are_not_judged(whole, tmp_path, replayed):
    """A run that was killed while it went back: its ledger is amended, and its journal does not tell of it."""
    folder = shutil.copytree(whole, tmp_path / "run")
    step_5 = read_steps(folder / "journal.jsonl")[5]
    ledger, (first, end) = Ledger(folder), step_5["samples"]
    length = step_5["sequence_length"]
    ledger.amend("skip", samples=(first, end), from_sample=first, sequence_length=length, reason="bad rows")
    code, said = replayed(folder, 5)
    assert code == 2 and "was amended after step 5 was computed" in said
    code, said = replayed(folder, 2)
    assert code == 0 and "equal to the bit: steps 1 to 3" in said


def test_what_others_computed_is_not_judged(run, tmp_path, replayed):
    """Another device or kernel, another layout."""
    folder = run(fault=_flip_a_weight_bit_after_step_4)
    journal = folder / "journal.jsonl"
    text = journal.read_text()
    journal.write_text(text.replace('"adamw": "', '"adamw": "another, '))
    code, said = replayed(folder, 5)
    assert code == 2, said
    assert "adamw another, " in said and ", and repeated by " in said
    journal.write_text(text.replace('"layout": "tp1-', '"layout": "tp2-'))
    code, said = replayed(folder, 5)
    assert code == 2, said
    assert "computed in layout tp2-pp1-vp1-cp1-dp1" in said and "says tp1-pp1-vp1-cp1-dp1" in said


def test_replay_is_no_second_run_where_people_look(small_config, tmp_path, monkeypatch):
    config = load_config(small_config, ["log.wandb=k2", "log.tensorboard=true", "spikes.policy=watch"])
    started, ended = [], SimpleNamespace(returncode=0)
    (tmp_path / replay.REPLAYED).write_text(config.to_toml())
    monkeypatch.setattr(replay.subprocess, "run", lambda command: started.append(command) or ended)
    replay.train([], REPOSITORY / "pretrain_k2.py", tmp_path, 3, config)
    (command,) = started
    sets = [given for option, given in itertools.pairwise(command) if option == "--set"]
    shown = load_config(tmp_path / replay.REPLAYED, sets).log
    assert (shown.wandb, shown.tensorboard) == (None, False)


def test_what_other_ranks_repeat_otherwise_is_not_judged():
    """--launch may start any number of them, whatever the configuration says."""
    two, one = ({"device": "cpu", "kernels": {}, "layout": f"tp1-pp1-vp1-cp1-dp{data}"} for data in (2, 1))
    replay.refuse_other_machines(range(1, 3), {1: two}, {1: two})
    with pytest.raises(ValueError, match=r"computed by .*dp2, and repeated by .*dp1; use the former"):
        replay.refuse_other_machines(range(1, 3), {1: two}, {1: one})
    replay.refuse_other_machines(range(1, 3), {1: two}, {1: one}, any_data_size=True)
    tensor = {**one, "layout": "tp2-pp1-vp1-cp1-dp1"}
    with pytest.raises(ValueError, match=r"tp1-pp1-vp1-cp1, and repeated by .*tp2-pp1-vp1-cp1; use the former"):
        replay.refuse_other_machines(range(1, 3), {1: two}, {1: tensor}, any_data_size=True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["{run}", "--step", "50"], "step 50 is not in {run}/journal.jsonl, which goes to step 9"),
        (["{run}", "--step", "10"], "step 10 is not in"),
        (["{run}", "--step", "0"], "step 0 is not in"),
        (["{run}/checkpoints", "--step", "5"], "{run}/checkpoints is no run folder"),
        (["{run}", "--step", "5", "--folder", "{run}"], "--folder {run} is not empty"),
        (["{run}", "--step", "5", "--folder", "{run}/journal.jsonl"], "--folder {run}/journal.jsonl is no folder"),
        (["{run}", "--step", "5", "--folder", "{run}/journal.jsonl/x"], "Not a directory"),
        (["{run}", "--step", "5", "--launch", "no-such-launcher -n 2"], "--launch no-such-launcher -n 2: No such file"),
        (["{run}", "--step", "5", "--launch", "false"], "the replay itself ended with exit code 1"),
    ],
)
def test_wrong_input_is_one_line(whole, monkeypatch, capsys, arguments, said):
    tool = loaded_tool("replay")
    monkeypatch.setattr(sys, "argv", ["replay.py", *(argument.format(run=whole) for argument in arguments)])
    assert tool.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("replay: ") and error.count("\n") == 1
    assert said.format(run=whole) in error
