"""A ledger's amendments applied to a schedule: sample numbers become rows of the plan's own length.

In: a schedule and the amendments of a ledger, in order. Out: the schedule that training follows.
"""

from __future__ import annotations

from typing import Any

from k2_megatron.data.ledger import Ledger
from k2_megatron.data.schedule import Amendment, Schedule


def amended(schedule: Schedule, entry: dict[str, Any], rows_per_chunk: int | None, row_length: int) -> Schedule:
    """The schedule after one amendment of a ledger. Sample numbers become rows of `row_length` tokens: rounded up where
    the amendment holds from, outwards for a range."""
    length = entry["sequence_length"]
    from_row = -(-entry["from_sample"] * length // row_length)
    rows = None
    if "samples" in entry:
        first, end = entry["samples"]
        low = first * length // row_length
        rows = (low if first < entry["from_sample"] else max(low, from_row), -(-end * length // row_length))
    return schedule.amended(Amendment(entry["action"], from_row, entry.get("chunk"), rows), rows_per_chunk)


def amended_by(schedule: Schedule, ledger: Ledger | None, rows_per_chunk: int | None, row_length: int) -> Schedule:
    """The schedule after every amendment of a ledger. ValueError names the one that does not fit."""
    if ledger is None:
        return schedule
    for number, entry in enumerate(ledger.amendments):
        try:
            schedule = amended(schedule, entry, rows_per_chunk, row_length)
        except ValueError as error:
            raise ValueError(f"{ledger.path}, amendment {number}: {error}") from None
    return schedule
