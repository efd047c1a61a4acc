"""Results for a screen: steps down, texts across, of each its first figure."""

import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

MAIN_FIGURE = {"rows": "loss", "documents": "loss", "choices": "acc", "completions": "greedy_match"}
_BESIDE = {
    "rows": ("perplexity",),
    "documents": ("perplexity", "bits_per_byte"),
    "choices": ("acc_norm",),
    "completions": ("log_likelihood",),
}


def in_words(result: dict[str, Any]) -> str:
    """ "loss 4.9209 ± 0.0210, perplexity 137.1, 16,384 tokens" """
    kind, figures = result["text"]["kind"], result["figures"]
    names = [main_figure(result), *_BESIDE.get(kind, ())]
    parts = [f"{name} {_number(figures.get(name))}{_error(figures, name)}" for name in names]
    tokens = figures.get("tokens")
    return ", ".join([*parts, *([f"{tokens:,} tokens"] if isinstance(tokens, int) else [])])


def main_figure(result: dict[str, Any]) -> str:
    """The name of the figure that stands for a result: of lm-eval's tasks the first."""
    figures = result["figures"]
    return MAIN_FIGURE.get(result["text"]["kind"]) or ("acc" if "acc" in figures else next(iter(figures), ""))


def _number(value: Any) -> str:
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"
    return str(value)


def _error(figures: dict[str, Any], name: str) -> str:
    error = figures.get(f"{name}_error", figures.get(f"{name}_stderr"))
    return f" ± {error:.4f}" if isinstance(error, float) else ""


def results_table(results: Sequence[dict[str, Any]]) -> Table:
    """One row a step; a column for each text, under its name and its figure's."""
    columns = list(dict.fromkeys((result["text"]["name"], main_figure(result)) for result in results))
    cells = {
        (result["step"], result["text"]["name"], main_figure(result)): _number(
            result["figures"].get(main_figure(result))
        )
        for result in results
    }
    table = Table()
    table.add_column("step", justify="right")
    for name, figure in columns:
        table.add_column(f"{name}\n{figure}", justify="right")
    for step in sorted({result["step"] for result in results}):
        table.add_row(str(step), *(cells.get((step, *column), "") for column in columns))
    return table
