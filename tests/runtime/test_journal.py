"""The journal: whole lines, whatever a kill left behind; and the steps that a run really went through."""

import json
import math
import resource
import subprocess

import pytest
from rank_processes import REPOSITORY

from k2_megatron.runtime.journal import Journal, read_events, read_steps, standing_events


def test_every_event_is_a_line_with_its_time(tmp_path):
    journal = Journal(tmp_path / "run", writer=True)
    journal.write("step", step=1, loss=2.5)
    line = json.loads(journal.path.read_text())  # before close: a kill loses no line that was written
    assert (line["event"], line["step"], line["loss"]) == ("step", 1, 2.5)
    assert line["time"].endswith("+00:00")
    journal.close()


def test_numbers_that_are_not_finite_are_strict_json_and_are_read_as_they_were(tmp_path):
    journal = Journal(tmp_path, writer=True)
    layers = [[1.0, math.inf], (2.0, -math.inf)]
    journal.write("incident", kind="not finite", loss=math.nan, layers={"gradients": layers}, names=["inf."])
    journal.close()

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    written = json.loads(journal.path.read_text(), parse_constant=refuse)
    assert (written["loss"], written["layers"]) == ("nan", {"gradients": [[1.0, "inf"], [2.0, "-inf"]]})
    (event,) = read_events(journal.path)
    assert math.isnan(event["loss"])
    assert event["layers"]["gradients"] == [[1.0, math.inf], [2.0, -math.inf]]
    assert event["names"] == ["inf."]


def test_other_ranks_write_nothing(tmp_path):
    journal = Journal(tmp_path / "run", writer=False)
    journal.write("step", step=1)
    journal.close()
    assert not (tmp_path / "run").exists()


def test_line_that_a_kill_cut_is_passed_over_and_ended(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    journal = Journal(tmp_path, writer=True)
    journal.write("resume", step=1)
    journal.close()
    assert [event["event"] for event in read_events(path)] == ["step", "resume"]
    assert path.read_text().count("\n") == 3


def test_start_on_a_full_disk_that_cut_the_last_line_is_no_error_of_the_journal(tmp_path, capsys):
    """A disk that fills up cuts a line where a block ends, so that not even the end of that line has room."""
    path = tmp_path / "journal.jsonl"
    path.write_text('{"event": "step", "step": 1}\n{"event": "step", "st')
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size, limits[1]))
    try:
        journal = Journal(tmp_path, writer=True)
        journal.write("resume", step=1)
        with pytest.raises(OSError, match="does not take its last lines"):
            journal.require_written()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    journal.close()
    assert [event["event"] for event in read_events(path)] == ["step", "resume"]


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    path = tmp_path / "journal.jsonl"
    path.write_text('\n[1, 2]\n{"time": 3}\nnull\n{"event": "stop"}\n')
    assert list(read_events(path)) == [{"event": "stop"}]


def test_steps_that_a_rollback_undid_are_forgotten(tmp_path):
    path = tmp_path / "journal.jsonl"
    steps = [1, 2, 3, 4, 5, 3, 4]  # killed at five, resumed from two
    path.write_text("".join(json.dumps({"event": "step", "step": s, "line": n}) + "\n" for n, s in enumerate(steps)))
    assert {step: event["line"] for step, event in read_steps(path).items()} == {1: 0, 2: 1, 3: 5, 4: 6}
    with path.open("a") as file:
        file.write('{"event": "rollback", "from_step": 4, "step": 2}\n')
    assert list(read_steps(path)) == [1, 2], "although no step was made since"


def test_what_a_resume_or_a_rollback_undid_stands_no_more(tmp_path):
    """A step that a resume undid does, until it is made anew."""
    path = tmp_path / "journal.jsonl"

    def tell(*told: tuple[str, int]) -> None:
        with path.open("a") as file:
            file.write("".join(json.dumps({"event": event, "step": step}) + "\n" for event, step in told))

    def standing(*kinds: str) -> list[int]:
        return [event["step"] for event in standing_events(path, *kinds)]

    tell(("step", 5), ("checkpoint", 4), ("step", 6), ("checkpoint", 6), ("resume", 4), ("resume", 4))
    assert (standing("checkpoint"), standing("resume")) == ([4], [4, 4])
    assert list(read_steps(path)) == [5, 6]
    tell(("step", 5), ("checkpoint", 5), ("rollback", 3))
    assert (standing("checkpoint"), standing("resume", "rollback"), list(read_steps(path))) == ([], [3], [])


def test_full_disk_does_not_end_the_run(tmp_path, capsys):
    journal = Journal(tmp_path, writer=True)
    journal._file.close()
    journal._file = open("/dev/full", "wb", buffering=0)
    journal.write("step", step=1)
    assert f"journal: cannot write {journal.path}" in capsys.readouterr().err


def test_lines_of_a_time_without_room_are_written_when_there_is_some(tmp_path, capsys):
    journal = Journal(tmp_path, writer=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for step in range(1, 90):
        if step == 3:  # room for a part of the next line; Python ignores the signal that comes with it
            resource.setrlimit(resource.RLIMIT_FSIZE, (journal.path.stat().st_size + 100, limits[1]))
        if step == 80:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        journal.write("step", step=step, layers=[0.5] * 100)
    journal.close()
    assert "77 lines wait, the run goes on" in capsys.readouterr().err
    assert list(read_steps(journal.path)) == list(range(1, 90))
    assert len(journal.path.read_text().splitlines()) == 89


def shown_by_page(folder, words: str) -> str:
    """What the one command of the on-call page that holds `words` shows of the run in `folder`."""
    page = (REPOSITORY / "docs" / "when_something_goes_wrong.md").read_text()
    (line,) = [line for line in page.splitlines() if words in line]
    command = line.replace("RUN", str(folder))
    return subprocess.run(command, shell=True, capture_output=True, text=True, check=True).stdout


def test_commands_of_the_page_show_what_happened_among_the_reports_of_480_ranks(tmp_path):
    journal, seconds = Journal(tmp_path, writer=True), {name: [7.123456] * 480 for name in ("data", "forward")}
    slow = {"rank": 17, "place": "rank 17 (tensor 1, pipeline 0)", "phase": "forward", "ratio": 1.7, "seconds": 4.9}
    journal.write("start", layout="tp8")
    journal.write("spike", kind="malignant", step=1)
    for step in range(50, 1000, 50):
        journal.write("step", step=step)
        journal.write("phases", step=step, slow=slow, seconds=seconds)
        journal.write("evaluation", step=step, held_out_loss=2.0)
        journal.write("checkpoint", step=step)
    journal.close()
    assert [json.loads(line)["event"] for line in shown_by_page(tmp_path, "grep -Ev").splitlines()] == [
        "start",
        "spike",
    ]
    last_reports = shown_by_page(tmp_path, "tail -n 3 | cut -c 1-400").splitlines()
    assert len(last_reports) == 3 and all(json.dumps(slow) in line for line in last_reports)
    assert json.loads("{" + shown_by_page(tmp_path, "grep -o") + "}") == {"forward": seconds["forward"]}
