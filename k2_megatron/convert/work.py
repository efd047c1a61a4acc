"""Units of work over processes, with a journal: what a kill leaves finished stays finished.

A unit writes one file of the result. When it is done its facts go into `finished.jsonl` beside the files; a second
start with the same plan hashes what is there and does the rest. The folder has a name of its own until it is whole.
"""

import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import xxhash
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from k2_megatron.convert.errors import ConversionError

JOURNAL = "finished.jsonl"
BYTES_PER_SECOND = 250e6  # one worker on one core, benchmarks/convert.py; only the estimate printed before rests on it
_READ_BYTES = 1 << 22


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
    """A file being written, with the xxh3 of all that goes through it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = xxhash.xxh3_128()
        self.bytes = 0
        self._stream = path.open("wb", buffering=0)

    def write(self, data) -> None:
        view = memoryview(data).cast("B")
        self.digest.update(view)
        self.bytes += len(view)
        while view:
            view = view[self._stream.write(view) :]

    def close(self) -> dict[str, Any]:
        """{"bytes", "xxh3"}, the content being on disk."""
        os.fsync(self._stream.fileno())
        self._stream.close()
        return {"bytes": self.bytes, "xxh3": self.digest.hexdigest()}


def hash_file(path: Path) -> dict[str, Any]:
    """{"bytes", "xxh3"} of a file on disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def estimate_text(read_bytes: int, write_bytes: int, workers: int) -> str:
    """What the work will take, said before it starts."""
    seconds = max(read_bytes, write_bytes) / BYTES_PER_SECOND / workers
    return (
        f"reads {read_bytes / 1e9:.2f} GB, writes {write_bytes / 1e9:.2f} GB, {workers} workers: "
        f"about {seconds:.0f} s at {BYTES_PER_SECOND / 1e6:.0f} MB/s each"
    )


def require_space(folder: Path, needed: int) -> None:
    """ConversionError when the disk of `folder` (which may not exist yet) has not `needed` bytes left."""
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConversionError(
            f"{folder} needs {needed / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB left; make room or give "
            "another --save"
        )


def run_units(job: Job, units: Sequence[Unit], plan: dict[str, Any], workers: int) -> tuple[list[dict], Totals]:
    """Do every unit that the journal in job.folder does not have; returns all facts, in the order of `units`.

    `plan` is what the result depends on (JSON): a folder begun with another plan is refused.
    """
    finished = _open_journal(job.folder, plan)
    kept = {unit.file: finished[unit.file] for unit in units if _is_there(job.folder, finished.get(unit.file))}
    left = [unit for unit in units if unit.file not in kept]
    with (job.folder / JOURNAL).open("a") as journal:

        def note(unit: Unit, facts: dict) -> None:
            journal.write(json.dumps({"file": unit.file, **facts}) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

        results, totals = _run(job, left, workers, "convert", note)
    totals.resumed = len(kept)
    made = {unit.file: {"file": unit.file, **facts} for unit, facts in zip(left, results, strict=True)}
    return [{**kept, **made}[unit.file] for unit in units], totals


def run_checks(check: Check, units: Sequence[Unit], workers: int) -> tuple[list[dict], Totals]:
    """Run units that only read; facts in the order of `units`."""
    return _run(check, units, workers, "check", lambda _unit, _facts: None)


def _run(
    job: Check, units: Sequence[Unit], workers: int, verb: str, note: Callable[[Unit, dict], None]
) -> tuple[list[dict], Totals]:
    began = time.monotonic()
    totals = Totals(bytes=sum(unit.bytes for unit in units), units=len(units))
    facts: dict[Unit, dict] = {}
    with _progress() as progress:
        task = progress.add_task(verb, total=totals.bytes)
        for unit, result in _each(job, units, workers):
            note(unit, result)
            facts[unit] = result
            totals.resident_bytes = max(totals.resident_bytes, result["resident_bytes"])
            progress.advance(task, unit.bytes)
    totals.seconds = time.monotonic() - began
    return [facts[unit] for unit in units], totals


def resident_bytes() -> int:
    """The largest resident set of this process; getrusage would count that of its parent, whose copy it began as."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _each(job: Check, units: Sequence[Unit], workers: int) -> Iterator[tuple[Unit, dict]]:
    if workers == 1 or len(units) < 2:
        for unit in units:
            yield unit, job.run(unit)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(units)), mp_context=context) as pool:
        pending = {pool.submit(job.run, unit): unit for unit in units}
        try:
            for done in as_completed(pending):
                yield pending[done], done.result()
        except BrokenProcessPool:
            raise ConversionError(
                "a worker process died (out of memory, or killed); start the same command again to go on, with fewer "
                "--workers if memory was short"
            ) from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _open_journal(folder: Path, plan: dict[str, Any]) -> dict[str, dict]:
    """What an earlier start of the same plan finished, by file; begins the journal where there is none."""
    path = folder / JOURNAL
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps({"plan": plan}) + "\n")
        return {}
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:  # the line that a kill cut
            continue
    if not lines or lines[0].get("plan") != json.loads(json.dumps(plan)):
        raise ConversionError(
            f"{folder} was begun by a conversion of other files or options; remove it, or repeat that command"
        )
    if not path.read_bytes().endswith(b"\n"):
        with path.open("a") as stream:
            stream.write("\n")
    return {line["file"]: line for line in lines[1:]}


def _is_there(folder: Path, facts: dict | None) -> bool:
    if facts is None or not (folder / facts["file"]).is_file():
        return False
    return hash_file(folder / facts["file"]) == {"bytes": facts["bytes"], "xxh3": facts["xxh3"]}


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
