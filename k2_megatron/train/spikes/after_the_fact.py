"""The spikes of a curve, found after the fact by the detector that watches a run; told in lines and a picture."""

from dataclasses import dataclass
from pathlib import Path

from k2_megatron.config.schema import Spikes
from k2_megatron.runtime.durable import write_file
from k2_megatron.train.spikes.curve import Curve
from k2_megatron.train.spikes.detector import Finding, State, observe

_COLOURS = {
    "benign": "rgba(230, 160, 0, 0.25)",
    "malignant": "rgba(200, 0, 0, 0.25)",
    "not over": "rgba(90, 90, 90, 0.2)",
}


@dataclass(frozen=True)
class Spike:
    """A spike from its beginning to its verdict; `verdict` is None when the curve ends before."""

    called: Finding
    verdict: Finding | None

    @property
    def kind(self) -> str:
        return self.verdict.kind if self.verdict else "not over"


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


def spike_line(spike: Spike, has_norms: bool) -> str:
    """What is told of a spike."""
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
            x0=spike.called.onset, x1=end, fillcolor=_COLOURS[spike.kind], line_width=0, row=1, col=1, **name
        )
        if curve.norms:
            figure.add_vrect(x0=spike.called.onset, x1=end, fillcolor=_COLOURS[spike.kind], line_width=0, row=2, col=1)
    figure.update_yaxes(title_text="loss", row=1, col=1)
    figure.update_layout(title=f"{len(spikes)} spikes in {len(curve.steps)} steps", template="simple_white")
    write_file(path, figure.to_html(include_plotlyjs=True))
