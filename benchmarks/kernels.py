"""`python -m benchmarks.kernels`: every op against this machine's copy bandwidth, torch, and the packages installed.

    --quick        fewer shapes and rounds      --only OP      one op      --no-compile   leave torch.compile out
    --results DIR  where the JSON goes (benchmarks/results), named after the hardware

All candidates of a workload and a plain copy take turns in every round, so that a machine whose speed drifts favours
none; the fastest round counts, since other processes only ever add time (the JSON holds the medians too). Every launch
takes the next of the sets of inputs, each with gradients of its outputs for the backward, which together exceed the
last-level cache, and its results are kept until as many others have followed: what one candidate has read or written,
the next one would find in the cache. Who begins changes from round to round. On a GPU a round is a queue of launches
behind a device-side wait, timed by events: the host's time is not in it; a round whose wait was too short to enqueue
them is taken again behind a longer one. There a copy of as many bytes as the workload's takes its turn too: "of equal"
is against its time. On a CPU glibc is told to keep freed memory, for everyone: else the page faults of fresh results
would be what is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import re
import statistics
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.kernel_workloads import Workload, cpu_workloads, cuda_workloads
from k2_megatron.kernels.dispatch import OPS, obstacle
from k2_megatron.runtime.memory import keep_freed_blocks

ROTATION_BYTES = {
    "cpu": 640 << 20,
    "cuda": 512 << 20,
}  # beyond the caches: 260 MiB on large Xeons, 50-60 MB on H100/H200
COPY_BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}
LAUNCHES = 5  # of one candidate in one round on a GPU
WAIT_CYCLES = 4_000_000  # 2 ms at 2 GHz: long enough to enqueue most launches behind it
LONGEST_WAIT_CYCLES = 32 * WAIT_CYCLES  # of launches that take longer to enqueue, an optimizer's over many tensors
WARM_UP_ROUNDS = 2  # the first of them compiles


def rounds_of(workload: Workload, device: str, quick: bool) -> int:
    """Timed rounds: on a GPU, whose clocks are steadier, few enough that all shapes fit scripts/gpu_check.sh's limit;
    the output layer's GEMMs take a second a round there."""
    if quick:
        return 5
    if device == "cuda":
        return 2 if workload.op == "linear_cross_entropy" else 6
    return 15


class Rotation:
    """The sets of inputs in turn, each with its gradients of the outputs, and the latest results, held so that their
    memory is not written again at once."""

    def __init__(self, sets: list, gradients: list):
        self.first = sets[0]
        self.sets = itertools.cycle(zip(sets, gradients, strict=True))
        self.results: deque = deque(maxlen=len(sets))

    def launch(self, run: Callable[..., Any]) -> None:
        """run(inputs, gradients), of the next set."""
        results = run(*next(self.sets))
        # Detached: a graph would hold what a candidate saves for its backward.
        self.results.append([result.detach() for result in as_tuple(results) if isinstance(result, torch.Tensor)])


def as_tuple(results: Any) -> tuple:
    return results if isinstance(results, tuple) else (results,)


def milliseconds(device: str, run: Callable[[], object]) -> float:
    """One round of one candidate."""
    if device == "cpu":
        start = time.perf_counter()
        run()
        return (time.perf_counter() - start) * 1e3
    wait = WAIT_CYCLES
    while True:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(wait)
        first.record()
        for _ in range(LAUNCHES):
            run()
        last.record()
        # Where the device has gone past the wait before the last launch was enqueued, it may have waited for the host.
        in_time = not first.query()
        last.synchronize()
        if in_time or wait >= LONGEST_WAIT_CYCLES:
            return first.elapsed_time(last) / LAUNCHES
        wait *= 2


def passes(workload: Workload, rotation: Rotation, candidate: Callable) -> dict[str, Callable[[], object]]:
    """One launch of the forward, and of forward and backward together."""

    def forward(inputs, gradients):
        return candidate(*inputs)

    def both(inputs, gradients):
        return torch.autograd.grad(as_tuple(candidate(*inputs)), workload.wanted(inputs), gradients)

    runs: dict[str, Callable[[], object]] = {"forward": lambda: rotation.launch(forward)}
    if workload.wanted(rotation.first):
        runs["forward + backward"] = lambda: rotation.launch(both)
    return runs


def rotation_of(workload: Workload, device: str) -> Rotation:
    """Sets that together exceed the caches: their outputs' gradients too, or the backward would find those there."""
    each = max(workload.forward_bytes // 2, 1 << 24)
    sets = [workload.inputs() for _ in range(min(12, max(2, ROTATION_BYTES[device] // each)))]
    gradients: list[list[torch.Tensor]] = [[] for _ in sets]
    if workload.wanted(sets[0]):
        outputs = as_tuple(workload.candidates["ours"](*sets[0]))
        gradients = [[torch.randn_like(output) for output in outputs] for _ in sets]
    return Rotation(sets, gradients)


def equal_copies(source: torch.Tensor, target: torch.Tensor, moved_bytes: int) -> Callable[[], object]:
    """A copy that moves as many bytes as a workload, each time of the buffers' next part: what a kernel of that size
    could at best take, with the launch and the ramps that a copy of a gigabyte does not show."""
    elements = min(max(1, moved_bytes // 2 // source.element_size()), source.numel())
    starts = itertools.cycle(range(0, source.numel() - elements + 1, elements))

    def copy() -> object:
        start = next(starts)
        return target[start : start + elements].copy_(source[start : start + elements])

    return copy


def able(workload: Workload, rotation: Rotation, name: str, candidate: Callable) -> dict[str, Callable] | None:
    """passes() of a candidate, tried once; None, with the reason on the screen, where another's package fails."""
    try:
        runs = passes(workload, rotation, candidate)
        for run in runs.values():
            run()
    except Exception as error:
        if name == "ours":
            raise
        print(f"{workload.op} {workload.shape}: {name} is left out: {type(error).__name__}: {str(error)[:200]}")
        return None
    return runs


def measure(workload: Workload, device: str, rounds: int, with_compile: bool) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each round, by pass and candidate; "copy" among them."""
    rotation = rotation_of(workload, device)
    candidates = dict(workload.candidates)
    if with_compile and workload.compiled:
        torch._dynamo.reset()
        candidates["compile"] = torch.compile(workload.compiled, fullgraph=True, dynamic=False)
    source = torch.ones(COPY_BYTES[device] // 4, device=device)
    target = torch.zeros_like(source)
    able_runs = {name: able(workload, rotation, name, candidate) for name, candidate in candidates.items()}
    runs = {name: run for name, run in able_runs.items() if run}
    times: dict[str, dict[str, list[float]]] = {}
    for part in next(iter(runs.values())):
        turns = {name: run[part] for name, run in runs.items()} | {"copy": lambda: target.copy_(source)}
        if 0 < necessary_bytes(workload, part) <= 2 * COPY_BYTES[device] and device == "cuda":
            turns["equal copy"] = equal_copies(source, target, necessary_bytes(workload, part))
        times[part] = {name: [] for name in turns}
        names = list(turns)
        for number in range(rounds + WARM_UP_ROUNDS):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                taken = milliseconds(device, turns[name])
                if number >= WARM_UP_ROUNDS:
                    times[part][name].append(taken)
    return times


def necessary_bytes(workload: Workload, part: str) -> int:
    return workload.forward_bytes + (workload.backward_bytes if part != "forward" else 0)


def summarise(workload: Workload, times: dict[str, dict[str, list[float]]], device: str) -> list[dict]:
    """One row a pass, by the fastest rounds: bandwidth of the necessary bytes, that of the copy beside it, ratios."""
    rows = []
    for part, by_name in times.items():
        necessary = necessary_bytes(workload, part)
        fastest = {name: min(values) for name, values in by_name.items()}
        copy_rate, rate = 2 * COPY_BYTES[device] / fastest["copy"] / 1e6, necessary / fastest["ours"] / 1e6
        rows.append({
            "op": workload.op, "shape": workload.shape, "dtype": str(workload.dtype)[6:], "pass": part,
            "milliseconds": fastest,
            "median_milliseconds": {name: statistics.median(values) for name, values in by_name.items()},
            "necessary_bytes": necessary,
            "gigabytes_per_second": rate,
            "copy_gigabytes_per_second": copy_rate,
            "share_of_equal_copy": fastest["equal copy"] / fastest["ours"] if "equal copy" in fastest else None,
            "times_faster_than": {
                name: taken / fastest["ours"]
                for name, taken in fastest.items()
                if name not in ("ours", "copy", "equal copy")
            },
            "rounds": len(by_name["ours"]),
        })  # fmt: skip
    return rows


def with_shares(rows: list[dict]) -> list[dict]:
    """Every row's share of the fastest copy of the whole run: on a machine that others use, a copy beside one workload
    may take half as long again as beside the next, and would flatter it."""
    best = max((row["copy_gigabytes_per_second"] for row in rows), default=0.0)
    return [
        row | {"best_copy_gigabytes_per_second": best, "share_of_copy": row["gigabytes_per_second"] / best}
        for row in rows
    ]


def show(rows: list[dict], title: str) -> None:
    others = list(dict.fromkeys(name for row in rows for name in row["times_faster_than"]))
    table = Table(title=title, title_justify="left")
    for heading in ("op", "shape", "dtype", "pass"):
        table.add_column(heading)
    for heading in ("ms", "GB/s", "% of copy", "of equal", *(f"x {name}" for name in others)):
        table.add_column(heading, justify="right")
    for row in rows:
        equal = row["share_of_equal_copy"]
        bandwidth = [f"{row['gigabytes_per_second']:.1f}", f"{100 * row['share_of_copy']:.0f}"]
        bandwidth.append(f"{100 * equal:.0f}" if equal else "-")
        ratios = [
            f"{row['times_faster_than'][name]:.2f}" if name in row["times_faster_than"] else "-" for name in others
        ]
        table.add_row(row["op"], row["shape"], row["dtype"], row["pass"], f"{row['milliseconds']['ours']:.3f}",
                      *(bandwidth if row["necessary_bytes"] else ["-", "-", "-"]), *ratios)  # fmt: skip
    Console(width=None if Console().is_terminal else 170).print(table)


def write(rows: list[dict], folder: Path, name: str) -> Path:
    """The JSON file of this hardware, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    record = {
        "hardware": name,
        "torch": torch.__version__,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    path = folder / f"kernels_{slug}.json"
    path.write_text(json.dumps(record | {"rows": rows}, indent=1) + "\n")
    return path


def hardware(device: str) -> str:
    """The GPU's name, or the processor's with the number of threads."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = (
        re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{names[0] if names else platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--only", help="one op, by name")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--results", type=Path, default=Path(__file__).parent / "results", help="folder of the JSON file"
    )
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPS:
        if reason := obstacle(op, device, device):
            sys.exit(f"benchmarks.kernels: nothing of ours to measure for {op}: {reason}")
    if device == "cpu":
        keep_freed_blocks()
    workloads = (cuda_workloads if device == "cuda" else cpu_workloads)(arguments.quick)
    name = hardware(device)
    rows: list[dict] = []
    failed: list[str] = []
    for workload in workloads:
        if arguments.only in (None, workload.op.partition(",")[0]):
            title = f"{workload.op} {workload.shape} {str(workload.dtype)[6:]}"
            rounds = rounds_of(workload, device, arguments.quick)
            try:
                times = measure(workload, device, rounds, not arguments.no_compile)
            except Exception:  # of our kernel: the others are still to be measured
                traceback.print_exc()
                failed.append(title)
                continue
            rows = with_shares(rows + summarise(workload, times, device))
            # After every workload: a run that is stopped leaves what it has measured.
            path = write(rows, arguments.results, name)
            print(title, flush=True)
    if not rows and not failed:
        parser.error(f"--only {arguments.only}: no such op; see cpu_workloads and cuda_workloads")
    if rows:
        show(rows, f"{name}, torch {torch.__version__}: x = how many times faster ours is")
        print(path)
    if failed:
        sys.exit(f"not measured, for the errors above: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
