"""A checkpoint that is damaged is never trained on: the run takes the one before it and says why."""

import os
import shutil
from pathlib import Path

import pytest
from endings import MISTAKE, says_one_line
from rank_processes import Rank

from k2_megatron.evaluate.one_process import loaded_model
from k2_megatron.runtime.journal import read_events, read_steps

SETTINGS = {"train.steps": 6, "checkpoint.every_steps": 2}


@pytest.fixture
def checkpoints(finished_run, tmp_path) -> Path:
    """The checkpoints of a copy of the finished run, in which the last one is gone: four is next, then two."""
    shutil.copytree(finished_run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.rmtree(folder / "step_00000006")
    (folder / "latest").write_text("step_00000004\n")
    return folder


def flip_a_byte(checkpoints: Path) -> str:
    path = _largest(checkpoints / "step_00000004")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return f"{path} was altered after it was written"


def cut_a_file(checkpoints: Path) -> str:
    path = _largest(checkpoints / "step_00000004")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return f"{path} has {len(content) // 2} bytes, {len(content)} were written"


def remove_a_file(checkpoints: Path) -> str:
    path = _largest(checkpoints / "step_00000004")
    path.unlink()
    return f"{path} is missing"


def exchange_a_file_with_another_step(checkpoints: Path) -> str:
    path = _largest(checkpoints / "step_00000004")
    shutil.copy(checkpoints / "step_00000002" / path.name, path)
    return f"{path} was altered"


def exchange_the_manifest_with_another_step(checkpoints: Path) -> str:
    shutil.copy(checkpoints / "step_00000002" / "k2.json", checkpoints / "step_00000004" / "k2.json")
    return "belongs to step 2, not to step_00000004: files were mixed up"


def cut_the_manifest(checkpoints: Path) -> str:
    path = checkpoints / "step_00000004" / "k2.json"
    path.write_text(path.read_text()[:100])
    return "k2.json is damaged"


def remove_the_manifest(checkpoints: Path) -> str:
    (checkpoints / "step_00000004" / "k2.json").unlink()
    return "latest says 'step_00000004', which is no complete checkpoint"


def _largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


DAMAGES = [
    flip_a_byte,
    cut_a_file,
    remove_a_file,
    exchange_a_file_with_another_step,
    exchange_the_manifest_with_another_step,
    cut_the_manifest,
    remove_the_manifest,
]


def resumed_from(folder: Path) -> dict:
    return [event for event in read_events(folder / "journal.jsonl") if event["event"] == "resume"][-1]


def losses(folder: Path) -> list[tuple[float, float]]:
    return [(event["loss"], event["grad_norm"]) for event in read_steps(folder / "journal.jsonl").values()]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoint_falls_back_to_the_one_before(attempt, checkpoints, finished_run, damage):
    reason = damage(checkpoints)
    (outcome,) = attempt(SETTINGS)
    assert outcome.exit_code == 0, outcome.stderr
    resume = resumed_from(checkpoints.parent)
    assert (resume["step"], resume["checkpoint"]) == (2, "step_00000002")
    assert reason in " ".join(resume["doubts"])
    assert reason in outcome.stdout
    assert losses(checkpoints.parent) == losses(finished_run)


def test_damage_is_seen_by_every_rank(attempt, checkpoints, finished_run):
    reason = flip_a_byte(checkpoints)
    outcomes = attempt({**SETTINGS, "parallel.pipeline": 2}, ranks=2)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    resume = resumed_from(checkpoints.parent)
    assert resume["step"] == 2
    assert reason in " ".join(resume["doubts"])
    assert [loss for loss, _ in losses(checkpoints.parent)] == pytest.approx(
        [loss for loss, _ in losses(finished_run)], rel=1e-5
    )


@pytest.mark.parametrize("content", ["", "step_0000", "step_00000006\n", "../elsewhere\n"])
def test_pointer_to_no_checkpoint_takes_the_newest(attempt, checkpoints, content):
    (checkpoints / "latest").write_text(content)
    (outcome,) = attempt(SETTINGS)
    assert outcome.exit_code == 0, outcome.stderr
    resume = resumed_from(checkpoints.parent)
    assert resume["step"] == 4
    assert f"latest says {content.strip()!r}, which is no complete checkpoint" in resume["doubts"][0]


def test_rest_of_a_killed_save_is_removed(attempt, checkpoints):
    aside = checkpoints / ".step_00000006.writing"
    shutil.copytree(checkpoints / "step_00000004", aside)
    (aside / "k2.json").unlink()
    (outcome,) = attempt(SETTINGS)
    assert outcome.exit_code == 0, outcome.stderr
    assert (resumed_from(checkpoints.parent)["step"], resumed_from(checkpoints.parent)["doubts"]) == (4, [])
    assert not aside.exists()


def test_damaged_checkpoint_is_kept_under_another_name(attempt, checkpoints):
    remove_a_file(checkpoints)
    attempt(SETTINGS)
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["damaged_step_00000004", "latest", "step_00000002", "step_00000004", "step_00000006"]


def test_no_sound_checkpoint_left(attempt, checkpoints):
    flip_a_byte(checkpoints)
    _largest(checkpoints / "step_00000002").unlink()
    steps = len((checkpoints.parent / "journal.jsonl").read_text().splitlines())
    says_one_line(
        attempt(SETTINGS),
        MISTAKE,
        f"no sound checkpoint is left in {checkpoints}: ",
        "step_00000004 is damaged (",
        "was altered after it was written",
        "step_00000002 is damaged (",
        "is missing",
        "Put one back, or remove the folder to start over",
    )
    lines = (checkpoints.parent / "journal.jsonl").read_text().splitlines()[steps:]
    assert lines == [], "nothing was begun"


@pytest.mark.parametrize("left", ["the journal", "a damaged checkpoint", "the ledger"])
def test_run_that_lost_its_checkpoints_does_not_begin_again(attempt, checkpoints, left):
    """The chain's next job must not train from step 0 over what the folder knows to be further."""
    folder = checkpoints.parent
    (checkpoints / "latest").unlink()
    (checkpoints / "step_00000002").rename(checkpoints / "damaged_step_00000002")
    shutil.rmtree(checkpoints / "step_00000004")
    if left != "a damaged checkpoint":
        shutil.rmtree(checkpoints / "damaged_step_00000002")
    if left != "the journal":
        (folder / "journal.jsonl").unlink()
    if left == "a damaged checkpoint":
        (folder / "ledger.jsonl").unlink()
    reasons = {
        "the journal": "journal.jsonl tells of one of step 6",
        "a damaged checkpoint": "damaged_step_00000002 was set aside as damaged",
        "the ledger": "the ledger tells of one before sample 48, and journal.jsonl of no step",
    }
    says_one_line(
        attempt(SETTINGS),
        MISTAKE,
        f"{checkpoints} holds no checkpoint, but this run had been saved: {reasons[left]}. It is not started over",
        "put a checkpoint back, or give run.folder another name",
    )
    assert not [path for path in checkpoints.iterdir() if path.name.startswith("step_")], "nothing was trained"


def test_lost_ledger_is_not_begun_anew_beside_its_journal(attempt, checkpoints):
    """What a person has amended since the last save would be undone without a word."""
    (checkpoints.parent / "ledger.jsonl").unlink()
    says_one_line(
        attempt(SETTINGS),
        MISTAKE,
        f"{checkpoints.parent / 'ledger.jsonl'} is gone, and journal.jsonl tells of",
        "put back the ledger.jsonl of this run",
    )
    assert not (checkpoints.parent / "ledger.jsonl").exists()


def test_later_checkpoints_leave_when_the_run_is_set_back(attempt, checkpoints, finished_run):
    """`latest` is what a person, or a rollback that was killed, goes back by: the branch after it must not be taken for
    the new one, neither by retention nor by the next start."""
    (checkpoints / "latest").write_text("step_00000002\n")
    (outcome,) = attempt({**SETTINGS, "checkpoint.keep_last": 2, "checkpoint.every_steps": 3})
    assert outcome.exit_code == 0, outcome.stderr
    resume = resumed_from(checkpoints.parent)
    said = "abandoned_step_00000004 is later than step_00000002: it was set aside under this name"
    assert (resume["step"], resume["doubts"]) == (2, [said])
    assert said in outcome.stdout
    names = sorted(path.name for path in checkpoints.iterdir())
    assert names == ["abandoned_step_00000004", "latest", "step_00000003", "step_00000006"]
    assert losses(checkpoints.parent) == losses(finished_run)


def manifest_unreadable_on_rank_1() -> None:
    import k2_megatron.train.checkpoints.load as checkpoint_load

    right = checkpoint_load.read_manifest

    def read(folder: Path) -> dict:
        if os.environ["RANK"] == "1" and folder.name == "step_00000004":
            raise checkpoint_load.CheckpointError("rank 1 cannot read it")
        return right(folder)

    checkpoint_load.read_manifest = read


def test_manifest_that_another_rank_cannot_read_counts(attempt, checkpoints):
    """That rank would have left its share of the files unchecked."""
    outcomes = attempt({**SETTINGS, "parallel.pipeline": 2}, ranks=2, fault=manifest_unreadable_on_rank_1)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    resume = resumed_from(checkpoints.parent)
    assert (resume["step"], "rank 1 cannot read it" in resume["doubts"][0]) == (2, True)
    assert "under tp1-pp2-vp1-cp1-dp1: random generators are seeded anew" in outcomes[0].stdout


def folder_as_it_was_on_rank_1() -> None:
    """As a file system does that remembers what it has read."""
    import k2_megatron.train.checkpoints.load as checkpoint_load

    if os.environ["RANK"] == "1":
        checkpoint_load.candidate_checkpoints = lambda _checkpoints: ([], None)


def test_every_rank_takes_what_rank_0_sees(attempt, checkpoints):
    outcomes = attempt({**SETTINGS, "parallel.pipeline": 2}, ranks=2, fault=folder_as_it_was_on_rank_1)
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], outcomes[0].stderr
    assert (resumed_from(checkpoints.parent)["step"], resumed_from(checkpoints.parent)["doubts"]) == (4, [])


def evaluated_step(folder: Path) -> int:
    with loaded_model(folder) as (_, step, _):
        return step


def test_evaluation_passes_over_a_damaged_checkpoint_and_renames_nothing(checkpoints, tmp_path):
    """The run may be alive, and about to write here."""
    reason = flip_a_byte(checkpoints)
    before = sorted(path.name for path in checkpoints.iterdir())
    outcome = Rank(evaluated_step, (checkpoints.parent,), {}, tmp_path / "output").finish()
    assert outcome.result == 2, outcome.stderr
    assert reason in outcome.stdout
    assert sorted(path.name for path in checkpoints.iterdir()) == before
