"""Find the loss spikes of a run after the fact, in its journal or in a CSV of loss and gradient norm, with a picture.

    python tools/find_spikes.py runs/k2_65b_stage1/journal.jsonl --picture spikes.html
    python tools/find_spikes.py curve.csv --window-steps 64 --threshold 30

A CSV has a heading; columns "step" and "loss" are needed, "grad_norm" is used when it is there. A journal tells of the
layers as well. The detector is the one that watches a training run; its settings are the defaults of section [spikes],
or those given. Prints one line a spike. Steps whose values are not finite are counted and left out.
"""

import argparse
import csv
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from k2_megatron.config.schema import Spikes
from k2_megatron.runtime.durable import write_file
from k2_megatron.runtime.journal import read_steps
from k2_megatron.runtime.tool import run_tool
from k2_megatron.train.spikes.detector import Finding, State, batch_of, observe

COLOURS = {
    "benign": "rgba(230, 160, 0, 0.25)",
    "malignant": "rgba(200, 0, 0, 0.25)",
    "not over": "rgba(90, 90, 90, 0.2)",
}


@dataclass(frozen=True)
class Curve:
    """Steps with their losses, gradient norms (None where they are not known), and what they tell of layers and
    samples."""

    steps: list[int]
    losses: list[float]
    norms: list[float] | None
    layers: list[dict | None]
    highest: list[float | None]
    batches: list[tuple[int, int] | None]  # samples of the step and their length
    left_out: list[int]  # steps that are not finite


@dataclass(frozen=True)
class Spike:
    """A spike from its beginning to its verdict; `verdict` is None when the curve ends before."""

    called: Finding
    verdict: Finding | None

    @property
    def kind(self) -> str:
        return self.verdict.kind if self.verdict else "not over"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("curve", type=Path, help="a journal.jsonl or a .csv")
    parser.add_argument("--picture", type=Path, help="write an HTML page with the curves and the spikes marked")
    parser.add_argument("--window-steps", type=int, default=Spikes().window_steps)
    parser.add_argument("--threshold", type=float, default=Spikes().threshold)
    parser.add_argument("--benign-steps", type=int, default=Spikes().benign_steps)
    arguments = parser.parse_args()
    return run_tool("find_spikes", lambda: tell_spikes(arguments))


def tell_spikes(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    curve = read_curve(arguments.curve)
    spikes = find_spikes(curve, settings)
    for spike in spikes:
        print(line(spike, curve.norms is not None))
    print(f"{len(spikes)} spikes in {len(curve.steps)} steps{remarks(curve, settings)}")
    if arguments.picture:
        write_picture(arguments.picture, curve, spikes)
    return 0


def settings_of(arguments: argparse.Namespace) -> Spikes:
    """The detector's settings. ValueError naming the option that does not fit."""
    given = {key: getattr(arguments, key) for key in ("window_steps", "threshold", "benign_steps")}
    try:
        return Spikes(**given)
    except ValidationError as error:
        wrong = error.errors()[0]
        key = str(wrong["loc"][0])
        option, what = key.replace("_", "-"), wrong["msg"].removeprefix("Input ")
        raise ValueError(f"--{option} {given[key]}: {what}") from None


def remarks(curve: Curve, settings: Spikes) -> str:
    """What the count of spikes does not tell."""
    told = ""
    if curve.left_out:
        steps = "step" if len(curve.left_out) == 1 else "steps"
        told += f"; {len(curve.left_out)} {steps} not finite and left out, the first {curve.left_out[0]}"
    if len(curve.steps) <= settings.window_steps:
        told += f"; nothing is judged before {settings.window_steps} steps are known (--window-steps)"
    return told


def read_curve(path: Path) -> Curve:
    """The curve of a journal or CSV. ValueError naming the file, and the line, when it holds none."""
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise ValueError(f"{path} {found}; give a run's journal.jsonl, or a CSV with columns step and loss")
    if path.suffix == ".jsonl":
        events = list(read_steps(path).values())
        without = [key for key in ("loss", "grad_norm") if any(key not in event for event in events)]
        if not events or without:
            raise ValueError(f"{path} tells of no {' and '.join(without) or 'step'}: it is no journal of a run")
        return curve_of(events, has_norms=True)
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:  # spreadsheets begin a file with a mark
            reader = csv.DictReader(lines)
            columns, rows = list(reader.fieldnames or ()), [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a CSV: {error}") from None
    if not {"step", "loss"} <= set(columns):
        raise ValueError(f"{path}: columns are {columns}; step and loss are needed, by these names")
    if not rows:
        raise ValueError(f"{path} has a heading and no step below it")
    has_norms = "grad_norm" in columns
    keys = ("step", "loss", "grad_norm") if has_norms else ("step", "loss")
    return curve_of([{key: number(path, at, row, key) for key in keys} for at, row in rows], has_norms)


def number(path: Path, at: int, row: Mapping[str, str | None], key: str) -> float:
    """The number of a CSV's cell. ValueError naming its line."""
    try:
        value = float(row[key] or "")
        return int(value) if key == "step" else value
    except (ValueError, OverflowError):
        raise ValueError(
            f"{path}, line {at}: {key} is {row[key]!r}, which is no number; mend or remove the line"
        ) from None


def curve_of(events: list[dict], has_norms: bool) -> Curve:
    """The finite steps of the events."""
    keys = ("loss", "grad_norm") if has_norms else ("loss",)
    left_out = [event["step"] for event in events if not all(math.isfinite(event[key]) for key in keys)]
    finite = [event for event in events if all(math.isfinite(event[key]) for key in keys)]
    return Curve(
        steps=[event["step"] for event in finite],
        losses=[event["loss"] for event in finite],
        norms=[event["grad_norm"] for event in finite] if has_norms else None,
        layers=[event.get("layers") for event in finite],
        highest=[event.get("highest_sample_loss") for event in finite],
        batches=[batch_of(event) for event in finite],
        left_out=left_out,
    )


def find_spikes(curve: Curve, settings: Spikes) -> list[Spike]:
    """Run the detector over the curve."""
    state, spikes, called = State(), [], None
    norms = curve.norms or [1.0] * len(curve.steps)  # a constant never deviates
    columns = (curve.steps, curve.losses, norms, curve.layers, curve.highest, curve.batches)
    for values in zip(*columns, strict=True):
        state, finding = observe(state, settings, *values)
        if finding and finding.kind == "spike":
            called = finding
        elif finding and called:
            spikes.append(Spike(called, finding))
            called = None
        elif called and state.trip is None:  # the batch or the length has changed: measured anew, and never judged
            spikes.append(Spike(called, None))
            called = None
    return [*spikes, Spike(called, None)] if called else spikes


def line(spike: Spike, has_norms: bool) -> str:
    called, verdict = spike.called, spike.verdict
    end = f"to step {verdict.step}" if verdict and verdict.kind == "benign" else "not over when the curve ends"
    if verdict and verdict.kind == "malignant":
        end = f"not over at step {verdict.step}"
    of_norm = f", gradient norm {called.norm_deviation:.1f} above {called.usual_norm:.4f}" if has_norms else ""
    of_layer = f"; {called.layers[0].words}" if called.layers else ""
    return (
        f"{spike.kind:9}  from step {called.onset}, called at {called.trip}, {end}; when called, loss "
        f"{called.loss_deviation:.1f} deviations above {called.usual_loss:.4f}{of_norm}{of_layer}"
    )


def write_picture(path: Path, curve: Curve, spikes: list[Spike]) -> None:
    """An HTML page that needs no network: loss above, gradient norm below, spikes as bands."""
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    figure = make_subplots(rows=2 if curve.norms else 1, cols=1, shared_xaxes=True, vertical_spacing=0.05)
    figure.add_trace(graph_objects.Scatter(x=curve.steps, y=curve.losses, name="loss", line_width=1), row=1, col=1)
    if curve.norms:
        trace = graph_objects.Scatter(x=curve.steps, y=curve.norms, name="gradient norm", line_width=1)
        figure.add_trace(trace, row=2, col=1)
        figure.update_yaxes(type="log", title_text="gradient norm", row=2, col=1)
    for spike in spikes:
        end = spike.verdict.step if spike.verdict else curve.steps[-1]
        name = {"annotation_text": spike.kind, "annotation_position": "top left"}
        figure.add_vrect(
            x0=spike.called.onset, x1=end, fillcolor=COLOURS[spike.kind], line_width=0, row=1, col=1, **name
        )
        if curve.norms:
            figure.add_vrect(x0=spike.called.onset, x1=end, fillcolor=COLOURS[spike.kind], line_width=0, row=2, col=1)
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_layout(title=f"{len(spikes)} spikes in {len(curve.steps)} steps", template="simple_white")
    write_file(path, figure.to_html(include_plotlyjs=True))


if __name__ == "__main__":
    sys.exit(main())
