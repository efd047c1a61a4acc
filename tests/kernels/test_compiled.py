"""What nvcc makes of the kernels: no register spills, 16-byte accesses, one barrier a row. Compiles, runs nothing.

Skipped where there is no nvcc; the part that reads machine code, where there is no cuobjdump (the toolkit's, or the
package nvidia-cuda-cuobjdump with nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path.stem for path in CSRC.glob("*.cu"))
ARCHITECTURES = ("sm_80", "sm_90")
# K2's instances: bf16 activations and gamma, aligned rows, hidden size up to 8192.
FORWARD = "forward_kernel<__nv_bfloat16, __nv_bfloat16, true>"
BACKWARD = "backward_kernel<__nv_bfloat16, __nv_bfloat16, true, 2>"
STATISTICS = "statistics_kernel<__nv_bfloat16, false>"
FLAGS = ("-std=c++17", "-O3", "-Xptxas", "-v")


@dataclass(frozen=True)
class Kernel:
    source: str
    architecture: str
    name: str
    registers: int
    spilled_bytes: int
    stack_bytes: int

    def __str__(self) -> str:
        return f"{self.source} {self.architecture} {self.name}"


def demangled(names: list[str]) -> dict[str, str]:
    """As in the source, without namespaces and parameters: kernel<float, true>."""
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    readable = re.sub(r"k2::cuda::|\(anonymous namespace\)::|^void ", "", done.stdout, flags=re.MULTILINE).splitlines()
    return {name: text.partition("(")[0] for name, text in zip(names, readable, strict=True)}


def read_report(source: str, report: str) -> list[Kernel]:
    """The kernels in ptxas's report, one for each architecture."""
    kernels, architecture, name, stack, spilled = [], "", "", 0, 0
    for line in report.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for '(\S+)'", line):
            name, architecture = found.groups()
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, spilled = int(found[1]), int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels.append(Kernel(source, architecture, name, int(found[1]), spilled, stack))
    return kernels


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[Path, list[Kernel]]:
    """The folder of objects (one a source, both architectures), and what ptxas said."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on PATH")
    folder = tmp_path_factory.mktemp("compiled")
    targets = [
        flag for arch in ARCHITECTURES for flag in ("-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}")
    ]

    def compile_one(source: str) -> list[Kernel]:
        command = [nvcc, *FLAGS, *targets, "-c", str(CSRC / f"{source}.cu"), "-o", str(folder / f"{source}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"nvcc failed on {source}.cu:\n{done.stderr[-3000:]}"
        assert "warning" not in done.stderr, f"nvcc warns about {source}.cu:\n{done.stderr[:3000]}"
        return read_report(source, done.stderr)

    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for kernels in pool.map(compile_one, SOURCES) for kernel in kernels]
    names = demangled([kernel.name for kernel in kernels])
    return folder, [replace(kernel, name=names[kernel.name]) for kernel in kernels]


def test_no_kernel_spills(compiled):
    _, kernels = compiled
    seen = {(kernel.source, kernel.architecture) for kernel in kernels}
    assert seen == {(source, architecture) for source in SOURCES for architecture in ARCHITECTURES}, (
        "a report is missing"
    )
    spilling = [f"{kernel}: {kernel.spilled_bytes} bytes, stack {kernel.stack_bytes}" for kernel in kernels
                if kernel.spilled_bytes or kernel.stack_bytes]  # fmt: skip
    assert not spilling, "\n".join(["registers spill (or arrays lie in local memory):", *spilling])


# Registers that leave enough threads on an SM to keep memory busy; 65,536 registers an SM.
# (source, K2's instance, most registers)
REGISTER_BUDGET = [
    ("rms_norm_forward", FORWARD, 64),  # 256 threads a row: 4 rows an SM
    ("rms_norm_backward", BACKWARD, 112),  # 512 threads: the one block an SM that there is work for
    ("swiglu", "forward_kernel<__nv_bfloat16, true>", 40),
    ("swiglu", "backward_kernel<__nv_bfloat16, true>", 48),
    ("rotary", "rotary_kernel<__nv_bfloat16, true, false>", 80),
    ("cross_entropy", STATISTICS, 64),  # 64 threads a row: 16 rows an SM
    ("cross_entropy", "gradient_kernel<__nv_bfloat16>", 64),
    ("adamw", "adamw_kernel<__nv_bfloat16, __nv_bfloat16>", 64),
]


@pytest.mark.parametrize(("source", "name", "most"), REGISTER_BUDGET, ids=lambda value: str(value))
def test_registers_stay_within_the_budget(compiled, source, name, most):
    _, kernels = compiled
    found = [kernel for kernel in kernels if kernel.source == source and kernel.name == name]
    assert len(found) == len(ARCHITECTURES), f"{name} is {[str(kernel) for kernel in found]}"
    for kernel in found:
        assert kernel.registers <= most, f"{kernel}: {kernel.registers} registers, budget {most}"


def find_tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: on PATH, or from NVIDIA's packages."""
    nvidia = Path(sysconfig.get_path("purelib")) / "nvidia"
    packaged = sorted(nvidia.glob(f"**/bin/{name}"))
    return shutil.which(name) or (str(packaged[0]) if packaged else None)


@pytest.fixture(scope="module")
def machine_code(compiled) -> dict[tuple[str, str, str], list[str]]:
    """{(source, architecture, kernel): its instructions with their operands, in order}."""
    cuobjdump, nvdisasm = find_tool("cuobjdump"), find_tool("nvdisasm")
    if cuobjdump is None or nvdisasm is None:
        pytest.skip("no cuobjdump with nvdisasm (toolkit, or packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm)")
    folder, _ = compiled
    codes: dict[tuple[str, str, str], list[str]] = {}
    for source in SOURCES:
        path = f"{Path(nvdisasm).parent}:/usr/bin:/bin"
        done = subprocess.run(
            [cuobjdump, "-sass", str(folder / f"{source}.o")], capture_output=True, text=True, env={"PATH": path}
        )
        assert done.returncode == 0, done.stderr
        architecture, code = "", []
        for line in done.stdout.splitlines():
            if found := re.search(r"arch = (sm_\d+)", line):
                architecture = found[1]
            elif found := re.search(r"Function : (\S+)", line):
                code = codes.setdefault((source, architecture, found[1]), [])
            elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]+);", line):
                code.append(found[1])
    names = demangled([name for _, _, name in codes])
    return {(source, architecture, names[name]): code for (source, architecture, name), code in codes.items()}


@pytest.fixture(scope="module")
def instructions(machine_code) -> dict[tuple[str, str, str], Counter]:
    """How often each instruction occurs in each kernel."""
    return {key: Counter(text.split()[0] for text in code) for key, code in machine_code.items()}


def total(counter: Counter, pattern: str) -> int:
    return sum(number for name, number in counter.items() if re.search(pattern, name))


# At least so many 16-byte loads and stores in K2's instance. LDGSTS: asynchronous copies to shared memory.
WIDE_ACCESSES = [
    ("rms_norm_forward", FORWARD, r"LDG\.E.*128", 12),  # 4 each of x, residual, gamma
    ("rms_norm_forward", FORWARD, r"STG\.E.*128", 8),  # h and y
    (
        "rms_norm_backward",
        BACKWARD,
        r"LDGSTS.*128",
        6,
    ),  # 2 each: x, grad_y, grad_h
    (
        "rms_norm_backward",
        BACKWARD,
        r"STG\.E.*128",
        2 + 4,
    ),  # grad_x; fp32 partials
    ("rms_norm_backward", BACKWARD, r"LDS.*128", 6),  # as LDGSTS; each member of a struct by itself would be 48
    ("swiglu", "forward_kernel<__nv_bfloat16, true>", r"LDG\.E.*128", 4),
    ("swiglu", "forward_kernel<__nv_bfloat16, true>", r"STG\.E.*128", 2),
    ("swiglu", "backward_kernel<__nv_bfloat16, true>", r"LDG\.E.*128", 6),
    ("swiglu", "backward_kernel<__nv_bfloat16, true>", r"STG\.E.*128", 4),
    ("rotary", "rotary_kernel<__nv_bfloat16, true, false>", r"LDG\.E.*128", 4 + 4),  # two heads; 8 cosines, 8 sines
    ("rotary", "rotary_kernel<__nv_bfloat16, true, false>", r"STG\.E.*128", 4),
    ("cross_entropy", STATISTICS, r"LDG\.E.*128", 8),
    ("cross_entropy", "gradient_kernel<__nv_bfloat16>", r"LDG\.E.*128", 4),
    ("cross_entropy", "gradient_kernel<__nv_bfloat16>", r"STG\.E.*128", 4),
    ("adamw", "adamw_kernel<__nv_bfloat16, __nv_bfloat16>", r"LDG\.E.*128", 6),  # 2 each: p, m, v
    ("adamw", "adamw_kernel<__nv_bfloat16, __nv_bfloat16>", r"LDG\.E.*64", 2),  # the gradient's vectors of 4
    ("adamw", "adamw_kernel<__nv_bfloat16, __nv_bfloat16>", r"STG\.E.*128", 6),
    ("adamw", "adamw_kernel<__nv_bfloat16, __nv_bfloat16>", r"STG\.E.*64", 2),  # the copy's
    ("gradient_norm", "chunk_norms_kernel<__nv_bfloat16>", r"LDG\.E.*128", 1),
]


@pytest.mark.parametrize(("source", "name", "pattern", "least"), WIDE_ACCESSES, ids=str)
def test_accesses_are_16_bytes_wide(instructions, source, name, pattern, least):
    found = {key: counter for key, counter in instructions.items() if key[0] == source and key[2] == name}
    assert len(found) == len(ARCHITECTURES), f"{name} is {list(found)}"
    for key, counter in found.items():
        assert total(counter, pattern) >= least, f"{key}: {total(counter, pattern)} of {pattern}; {dict(counter)}"


def registers_in(text: str) -> set[int]:
    """Those that an instruction names, and the second of a 64-bit address."""
    found = re.findall(r"\bR(\d+)\b(?:\.reuse)?(\.64)?", text)
    return {int(number) + i for number, wide in found for i in range(2 if wide else 1)}


def loads_at_each_wait(code: list[str]) -> list[int]:
    """How many 16-byte loads are under way, in the order of the code, wherever an instruction needs what a load of any
    width brings, and so waits."""
    found, pending, wide = [], set(), 0
    for text in code:
        load = re.match(r"LDG\S* R(\d+),", text)
        # A load into registers of a pending one stands on another branch.
        if pending & registers_in(text[load.end() :] if load else text):
            found.append(wide)
            pending, wide = set(), 0
        if load:
            width = {"128": 4, "64": 2}.get((re.search(r"\.(128|64)\b", text.split()[0]) or [""] * 2)[1], 1)
            pending |= {int(load[1]) + i for i in range(width)}
            wide += width == 4
    return [*found, wide]


# A thread's 16-byte loads that are under way together, and how many waits may come before them.
IN_FLIGHT = [
    ("rms_norm_forward", FORWARD, 8, 0),  # 4 each of x and residual
    ("swiglu", "forward_kernel<__nv_bfloat16, true>", 4, 0),
    ("swiglu", "backward_kernel<__nv_bfloat16, true>", 6, 0),
    ("rotary", "rotary_kernel<__nv_bfloat16, true, false>", 8, 1),  # 4 of the tables, at a position, and two heads
    ("cross_entropy", STATISTICS, 8, 0),
    ("cross_entropy", "gradient_kernel<__nv_bfloat16>", 4, 0),
    ("adamw", "adamw_kernel<__nv_bfloat16, __nv_bfloat16>", 6, 1),  # after the scale of the gradient
    ("gradient_norm", "chunk_norms_kernel<__nv_bfloat16>", 4, 3),  # after the code of unaligned parts
]


@pytest.mark.parametrize(("source", "name", "least", "waits"), IN_FLIGHT, ids=str)
def test_loads_are_under_way_before_the_first_is_waited_for(machine_code, source, name, least, waits):
    """Elements of 16 bits once were taken apart where they arrived, before the next vector was asked for."""
    found = {key: code for key, code in machine_code.items() if key[0] == source and key[2] == name}
    assert len(found) == len(ARCHITECTURES), f"{name} is {list(found)}"
    for key, code in found.items():
        under_way = loads_at_each_wait(code)
        assert max(under_way[: waits + 1]) >= least, f"{key}: {under_way} at each wait"


@pytest.mark.parametrize(("source", "name"), [("rms_norm_forward", FORWARD), ("rms_norm_backward", BACKWARD),
                                              ("swiglu", "forward_kernel<__nv_bfloat16, true>"),
                                              ("swiglu", "backward_kernel<__nv_bfloat16, true>")])  # fmt: skip
def test_no_element_goes_alone_where_rows_are_aligned(instructions, source, name):
    """Neither to and from memory nor, where lanes 16 bytes apart would meet in the same banks, shared memory."""
    found = {key: counter for key, counter in instructions.items() if key[0] == source and key[2] == name}
    assert len(found) == len(ARCHITECTURES), f"{name} is {list(found)}"
    for key, counter in found.items():
        assert total(counter, r"^(LDG|STG|LDS|STS)\b.*U?16$") == 0, f"{key}: {dict(counter)}"


@pytest.mark.parametrize(
    ("source", "name", "pattern", "most"),
    [
        ("rms_norm_forward", FORWARD, r"^BAR", 1),
        ("rms_norm_backward", BACKWARD, r"^BAR", 1),
        ("cross_entropy", STATISTICS, r"^BAR", 1),
        # one exponential for each of 8 * 8 logits held, and a few for rescaling, edges and the merge
        ("cross_entropy", STATISTICS, r"MUFU\.EX2", 64 + 8),
        # All instructions: elements taken apart and put together again once made half as many more.
        ("cross_entropy", STATISTICS, r"", 800),
        ("rms_norm_backward", BACKWARD, r"", 1000),
        # two of each: sigmoid is one exponential and one reciprocal
        ("swiglu", "backward_kernel<__nv_bfloat16, true>", r"MUFU\.(EX2|RCP)", 2 * 16 + 4),
    ],
    ids=str,
)
def test_barriers_and_special_functions_stay_few(instructions, source, name, pattern, most):
    found = {key: counter for key, counter in instructions.items() if key[0] == source and key[2] == name}
    assert len(found) == len(ARCHITECTURES), f"{name} is {list(found)}"
    for key, counter in found.items():
        assert 0 < total(counter, pattern) <= most, f"{key}: {total(counter, pattern)} of {pattern}; {dict(counter)}"
