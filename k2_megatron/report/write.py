"""A report, from run folders to a file or to lines of text."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from k2_megatron.report.event_lines import ROUTINE, event_lines
from k2_megatron.report.facts import duration, facts_of, moment, time_lines
from k2_megatron.report.one_run import run_page
from k2_megatron.report.run import ReportedRun, named_apart, read_run
from k2_megatron.report.several_runs import runs_page
from k2_megatron.runtime.durable import make_folder, write_file

PAGE, COMPARISON = "report.html", "comparison.html"


def write_report(folders: Sequence[Path], output: Path | None) -> str:
    """Write the page of one run, or of several beside each other; the line that says where. ValueError where a folder
    is no run's."""
    runs = [read_run(folder) for folder in folders]
    if output is None:
        output = folders[0] / PAGE if len(runs) == 1 else Path(COMPARISON)
    output = output.absolute()
    text = run_page(runs[0], output) if len(runs) == 1 else runs_page(list(zip(named_apart(runs), runs, strict=True)))
    make_folder(output.parent)
    write_file(output, text)
    return f"{output}: {len(text) / 1e6:.1f} MB; open it in a browser"


def report_text(folders: Sequence[Path]) -> str:
    """Facts, time and events of each run, as lines."""
    return "\n\n".join("\n".join(_text(run)) for run in map(read_run, folders))


def _text(run: ReportedRun) -> Iterator[str]:
    yield f"{run.folder}"
    yield from (f"  {name:18} {text}" for name, text in facts_of(run))
    yield "time"
    yield from (f"  {what:54} {duration(seconds):>12} {share:7.2%}" for what, seconds, share in time_lines(run))
    yield "events"
    for line in event_lines(run.told, run.folder):
        if line.kind not in ROUTINE:
            step = "" if line.step is None else f"{line.step:,}"
            yield f"  {moment(line.time)}  {line.kind:10} {step:>9}  {line.text}"
