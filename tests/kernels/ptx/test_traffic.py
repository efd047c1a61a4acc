"""What warps move at K2's widths: whole sectors of memory, and no bank conflicts; and that the counting sees others."""

from __future__ import annotations

import numpy as np
import pytest
from parse import Instruction
from traffic import Line, Traffic

from benchmarks import kernel_traffic

LOAD = Instruction("", False, "ld.global.u32", (), 1, "here")
LANES = np.arange(64)


@pytest.mark.parametrize(
    ("addresses", "size", "moved", "least"),
    [
        (1024 + 16 * LANES, 16, 32, 32),  # side by side
        (1024 + 32 * LANES, 16, 64, 32),  # every other 16 bytes: half of each sector
        (1024 + 2 * LANES + 2, 2, 6, 4),  # 64 bytes a warp, each from the middle of a sector on
        (np.full(64, 1024), 4, 2, 2),  # all of a warp the same
        (1024 + 128 * LANES, 4, 64, 8),
    ],
)
def test_sectors(addresses, size, moved, least):
    traffic = Traffic()
    traffic.note_global(LOAD, LANES, addresses, size)
    assert traffic.loaded == Line(moved, least)


@pytest.mark.parametrize(
    ("addresses", "size", "moved", "least"),
    [
        (4 * LANES, 4, 2, 2),
        (8 * LANES, 4, 4, 2),  # two words of each of half the banks
        (128 * LANES, 4, 64, 2),  # all in one bank
        (np.zeros(64, int), 4, 2, 2),  # one word, read by all
        (16 * LANES, 16, 8, 8),  # a quarter of a warp at once
        (4 * 33 * LANES, 4, 2, 2),  # a column of a tile with one word of padding
    ],
)
def test_bank_conflicts(addresses, size, moved, least):
    traffic = Traffic()
    traffic.note_shared(LOAD, LANES, addresses, size)
    assert traffic.wavefronts == Line(moved, least)


# What is not whole, by dev/LOG.md: partial sums of 8 fp32 a thread; tables of cos and sin; rows of 4004 columns.
ALLOWED = {"rms_norm backward, residual": 1.34, "rotary, halves": 1.12, "cross_entropy statistics": 1.05,
           "cross_entropy gradient": 1.05}  # fmt: skip


@pytest.mark.parametrize("workload", [w for w in kernel_traffic.WORKLOADS if w.name != "cross_entropy loss"],
                         ids=lambda workload: workload.name)  # fmt: skip
def test_kernels_move_whole_sectors(ptx_module, monkeypatch, workload):
    monkeypatch.setattr(kernel_traffic, "ROWS", 4)
    for kernel, _, traffic in kernel_traffic.measure(ptx_module, workload):
        if kernel == "add_chunks_kernel":  # one pair a chunk
            continue
        for line in (traffic.loaded, traffic.stored):
            assert 0 < line.moved <= ALLOWED.get(workload.name, 1.0) * line.least, f"{kernel}: {dict(traffic.by_line)}"
        assert traffic.wavefronts.moved == traffic.wavefronts.least, f"{kernel}: bank conflicts"
