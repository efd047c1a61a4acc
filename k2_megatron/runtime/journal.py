"""journal.jsonl: the truth about a run, one JSON object a line; console, TensorBoard and W&B are views of it.

Rank 0 writes. A line is written whole and flushed before the run goes on, so that a kill loses none that was reported;
a power cut loses at most steps since the last event of another kind or the last `sync`, which precedes each save.
After a resume, the steps that a kill undid stand in the journal twice; `read_steps` keeps the last telling of each.
"""

import contextlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

import orjson

from k2_megatron.runtime.durable import sync

T = TypeVar("T")
JOURNAL = "journal.jsonl"
_NOT_FINITE = ("nan", "inf", "-inf")


class Journal:
    """Appends events; on ranks other than the writer every call does nothing."""

    def __init__(self, folder: Path, *, writer: bool) -> None:
        self.path = folder / JOURNAL
        self.is_writer = writer
        self._file: BinaryIO | None = None
        self._unwritten = b""
        if writer:
            folder.mkdir(parents=True, exist_ok=True)
            self._unwritten = end_of_last_line(self.path)
            self._file = self.path.open("ab", buffering=0)
            sync(folder)  # the name of a new journal

    def write(self, event: str, **fields) -> None:
        """Append one event with the time of writing (UTC)."""
        if self._file is None:
            return
        line = {"event": event, "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"), **fields}
        self._unwritten += strict_json(line).encode() + b"\n"
        try:
            self._write()
            if event != "step":  # those are many, and are synced together
                os.fsync(self._file.fileno())
        except OSError as error:  # a full disk must not end a run that can still train and save elsewhere
            lines = self._unwritten.count(b"\n")
            print(f"journal: cannot write {self.path} ({error}); {lines} lines wait, the run goes on", file=sys.stderr)

    def _write(self) -> None:
        """Write what waits; a disk that fills up takes a part, and the rest follows when there is room."""
        while self._file is not None and self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def sync(self) -> None:
        """Have all lines on the disk: a checkpoint must not survive what the journal tells of its steps."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # lines that could not be written were told of
                os.fsync(self._file.fileno())

    def require_written(self) -> None:
        """OSError where a line still waits for room: for who has nothing to go on with."""
        if self._unwritten:
            raise OSError(f"{self.path} does not take its last lines")

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # lines that could not be written are tried once more, and were told of
                self._write()
            self._file.close()


def strict_json(event: dict) -> str:
    """One JSON object. JSON has no NaN and no infinity: such a number becomes a string, "nan", "inf" or "-inf"."""
    try:
        return json.dumps(event, allow_nan=False)
    except ValueError:
        return json.dumps(_named(event), allow_nan=False)


def _named(value: object) -> object:
    if isinstance(value, dict):
        return {key: _named(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: object) -> object:
    """The other way of `_named`: a reader gets the number that was written."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and value in _NOT_FINITE else value


def end_of_last_line(path: Path) -> bytes:
    """What the last line lacks, which a kill or a full disk may have cut: the next event starts a line of its own."""
    if not path.exists() or not path.stat().st_size:
        return b""
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return b"" if stream.read(1) == b"\n" else b"\n"


def read_events(path: Path, wanted: Callable[[str], bool] | None = None) -> Iterator[dict]:
    """The whole events of a journal, in order; a line that a kill cut, or a power cut tore, is passed over. Where few
    are `wanted`, by their lines, the rest is not parsed."""
    with path.open(errors="replace") as lines:
        yield from _events(filter(wanted, lines) if wanted else lines)


def _events(lines: Iterable[str]) -> Iterator[dict]:
    for line in lines:
        try:
            event = orjson.loads(line)  # a journal of a long run has hundreds of megabytes
        except ValueError:
            try:
                event = json.loads(line)  # takes more, such as a bare NaN
            except ValueError:
                continue
        if isinstance(event, dict) and "event" in event:
            if any(f'"{name}"' in line for name in _NOT_FINITE):
                event = {key: _numbers(value) for key, value in event.items()}
            yield event


def read_steps(path: Path) -> dict[int, dict]:
    """{step: its last "step" event}, ascending: what the run's weights actually went through."""
    # Not by a resume: what it undid stands until it is made anew, and a run that dies before that still tells of it.
    return {event["step"]: event for event in standing_events(path, "step", undone_by=("rollback",))}


def standing_events(path: Path, *kinds: str, undone_by: Sequence[str] = ("resume", "rollback")) -> list[dict]:
    """The events of `kinds`, all of which have a step, that still stand: those of later steps than a resume or rollback
    goes on from do not, nor does what was told of a step, or a later one, before it is told again."""
    standing: Standing[dict] = Standing(undone_by)
    for event in read_events(path):
        standing.take_back(event)
        if event["event"] in kinds:
            standing.told.append((event["step"], event))
    return [event for _, event in standing.told]


class Standing(Generic[T]):
    """(step, what is kept of an event) of the events that stand, of a journal that is read line by line."""

    def __init__(self, undone_by: Sequence[str] = ("resume", "rollback")) -> None:
        self.told: list[tuple[int, T]] = []
        self._undone_by = undone_by

    def take_back(self, event: dict) -> None:
        """Forget what this event, the next of the journal, takes back."""
        kind = event["event"]
        if kind in self._undone_by:
            self.told = [told for told in self.told if told[0] <= event["step"]]
        elif kind == "step":
            while self.told and self.told[-1][0] >= event["step"]:
                self.told.pop()
