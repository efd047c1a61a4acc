"""csrc/swiglu.cu on the CPU, beyond the common cases: tiles, overwriting, alignment, extreme gates."""

from __future__ import annotations

import pytest
import torch
from guarded import DTYPES, Guarded, check_all, empty
from kernel_cases import assert_as_good_as_reference

# A tile is 512 vectors: rows shorter than a tile, one and a half tiles, two rows in one tile, K2's 2752, odd widths.
SHAPES = [(1, 1), (3, 7), (70, 16), (2, 6200), (9, 2752), (5, 1001), (0, 64)]


def forward(kernels, packed, offset=0):
    rows, columns = packed.shape[0], packed.shape[1] // 2
    held = {"packed": Guarded(packed, offset), "out": empty((rows, columns), packed.dtype, offset)}
    kernels.swiglu_forward(held["packed"].address, held["out"].address, rows, columns, DTYPES[packed.dtype], 0)
    check_all(held)
    return held["out"].tensor


def backward(kernels, grad_out, packed, offset=0, in_place=False):
    rows, columns = grad_out.shape
    held = {"grad_out": Guarded(grad_out, offset), "packed": Guarded(packed, offset)}
    held["grad_packed"] = held["packed"] if in_place else empty(packed.shape, packed.dtype, offset)
    addresses = [held[name].address for name in ("grad_out", "packed", "grad_packed")]
    kernels.swiglu_backward(*addresses, rows, columns, DTYPES[packed.dtype], 0)
    check_all(held)
    return held["grad_packed"].tensor


def inputs(rows, columns, dtype):
    generator = torch.Generator().manual_seed(rows + columns)
    packed = (3 * torch.randn(rows, 2 * columns, generator=generator)).to(dtype)
    return packed, torch.randn(rows, columns, generator=generator).to(dtype)


def equation(packed, grad_out):
    packed = packed.detach().requires_grad_()
    gate, up = packed.chunk(2, -1)
    out = torch.nn.functional.silu(gate) * up
    return {"out": out.detach(), "grad_packed": torch.autograd.grad(out, packed, grad_out)[0]}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_is_as_exact_as_torch(kernels, rows, columns, dtype):
    packed, grad_out = inputs(rows, columns, dtype)
    found = {"out": forward(kernels, packed), "grad_packed": backward(kernels, grad_out, packed)}
    reference = {name: value.to(dtype) for name, value in equation(packed.float(), grad_out.float()).items()}
    assert_as_good_as_reference(found, reference, equation(packed.double(), grad_out.double()), (rows, columns))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neither_alignment_nor_overwriting_changes_a_bit(kernels, dtype):
    packed, grad_out = inputs(6, 320, dtype)
    out, grad_packed = forward(kernels, packed), backward(kernels, grad_out, packed)
    assert torch.equal(out, forward(kernels, packed, offset=1))
    assert torch.equal(grad_packed, backward(kernels, grad_out, packed, offset=1))
    assert torch.equal(grad_packed, backward(kernels, grad_out, packed, in_place=True))


def test_extreme_gates_saturate(kernels):
    """sigmoid(-200) is 0 in fp32 although exp(200) is infinite there."""
    packed = torch.tensor([[-200.0, -90.0, 200.0, 0.0, 2.0, 2.0, 2.0, 2.0]])
    assert forward(kernels, packed)[0, [0, 2, 3]].tolist() == [0.0, 400.0, 0.0]
    gradient = backward(kernels, torch.ones(1, 4), packed)
    assert gradient.isfinite().all()
    assert gradient[0, [0, 2, 4, 6]].tolist() == [0.0, 2.0, 0.0, 200.0]
