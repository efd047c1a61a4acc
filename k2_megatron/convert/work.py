"""Units of work over processes, with a journal: what a kill leaves finished stays finished.

A unit writes one file of the result, under another name until it is whole. When it is done its facts go into the
journal beside the files (journal.py); a second start with the same plan does what is left. The folder has a name of its
own until it is whole.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.journal import JOURNAL, begin_or_continue, is_there
from k2_megatron.convert.workers import Workers
from k2_megatron.runtime.durable import make_folder
from k2_megatron.train.checkpoints.file_hash import new_hash


class Unit(NamedTuple):
    """One file of the result: its name, a word on what it holds (the job's own), and the bytes it will have."""

    file: str
    content: tuple
    bytes: int


class Check(Protocol):
    """Picklable; `run` reads what a unit names and returns facts, "resident_bytes" among them."""

    def run(self, unit: Unit) -> dict[str, Any]: ...


class Job(Check, Protocol):
    """A check that writes: `run` leaves `unit.file` in `folder`, and its facts are for the journal (JSON)."""

    @property
    def folder(self) -> Path: ...


@dataclass
class Totals:
    """What the work cost. Resident bytes are the largest of any process, its interpreter and libraries included."""

    seconds: float = 0.0
    bytes: int = 0
    units: int = 0
    resumed: int = 0
    resident_bytes: int = 0

    def text(self) -> str:
        done = f"{self.units} files, {self.bytes / 1e9:.2f} GB in {self.seconds:.1f} s"
        speed = f"{self.bytes / 1e9 / max(self.seconds, 1e-9):.3f} GB/s"
        again = f", {self.resumed} files kept from an earlier start" if self.resumed else ""
        return f"{done} ({speed}); peak resident set of a process {self.resident_bytes / 1e6:.0f} MB{again}"


class HashedFile:
    """A file being written, with a hash of all that goes through it. It gets its name when it is closed."""

    def __init__(self, path: Path, hash_name: str) -> None:
        self.path = path
        self.hash_name = hash_name
        self.digest = new_hash(hash_name)
        self.bytes = 0
        self._aside = path.with_name(f".{path.name}.{os.getpid()}")
        self._stream = self._aside.open("wb", buffering=0)

    def write(self, data) -> None:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.bytes += len(view)
        try:
            while view:
                view = view[self._stream.write(view) :]
        except OSError as error:  # a full disk, a quota; the system does not say which file
            raise ConversionError(
                f"{self.path} cannot be written ({error.strerror}); make room, and the same command goes on"
            ) from None

    def close(self) -> dict[str, Any]:
        """{"bytes", hash}, the content being on disk."""
        os.fsync(self._stream.fileno())
        self._stream.close()
        os.rename(self._aside, self.path)
        return {"bytes": self.bytes, self.hash_name: self.digest.hexdigest()}


def require_space(folder: Path, needed: int) -> None:
    """ConversionError when the disk of `folder` (which may not exist yet) has no room for a result of `needed` bytes.

    What an earlier start left in `folder` counts as room: each of its files is kept, or removed before work begins.
    """
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    there = sum(path.stat().st_blocks * 512 for path in folder.iterdir()) if folder.is_dir() else 0
    if free + there < needed:
        begun = f", {there / 1e9:.2f} GB of an earlier start being there," if there else ""
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.2f} GB{begun} and its disk has {free / 1e9:.2f} GB left; make room or give "
            "another --save"
        )


def run_units(job: Job, units: Sequence[Unit], plan: dict[str, Any], workers: Workers) -> tuple[list[dict], Totals]:
    """Do every unit that the journal in job.folder does not have; returns all facts, in the order of `units`.

    `plan` is what the result depends on (JSON): a folder begun with another plan is refused. The caller is the
    `sole_writer` of job.folder until the result is published.
    """
    make_folder(job.folder)
    with (job.folder / JOURNAL).open("a+") as journal:
        finished = begin_or_continue(journal, job.folder, plan)
        kept = {unit.file: finished[unit.file] for unit in units if is_there(job.folder, finished.get(unit.file))}
        left = [unit for unit in units if unit.file not in kept]
        for path in job.folder.iterdir():
            if path.name not in kept and path.name != JOURNAL:
                path.unlink()

        def note(unit: Unit, facts: dict) -> None:
            journal.write(json.dumps({"file": unit.file, **facts}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

        results, totals = _run(job, left, workers, "convert", note)
    totals.resumed = len(kept)
    # Through JSON as the journal's are: pickles of equal facts differ by which of their strings are one object.
    made = {unit.file: json.loads(json.dumps({"file": unit.file, **facts}))
            for unit, facts in zip(left, results, strict=True)}  # fmt: skip
    return [{**kept, **made}[unit.file] for unit in units], totals


def run_checks(check: Check, units: Sequence[Unit], workers: Workers, verb: str) -> tuple[list[dict], Totals]:
    """Run units that only read; facts in the order of `units`. `verb` says beside the bar what is done."""
    return _run(check, units, workers, verb, lambda _unit, _facts: None)


def _run(
    job: Check, units: Sequence[Unit], workers: Workers, verb: str, note: Callable[[Unit, dict], None]
) -> tuple[list[dict], Totals]:
    began = time.monotonic()
    totals = Totals(bytes=sum(unit.bytes for unit in units), units=len(units))
    facts: dict[Unit, dict] = {}
    with _progress() as progress:
        task = progress.add_task(verb, total=totals.bytes)
        for unit, result in workers.each(job.run, units):
            note(unit, result)
            facts[unit] = result
            totals.resident_bytes = max(totals.resident_bytes, result["resident_bytes"])
            progress.advance(task, unit.bytes)
    totals.seconds = time.monotonic() - began
    return [facts[unit] for unit in units], totals


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
