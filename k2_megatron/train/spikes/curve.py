"""The curve of a run as a journal or a CSV has it, for looking at spikes after the fact."""

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from k2_megatron.runtime.journal import read_steps
from k2_megatron.train.spikes.detector import batch_of


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
        return _curve_of(events, has_norms=True)
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
    return _curve_of([{key: _number(path, at, row, key) for key in keys} for at, row in rows], has_norms)


def _number(path: Path, at: int, row: Mapping[str, str | None], key: str) -> float:
    """The number of a CSV's cell. ValueError naming its line."""
    try:
        value = float(row[key] or "")
        return int(value) if key == "step" else value
    except (ValueError, OverflowError):
        raise ValueError(
            f"{path}, line {at}: {key} is {row[key]!r}, which is no number; mend or remove the line"
        ) from None


def _curve_of(events: list[dict], has_norms: bool) -> Curve:
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
