"""The report of one run: its sections, each from what the run's files tell.

In:  a `ReportedRun`, and where the page will lie (links are relative to it). Out: the page.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from k2_megatron.report import goodput
from k2_megatron.report.buckets import POINTS
from k2_megatron.report.curves import curves, width_of
from k2_megatron.report.event_lines import ROUTINE, Line, event_lines
from k2_megatron.report.facts import NO_STEP, duration, facts_of, moment, state_of, time_lines
from k2_megatron.report.heat_maps import heat_maps
from k2_megatron.report.matrices import read_matrices
from k2_megatron.report.page import (
    Cell,
    Html,
    bar,
    folded,
    link,
    note,
    page,
    paragraph,
    pictures,
    preformatted,
    scrolled,
    swatch,
    table,
)
from k2_megatron.report.run import CONFIG, EVALUATIONS, ReportedRun
from k2_megatron.report.soundness import ledger_checks, ledger_facts
from k2_megatron.report.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, PURPLE, RED, SKY
from k2_megatron.report.time_axis import time_picture

ROWS = 2_000  # of a table of events; the journal has the rest
TIME_COLOURS = (BLUE, ORANGE, RED, GREEN, SKY, PURPLE, "#6a51a3", INK, GREY, PALE)
Section = tuple[str, Sequence[Html]]


def run_page(run: ReportedRun, output: Path) -> str:
    """The page that will lie at `output`."""
    return page(f"{run.name}", state_of(run), _sections(run, output))


def _sections(run: ReportedRun, output: Path) -> Iterator[Section]:
    lines = event_lines(run.told, run.folder)
    yield "The run", [table((), facts_of(run))]
    yield "Where the time went", time_section(run)
    yield "Over the steps", _step_section(run)
    yield "Layers and ranks", _matrix_section(run)
    yield "Over time", _time_section(run, lines)
    yield "Events", list(_events_section(run, lines, output))
    yield "Evaluations", _evaluation_section(run)
    yield "Ledger", _ledger_section(run)
    yield "Configuration", [folded(f"all of {CONFIG}, resolved", preformatted((run.folder / CONFIG).read_text()))]


def time_section(run: ReportedRun) -> list[Html]:
    """Goodput, its parts, and by what rule."""
    lines = time_lines(run)
    if not run.told.account.wall:
        return [note("The journal tells of no start and end: nothing can be said.")]
    colours = dict(zip(goodput.WORDS.values(), TIME_COLOURS, strict=True))
    rows: list[list[Cell]] = [
        [Html(f"{swatch(colours[what]).text}{what}"), duration(seconds), f"{seconds:,.3f}", f"{share:.2%}"]
        for what, seconds, share in lines
    ]
    wall = run.told.account.wall
    rows.append(["wall time", duration(wall), f"{wall:,.3f}", ""])
    assert goodput.__doc__ is not None, "it says by which rule the parts are counted"
    rule = " ".join(goodput.__doc__.split("\n\n")[2].split())
    return [
        bar([(share, colours[what]) for what, _, share in lines]),
        table(("", "", "seconds", "share"), rows, numbers=(1, 2, 3)),
        note(rule),
    ]


def _step_section(run: ReportedRun) -> list[Html]:
    if not len(run.told.steps):
        return [note(f"Nothing to draw: {NO_STEP}.")]
    width = width_of(run)
    how = (
        f"More than {POINTS:,} steps are drawn in buckets, here of {width:,}. The thin line goes through the smallest "
        "and the largest value of each bucket, each at its own step, so that no spike disappears; the thick one "
        "through the medians."
        if width > 1
        else "Every step is drawn."
    )
    figures = [(figure, number == 0) for number, figure in enumerate(curves(run))]
    pale = " Pale is what was taken back by a rollback, or repeated after a resume." if (~run.told.stands).any() else ""
    return [note(f"{how}{pale} Drag to enlarge, double-click to see all."), pictures(figures, axis="step")]


def _matrix_section(run: ReportedRun) -> list[Html]:
    matrices = read_matrices(run.journal, run.told)
    parts = [pictures([(figure, True) for figure in heat_maps(run, matrices)])]
    if not matrices.layers:
        parts.append(note("The journal tells of no layers (log.layers_every_steps)."))
    if matrices.work is None:
        parts.append(note("The journal tells of no phases of ranks (log.phases_every_steps)."))
    return parts


def _time_section(run: ReportedRun, lines: Sequence[Line]) -> list[Html]:
    if not run.lives:
        return [note("The journal tells of no start.")]
    rows: list[list[Cell]] = []
    for life in run.lives:
        steps = run.told.columns["step"][life.tellings]
        trained = f"{steps[0]:,.0f} to {steps[-1]:,.0f}" if len(steps) else "none"
        gone = int((~run.told.stands[life.tellings]).sum())
        trained += f" ({gone:,} taken back)" if gone else ""
        origin = "its beginning" if life.resume is None else f"step {life.resume['step']:,}"
        rows.append(
            [
                f"{life.number}",
                moment(life.began),
                duration(life.ended - life.began),
                origin,
                trained,
                str(life.start.get("layout", "not told")),
                "; ".join(life.changes),
                life.end,
            ]
        )
    heading = ("", "start", "lasted", "went on from", "steps told", "layout", "what changed", "end")
    return [pictures([(time_picture(run, lines), True)]), scrolled(table(heading, rows))]


def _events_section(run: ReportedRun, lines: Sequence[Line], output: Path) -> Iterator[Html]:
    told = [line for line in lines if line.kind not in ROUTINE]
    routine = [line for line in lines if line.kind in ROUTINE]
    if not lines:
        yield note("The journal tells of none.")
        return
    yield scrolled(_event_table(run, told, output))
    if routine:
        table_of_them = _event_table(run, routine, output)
        yield folded(f"{len(routine):,} checkpoints and evaluations", scrolled(table_of_them))


def _event_table(run: ReportedRun, lines: Sequence[Line], output: Path) -> Html:
    shown = lines[-ROWS:]
    rows: list[list[Cell]] = []
    for line in shown:
        more: Cell = ""
        if line.path:
            more = link(line.path, os.path.relpath(run.folder / line.path, output.parent))
        step = "" if line.step is None else f"{line.step:,}"
        rows.append([moment(line.time).removesuffix(" UTC"), line.kind, step, line.text, more])
    pale = [number for number, line in enumerate(shown) if not line.stands]
    left_out = len(lines) - len(shown)
    remark = note(f"{left_out:,} earlier ones are in the journal.").text if left_out else ""
    return Html(remark + table(("time, UTC", "event", "step", "", "file"), rows, numbers=(2,), pale=pale).text)


def _evaluation_section(run: ReportedRun) -> list[Html]:
    if not run.evaluations:
        return [
            note(f"There is no {EVALUATIONS} (tools/evaluate_checkpoints.py writes it); above is what the journal has.")
        ]
    newest: dict[str, dict] = {}
    for event in run.evaluations:
        newest[str(event["text"].get("name"))] = dict(event)
    rows: list[list[Cell]] = []
    for name, event in sorted(newest.items()):
        figures = "; ".join(f"{key} {value}" for key, value in event["figures"].items() if value is not None)
        rows.append([name, str(event["text"].get("kind")), f"{event['step']:,}", figures, str(event.get("layout", ""))])
    return [
        paragraph(f"{len(run.evaluations):,} evaluations of checkpoints; the newest of each text:"),
        table(("text", "kind", "step", "figures", "layout"), rows, numbers=(2,)),
    ]


def _ledger_section(run: ReportedRun) -> list[Html]:
    rows: list[list[Cell]] = []
    for check in ledger_checks(run):
        verdict = {True: ("holds", "holds"), False: ("fails", "DOES NOT HOLD"), None: ("", "not checked")}[check.holds]
        rows.append([check.what, Html(f'<span class="{verdict[0]}">{verdict[1]}</span>'), check.text])
    parts = [table((), rows)]
    facts = ledger_facts(run.folder)
    return [*parts, table((), facts)] if facts else parts
