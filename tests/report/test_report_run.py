"""tools/report_run.py: what the page says, of one run and of several; what is no run; that it stands alone."""

import importlib.util
import json
import re
import sys
from dataclasses import replace
from html import escape

import pytest
from journals import event, resume, start, step, write_run
from plotly import graph_objects
from rank_processes import REPOSITORY

from k2_megatron.report.curves import curves
from k2_megatron.report.event_lines import event_lines
from k2_megatron.report.facts import facts_of, time_lines
from k2_megatron.report.matrices import matrices_of
from k2_megatron.report.one_run import run_page
from k2_megatron.report.page import pictures
from k2_megatron.report.reading import sound_events, told_of
from k2_megatron.report.run import read_run
from k2_megatron.report.several_runs import differences, loss_at
from k2_megatron.report.time_axis import time_picture

NASTY = "</script><script>alert(1)</script><b>&"


def report_run(*arguments: object) -> int:
    """The tool's main, in this process."""
    specification = importlib.util.spec_from_file_location("report_run", REPOSITORY / "tools" / "report_run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["report_run.py", *map(str, arguments)])
        return module.main()


def figures_of(page: str) -> dict[str, dict]:
    """{title: figure} of a page, each accepted by plotly."""
    found = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', page, re.S)]
    for figure in found:
        graph_objects.Figure(figure)
    return {figure["layout"]["title"]["text"]: figure for figure in found}


def traces_of(figure: dict) -> dict[str, dict]:
    return {trace["name"]: trace for trace in figure["data"] if trace.get("name")}


EVENTS = [
    start(0, revision="abc", data="0123"),
    *(step(number, 2 * number) for number in range(1, 5)),
    event("spike", 8.1, kind="spike", step=4, onset=3, trip=4, decision="watch", dossier="spike_step_00000003.json"),
    step(5, 10, loss=9.0),
    event("spike", 10.1, kind="malignant", step=5, onset=3, trip=4, decision="go back"),
    event("rollback", 11, from_step=5, step=2, amendment={"action": "skip", "samples": [16, 40], "from_sample": 16}),
    *(step(number, 10 + 2 * number) for number in range(3, 7)),
    event("evaluation", 22.5, step=6, held_out_loss=4.25),
    event("checkpoint", 23, step=6, checkpoint="step_00000006", stall_seconds=0.5, seconds=0.5, bytes=4),
    start(30),
    resume(31, 6, changes=[{"key": "train.micro_batch", "was": 2, "now": NASTY}]),
    step(7, 34),
    event("incident", 35, kind=NASTY, step=7),
]


@pytest.fixture
def run(tmp_path):
    folder = write_run(tmp_path / "run", EVENTS, tail='{"event": "step", "step": 8, "lo', train={"steps": 9})
    (folder / "dossiers").mkdir()
    (folder / "dossiers" / "spike_step_00000003.json").write_text("{}")
    return folder


def test_the_page_says_what_the_journal_says(run, capsys):
    assert report_run(run) == 0
    page = (run / "report.html").read_text()
    facts = dict(facts_of(read_run(run)))
    assert facts["training loss"] == "4.9900 at step 1, 4.9300 at step 7"
    assert facts["held-out loss"] == "4.2500 at step 6"
    assert facts["steps"] == "7 of 9; 1,792 tokens trained, 2,304 tokens of the whole run"
    assert (
        facts["goodput"] == "20.0% of that in steps that stand; 2 starts, 1 rollback, 3 steps taken back or made again"
    )
    assert all(escape(text) in page for text in facts.values())
    assert 'href="dossiers/spike_step_00000003.json"' in page
    assert "train.micro_batch: 2 → " in page

    figures = figures_of(page)
    loss = traces_of(figures["training loss, nats a token"])
    assert loss["each step"]["x"] == [1, 2, 3, 4, 5, 6, 7]
    assert loss["each step"]["y"] == pytest.approx([5.0 - number / 100 for number in range(1, 8)])
    assert loss["taken back"]["x"] == [3, 4, 5, None]
    assert loss["taken back"]["y"][:3] == [4.97, 4.96, 9.0]
    assert (loss["spike: malignant"]["x"], loss["spike: malignant"]["y"]) == ([4], [4.96])
    assert (loss["rolled back"]["x"], loss["rolled back"]["y"]) == ([5], [9.0])
    assert traces_of(figures["held-out loss, nats a token"])["held out, by the training loop"]["y"] == [4.25]
    assert "no layers" in page and "no phases of ranks" in page and "no evaluations.jsonl" in page


def test_nothing_of_a_file_becomes_a_tag_and_nothing_is_fetched(run):
    page = run_page(read_run(run), run / "report.html")
    ours = page.replace(page[page.index("/**") : page.index("</script></head>")], "")  # without plotly itself
    assert "alert(1)" in ours
    assert "<script>alert" not in ours and "<b>" not in ours
    assert not re.findall(r'(?:src|href)="(?!dossiers/)[^"]*"', ours)
    assert not re.findall(r"https?://", ours)
    figures_of(page)


def test_the_json_of_a_picture_cannot_end_its_script():
    figure = {"data": [], "layout": {"height": 300, "title": {"text": NASTY}}}
    part = pictures([(figure, True)]).text
    assert part.count("</script>") == 1
    assert figures_of(part).keys() == {NASTY}


def test_evaluations_are_the_last_line_of_each_step_and_text(run):
    lines = [
        {"event": "evaluation", "step": 6, "text": {"name": "news", "kind": "rows"}, "figures": {"loss": loss}}
        for loss in (3.0, 2.5)
    ]
    for name, figures in (("quiz", {"acc": 0.75, "tokens": 9}), ("rest", {"acc": 0.5, "acc_norm": 0.25})):
        lines.append({"event": "evaluation", "step": 6, "text": {"name": name, "kind": "choices"}, "figures": figures})
    (run / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "ev')
    figures = figures_of(run_page(read_run(run), run / "report.html"))
    assert traces_of(figures["held-out loss, nats a token"])["news, evaluated"]["y"] == [2.5]
    tasks = traces_of(figures["tasks, evaluated"])
    assert {name: trace["y"] for name, trace in tasks.items()} == {
        "quiz: acc, evaluated": [0.75],
        "rest: acc, evaluated": [0.5],
    }


@pytest.mark.parametrize("tail", ["", '{"event": "sta'])
def test_a_run_that_has_told_nothing_has_a_report(tmp_path, tail, capsys):
    run = write_run(tmp_path / "run", [], tail)
    assert report_run(run) == 0
    page = (run / "report.html").read_text()
    assert "the journal tells of nothing yet" in page
    assert "the journal tells of no step" in page
    assert report_run(run, "--text") == 0


WHAT_ELSE_A_JOURNAL_TELLS = [
    event("start_from", 36, step=3, checkpoint="other", optimizer="reset"),
    event("phases", 36, step=7, seconds={"forward": [1.0, 2.0]}, slow={"place": "rank 1", "phase": "forward"}),
    step(8, 38, layers={"gradient_norm": [1.0, 0.0], "activation_rms": [1.0, 2.0]}, ledger={"lines": 0}),
    event("incident", 43, kind="in doubt", step=8, loss=3.0, grad_norm=1.0, made_again=True, ranks=[1]),
    event("amendment", 44, reason="by hand"),
    event("stop", 45, reason="finished", saved_step=8),
]


@pytest.mark.filterwarnings("error")
def test_a_journal_of_another_version_has_a_report(tmp_path):
    """Each key of each kind of event missing, and with values of other types."""
    folder = write_run(tmp_path / "run", EVENTS)
    read = read_run(folder)
    whole = [*EVENTS, *WHAT_ELSE_A_JOURNAL_TELLS]
    firsts = {told["event"]: number for number, told in reversed(list(enumerate(whole)))}
    for number in firsts.values():
        for key in whole[number].keys() - {"event"}:
            kept = {name: value for name, value in whole[number].items() if name != key}
            for changed in (kept, *({**kept, key: wrong} for wrong in ("text", None, {}, float("nan")))):
                told = told_of([*whole[:number], changed, *whole[number + 1 :]])
                run = replace(read, told=told)
                tuple(facts_of(run)), time_lines(run), event_lines(told, folder)
                (
                    tuple(curves(run)),
                    [life.changes for life in run.lives],
                    matrices_of(sound_events([*whole[:number], changed]), told),
                )
                time_picture(run, event_lines(told, folder))


def test_an_event_of_unknown_shape_is_told_as_it_is():
    told = told_of([start(0), resume(1, 0, changes="none"), event("rollback", 2, step=0, amendment={"samples": 3})])
    assert [line.text for line in event_lines(told, REPOSITORY)][2] == "{'amendment': {'samples': 3}}"


def test_several_runs_differ_where_their_configurations_do(run, tmp_path, capsys):
    other = write_run(
        tmp_path / "other", [start(0), *(step(n, n, loss=2.0) for n in range(1, 5))], optimizer={"learning_rate": 0.5}
    )
    runs = [read_run(run), read_run(other)]
    assert differences(runs) == [("train.steps", [9, 5]), ("optimizer.learning_rate", [3e-3, 0.5])]
    assert loss_at(runs[1], 700) == (2, 2.0), "two steps of 256 tokens"
    assert loss_at(runs[0], 3 * 256) == (3, pytest.approx(4.98))
    assert loss_at(runs[1], 5 * 256) is None, "it is not so far"
    assert report_run(run, other, "--output", tmp_path / "both.html") == 0
    page = (tmp_path / "both.html").read_text()
    figures = figures_of(page)
    assert {"run", "other"} <= traces_of(figures["training loss, nats a token"]).keys()
    assert "1,024" in page


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert report_run(tmp_path) == 2
    assert capsys.readouterr().err == (f"report_run: {tmp_path}: no config.toml there; name the folder of a run\n")


def test_text_has_facts_time_and_events(run, capsys):
    assert report_run(run, "--text") == 0
    told = capsys.readouterr().out
    assert "4.9900 at step 1" in told
    assert "rollback" in told and "from step 5 back to step 2; skip samples 16 to 39" in told
    assert "between two starts" in told
    assert not (run / "report.html").exists()
