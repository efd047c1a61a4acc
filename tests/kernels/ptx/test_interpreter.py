"""The interpreter itself: it runs a right kernel, and reports each mistake that the other tests rely on it to see."""

from __future__ import annotations

from pathlib import Path

import ptx_build
import pytest
import torch
from arithmetic import Approximation
from machine import Launch, Machine
from memory import GlobalMemory, Region
from parse import Module, PtxError

SOURCE = Path(__file__).with_name("faulty.cu")


@pytest.fixture(scope="module")
def run(ptx_folder):
    (path,) = ptx_build.compile_ptx([SOURCE], ptx_folder)
    module = Module(path.read_text())

    def run(name: str, blocks: int = 1, threads: int = 64, in_use: str = "in") -> torch.Tensor:
        given, out = torch.arange(64.0), torch.full((80,), -1.0)
        memory = GlobalMemory([
            Region("in", given.data_ptr(), (64,), (1,), 4, in_use),
            Region("out", out.data_ptr(), (60 if name == "misaligned" else 64,), (1,), 4, "out"),
        ])  # fmt: skip
        arguments = tuple(address.to_bytes(8, "little") for address in (given.data_ptr(), out.data_ptr()))
        launch = Launch((blocks, 1, 1), (threads, 1, 1), 0, arguments)
        Machine(module[name], launch, memory, Approximation()).run()
        memory.require_complete()
        memory.write_back()
        assert torch.equal(out[64:], torch.full((16,), -1.0))
        return out[:64]

    return run


def test_a_right_kernel_gives_the_right_result(run):
    assert torch.equal(run("right"), (torch.arange(64.0) + 33) % 64)


MISTAKES = [
    ("missing_barrier", "race: "),
    ("shared_beyond_end", "out of bounds: 4 bytes read at shared "),
    ("early_exit", "(bar.sync 0), 1 threads have left"),
    ("divergent_barrier", "deadlock in divergent_barrier, block 0: 32 threads wait at faulty.cu:"),
    ("two_barriers", "a barrier of all threads, of which 32 wait at another barrier or collective"),
    ("shared_never_written", "4 bytes read: never written before at shared "),
    ("wrong_mask", "a collective that does not name the lane that executes it; thread 16"),
    ("lane_does_not_arrive", "deadlock in lane_does_not_arrive, block 0: "),
    ("reads_a_stranger", "a collective reads a lane that does not take part; thread 0"),
    ("off_by_one", "out of bounds: 4 bytes at in + 256 bytes (it has 256); thread 63"),
    ("before_the_start", "out of bounds: 4 bytes at in + -4 bytes (it has 256); thread 0"),
    ("writes_an_input", "4 bytes written: an input, which is written at in + 0 bytes"),
    ("dropped_tail", "4 bytes of the outputs are never written, the first at out + 252 bytes"),
    ("reads_an_output", "4 bytes read: never written before at out + 0 bytes"),
    ("misaligned", "misaligned: 16 bytes read at in + 4 bytes"),
    ("copy_not_waited_for", "read while an asynchronous copy is under way at shared "),
    ("unknown_instruction", "an instruction that is not known here: sin.approx.f32"),
]


@pytest.mark.parametrize(("name", "expected"), MISTAKES)
def test_mistakes_are_named(run, name, expected):
    with pytest.raises(PtxError) as error:
        run(name)
    assert expected in str(error.value)
    assert name == "dropped_tail" or "faulty.cu:" in str(error.value), "the report names the line of the source"


def test_a_race_for_what_may_be_written_is_one(run):
    with pytest.raises(PtxError, match="race: written by one thread"):
        run("race_in_global_memory", in_use="inout")


def test_blocks_race_with_each_other_in_any_order(run):
    with pytest.raises(PtxError, match=r"race: written .* at out \+ 12[48] bytes"):
        run("race_of_blocks", blocks=2)


def test_a_block_of_more_threads_than_the_kernel_may_have_is_refused(run):
    with pytest.raises(PtxError, match="1056 threads a block; the kernel is compiled for 1024"):
        run("right", threads=1056)
