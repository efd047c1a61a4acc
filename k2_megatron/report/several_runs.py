"""The report of several runs beside each other: facts, time, curves, the loss at equal tokens, what differs.

In:  `ReportedRun`s. Out: the page. Runs may have other batches: the loss is drawn over steps and over tokens.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from k2_megatron.report.curves import MEASURED, MEDIAN_STEPS, last_step, raw_and_median
from k2_megatron.report.facts import amount, duration, facts_of, state_of
from k2_megatron.report.goodput import WORDS
from k2_megatron.report.page import Cell, Html, note, page, pictures, table
from k2_megatron.report.run import ReportedRun
from k2_megatron.report.style import SERIES, Figure, Trace, axis, figure, line, over_steps, round_numbers, words

LOSS_STEPS = 32  # over whose median the loss at equal tokens is taken
AMOUNTS = 10  # of tokens at which it is told
NOT_COMPARED = ("run.folder",)
Named = Sequence[tuple[str, ReportedRun]]


def runs_page(runs: Named) -> str:
    """The page; each run with its name."""
    names = [name for name, _ in runs]
    states = "; ".join(f"{name}: {state_of(run)}" for name, run in runs)
    return page(" and ".join([", ".join(names[:-1]), names[-1]]), states, _sections(runs))


def _sections(runs: Named) -> Iterator[tuple[str, Sequence[Html]]]:
    yield "The runs", [_side_by_side([dict(facts_of(run)) for _, run in runs], runs)]
    yield "What differs in their configurations", [_differences(runs)]
    yield "Loss at equal tokens", _equal_tokens(runs)
    yield "Over the steps", [pictures([(picture, number < 2) for number, picture in enumerate(_curves(runs))])]
    yield "Where the time went", [_time(runs), note("docs/report.md has the rule; each run's own report as well.")]


def _side_by_side(facts: Sequence[Mapping[str, str]], runs: Named) -> Html:
    keys = list(dict.fromkeys(key for of_run in facts for key in of_run))
    rows: list[list[Cell]] = [[key, *(of_run.get(key, "") for of_run in facts)] for key in keys]
    return table(["", *(name for name, _ in runs)], rows)


def differences(runs: Sequence[ReportedRun]) -> list[tuple[str, list[Any]]]:
    """(key, its value in each run) of every key of the resolved configurations that is not the same in all."""
    trees = [run.config.flat() for run in runs]
    rows = [(key, [tree[key] for tree in trees]) for key in trees[0] if key not in NOT_COMPARED]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _differences(runs: Named) -> Html:
    found = differences([run for _, run in runs])
    if not found:
        return note("Nothing but run.folder: the resolved configurations are the same.")
    rows: list[list[Cell]] = [[key, *map(_value, values)] for key, values in found]
    return table(["key", *(name for name, _ in runs)], rows)


def _value(value: object) -> str:
    return "not set" if value is None else str(value)


def loss_at(run: ReportedRun, tokens: float) -> tuple[int, float] | None:
    """(the last step that ends at `tokens` trained or before, the median loss of the LOSS_STEPS steps up to it, of as
    many as there are); None where the run is not so far."""
    trained = run.told.standing("consumed_tokens")
    if not len(trained) or not trained[0] <= tokens <= trained[-1]:
        return None
    end = int(np.searchsorted(trained, tokens, side="right"))
    losses = run.told.standing("loss")[max(0, end - LOSS_STEPS) : end]
    return int(run.told.steps[end - 1]), float(np.nanmedian(losses))


def _equal_tokens(runs: Named) -> list[Html]:
    reached = [run.told.standing("consumed_tokens") for _, run in runs]
    if not all(len(tokens) and np.isfinite(tokens).all() for tokens in reached):
        return [note("A run tells of no step, or not how many tokens its steps trained.")]
    low, high = max(tokens[0] for tokens in reached), min(tokens[-1] for tokens in reached)
    if high <= low:
        return [note("The runs have no number of tokens in common.")]
    amounts = [*(number for number in round_numbers(low, high, AMOUNTS) if number < high), high]
    rows: list[list[Cell]] = []
    for tokens in amounts:
        cells: list[Cell] = [amount(tokens)]
        for _, run in runs:
            found = loss_at(run, tokens)
            cells.append(f"{found[1]:.4f} (step {found[0]:,})" if found else "")
        rows.append(cells)
    told = f"Training loss, the median of the {LOSS_STEPS} steps that end at so many tokens or just before."
    return [note(told), table(["tokens", *(name for name, _ in runs)], rows, numbers=range(1, len(runs) + 1))]


def _curves(runs: Named) -> Iterator[Figure]:
    last = max(last_step(run) for _, run in runs)
    yield figure("training loss, nats a token", _overlaid(runs, "loss"), 420, xaxis=over_steps(last), yaxis=axis())
    over_tokens = [
        line(name, *_loss_over_tokens(run), SERIES[number % len(SERIES)], width=2, hovertemplate="%{x:,}: %{y:.6g}")
        for number, (name, run) in enumerate(runs)
    ]
    title = f"training loss over tokens, medians of {MEDIAN_STEPS} steps or of a bucket"
    yield figure(title, over_tokens, 420, xaxis=axis("tokens"), yaxis=axis())
    held_out = [
        line(name, *_held_out(run), SERIES[number % len(SERIES)], mode="lines+markers", width=2)
        for number, (name, run) in enumerate(runs)
    ]
    if any(len(trace["x"]) for trace in held_out):
        yield figure("held-out loss, nats a token", held_out, xaxis=over_steps(last), yaxis=axis())
    for name, title, scale in (*MEASURED, ("step_seconds", "seconds a step", "linear")):
        if any(np.isfinite(run.told.standing(name)).any() for _, run in runs):
            scaled = axis(type=scale, rangemode="tozero")
            yield figure(title, _overlaid(runs, name), xaxis=over_steps(last), yaxis=scaled)


def _overlaid(runs: Named, column: str) -> list[Trace]:
    """Of each run the median, named, above its raw values."""
    raw, middle = [], []
    for number, (name, run) in enumerate(runs):
        thin, thick = raw_and_median(run, column, SERIES[number % len(SERIES)])
        raw.append({**thin, "showlegend": False, "opacity": 0.3})
        middle.append({**thick, "name": words(name)})
    return [*raw, *middle]


def _loss_over_tokens(run: ReportedRun) -> tuple[np.ndarray, np.ndarray]:
    _, thick = raw_and_median(run, "loss", "")
    steps, tokens = run.told.steps, run.told.standing("consumed_tokens")
    return np.interp(thick["x"], steps, tokens) if len(steps) else steps, thick["y"]


def _held_out(run: ReportedRun) -> tuple[list[int], list[float]]:
    told = [rare.event for rare in run.told.of_kind("evaluation") if rare.stands and "held_out_loss" in rare.event]
    return [event["step"] for event in told], [event["held_out_loss"] for event in told]


def _time(runs: Named) -> Html:
    rows: list[list[Cell]] = []
    for part, what in WORDS.items():
        if any(part in run.time_parts for _, run in runs):
            rows.append([what, *(_share(run, part) for _, run in runs)])
    rows.append(["wall time", *(duration(run.told.account.wall) for _, run in runs)])
    return table(["", *(name for name, _ in runs)], rows, numbers=range(1, len(runs) + 1))


def _share(run: ReportedRun, part: str) -> str:
    seconds, wall = run.time_parts.get(part, 0.0), run.told.account.wall
    return f"{duration(seconds)}, {seconds / wall:.2%}" if wall else ""
