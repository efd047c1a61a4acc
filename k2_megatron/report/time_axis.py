"""The picture of a run over the time of the clock: how far it was when, and what happened.

In:  a `ReportedRun` and its events in words. Out: one picture. Above, the step reached, what was taken back pale;
below, a row for each kind of event, and rows for the time that was lost.
"""

from collections.abc import Sequence

import numpy as np

from k2_megatron.report.buckets import BUCKETS, POINTS
from k2_megatron.report.event_lines import Line
from k2_megatron.report.facts import duration, moment
from k2_megatron.report.run import ReportedRun
from k2_megatron.report.style import (
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PALE,
    PURPLE,
    RED,
    SKY,
    Figure,
    Trace,
    axis,
    figure,
    points,
    words,
)

# From the uppermost row down, with colour and symbol
KINDS = {
    "start": (GREEN, "triangle-right"),
    "start_from": (GREEN, "triangle-right-open"),
    "resume": (GREEN, "triangle-up"),
    "checkpoint": (BLUE, "square"),
    "evaluation": (SKY, "circle"),
    "straggler": (ORANGE, "cross"),
    "spike": (RED, "diamond"),
    "rollback": (PURPLE, "triangle-left"),
    "amendment": (INK, "star"),
    "incident": (RED, "x"),
    "stop": (INK, "square-open"),
}
DOWN, TAKEN_BACK = "lost: down", "lost: taken back"


def time_picture(run: ReportedRun, lines: Sequence[Line]) -> Figure:
    """See above."""
    told_of = {told.kind for told in lines}
    kinds = [kind for kind in KINDS if kind in told_of] + sorted(told_of - KINDS.keys())
    rows = [*kinds, DOWN, TAKEN_BACK]
    data = [*_progress(run), *(_marks(kind, lines) for kind in kinds)]
    data += [_bars(DOWN, _down(run), GREY), _bars(TAKEN_BACK, _taken_back(run), PALE)]
    height = 330 + 24 * len(rows)
    split = 24 * len(rows) / (height - 130)
    return figure(
        "the run over time",
        data,
        height,
        showlegend=False,
        xaxis=axis("UTC", type="date", anchor="y2"),
        yaxis=axis("step", domain=[min(0.75, split) + 0.04, 1], rangemode="tozero", tickformat=",d"),
        yaxis2=axis(
            domain=[0, min(0.75, split)],
            type="category",
            categoryorder="array",
            categoryarray=list(map(words, reversed(rows))),
            range=[-0.6, len(rows) - 0.4],
        ),
    )


def _progress(run: ReportedRun) -> list[Trace]:
    """The step reached, over the time: every one of a short run, of a long one as many as can be seen."""
    told = run.told
    strong: tuple[list, list] = ([], [])
    pale: tuple[list, list] = ([], [])
    every = 1 if len(told.stands) <= POINTS else -(-len(told.stands) // BUCKETS)
    # A line is broken where a life ends, or the run goes back
    breaks = np.flatnonzero((np.diff(told.columns["life"]) != 0) | (np.diff(told.columns["step"]) <= 0)) + 1
    for branch in np.split(np.arange(len(told.stands)), breaks):
        for stands, (x, y) in ((True, strong), (False, pale)):
            part = branch[told.stands[branch] == stands]
            if len(part):
                shown = np.unique([*part[::every], part[-1]])
                x += [*(told.columns["time"][shown] * 1000).tolist(), None]
                y += [*told.columns["step"][shown].astype(int).tolist(), None]
    traces = [("step reached, taken back since", pale, GREY, 1.2), ("step reached", strong, BLUE, 2.5)]
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": name,
            "x": x,
            "y": y,
            "line": {"color": colour, "width": width},
            "hovertemplate": "%{x}: step %{y:,}<extra></extra>",
        }
        for name, (x, y), colour, width in traces
        if x
    ]


def _marks(kind: str, lines: Sequence[Line]) -> Trace:
    own = [told for told in lines if told.kind == kind and not np.isnan(told.time)]
    colour, symbol = KINDS.get(kind, (INK, "circle"))
    texts = [f"{moment(told.time)}{_at(told)}: {told.text[:200]}" for told in own]
    x, y = [told.time * 1000 for told in own], [words(kind)] * len(own)
    return points(kind, x, y, colour, texts, symbol=symbol, yaxis="y2")


def _at(told: Line) -> str:
    return "" if told.step is None else f", step {told.step:,}"


def _bars(row: str, spans: Sequence[tuple[float, float]], colour: str) -> Trace:
    x: list[float | None] = []
    for began, ended in spans:
        x += [began * 1000, ended * 1000, None]
    texts = [text for began, ended in spans for text in [f"{row}, {duration(ended - began)}"] * 3]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": x,
        "y": [row] * len(x),
        "yaxis": "y2",
        "line": {"color": colour, "width": 12},
        "hovertext": texts,
        "hovertemplate": "%{hovertext}<extra></extra>",
    }


def _down(run: ReportedRun) -> list[tuple[float, float]]:
    """From the end of each life to the next start."""
    return [(one.ended, two.began) for one, two in zip(run.lives, run.lives[1:], strict=False)]


def _taken_back(run: ReportedRun) -> list[tuple[float, float]]:
    """From the begin of the first step of each stretch of steps that were taken back to the end of its last."""
    told = run.told
    gone = np.flatnonzero(~told.stands)
    lives = told.columns["life"]
    cuts = np.flatnonzero((np.diff(gone) > 1) | (np.diff(lives[gone]) != 0)) + 1
    times, seconds = told.columns["time"], np.nan_to_num(told.columns["step_seconds"])
    return [(times[of[0]] - seconds[of[0]], times[of[-1]]) for of in np.split(gone, cuts) if len(of)]
