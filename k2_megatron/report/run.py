"""A run folder, read for its report: configuration, journal, evaluations, checkpoints, ledger.

In:  the folder; nothing in it is changed, and the run may be at work. Out: a `ReportedRun`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from k2_megatron.config import Config, load_run_config
from k2_megatron.report.goodput import goodput_of, parts_of
from k2_megatron.report.lives import Life, lives_of
from k2_megatron.report.reading import Told, read_told
from k2_megatron.runtime.journal import JOURNAL, read_events

EVALUATIONS = "evaluations.jsonl"  # docs/evaluate.md
CONFIG = "config.toml"


@dataclass(frozen=True)
class ReportedRun:
    """`name`: what the folder is called."""

    folder: Path
    name: str
    config: Config
    told: Told

    @property
    def journal(self) -> Path:
        return self.folder / JOURNAL

    @cached_property
    def lives(self) -> list[Life]:
        return lives_of(self.told)

    @cached_property
    def time_parts(self) -> dict[str, float]:
        """{part: seconds} of the wall time; see goodput.py."""
        return parts_of(self.told.account, self.told.columns["step_seconds"], self.told.stands)

    @property
    def goodput(self) -> float | None:
        return goodput_of(self.told.account, self.told.columns["step_seconds"], self.told.stands)

    @cached_property
    def evaluations(self) -> list[dict]:
        """The last line of each (step, text) of evaluations.jsonl; none where nothing was evaluated."""
        path = self.folder / EVALUATIONS
        found = {}
        for event in read_events(path) if path.is_file() else ():
            text, figures = event.get("text"), event.get("figures")
            if (
                isinstance(text, dict)
                and isinstance(text.get("kind"), str)
                and isinstance(figures, dict)
                and type(event.get("step")) is int
            ):
                found[event["step"], str(text.get("name"))] = event
        return [found[key] for key in sorted(found)]


def read_run(folder: Path) -> ReportedRun:
    """Read a run folder. ValueError where it is none."""
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder}: no {CONFIG} there; name the folder of a run")
    config = load_run_config(folder / CONFIG)
    return ReportedRun(folder, folder.resolve().name, config, read_told(folder / JOURNAL))


def named_apart(runs: Sequence[ReportedRun]) -> list[str]:
    """A name for each run; where two folders are called alike, as they were given."""
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]
