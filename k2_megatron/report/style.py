"""How the pictures look: plain, on white, in colours that the colour-blind tell apart (Okabe and Ito 2008).

A picture is plotly's figure as a plain value: {"data": [traces], "layout": {...}}.
"""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

Figure = dict[str, Any]
Trace = dict[str, Any]

BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
INK, GREY, PALE = "#222222", "#8c8c8c", "#c9c9c9"
SERIES = (BLUE, RED, GREEN, PURPLE, ORANGE, SKY, INK)
TOKEN_TICKS = 5


def words(text: object) -> str:
    """Text from a file in a picture: plotly takes some tags of HTML in what it writes."""
    return escape(str(text), quote=False)


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": title, "standoff": 6},
        "showline": True,
        "linecolor": GREY,
        "ticks": "outside",
        "tickcolor": GREY,
        "gridcolor": "#eeeeee",
        "zeroline": False,
        "automargin": True,
        **more,
    }


def figure(title: str, data: Sequence[Trace], height: int = 300, **layout: Any) -> Figure:
    """A picture with a title, a legend above it where there are several traces to name."""
    named = sum(trace.get("showlegend", True) and bool(trace.get("name")) for trace in data)
    return {
        "data": list(data),
        "layout": {
            "title": {"text": title, "x": 0.01, "font": {"size": 15}, "y": 1, "yanchor": "top", "pad": {"t": 8}},
            "height": height,
            "margin": {"l": 64, "r": 20, "t": 96 if named > 1 else 74, "b": 44},
            "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
            "paper_bgcolor": "white",
            "plot_bgcolor": "white",
            "hovermode": "closest",
            "showlegend": named > 1,
            "legend": {"orientation": "h", "x": 0, "y": 1 - 26 / height, "yref": "container", "yanchor": "top"},
            **layout,
        },
    }


def line(name: str, x: Sequence | np.ndarray, y: Sequence | np.ndarray, colour: str, **more: Any) -> Trace:
    width = more.pop("width", 1.2)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": words(name),
        "x": x,
        "y": y,
        "line": {"color": colour, "width": width},
        "hovertemplate": "step %{x:,}: %{y:.6g}<extra></extra>",
        **more,
    }


def points(name: str, x: Sequence, y: Sequence, colour: str, texts: Sequence[str], **more: Any) -> Trace:
    """Marks with a text each, which may come from a file."""
    symbol = more.pop("symbol", "circle")
    return {
        "type": "scatter",
        "mode": "markers",
        "name": words(name),
        "x": x,
        "y": y,
        "marker": {
            "color": colour,
            "symbol": symbol,
            "size": more.pop("size", 9),
            "line": {"width": 1, "color": "white"},
        },
        "hovertext": [words(text) for text in texts],
        "hovertemplate": "%{hovertext}<extra></extra>",
        **more,
    }


def with_tokens(picture: Figure, steps: np.ndarray, tokens: np.ndarray) -> Figure:
    """The picture over steps with the tokens trained until then along its upper edge, where they are told."""
    told = np.isfinite(tokens)
    steps, tokens = steps[told], tokens[told]
    if len(steps) < 2 or tokens[-1] <= tokens[0]:
        return picture
    unit, letter = next(
        (
            (size, letter)
            for size, letter in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k"))
            if tokens[-1] >= size
        ),
        (1.0, ""),
    )
    places = round_numbers(tokens[0], tokens[-1], TOKEN_TICKS)
    upper = axis(
        "tokens",
        overlaying="x",
        side="top",
        matches="x",
        showgrid=False,
        tickvals=np.interp(places, tokens, steps).tolist(),
        ticktext=[f"{place / unit:g}{letter}" for place in places],
    )
    upper["title"] = {"text": "tokens", "standoff": 2, "font": {"size": 11}}
    hidden = {
        "type": "scatter",
        "x": [int(steps[0]), int(steps[-1])],
        "y": [None, None],
        "xaxis": "x2",
        "showlegend": False,
        "hoverinfo": "skip",
    }
    return {"data": [*picture["data"], hidden], "layout": {**picture["layout"], "xaxis2": upper}}


def over_steps(last: int, **more: Any) -> dict[str, Any]:
    """The axis of steps, from the first to the last that is drawn."""
    return axis("step", tickformat=",d", range=[0, last * 1.01 + 1], **more)


def round_numbers(low: float, high: float, most: int) -> list[float]:
    """Round numbers between two, `most` at most."""
    smallest = (high - low) / most
    power = 10.0 ** np.floor(np.log10(smallest))
    apart = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= smallest)
    return [number * apart for number in range(int(np.ceil(low / apart)), int(high // apart) + 1)]
