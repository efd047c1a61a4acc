"""What a conversion will take, told before it starts: each phase with its bytes, on cores and disks as they are now.

A phase takes as long as its processors need or as the disk does, whichever is longer. Both are sampled where the work
is large enough to be worth it: a core by a quarter of a second of the work itself, beside whatever else runs. What a
phase costs is stated as a multiple of that sample, so that it holds on other machines.
"""

import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from k2_megatron.convert.fingerprint import fingerprint_rows
from k2_megatron.convert.numbers import change_dtype, require_finite
from k2_megatron.convert.torch_blob import tensor_blob

# What a byte (read or written, whichever are more) costs a core, as a multiple of a byte of `_core_rate`'s sample:
# measured phase by phase, in turn with the sample, on a loaded 2-core Xeon (Sapphire Rapids)
HASH, FINGERPRINT, CONVERT, COMPARE, CHECK_ADAM, PROOF = 0.2, 0.6, 1.5, 0.5, 0.9, 2.9
START_SECONDS, PROOF_START_SECONDS = 0.3, 6.0  # of a phase; of the proof, which imports torch and transformers
_CORE_RATE = 0.8e9  # where nothing is sampled: that Xeon, idle
_CORE_SAMPLE_SECONDS = 0.25
_SAMPLE_BYTES = 64 << 20
_WORTH_A_SAMPLE = 512 << 20


class Phase(NamedTuple):
    """A part of the work. `cost` is one of the multiples above."""

    name: str
    cost: float
    read_bytes: int = 0
    written_bytes: int = 0
    workers: int = 1
    start_seconds: float = START_SECONDS


class Speeds(NamedTuple):
    """Bytes a second of a core and of the disks; None where nothing was sampled."""

    core: float | None = None
    read: float | None = None
    write: float | None = None


def proof_phase(weight_bytes: int) -> Phase:
    """Two models read the weights once each, in one process."""
    return Phase("proof", PROOF, read_bytes=2 * weight_bytes, start_seconds=PROOF_START_SECONDS)


def announce(phases: Sequence[Phase], load: Path, save: Path | None = None) -> None:
    """Print the estimate. `load` is a folder that is read, `save` one (it may not exist yet) that is written."""
    print(estimate_text(phases, sample(phases, load, save)), flush=True)


def estimate_text(phases: Sequence[Phase], speeds: Speeds) -> str:
    seconds = [_seconds(phase, speeds) for phase in phases]
    parts = [
        f"{phase.name} {max(phase.read_bytes, phase.written_bytes) / 1e9:.2f} GB {part:.0f} s"
        for phase, part in zip(phases, seconds, strict=True)
    ]
    names = ("core", "disk reads", "disk writes")
    sampled = [f"{name} {rate / 1e9:.2f} GB/s" for name, rate in zip(names, speeds, strict=True) if rate]
    return (
        f"estimate: {', '.join(parts)}: about {sum(seconds):.0f} s with {max(phase.workers for phase in phases)} "
        f"workers ({'sampled: ' + ', '.join(sampled) if sampled else 'nothing sampled'}; load "
        f"{os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, more of it makes it longer)"
    )


def _seconds(phase: Phase, speeds: Speeds) -> float:
    workers = min(phase.workers, os.cpu_count() or 1)
    needs = [max(phase.read_bytes, phase.written_bytes) * phase.cost / (speeds.core or _CORE_RATE) / workers]
    needs += [phase.read_bytes / speeds.read] if speeds.read else []
    needs += [phase.written_bytes / speeds.write] if speeds.write else []
    return phase.start_seconds + max(needs)


def sample(phases: Sequence[Phase], load: Path, save: Path | None) -> Speeds:
    """How fast a core is, the disk of `load` reads and that of `save` writes. Small work is not worth the second."""
    read, written = (sum(sizes) for sizes in zip(*((p.read_bytes, p.written_bytes) for p in phases), strict=True))
    return Speeds(
        _core_rate() if max(read, written) >= _WORTH_A_SAMPLE else None,
        _read_rate(load) if read >= _WORTH_A_SAMPLE else None,
        _write_rate(save) if save and written >= _WORTH_A_SAMPLE else None,
    )


def _core_rate() -> float:
    """Of float32 parameters made as from-hf makes them of bfloat16: checked, fingerprinted, widened, hashed twice."""
    bits = np.random.default_rng(0).integers(0, 0x4000, (1024, 1024), np.uint16)
    made, began = 0, 0.0
    while not began or time.monotonic() - began < _CORE_SAMPLE_SECONDS:
        require_finite(bits, "bfloat16", "a sample")
        fingerprint_rows("sample", None, 0, bits)
        rows = change_dtype(bits, "bfloat16", "float32")
        digest = xxhash.xxh3_128()
        for piece in tensor_blob(rows, "float32", rows.shape):
            digest.update(piece)
        if began:
            made += rows.nbytes
        else:  # the first time loads what is used
            began = time.monotonic()
    return made / (time.monotonic() - began)


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
