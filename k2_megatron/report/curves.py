"""The pictures of one run over its steps: loss, norms, learning rate, batch, speed.

In:  a `ReportedRun`. Out: pictures, in the order in which they are shown. What stands is drawn strong, what was taken
back pale. A long run is drawn in buckets; the smallest and largest value of each stay, at their steps.
"""

from collections.abc import Iterator

import numpy as np

from k2_megatron.evaluate.table import main_figure
from k2_megatron.report.buckets import Buckets, reduce, running_median, width_for
from k2_megatron.report.loss_marks import marks_of_loss, shapes_of_loss
from k2_megatron.report.run import ReportedRun
from k2_megatron.report.style import (
    BLUE,
    GREY,
    ORANGE,
    PALE,
    SERIES,
    Figure,
    Trace,
    axis,
    figure,
    line,
    over_steps,
    with_tokens,
    words,
)

MEDIAN_STEPS = 31  # of the running median, where steps are drawn one by one
# (column, title, scale) of what is drawn alike
MEASURED = (
    ("grad_norm", "gradient norm, before clipping", "log"),
    ("learning_rate", "learning rate", "linear"),
    ("batch", "global batch, sequences", "linear"),
    ("tokens_per_second", "tokens a second", "linear"),
    ("model_flops_utilization", "model FLOPs utilization", "linear"),
)


def curves(run: ReportedRun) -> Iterator[Figure]:
    """The pictures of numbers that every step has."""
    yield with_run_tokens(run, loss_picture(run))
    yield with_run_tokens(run, held_out_picture(run))
    if tasks := _evaluated(run, of_loss=False):
        title = "tasks, evaluated" if len(tasks) > 1 else tasks[0]["name"]  # one line has no legend
        yield with_run_tokens(
            run, figure(title, tasks, xaxis=over_steps(last_step(run)), yaxis=axis(rangemode="tozero"))
        )
    for name, title, scale in MEASURED:
        if np.isfinite(run.told.standing(name)).any():
            yield with_run_tokens(run, _curve(run, name, title, scale))
    if np.isfinite(run.told.standing("step_seconds")).any():
        yield with_run_tokens(run, _seconds_picture(run))


def with_run_tokens(run: ReportedRun, picture: Figure) -> Figure:
    return with_tokens(picture, run.told.steps, run.told.standing("consumed_tokens"))


def last_step(run: ReportedRun) -> int:
    """The largest step that is told of, taken back or not."""
    return int(run.told.columns["step"].max(initial=1))


def width_of(run: ReportedRun) -> int:
    """Steps of a bucket, in all pictures of this run."""
    steps = run.told.steps
    return width_for(int(steps[-1] - steps[0]) + 1) if len(steps) else 1


def raw_and_median(run: ReportedRun, name: str, colour: str) -> list[Trace]:
    """A line through all values, or through the extremes of each bucket, and the median."""
    width, steps, values = width_of(run), run.told.steps, run.told.standing(name)
    found = reduce(steps, values, width)
    if width == 1:
        middle = running_median(values, MEDIAN_STEPS)
        return [
            line("each step", found.first, found.median, colour, width=0.8, opacity=0.55),
            line(f"median of {MEDIAN_STEPS} steps", steps, middle, colour, width=2),
        ]
    return [
        line(f"least and largest of {width:,} steps", *found.extremes, colour, width=0.8, opacity=0.55),
        line(f"median of {width:,} steps", middle_of(found), found.median, colour, width=2),
    ]


def middle_of(found: Buckets) -> np.ndarray:
    return (found.first + found.last) / 2


def _taken_back(run: ReportedRun, name: str) -> list[Trace]:
    """The values of steps that were taken back, each branch a line of its own."""
    told, width = run.told, width_of(run)
    x: list[float | None] = []
    y: list[float | None] = []
    gone = np.flatnonzero(~told.stands)
    # A branch ends where tellings that stand come between, or the step does not follow
    cuts = np.flatnonzero((np.diff(gone) > 1) | (np.diff(told.columns["step"][gone]) <= 0)) + 1
    for branch in np.split(gone, cuts):
        places, values = reduce(told.columns["step"][branch], told.columns[name][branch], width).extremes
        x += [*places.tolist(), None]
        y += [*values.tolist(), None]
    return [line("taken back", x, y, PALE, width=1.2)] if x else []


def _curve(run: ReportedRun, name: str, title: str, scale: str) -> Figure:
    data = [*_taken_back(run, name), *raw_and_median(run, name, BLUE)]
    if name in ("learning_rate", "batch"):  # what was asked for has no noise: its steps are what is to be seen
        data = [*_taken_back(run, name), {**data[-2], "opacity": 1.0, "line": {"color": BLUE, "width": 2}}]
    yaxis = axis(type=scale, rangemode="tozero", **(_few_ticks(run.told.standing(name)) if scale == "log" else {}))
    return figure(title, data, xaxis=over_steps(last_step(run)), yaxis=yaxis)


def _few_ticks(values: np.ndarray) -> dict[str, str]:
    """1, 2, 5, 10 ... on a logarithmic axis; plotly writes every digit up to some powers, one above the other."""
    values = values[np.isfinite(values) & (values > 0)]
    return {"dtick": "D2"} if len(values) and 5 <= values.max() / values.min() <= 1e4 else {}


def loss_picture(run: ReportedRun) -> Figure:
    """The training loss, with spikes, rollbacks and resumes marked."""
    data = [*_taken_back(run, "loss"), *raw_and_median(run, "loss", BLUE), *marks_of_loss(run)]
    x = over_steps(last_step(run))
    return figure("training loss, nats a token", data, 440, xaxis=x, yaxis=axis(), shapes=shapes_of_loss(run))


def held_out_picture(run: ReportedRun) -> Figure:
    """Losses on texts that are not trained on: of the training loop, and of evaluations.jsonl."""
    data = []
    told = run.told.of_kind("evaluation")
    for name, colour, stands in (("taken back", PALE, False), ("held out, by the training loop", BLUE, True)):
        part = [rare.event for rare in told if rare.stands is stands and "held_out_loss" in rare.event]
        if part:
            x, y = [event["step"] for event in part], [event["held_out_loss"] for event in part]
            mode = "lines+markers" if stands else "markers"
            data.append(line(name, x, y, colour, mode=mode, marker={"size": 6}, width=2))
    data += _evaluated(run, of_loss=True)
    note = [] if data else [_note("nothing was evaluated")]
    return figure("held-out loss, nats a token", data, xaxis=over_steps(last_step(run)), yaxis=axis(), annotations=note)


def _evaluated(run: ReportedRun, *, of_loss: bool) -> list[Trace]:
    """A line for each text of evaluations.jsonl: of those whose main figure is the loss, or of all others."""
    texts: dict[str, list[tuple[int, float]]] = {}
    for event in run.evaluations:
        name = main_figure(event)
        value = event["figures"].get(name)
        if (name == "loss") is of_loss and isinstance(value, int | float):
            of_what = "" if of_loss else f": {name}"
            texts.setdefault(f"{event['text'].get('name')}{of_what}, evaluated", []).append((event["step"], value))
    traces = []
    for number, (name, values) in enumerate(sorted(texts.items())):
        x, y = [step for step, _ in values], [value for _, value in values]
        colour = SERIES[1 + number % (len(SERIES) - 1)]
        look = {"mode": "lines+markers", "marker": {"size": 7, "symbol": "square"}}
        traces.append(line(name, x, y, colour, **look))
    return traces


def _note(text: str) -> dict:
    at = {"x": 0.5, "y": 0.5, "xref": "paper", "yref": "paper"}
    return {**at, "text": words(text), "showarrow": False, "font": {"color": GREY, "size": 14}}


def _seconds_picture(run: ReportedRun) -> Figure:
    """Median and 95th percentile of what steps took, by bucket: of a short run, buckets of a fiftieth of it."""
    told = run.told
    steps, width = told.steps, width_of(run)
    wide = max(width, -(-len(steps) // 50)) if width == 1 else width
    found = reduce(steps, told.standing("step_seconds"), wide)
    x = middle_of(found)
    data = [
        line(f"largest of {wide:,} steps", *_largest(found), PALE, width=1),
        line("95th percentile", x, found.p95, ORANGE, width=1.6),
        line(f"median of {wide:,} steps", x, found.median, BLUE, width=2),
    ]
    return figure("seconds a step", data, xaxis=over_steps(last_step(run)), yaxis=axis(rangemode="tozero"))


def _largest(found: Buckets) -> tuple[np.ndarray, np.ndarray]:
    return found.maximum_at, found.maximum
