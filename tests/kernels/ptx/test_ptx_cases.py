"""The cases that every backend is tested on, with the kernels run from PTX: what nvcc made of them is as good as torch.

Every instruction of a kernel is executed as nvcc emitted it, with its fused multiplications and its own addresses;
bounds, alignment, races, barriers and what nobody wrote are checked on the way (memory.py, machine.py).
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from arithmetic import Approximation
from kernel_cases import CASES, Case, assert_as_good_as_reference

from k2_megatron.kernels import library
from k2_megatron.kernels.gradient_norm import gradient_statistics

BF16 = torch.bfloat16
LARGE = 30_000  # elements: such cases take seconds here
# In their place: rows just too long for registers, by element and by vector; and for two vectors a thread.
LONG_ROWS = [
    Case("rms_norm", (2, 16_392), BF16, options={"add": True}),
    Case("rms_norm", (2, 8_199), options={"add": True}),
    Case("rms_norm", (3, 4_104), options={"zero_centered": True}),
]


@pytest.fixture
def ptx_on_cpu_tensors(ptx_module, monkeypatch):
    monkeypatch.setattr(library, "extension", lambda _device_type: (ptx_module, ""))
    return ptx_module


def is_small(case) -> bool:
    return case.op in ("adamw", "clip_gradients") or int(np.prod(case.shape)) <= LARGE


@pytest.mark.parametrize("case", [*filter(is_small, CASES), *LONG_ROWS], ids=str)
def test_error_is_at_most_twice_the_references(ptx_on_cpu_tensors, case):
    exact, reference = case.run("torch", exact=True), case.run("torch")
    assert_as_good_as_reference(case.run("cpu"), reference, exact, case)


ONE_OF_EACH = [
    case
    for case in CASES
    if str(case) in {
        "rms_norm-4x257-bfloat16-add=True", "swiglu-4x514-bfloat16", "swiglu-4x514-float32",
        "rotary-5x2x3x32-bfloat16-offset1-layout=packed-positions=True", "cross_entropy-2x2x4004-bfloat16",
        "cross_entropy-5x2x131-float16-ignored=0.3-label_smoothing=0.1", "cross_entropy-4x2x65-float32",
        "cross_entropy-5x2x131-float32-label_smoothing=0.1-ignored=0.3", "clip_gradients-33x70001-bfloat16-offset1",
    }
]  # fmt: skip


@pytest.mark.parametrize("kind", ["exact", "high", "low"])
@pytest.mark.parametrize("case", [case for case in ONE_OF_EACH if case.op in ("swiglu", "cross_entropy")], ids=str)
def test_any_device_that_errs_as_documented_is_as_good_as_torch(ptx_on_cpu_tensors, case, kind):
    ptx_on_cpu_tensors.approximation = Approximation(kind)
    exact, reference = case.run("torch", exact=True), case.run("torch")
    assert_as_good_as_reference(case.run("cpu"), reference, exact, case)


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=str)
def test_results_do_not_depend_on_the_order_of_blocks(ptx_on_cpu_tensors, case):
    """Nor on how many run at once: one after another, the last one first."""
    expected = case.run("cpu")
    ptx_on_cpu_tensors.lanes = 1
    ptx_on_cpu_tensors.order = lambda blocks: np.arange(blocks)[::-1]
    for name, value in case.run("cpu").items():
        assert torch.equal(value, expected[name]), f"{case}: {name} differs"


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_the_gradient_norm_adds_in_fp64(ptx_on_cpu_tensors, dtype, offset):
    """Whole chunks of 8192, parts of one, vectors and elements; the cases above begin behind the norm."""
    generator = torch.Generator().manual_seed(offset)
    tensors = [torch.randn(size + offset, generator=generator).to(dtype)[offset:] for size in (0, 1, 7, 8192, 9001)]
    total, not_finite = gradient_statistics(tensors, backend="cpu").tolist()
    assert total == pytest.approx(sum(float(tensor.double().square().sum()) for tensor in tensors), rel=1e-14)
    assert not_finite == 0
    tensors[3][5], tensors[4][9000] = torch.inf, torch.nan
    assert gradient_statistics(tensors, backend="cpu")[1] == 2
    assert any("add_chunks_kernel" in name for name in ptx_on_cpu_tensors.launched)
