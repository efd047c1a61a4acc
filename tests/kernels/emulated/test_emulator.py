"""The emulation itself: it runs a right kernel, and it reports each mistake that the other tests rely on it to see."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import emulated_build
import pytest
import torch

SOURCE = Path(__file__).with_name("faulty_kernels.cu")
MISTAKES = (
    "none", "missing_barrier", "divergent_barrier", "different_barriers", "divergent_collective", "lane_has_left",
    "partial_mask", "early_exit", "copy_not_waited_for", "wrong_group_waited_for", "misaligned", "shared_beyond_end",
    "global_beyond_end", "partial_warp",
)  # fmt: skip
EXCHANGE, COLLECTIVE, COPIES, NEIGHBOURS = range(4)
SELF = torch.arange(64.0)
RIGHT = {EXCHANGE: (SELF + 33) % 64, COLLECTIVE: (SELF % 32 + 1 - 2 * (SELF % 2)), COPIES: 8 * SELF}


def build_faulty(folder: Path, *, sanitize: bool = False) -> Path:
    flags = (*emulated_build.FLAGS, "-O1", *(emulated_build.SANITIZERS if sanitize else ()))
    sources = [SOURCE, emulated_build.CSRC / "emulation" / "runtime.cpp"]
    objects = emulated_build.compile_objects(sources, folder, flags)
    target = folder / f"faulty{'_sanitized' * sanitize}.so"
    sanitizers = emulated_build.SANITIZERS if sanitize else ()
    subprocess.run(["g++", "-shared", *sanitizers, *map(str, objects), "-o", str(target)], check=True)
    return target


def load(path: Path):
    function = ctypes.CDLL(str(path)).run_faulty
    function.restype = ctypes.c_char_p
    function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]

    def run(kernel: int, mistake: str) -> tuple[str, torch.Tensor]:
        given, out = torch.arange(257.0), torch.full((64,), -1.0)
        message = function(kernel, MISTAKES.index(mistake), given.data_ptr(), out.data_ptr()).decode()
        return message, out

    return run


@pytest.fixture(scope="module")
def run_faulty(build_folder):
    return load(build_faulty(build_folder))


@pytest.mark.parametrize("order", ["0", "reverse", "1", "99"])
@pytest.mark.parametrize("kernel", [EXCHANGE, COLLECTIVE, COPIES])
def test_right_kernels_give_right_results_in_any_order(run_faulty, monkeypatch, kernel, order):
    monkeypatch.setenv("K2_EMULATION_ORDER", order)
    message, out = run_faulty(kernel, "none")
    assert message == ""
    assert torch.equal(out, RIGHT[kernel])


@pytest.mark.parametrize(
    ("kernel", "mistake", "expected"),
    [
        (EXCHANGE, "divergent_barrier", "deadlock: 32 threads at the block barrier faulty_kernels.cu"),
        (EXCHANGE, "different_barriers", "threads of one block wait at different barriers"),
        (EXCHANGE, "early_exit", "1 threads finished"),
        (COLLECTIVE, "divergent_collective", "deadlock: 32 threads at the warp collective"),
        (COLLECTIVE, "lane_has_left", "deadlock: 31 threads at the warp collective"),
        (COLLECTIVE, "partial_mask", "warp collective with a partial mask"),
        (COPIES, "misaligned", "misaligned access: 16 bytes at an address that ends in 4 modulo 16, thread 0"),
        (EXCHANGE, "partial_warp", "a block of 63 threads"),
    ],
)
def test_mistakes_are_named(run_faulty, kernel, mistake, expected):
    message, _ = run_faulty(kernel, mistake)
    assert message.startswith("emulation: ")
    assert expected in message.replace(str(SOURCE.parent) + "/", "")
    assert run_faulty(kernel, "none")[0] == "", "the next launch must not suffer"


@pytest.mark.parametrize(
    ("kernel", "mistake"),
    [(EXCHANGE, "missing_barrier"), (COPIES, "copy_not_waited_for"), (COPIES, "wrong_group_waited_for")],
)
def test_races_read_poison(run_faulty, kernel, mistake):
    message, out = run_faulty(kernel, mistake)
    assert message == ""
    assert out.isnan().any(), "what nobody had written yet must read as NaN"


def test_the_reverse_order_shows_that_a_block_overwrites_what_another_reads(run_faulty, monkeypatch):
    message, natural = run_faulty(NEIGHBOURS, "none")
    monkeypatch.setenv("K2_EMULATION_ORDER", "reverse")
    other_message, reverse = run_faulty(NEIGHBOURS, "none")
    assert message == other_message == ""
    assert torch.equal(natural[:32], torch.full((32,), -1.0))
    assert torch.equal(reverse[:32], torch.arange(32.0))


# A process of its own, because the sanitiser ends it; the output is exactly 64 floats of malloc's.
SANITIZED_RUN = """
import ctypes, sys
malloc = ctypes.CDLL(None).malloc
malloc.restype, malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
function = ctypes.CDLL(sys.argv[1]).run_faulty
function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
function(0, int(sys.argv[2]), malloc(1024), malloc(256))
print("finished")
"""


@pytest.fixture(scope="module")
def sanitized(build_folder):
    runtime = emulated_build.sanitizer_runtime()
    if runtime is None:
        pytest.skip("g++ has no AddressSanitizer runtime here")
    path = build_faulty(build_folder, sanitize=True)

    def run(mistake: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", SANITIZED_RUN, str(path), str(MISTAKES.index(mistake))]
        return subprocess.run(
            command, capture_output=True, text=True, env=emulated_build.sanitizer_environment(runtime)
        )

    return run


@pytest.mark.parametrize("mistake", ["shared_beyond_end", "global_beyond_end"])
def test_sanitizers_see_accesses_out_of_bounds(sanitized, mistake):
    assert sanitized("none").stdout == "finished\n"
    done = sanitized(mistake)
    assert done.returncode != 0
    assert "AddressSanitizer" in done.stderr
    assert "exchange" in done.stderr, "the report names the kernel"
