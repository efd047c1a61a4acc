"""csrc/rms_norm_*.cu on the CPU: forward and backward, with and without the residual: dtypes, widths, alignments."""

from __future__ import annotations

import pytest
import torch
from guarded import DTYPES, Guarded, check_all, empty
from kernel_cases import assert_as_good_as_reference

EPSILON = 1e-5

# rows, hidden: one element; a warp a row, with rows left over; odd rows (no vectors); K2's width; the widest that the
# register kernels take, forward and backward, and one vector more; none at all.
SHAPES = [(1, 1), (5, 64), (3, 77), (9, 1000), (2, 8192), (2, 9000), (2, 16392), (0, 128)]
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
]


def equation(x, residual, gamma, zero_centered):
    """y and h in the dtype of the arguments."""
    h = x if residual is None else x + residual
    weight = 1 + gamma if zero_centered else gamma
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPSILON) * weight, h


def inputs(rows, hidden, dtype, gamma_dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad_y, grad_h = (torch.randn(rows, hidden, generator=generator).to(dtype) for _ in range(4))
    return x, residual, torch.randn(hidden, generator=generator).to(gamma_dtype), grad_y, grad_h


def forward(kernels, x, residual, gamma, zero_centered=False, offset=0):
    rows, hidden = x.shape
    held = {"x": Guarded(x, offset), "gamma": Guarded(gamma, offset)}
    held |= {"y": empty(x.shape, x.dtype, offset), "rstd": empty((rows,), torch.float32)}
    if residual is not None:
        held |= {"residual": Guarded(residual, offset), "h": empty(x.shape, x.dtype, offset)}
    address = {name: held[name].address if name in held else 0 for name in ("x", "residual", "gamma", "h", "y", "rstd")}
    kernels.rms_norm_forward(
        *address.values(), rows, hidden, EPSILON, zero_centered, DTYPES[x.dtype], DTYPES[gamma.dtype], 0
    )
    check_all(held)
    return held["y"].tensor, held["h"].tensor if residual is not None else x, held["rstd"].tensor


def backward(kernels, grad_y, grad_h, h, gamma, rstd, zero_centered=False, offset=0, partial_rows=None, in_place=False):
    rows, hidden = h.shape
    partial_rows = partial_rows or kernels.rms_norm_partial_rows(rows, hidden)
    held = {
        "grad_y": Guarded(grad_y, offset),
        "x": Guarded(h, offset),
        "gamma": Guarded(gamma, offset),
        "rstd": Guarded(rstd),
    }
    held["grad_x"] = held["grad_y"] if in_place else empty(h.shape, h.dtype, offset)
    held |= {
        "grad_gamma": empty(gamma.shape, gamma.dtype, offset),
        "workspace": empty((partial_rows, hidden), torch.float32),
    }
    if grad_h is not None:
        held["grad_h"] = Guarded(grad_h, offset)
    names = ("grad_y", "grad_h", "x", "gamma", "rstd", "grad_x", "grad_gamma", "workspace")
    address = [held[name].address if name in held else 0 for name in names]
    kernels.rms_norm_backward(
        *address, partial_rows, rows, hidden, zero_centered, DTYPES[h.dtype], DTYPES[gamma.dtype], 0
    )
    check_all(held)
    return held["grad_x"].tensor, held["grad_gamma"].tensor


def gradients_of_equation(h, gamma, grad_y, grad_h, zero_centered):
    """By autograd, in the arguments' dtype."""
    h, gamma = h.detach().requires_grad_(), gamma.detach().requires_grad_()
    y, _ = equation(h, None, gamma, zero_centered)
    grad_x, grad_gamma = torch.autograd.grad(y, [h, gamma], grad_y.to(y.dtype))
    return (grad_x if grad_h is None else grad_x + grad_h), grad_gamma


def judge(name, actual, reference, exact):
    assert_as_good_as_reference({name: actual}, {name: reference}, {name: exact}, "rms_norm")


@pytest.mark.parametrize(("dtype", "gamma_dtype"), TYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "hidden"), SHAPES)
@pytest.mark.parametrize("residual_given", [False, True], ids=["plain", "residual"])
def test_forward_is_as_exact_as_torch(kernels, rows, hidden, dtype, gamma_dtype, residual_given):
    x, residual, gamma, _, _ = inputs(rows, hidden, dtype, gamma_dtype)
    residual = residual if residual_given else None
    y, h, rstd = forward(kernels, x, residual, gamma, zero_centered=residual_given)
    if residual is not None:
        assert torch.equal(h, x + residual), "h must be x + residual, rounded once"
    exact, _ = equation(h.double(), None, gamma.double(), residual_given)
    reference, _ = equation(h.float(), None, gamma.float(), residual_given)
    judge("y", y, reference.to(dtype), exact)
    exact_rstd = torch.rsqrt(h.double().pow(2).mean(-1) + EPSILON)
    judge("rstd", rstd, torch.rsqrt(h.float().pow(2).mean(-1) + EPSILON), exact_rstd)


@pytest.mark.parametrize(("dtype", "gamma_dtype"), TYPES, ids=lambda t: str(t).removeprefix("torch."))
@pytest.mark.parametrize(("rows", "hidden"), [*SHAPES, (40, 520), (300, 128)])
@pytest.mark.parametrize("branch_given", [False, True], ids=["plain", "residual"])
def test_backward_is_as_exact_as_torch(kernels, rows, hidden, dtype, gamma_dtype, branch_given):
    h, _, gamma, grad_y, grad_h = inputs(rows, hidden, dtype, gamma_dtype, seed=1)
    grad_h = grad_h if branch_given else None
    rstd = torch.rsqrt(h.float().pow(2).mean(-1) + EPSILON)
    grad_x, grad_gamma = backward(kernels, grad_y, grad_h, h, gamma, rstd, zero_centered=branch_given)

    def reference(kind):
        branch = None if grad_h is None else grad_h.to(kind)
        return gradients_of_equation(h.to(kind), gamma.to(kind), grad_y.to(kind), branch, branch_given)

    (exact_x, exact_gamma), (torch_x, torch_gamma) = reference(torch.float64), reference(torch.float32)
    judge("grad_x", grad_x, torch_x.to(dtype), exact_x)
    judge("grad_gamma", grad_gamma, torch_gamma.to(gamma_dtype), exact_gamma)


@pytest.mark.parametrize("hidden", [64, 1024, 16400])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_alignment_does_not_change_a_bit(kernels, dtype, hidden):
    x, residual, gamma, grad_y, grad_h = inputs(2, hidden, dtype, dtype)
    aligned = forward(kernels, x, residual, gamma)
    gradients = backward(kernels, grad_y, grad_h, aligned[1], gamma, aligned[2])
    for offset in (1, 3):
        assert all(map(torch.equal, aligned, forward(kernels, x, residual, gamma, offset=offset)))
        shifted = backward(kernels, grad_y, grad_h, aligned[1], gamma, aligned[2], offset=offset)
        assert all(map(torch.equal, gradients, shifted))


@pytest.mark.parametrize("partial_rows", [1, 3, 64])
def test_backward_with_any_number_of_partial_rows(kernels, partial_rows):
    h, _, gamma, grad_y, _ = inputs(17, 256, torch.float32, torch.float32)
    rstd = torch.rsqrt(h.pow(2).mean(-1) + EPSILON)
    _, grad_gamma = backward(kernels, grad_y, None, h, gamma, rstd, partial_rows=partial_rows)
    exact = (grad_y.double() * h.double() * rstd.double()[:, None]).sum(0)
    judge("grad_gamma", grad_gamma, (grad_y * h * rstd[:, None]).sum(0), exact)


@pytest.mark.parametrize("hidden", [512, 16400])
def test_backward_may_overwrite_grad_y(kernels, hidden):
    h, _, gamma, grad_y, grad_h = inputs(3, hidden, torch.bfloat16, torch.bfloat16)
    rstd = torch.rsqrt(h.float().pow(2).mean(-1) + EPSILON)
    apart = backward(kernels, grad_y, grad_h, h, gamma, rstd)
    assert all(map(torch.equal, apart, backward(kernels, grad_y, grad_h, h, gamma, rstd, in_place=True)))


def test_gamma_without_gradient_writes_no_gradient(kernels):
    h, _, gamma, grad_y, _ = inputs(4, 128, torch.float32, torch.float32)
    rstd = torch.rsqrt(h.pow(2).mean(-1) + EPSILON)
    grad_x = empty(h.shape, h.dtype)
    kernels.rms_norm_backward(
        grad_y.data_ptr(),
        0,
        h.data_ptr(),
        gamma.data_ptr(),
        rstd.data_ptr(),
        grad_x.address,
        0,
        0,
        2,
        4,
        128,
        False,
        0,
        0,
        0,
    )
    expected, _ = backward(kernels, grad_y, None, h, gamma, rstd, partial_rows=2)
    assert torch.equal(grad_x.tensor, expected)


def test_partial_rows_depend_on_the_shape_alone(kernels):
    shapes = [(0, 8192), (1, 8192), (256, 8192), (2048, 8192), (100_000, 8192), (100_000, 1024), (100_000, 65536)]
    assert [kernels.rms_norm_partial_rows(*shape) for shape in shapes] == [1, 1, 64, 128, 128, 1024, 128]


def test_nan_stays_in_its_row(kernels):
    x, _, gamma, _, _ = inputs(3, 128, torch.bfloat16, torch.bfloat16)
    x[1, 5] = float("nan")
    y, _, _ = forward(kernels, x, None, gamma)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()
