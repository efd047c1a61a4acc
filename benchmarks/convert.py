"""How fast checkpoints convert, next to a plain copy of the same bytes, and how much memory that takes.

    python benchmarks/convert.py [--gigabytes 2] [--workers 2] [--turns 3] [--folder SCRATCH]

Makes a bfloat16 model of random weights, converts it in (weights, fp32 parameters, shared zeros), out again; makes old
shards with Adam's state, converts them in and cuts the result anew; and copies files of the same size with the same
number of processes, in turns within one run: the best turn of each is compared.
GB are of bytes written; each measurement ends with the data on disk. CPU seconds are of all processes of the command,
their start included: they tell what a core can do where the disk is slow or shared. Peak memory is that of the largest
worker, read from the tool's own output.
"""

import argparse
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from old_iteration import write_old_iteration
from random_model import write_random_model

from k2_megatron.convert.hugging_face import HuggingFaceSource
from k2_megatron.convert.model_facts import ModelFacts
from k2_megatron.convert.names import Shape, places

TOOL = str(Path(__file__).resolve().parents[1] / "tools" / "convert_checkpoint.py")
COPY_BLOCK = 32 << 20


def shape_of(gigabytes: float) -> Shape:
    """A model of K2's proportions with about `gigabytes` of bfloat16 weights."""
    hidden, ffn, vocabulary = 2048, 5504, 32032
    a_layer = 4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * vocabulary * hidden) / a_layer))
    return Shape(layers, hidden, ffn, 16, 16, vocabulary, vocabulary)


def copy_files(sources: list[Path], folder: Path, workers: int) -> tuple[float, int]:
    """(seconds, bytes) of a plain copy by blocks, one file a task."""
    folder.mkdir()
    began = time.monotonic()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        sizes = list(pool.map(copy_file, sources, [folder / path.name for path in sources]))
    return time.monotonic() - began, sum(sizes)


def copy_file(source: Path, target: Path) -> int:
    with source.open("rb") as reader, target.open("wb", buffering=0) as writer:
        while block := reader.read(COPY_BLOCK):
            writer.write(block)
        os.fsync(writer.fileno())
        return writer.tell()


class Run(NamedTuple):
    """What a command told and took. `line` is on the conversion alone; seconds are of the whole command."""

    line: str
    rate: float  # GB/s of the conversion alone
    seconds: float
    estimate: float
    cpu_seconds: float
    kernel_seconds: float  # of these, in the kernel: pages of memory that are new to the machine cost it most


def measured(arguments: list[str]) -> Run:
    (user_before, kernel_before), began = cpu_seconds(), time.monotonic()
    done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds = time.monotonic() - began
    line = next(line for line in done.stdout.splitlines() if "peak resident" in line)
    estimate = float(done.stdout.split(": about ")[1].split(" s with")[0])
    user, kernel = cpu_seconds()
    rate, in_kernel = float(line.split("(")[1].split(" GB/s")[0]), kernel - kernel_before
    return Run(line, rate, seconds, estimate, user - user_before + in_kernel, in_kernel)


def cpu_seconds() -> tuple[float, float]:
    """(in programs, in the kernel) of all children."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime, usage.ru_stime


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="scratch folder (default: the system's)")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="convert_", dir=options.folder))
    try:
        report(scratch, options.gigabytes, options.workers, options.turns)
        report_with_adam(scratch, options.gigabytes, options.workers, options.turns)
    finally:
        shutil.rmtree(scratch)
    return 0


def report(scratch: Path, gigabytes: float, workers: int, turns: int) -> None:
    shape = shape_of(gigabytes)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # its memory is not to be measured
        size = pool.submit(write_random_model, scratch / "hf", shape, 2048).result()
    facts = ModelFacts.from_hugging_face(scratch / "hf")
    assert HuggingFaceSource(scratch / "hf", facts).shape.parameters == shape.parameters, "the model is not as planned"
    largest = 2 * max(rows * columns for rows, columns in (place.entry.size(shape) for place in places(shape)))
    print(f"{shape.parameters:,} parameters, {size / 1e9:.2f} GB; largest tensor {largest / 1e6:.0f} MB; bound on")
    print(
        f"memory 3 x that + 1 GB = {(3 * largest + 1e9) / 1e6:.0f} MB; load {os.getloadavg()[0]:.1f}, {workers} workers"
    )
    into = ["from-hf", "--load", str(scratch / "hf"), "--precision", "bfloat16", "--no-proof"]
    measured([*into, "--save", str(scratch / "run"), "--workers", str(workers)])
    out = ["to-hf", "--load", str(scratch / "run"), "--shard-gb", "0.4", "--no-proof"]
    for arguments, files in ((into, "**/*.distcp"), (out, "*.safetensors")):
        for count in sorted({1, workers}):
            against_copy(arguments, scratch, files, count, turns)


def report_with_adam(scratch: Path, gigabytes: float, workers: int, turns: int) -> None:
    """The conversions that carry Adam's state: 14 bytes a parameter, `gigabytes` in all."""
    shape = shape_of(gigabytes / 7)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        size = pool.submit(write_old_iteration, scratch / "iter_0000941", shape, 2).result()
    print(f"{shape.parameters:,} parameters with Adam's state, {size / 1e9:.2f} GB in two old shards")
    old = ["from-k2-legacy", "--load", str(scratch / "iter_0000941"), "--no-proof"]
    measured([*old, "--save", str(scratch / "old"), "--workers", str(workers)])
    for arguments in (old, ["reshard", "--load", str(scratch / "old"), "--tensor", "2"]):
        for count in sorted({1, workers}):
            against_copy(arguments, scratch, "**/*.distcp", count, turns)


def against_copy(arguments: list[str], scratch: Path, pattern: str, workers: int, turns: int) -> None:
    """Print the best turn of a conversion next to a plain copy of the files it wrote."""
    runs, copies, copied = [], [], 0
    for _turn in range(turns):
        target, copy = scratch / "product", scratch / "copy"
        runs.append(measured([*arguments, "--save", str(target), "--workers", str(workers)]))
        seconds, copied = copy_files(sorted(target.glob(pattern)), copy, workers)
        copies.append(copied / 1e9 / seconds)
        shutil.rmtree(copy)
        shutil.rmtree(target)
    best, least = max(run.rate for run in runs), min(runs, key=lambda run: run.cpu_seconds)
    speed, kernel = copied / 1e6 / least.cpu_seconds, least.kernel_seconds / least.cpu_seconds
    whole = min(runs, key=lambda run: run.seconds)
    print(f"{arguments[0]}, {workers} workers: {runs[-1].line}")
    print(f"  best of {turns}: {best:.3f} GB/s, {speed:.0f} MB a CPU second of the whole command ({kernel:.0%} in")
    print(f"  the kernel); plain copy {max(copies):.3f} GB/s, of which it is {best / max(copies):.0%};")
    print(f"  {whole.seconds:.0f} s, estimated {whole.estimate:.0f} s; load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    sys.exit(main())
