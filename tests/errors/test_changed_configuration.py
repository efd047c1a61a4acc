"""A run started again under a changed configuration: told what is harmless and what was accepted, refused the rest."""

import shutil
from pathlib import Path

import pytest
from endings import MISTAKE, says_one_line
from rank_processes import pretrain
from small_run import overrides

from k2_megatron.runtime.journal import read_events


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture
def edited(small_config: Path, run: Path, tmp_path: Path):
    """edited({section: line}) -> outcomes of a start with a file that has these lines more, and no --set for them."""

    def start(lines: dict[str, str]):
        text = small_config.read_text()
        for section, line in lines.items():
            key = line.split(" ")[0]
            kept = [old for old in text.splitlines() if not old.startswith(f"{key} =")]
            kept.insert(kept.index(f"[{section}]") + 1, line)
            text = "\n".join(kept)
        file = tmp_path / "edited.toml"
        file.write_text(text)
        given = {"run.folder": run, "checkpoint.every_steps": 2}
        return pretrain(1, file, overrides(given), tmp_path / "output")

    return start


def test_changes_are_listed_with_what_becomes_of_them(attempt, run):
    (outcome,) = attempt({"train.steps": 8, "checkpoint.every_steps": 4, "optimizer.weight_decay": 0.2})
    assert outcome.exit_code == 0, outcome.stderr
    assert "  accepted: train.steps was 6 and is now 8 (--set; another end" in outcome.stdout
    assert "  accepted: optimizer.weight_decay was 0.1 and is now 0.2 (--set; another update rule" in outcome.stdout
    assert "  harmless: checkpoint.every_steps was 2 and is now 4 (when is saved" in outcome.stdout
    assert "next: step 7, sample 48, learning rate" in outcome.stdout
    (resume,) = [event for event in read_events(run / "journal.jsonl") if event["event"] == "resume"]
    assert {change["key"]: change["outcome"] for change in resume["changes"]} == {
        "train.steps": "accepted",
        "optimizer.weight_decay": "accepted",
        "checkpoint.every_steps": "harmless",
        "run.folder": "harmless",
    }


def test_change_in_the_file_alone_says_how_to_accept_it(edited, run):
    outcomes = edited({"optimizer": "beta2 = 0.9", "train": "steps = 6"})
    says_one_line(
        outcomes,
        MISTAKE,
        f"{run} holds a run of another configuration: optimizer.beta2 was 0.95 and is now 0.9",
        "to take it, give --set optimizer.beta2=0.9",
    )


@pytest.mark.parametrize(
    ("section", "line", "says"),
    [
        ("optimizer", "beta2 = 0.9", "optimizer.beta2 was 0.95 and is now 0.9 (another update rule"),
        ("model", "vocab_size = 512", "model.vocab_size was 256 and is now 512 (the weights have this shape)"),
        ("model", "rope_base = 50000.0", "begin a new run with checkpoint.start_from"),
    ],
)
def test_checkpoint_itself_is_compared_where_the_folder_says_nothing(edited, run, section, line, says):
    (run / "config.toml").unlink()
    says_one_line(
        edited({section: line, "train": "steps = 6"}),
        MISTAKE,
        f"{run}/checkpoints/step_00000006 was saved by a run of another configuration: ",
        says,
    )


def test_end_before_the_checkpoint(attempt, run):
    outcomes = attempt({"train.steps": 5})
    says_one_line(outcomes, MISTAKE, "step_00000006 is of step 6, train.steps = 5 ends before")
