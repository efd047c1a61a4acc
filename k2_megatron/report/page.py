"""One HTML file that stands alone: text, tables, pictures, and plotly's JavaScript inside it.

In:  sections of ready parts. Out: the text of the file. Whatever comes from a file of a run is escaped here, or by
`style.words` where it stands in a picture. Nothing in the page is loaded from anywhere.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

import orjson
from plotly.offline import get_plotlyjs

from k2_megatron.report.style import Figure

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 0 24px 48px;
       max-width: 1320px; }
h1 { font-size: 26px; margin: 28px 0 2px; }
h2 { font-size: 19px; margin: 34px 0 8px; border-bottom: 1px solid #ddd; }
p { margin: 6px 0; max-width: 110ch; } .state { color: #555; margin-bottom: 14px; } .note { color: #666;
       font-size: 13px; }
table { border-collapse: collapse; font-size: 13.5px; } td, th { text-align: left; vertical-align: top;
       padding: 3px 14px 3px 0; border-bottom: 1px solid #eee; overflow-wrap: break-word; }
th { white-space: nowrap; font-weight: 600; color: #444; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.first { white-space: nowrap; color: #444; } tr.pale td { color: #999; }
.scroll { max-height: 480px; overflow-y: auto; } .scroll th { position: sticky; top: 0; background: #fff; }
.pictures { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 18px; } .pictures > * { min-width: 0; }
.wide { grid-column: 1 / -1; } pre { font-size: 12.5px; background: #f7f7f7; padding: 12px; overflow-x: auto; }
.bar { display: flex; height: 22px; margin: 8px 0 10px; } .bar > span { display: block; height: 100%; }
.swatch { display: inline-block; width: 11px; height: 11px; margin-right: 7px; }
.holds { color: #006b4f; } .fails { color: #b33c00; font-weight: 600; }
@media (max-width: 900px) { .pictures { grid-template-columns: 1fr; } }
.bar, .swatch { print-color-adjust: exact; }
@media print { body { max-width: none; padding: 0; font-size: 11px; } .scroll { max-height: none; overflow: visible; }
       .picture, tr { break-inside: avoid; } h2 { break-after: avoid; } .modebar { display: none; }
       .pictures { grid-template-columns: 1fr; } }
"""
# Pictures over the same steps are moved together; for printing they take the width of the page.
SCRIPT = """
const drawn = [];
for (const holder of document.querySelectorAll('.picture')) {
  const figure = JSON.parse(holder.nextElementSibling.textContent);
  Plotly.newPlot(holder, figure.data, figure.layout,
    {responsive: true, displaylogo: false, modeBarButtons: [['zoom2d', 'pan2d', 'resetScale2d', 'toImage']]});
  if (holder.dataset.axis) drawn.push(holder);
}
let moving = false;
for (const holder of drawn) holder.on('plotly_relayout', (change) => {
  if (moving) return;
  const moved = {};
  for (const key of ['xaxis.range[0]', 'xaxis.range[1]', 'xaxis.autorange'])
    if (key in change) moved[key] = change[key];
  if (!Object.keys(moved).length) return;
  moving = true;
  Promise.all(drawn.filter((other) => other !== holder && other.dataset.axis === holder.dataset.axis)
    .map((other) => Plotly.relayout(other, moved))).finally(() => { moving = false; });
});
const resize = () => { for (const holder of document.querySelectorAll('.picture')) Plotly.Plots.resize(holder); };
window.addEventListener('beforeprint', resize);
window.addEventListener('afterprint', resize);
"""


@dataclass(frozen=True)
class Html:
    """Text that is HTML already."""

    text: str


Cell = str | Html


def html(cell: Cell) -> str:
    """HTML of a text, escaped, or of what is HTML already."""
    return cell.text if isinstance(cell, Html) else escape(cell)


def page(title: str, state: str, sections: Iterable[tuple[str, Sequence[Html]]]) -> str:
    """The whole file. `sections`: heading and parts of each."""
    body = "\n".join(
        f"<section><h2>{escape(heading)}</h2>\n{''.join(part.text for part in parts)}\n</section>"
        for heading, parts in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n<script>{get_plotlyjs()}</script></head>\n"
        f'<body><h1>{escape(title)}</h1><p class="state">{escape(state)}</p>\n{body}\n'
        f"<script>{SCRIPT}</script></body></html>\n"
    )


def paragraph(text: Cell, kind: str = "") -> Html:
    return Html(f'<p class="{kind}">{html(text)}</p>\n')


def note(text: Cell) -> Html:
    """A remark in small print."""
    return paragraph(text, "note")


def table(
    heading: Sequence[str], rows: Sequence[Sequence[Cell]], numbers: Sequence[int] = (), pale: Sequence[int] = ()
) -> Html:
    """A table; `numbers`: columns that are set to the right; `pale`: rows that are."""

    def row(cells: Sequence[Cell], tag: str, kind: str = "") -> str:
        kinds = ["number" if column in numbers else "first" if column == 0 else "" for column in range(len(cells))]
        inner = "".join(f'<{tag} class="{of}">{html(cell)}</{tag}>' for cell, of in zip(cells, kinds, strict=True))
        return f'<tr class="{kind}">{inner}</tr>'

    lines = [row(heading, "th")] if heading else []
    lines += [row(cells, "td", "pale" if number in pale else "") for number, cells in enumerate(rows)]
    return Html("<table>" + "\n".join(lines) + "</table>\n")


def scrolled(part: Html) -> Html:
    return Html(f'<div class="scroll">{part.text}</div>\n')


def folded(summary: str, part: Html) -> Html:
    return Html(f"<details><summary>{escape(summary)}</summary>{part.text}</details>\n")


def preformatted(text: str) -> Html:
    return Html(f"<pre>{escape(text)}</pre>")


def link(text: str, path: str) -> Html:
    """A link to a file beside the page, by a relative path."""
    from urllib.parse import quote

    return Html(f'<a href="{escape(quote(path))}">{escape(text)}</a>')


def pictures(figures: Iterable[tuple[Figure, bool]], axis: str = "") -> Html:
    """Pictures beside each other, `wide` ones in a row of their own; those of one `axis` are moved together."""
    parts = []
    for figure, wide in figures:
        height = figure["layout"]["height"]
        moved = f' data-axis="{escape(axis)}"' if axis else ""
        parts.append(
            f'<div class="{"wide" if wide else ""}"><div class="picture" style="height:{height}px"{moved}></div>'
            f'<script type="application/json">{_json(figure)}</script></div>\n'
        )
    return Html(f'<div class="pictures">{"".join(parts)}</div>\n')


def _json(figure: Figure) -> str:
    """JSON that cannot end the script that it stands in."""
    text = orjson.dumps(figure, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS).decode()
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def bar(parts: Sequence[tuple[float, str]]) -> Html:
    """A bar of shares with their colours."""
    spans = "".join(
        f'<span style="width:{100 * share:.3f}%;background:{colour}"></span>' for share, colour in parts if share > 0
    )
    return Html(f'<div class="bar">{spans}</div>\n')


def swatch(colour: str) -> Html:
    return Html(f'<span class="swatch" style="background:{colour}"></span>')
