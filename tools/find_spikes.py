"""Find the loss spikes of a run after the fact, in its journal or in a CSV of loss and gradient norm, with a picture.

    python tools/find_spikes.py runs/k2_65b_stage1/journal.jsonl --picture spikes.html
    python tools/find_spikes.py curve.csv --window-steps 64 --threshold 30

A CSV has a heading; columns "step" and "loss" are needed, "grad_norm" is used when it is there. A journal tells of the
layers as well. The detector is the one that watches a training run; its settings are the defaults of section [spikes],
or those given. Prints one line a spike.
"""

import argparse
import csv
import sys
from dataclasses import dataclass
from pathlib import Path

from k2_megatron.config.schema import Spikes
from k2_megatron.train.journal import read_steps
from k2_megatron.train.spikes.detector import Finding, State, observe

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
    try:
        settings = Spikes(
            window_steps=arguments.window_steps, threshold=arguments.threshold, benign_steps=arguments.benign_steps
        )
        curve = read_curve(arguments.curve)
    except ValueError as error:  # pydantic's ValidationError is one
        print(f"error: {error}", file=sys.stderr)
        return 2
    spikes = find_spikes(curve, settings)
    for spike in spikes:
        print(line(spike))
    print(f"{len(spikes)} spikes in {len(curve.steps)} steps")
    if arguments.picture:
        write_picture(arguments.picture, curve, spikes)
    return 0


def read_curve(path: Path) -> Curve:
    """The curve of a journal or CSV. ValueError naming the file when it holds none."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a run's journal.jsonl, or a CSV with columns step and loss")
    if path.suffix == ".jsonl":
        events = list(read_steps(path).values())
        if not events:
            raise ValueError(f"{path} tells of no step")
        values = ([event[key] for event in events] for key in ("step", "loss", "grad_norm"))
        highest = [event.get("highest_sample_loss") for event in events]
        return Curve(*values, layers=[event.get("layers") for event in events], highest=highest)
    with path.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    if not rows or not {"step", "loss"} <= rows[0].keys():
        raise ValueError(
            f"{path}: columns are {list(rows[0]) if rows else []}; step and loss are needed, by these names"
        )
    norms = [float(row["grad_norm"]) for row in rows] if "grad_norm" in rows[0] else None
    steps, losses = [int(float(row["step"])) for row in rows], [float(row["loss"]) for row in rows]
    return Curve(steps, losses, norms, layers=[None] * len(rows), highest=[None] * len(rows))


def find_spikes(curve: Curve, settings: Spikes) -> list[Spike]:
    """Run the detector over the curve."""
    state, spikes, called = State(), [], None
    norms = curve.norms or [1.0] * len(curve.steps)  # a constant never deviates
    for values in zip(curve.steps, curve.losses, norms, curve.layers, curve.highest, strict=True):
        state, finding = observe(state, settings, *values)
        if finding and finding.kind == "spike":
            called = finding
        elif finding and called:
            spikes.append(Spike(called, finding))
            called = None
    return [*spikes, Spike(called, None)] if called else spikes


def line(spike: Spike) -> str:
    called, verdict = spike.called, spike.verdict
    end = f"to step {verdict.step}" if verdict and verdict.kind == "benign" else "not over when the curve ends"
    if verdict and verdict.kind == "malignant":
        end = f"not over at step {verdict.step}"
    of_layer = f"; {called.layers[0].words}" if called.layers else ""
    return (
        f"{spike.kind:9}  from step {called.onset}, called at {called.trip}, {end}; when called, loss "
        f"{called.loss_deviation:.1f} deviations above {called.usual_loss:.4f}, gradient norm "
        f"{called.norm_deviation:.1f} above {called.usual_norm:.4f}{of_layer}"
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
        figure.add_vrect(x0=spike.called.onset, x1=end, fillcolor=COLOURS[spike.kind], line_width=0)
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_layout(title=f"{len(spikes)} spikes in {len(curve.steps)} steps", template="simple_white")
    figure.write_html(path, include_plotlyjs=True)


if __name__ == "__main__":
    sys.exit(main())
