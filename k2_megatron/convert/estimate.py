"""What a conversion will take, told before it starts: each phase with its bytes, and the disks as they are now.

A phase takes as long as its processors need or as the disk does, whichever is longer. What a core does is stated below,
from benchmarks/convert.py; what the disks do is sampled on this machine where the work is large enough to be worth it.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# Bytes a core of a 2-core Xeon (Sapphire Rapids) handles in a second: those read or those written, whichever are more
HASH, FINGERPRINT, CONVERT, COMPARE, CHECK_ADAM, PROOF = 4e9, 1.5e9, 0.45e9, 1.2e9, 0.9e9, 0.25e9
START_SECONDS, PROOF_START_SECONDS = 1.5, 6.0  # of a phase's processes; of one that imports torch and transformers
_SAMPLE_BYTES = 64 << 20
_WORTH_A_SAMPLE = 512 << 20


class Phase(NamedTuple):
    """A part of the work. `rate` is in bytes a second and worker."""

    name: str
    rate: float
    read_bytes: int = 0
    written_bytes: int = 0
    workers: int = 1
    start_seconds: float = START_SECONDS


class Disks(NamedTuple):
    """Bytes a second; None where nothing was sampled."""

    read: float | None = None
    write: float | None = None


def proof_phase(weight_bytes: int) -> Phase:
    """Two models read the weights once each, in one process."""
    return Phase("proof", PROOF, read_bytes=2 * weight_bytes, start_seconds=PROOF_START_SECONDS)


def announce(phases: Sequence[Phase], load: Path, save: Path | None = None) -> None:
    """Print the estimate. `load` is a folder that is read, `save` one (it may not exist yet) that is written."""
    print(estimate_text(phases, sample_disks(phases, load, save)), flush=True)


def estimate_text(phases: Sequence[Phase], disks: Disks) -> str:
    seconds = [_seconds(phase, disks) for phase in phases]
    parts = [
        f"{phase.name} {max(phase.read_bytes, phase.written_bytes) / 1e9:.2f} GB {part:.0f} s"
        for phase, part in zip(phases, seconds, strict=True)
    ]
    sampled = [f"{name} {rate / 1e9:.2f} GB/s" for name, rate in zip(("reads", "writes"), disks, strict=True) if rate]
    return (
        f"estimate: {', '.join(parts)}: about {sum(seconds):.0f} s with {max(phase.workers for phase in phases)} "
        f"workers (speeds of a core from benchmarks/convert.py; disk {', '.join(sampled) or 'not sampled'}; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, other work makes it longer)"
    )


def _seconds(phase: Phase, disks: Disks) -> float:
    workers = min(phase.workers, os.cpu_count() or 1)
    needs = [max(phase.read_bytes, phase.written_bytes) / phase.rate / workers]
    needs += [phase.read_bytes / disks.read] if disks.read else []
    needs += [phase.written_bytes / disks.write] if disks.write else []
    return phase.start_seconds + max(needs)


def sample_disks(phases: Sequence[Phase], load: Path, save: Path | None) -> Disks:
    """How fast the disk of `load` reads and that of `save` writes. Small work is not worth the second this takes."""
    return Disks(
        _read_rate(load) if sum(phase.read_bytes for phase in phases) >= _WORTH_A_SAMPLE else None,
        _write_rate(save) if save and sum(phase.written_bytes for phase in phases) >= _WORTH_A_SAMPLE else None,
    )


def _read_rate(folder: Path) -> float | None:
    """From the middle of the largest file. What lies in memory already is read at its speed."""
    try:
        path = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
        with path.open("rb", buffering=0) as stream:
            stream.seek(max(0, path.stat().st_size - _SAMPLE_BYTES) // 2)
            began, count = time.monotonic(), 0
            while count < _SAMPLE_BYTES and (block := stream.read(1 << 20)):
                count += len(block)
        return count / (time.monotonic() - began)
    except (OSError, ValueError):
        return None  # whoever reads it next says what is wrong


def _write_rate(folder: Path) -> float | None:
    """Of a file without a name in `folder`, or where that will be made, until its bytes are on the disk."""
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    block = os.urandom(1 << 20)  # a file system that compresses would be too fast with zeros
    try:
        with tempfile.TemporaryFile(dir=existing, buffering=0) as stream:
            began = time.monotonic()
            for _ in range(_SAMPLE_BYTES // len(block)):
                stream.write(block)
            os.fdatasync(stream.fileno())
            return _SAMPLE_BYTES / (time.monotonic() - began)
    except OSError:
        return None  # the conversion itself says so, with the file's name
