"""The pictures of what each layer and each rank tells, over the steps.

In:  a run and its matrices. Out: heat maps, whose colour is the largest value of a bucket, and the last report of
phases.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from k2_megatron.report.curves import last_step, with_run_tokens
from k2_megatron.report.matrices import Matrices, Matrix
from k2_megatron.report.run import ReportedRun
from k2_megatron.report.style import SERIES, Figure, axis, figure, over_steps, words

TITLES = {"gradient_norm": "gradient norm of each layer", "activation_rms": "root mean square of each layer's output"}


def heat_maps(run: ReportedRun, matrices: Matrices) -> Iterator[Figure]:
    """Layers and ranks over the steps, and the last report of phases."""
    for signal, matrix in matrices.layers.items():
        rows = _layer_names(len(matrix.largest), ends=signal == "gradient_norm")
        picture = _heat_map(run, f"{TITLES[signal]}{_largest_of(matrix, 'steps')}", matrix, rows, "layer", log=True)
        yield with_run_tokens(run, picture)
    if matrices.work is not None:
        ranks = list(map(str, range(len(matrices.work.largest))))
        title = f"seconds of own work in a step, by rank{_largest_of(matrices.work, 'reports')}"
        yield with_run_tokens(run, _heat_map(run, title, matrices.work, ranks, "rank", log=False))
        yield _phases_picture(matrices)


def _layer_names(rows: int, ends: bool) -> list[str]:
    if not ends:
        return [str(number) for number in range(1, rows + 1)]
    return ["embedding", *(str(number) for number in range(1, rows - 1)), "output"]


def _largest_of(matrix: Matrix, what: str) -> str:
    return f" (the largest of {matrix.width:,} {what})" if matrix.width > 1 else ""


def _heat_map(run: ReportedRun, title: str, matrix: Matrix, rows: Sequence[str], row: str, *, log: bool) -> Figure:
    values = np.where(matrix.largest > 0, matrix.largest, np.nan) if log else matrix.largest
    finite = values[np.isfinite(values)]
    shown = np.log10(values) if log else values
    bar: dict = {"thickness": 12, "outlinewidth": 0}
    if log and len(finite):
        bar |= _log_ticks(float(finite.min()), float(finite.max()))
    names = list(map(words, rows))
    trace = {
        "type": "heatmap",
        "x": [*matrix.first.tolist(), int(matrix.last[-1]) + 1],
        "y": names,
        "z": rounded(shown),
        "customdata": np.stack([rounded(matrix.largest), rounded(matrix.median)], axis=-1),
        "colorscale": "Cividis",
        "colorbar": bar,
        "hovertemplate": f"{row} %{{y}}, steps from %{{x:,}}: largest %{{customdata[0]:.5g}}, median "
        "%{customdata[1]:.5g}<extra></extra>",
        "showlegend": False,
    }
    height = min(560, max(230, 150 + 16 * len(rows)))
    ticks = axis(row, type="category", tickvals=names[:: -(-len(rows) // 20)], showgrid=False)
    return figure(title, [trace], height, xaxis=over_steps(last_step(run)), yaxis=ticks)


def rounded(values: np.ndarray) -> np.ndarray:
    """To five significant digits, as many as the journal has of layers; NaN stays."""
    with np.errstate(divide="ignore", invalid="ignore"):
        digits = 10.0 ** (4 - np.floor(np.log10(np.abs(values))))
        return np.where(np.isfinite(digits), np.round(values * digits) / digits, values)


def _log_ticks(low: float, high: float) -> dict:
    """Ticks of a colour bar whose values are logarithms."""
    powers = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    inside = [value for value in values if low <= value <= high] or [low, high]
    return {"tickvals": np.log10(inside).tolist(), "ticktext": [f"{value:.3g}" for value in inside]}


def _phases_picture(matrices: Matrices) -> Figure:
    """What each rank spent its last reported step on."""
    data = []
    for number, (phase, seconds) in enumerate(matrices.latest.items()):
        bars = {"type": "bar", "name": words(phase), "x": list(range(len(seconds))), "y": list(seconds)}
        colour = {"color": SERIES[number % len(SERIES)]}
        data.append(
            {**bars, "marker": colour, "hovertemplate": f"rank %{{x}}: {words(phase)} %{{y:.4g}} s<extra></extra>"}
        )
    title = f"seconds of each phase by rank, in the report of step {matrices.latest_step:,}"
    return figure(title, data, barmode="stack", xaxis=axis("rank", dtick=max(1, len(data[0]["x"]) // 16)), yaxis=axis())
