"""What is marked in the picture of the loss: spikes with their verdicts and decisions, rollbacks, resumes.

In:  a `ReportedRun`. Out: traces, and shapes below them.
"""

import numpy as np

from k2_megatron.report.reading import Rare
from k2_megatron.report.run import ReportedRun
from k2_megatron.report.style import GREY, ORANGE, PURPLE, RED, Trace, line, points

MOST_SHAPES = 100  # of each kind, the newest
SPIKE_COLOURS = {"benign": ORANGE, "malignant": RED, "not over": GREY}


def marks_of_loss(run: ReportedRun) -> list[Trace]:
    """Spikes, rollbacks, and what the shapes of resumes are called."""
    resumed = [line("resumed", [None], [None], GREY)] if _resumed(run) else []
    for trace in resumed:
        trace["line"] = {"color": GREY, "width": 1, "dash": "dot"}
    return [*_spike_marks(run), *_rollback_marks(run), *resumed]


def shapes_of_loss(run: ReportedRun) -> list[dict]:
    """Lines where the run was resumed, bands where a spike lasted."""
    return [*map(_upright, _resumed(run)[-MOST_SHAPES:]), *_spike_bands(run)]


def _resumed(run: ReportedRun) -> list[int]:
    return [life.resume["step"] for life in run.lives if life.resume is not None]


def _upright(step: int) -> dict:
    at = {"x0": step, "x1": step, "y0": 0, "y1": 1, "xref": "x", "yref": "paper"}
    return {"type": "line", **at, "line": {"color": GREY, "width": 1, "dash": "dot"}, "layer": "below"}


def spikes_of(run: ReportedRun) -> list[tuple[Rare, Rare | None]]:
    """(the event that called a spike, the one with its verdict) of each."""
    found: list[tuple[Rare, Rare | None]] = []
    for rare in run.told.of_kind("spike"):
        if rare.event.get("kind") == "spike":
            found.append((rare, None))
        elif found and found[-1][1] is None and found[-1][0].event.get("trip") == rare.event.get("trip"):
            found[-1] = (found[-1][0], rare)
        else:  # called before the journal begins
            found.append((rare, rare))
    return found


def kind_of(verdict: Rare | None) -> str:
    return str(verdict.event.get("kind")) if verdict else "not over"


def _spike_bands(run: ReportedRun) -> list[dict]:
    last = int(run.told.columns["step"].max(initial=0))
    bands = []
    for called, verdict in spikes_of(run)[-MOST_SHAPES:]:
        end = verdict.event["step"] if verdict else last
        at = {"x0": called.event.get("onset", called.event["step"]), "x1": end, "y0": 0, "y1": 1}
        colour = SPIKE_COLOURS.get(kind_of(verdict), GREY)
        bands.append(
            {"type": "rect", **at, "xref": "x", "yref": "paper", "fillcolor": colour, "opacity": 0.12, "layer": "below"}
            | {"line": {"width": 0}}
        )
    return bands


def _loss_at(run: ReportedRun, step: int, before: int) -> float | None:
    """The loss of the last telling of a step among the first `before`."""
    steps = run.told.columns["step"][:before]
    places = np.flatnonzero(steps == step)
    return float(run.told.columns["loss"][places[-1]]) if len(places) else None


def _spike_marks(run: ReportedRun) -> list[Trace]:
    by_kind: dict[str, list[tuple[int, float | None, str]]] = {}
    for called, verdict in spikes_of(run):
        kind, decision = kind_of(verdict), (verdict or called).event.get("decision")
        trip = called.event.get("trip", called.event["step"])
        text = f"{kind} spike, from step {called.event.get('onset')}, called at {trip}; decision: {decision}"
        by_kind.setdefault(kind, []).append((trip, _loss_at(run, trip, called.tellings), text))
    return [
        points(f"spike: {kind}", [at[0] for at in marks], [at[1] for at in marks], SPIKE_COLOURS.get(kind, GREY),
               [at[2] for at in marks], symbol="diamond", size=11)
        for kind, marks in by_kind.items()
    ]  # fmt: skip


def _rollback_marks(run: ReportedRun) -> list[Trace]:
    marks = []
    for rare in run.told.of_kind("rollback"):
        step, back = rare.event.get("from_step", rare.event["step"]), rare.event["step"]
        marks.append((step, _loss_at(run, step, rare.tellings), f"rolled back from step {step} to {back}"))
    if not marks:
        return []
    columns = list(zip(*marks, strict=True))
    return [points("rolled back", columns[0], columns[1], PURPLE, columns[2], symbol="triangle-left", size=12)]
