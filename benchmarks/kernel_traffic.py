"""`python -m benchmarks.kernel_traffic`: what the CUDA kernels move at K2's row widths, counted without a GPU.

nvcc's PTX of every kernel runs in the tests' interpreter (tests/kernels/ptx) on a few rows, launched by the project's
host code. For each launch: sectors of 32 bytes that warps load and store against the least that their lanes' bytes
fill, bytes of distinct sectors an element against the floor in ops' own words, and wavefronts of shared memory against
those without bank conflicts. --lines names the lines of the source that move more than they must.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

TESTS = Path(__file__).resolve().parents[1] / "tests" / "kernels"
sys.path[:0] = [str(TESTS / "ptx"), str(TESTS / "emulated")]

import emulated_build  # noqa: E402
import ptx_build  # noqa: E402
from launches import PtxModule  # noqa: E402
from traffic import Traffic  # noqa: E402

DTYPE, BF16 = torch.bfloat16, 1
ROWS, HIDDEN, FFN, VOCABULARY, HEADS, HEAD_DIM = 16, 8192, 2752, 4004, 8, 128  # K2's rank at TP 8


@dataclass(frozen=True)
class Workload:
    name: str
    elements: int
    floor: float  # bytes an element: every tensor once
    run: Callable[[PtxModule], None]


def at(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def normal(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def rms_norm(module: PtxModule, backward: bool) -> None:
    x, other, out, out2 = (normal(ROWS, HIDDEN) for _ in range(4))
    gamma, rstd, grad_gamma = normal(HIDDEN), torch.rand(ROWS), normal(HIDDEN)
    if backward:
        workspace = torch.empty(module.rms_norm_partial_rows(ROWS, HIDDEN), HIDDEN)
        module.rms_norm_backward(at(x), at(other), at(out), at(gamma), at(rstd), at(out2), at(grad_gamma),
                                 at(workspace), len(workspace), ROWS, HIDDEN, False, BF16, BF16, 0)  # fmt: skip
    else:
        module.rms_norm_forward(at(x), at(other), at(gamma), at(out), at(out2), at(rstd), ROWS, HIDDEN, 1e-5, False,
                                BF16, BF16, 0)  # fmt: skip


def swiglu(module: PtxModule, backward: bool) -> None:
    packed, out = normal(ROWS, 2 * FFN), normal(ROWS, FFN)
    if backward:
        module.swiglu_backward(at(out), at(packed), at(packed), ROWS, FFN, BF16, 0)
    else:
        module.swiglu_forward(at(packed), at(out), ROWS, FFN, BF16, 0)


def rotary(module: PtxModule, interleaved: bool) -> None:
    """In place, on q and k as they lie in the packed output of the QKV GEMM."""
    heads = normal(ROWS, 1, HEADS, 3 * HEAD_DIM)
    q, k = heads[..., :HEAD_DIM], heads[..., HEAD_DIM : 2 * HEAD_DIM]
    tables = [torch.rand(ROWS, HEAD_DIM // 2) for _ in range(2)]
    strides = heads.stride()[:3]
    module.rotary(at(q), *strides, at(q), *strides, at(k), *strides, at(k), *strides, *map(at, tables), 0, ROWS, ROWS,
                  1, HEADS, HEADS, HEAD_DIM, HEAD_DIM, interleaved, False, BF16, 0)  # fmt: skip


def cross_entropy(module: PtxModule, part: str) -> None:
    logits, labels = normal(ROWS, VOCABULARY), torch.randint(0, VOCABULARY, (ROWS,))
    statistics, loss, lse = torch.rand(8, 3 * ROWS + 1), torch.ones(ROWS), torch.rand(ROWS)
    if part == "statistics":
        module.cross_entropy_statistics(at(logits), VOCABULARY, at(labels), at(statistics), 3, ROWS, VOCABULARY, 0,
                                        BF16, 0)  # fmt: skip
    elif part == "loss":
        module.cross_entropy_loss(at(statistics), 8, 3, at(labels), at(loss), at(lse), ROWS, 8 * VOCABULARY, 0.0, 0.0,
                                  -100, 0)  # fmt: skip
    else:
        module.cross_entropy_gradient(at(logits), VOCABULARY, at(labels), at(lse), at(loss), 1, at(logits), VOCABULARY,
                                      ROWS, VOCABULARY, 0, 8 * VOCABULARY, 0.0, 0.0, -100, BF16, 0)  # fmt: skip


def optimizer(module: PtxModule, part: str) -> None:
    """One tensor of ROWS rows of HIDDEN; the main gradient is fp32, as megatron-core keeps it."""
    size, n = torch.tensor([ROWS * HIDDEN]), ROWS * HIDDEN
    tensors = [*(torch.rand(n) for _ in range(4)), normal(n)]  # parameter, gradient, moments, the model's copy
    lists = [torch.tensor([at(tensor)]) for tensor in tensors]
    factor, workspace = (
        torch.tensor([0.5]),
        torch.empty(module.squared_norm_workspace(at(size), 1), dtype=torch.float64),
    )
    result = torch.empty(2, dtype=torch.float64)
    if part == "adamw":
        module.adamw(*map(at, lists), at(size), 1, 1e-3, 0.9, 0.95, 1e-8, 0.1, 3, at(factor), 0, BF16, 0)
    elif part == "squared_norm":
        module.squared_norm(at(lists[1]), at(size), 1, at(workspace), at(result), 0, 0)
    else:
        module.scale(at(lists[1]), at(size), 1, at(factor), 0, 0)


WORKLOADS = [
    Workload("rms_norm forward, residual", ROWS * HIDDEN, 8, lambda m: rms_norm(m, False)),
    Workload("rms_norm backward, residual", ROWS * HIDDEN, 8, lambda m: rms_norm(m, True)),
    Workload("swiglu forward", ROWS * FFN, 6, lambda m: swiglu(m, False)),
    Workload("swiglu backward", ROWS * FFN, 10, lambda m: swiglu(m, True)),
    Workload("rotary, halves", 2 * ROWS * HEADS * HEAD_DIM, 4, lambda m: rotary(m, False)),
    Workload("rotary, pairs", 2 * ROWS * HEADS * HEAD_DIM, 4, lambda m: rotary(m, True)),
    Workload("cross_entropy statistics", ROWS * VOCABULARY, 2, lambda m: cross_entropy(m, "statistics")),
    Workload("cross_entropy loss", ROWS * 8, 12, lambda m: cross_entropy(m, "loss")),
    Workload("cross_entropy gradient", ROWS * VOCABULARY, 4, lambda m: cross_entropy(m, "gradient")),
    Workload("adamw", ROWS * HIDDEN, 30, lambda m: optimizer(m, "adamw")),
    Workload("squared_norm", ROWS * HIDDEN, 4, lambda m: optimizer(m, "squared_norm")),
    Workload("scale", ROWS * HIDDEN, 8, lambda m: optimizer(m, "scale")),
]


def measure(module: PtxModule, workload: Workload) -> list[tuple[str, str, Traffic]]:
    """(kernel, its launch, traffic) of each launch."""
    found: list[tuple[str, str, Traffic]] = []

    def count(name: str, launch) -> Traffic:
        short = name.partition("(anonymous namespace)::")[2].partition("(")[0]
        found.append((short, f"{launch.blocks} x {launch.threads}", Traffic()))
        return found[-1][2]

    module.counters = count
    workload.run(module)
    return found


def build(folder: Path, architecture: str) -> PtxModule:
    reason = ptx_build.reason_not_to_compile() or emulated_build.reason_not_to_build()
    if reason:
        raise SystemExit(f"kernel_traffic: the kernels cannot be compiled to PTX: {reason}")
    library = emulated_build.build_module(folder)
    files = ptx_build.compile_ptx(sorted(ptx_build.CSRC.glob("*.cu")), folder, architecture)
    return PtxModule(emulated_build.load_module(library), library, files)


def ratio(line) -> str:
    return f"{line.moved:,} ({line.moved / line.least:.2f})" if line.least else "-"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_80", help="nvcc's -arch (default: sm_80)")
    parser.add_argument("--lines", action="store_true", help="the lines that move more sectors than they must")
    parser.add_argument("--build", type=Path, help="a folder to keep what is compiled (default: a temporary one)")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = Table(title=f"{ROWS} rows, bf16, {arguments.architecture}; in brackets the ratio to the least possible")
    for column in ("operation", "kernel", "blocks x threads", "sectors loaded", "stored", "bytes/element (floor)",
                   "shared wavefronts"):  # fmt: skip
        table.add_column(column)
    with tempfile.TemporaryDirectory() as temporary:
        module = build(arguments.build or Path(temporary), arguments.architecture)
        wasteful = []
        for workload in WORKLOADS:
            for kernel, launch, traffic in measure(module, workload):
                moved = f"{traffic.bytes_touched / workload.elements:.2f} ({workload.floor:g})"
                table.add_row(workload.name, kernel, launch, ratio(traffic.loaded), ratio(traffic.stored), moved,
                              ratio(traffic.wavefronts))  # fmt: skip
                wasteful += [(workload.name, kernel, source, line) for source, line in traffic.by_line.items()
                             if line.moved > line.least]  # fmt: skip
    console = Console(width=170)
    console.print(table)
    if arguments.lines:
        for name, kernel, source, line in wasteful:
            console.print(f"{name}, {kernel}: {source}: {ratio(line)} sectors", highlight=False)


if __name__ == "__main__":
    main()
