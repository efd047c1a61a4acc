"""RMSNorm and residual add + RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467, equation 4).

    h = x + residual (or x),   rstd = 1 / sqrt(mean(h^2) + epsilon),   y = h * rstd * w,   w = gamma or 1 + gamma
    grad_x = rstd * (g - h * rstd * mean(g * h * rstd)) + grad_h,      g = grad_y * w
    grad_gamma = sum_t grad_y * h * rstd

In:   x, residual [..., H] fp32, bf16 or fp16, contiguous; weight [H] of that dtype or fp32.   Out: y (and h) like x.
h is rounded before it is normalized, so the backward from the stored h is exact; arithmetic is fp32, rounded once.
Saved for the backward: h and rstd [T]. Both passes read and write every element once.
"""

from __future__ import annotations

import math

import torch

from k2_megatron.kernels import peers
from k2_megatron.kernels.checks import (
    FLOATS,
    MAXIMUM_HIDDEN_SIZE,
    REFERENCE_FLOATS,
    require,
    require_backend,
    require_backend_device,
    require_contiguous,
    require_dtype,
    require_number,
    require_one_device,
    require_shape,
    require_tensors,
)
from k2_megatron.kernels.library import (
    DTYPE_CODES,
    call_in_function,
    module_for,
    pointer,
    refuse_second_derivative,
    register,
    run,
)

PEERS = ("apex", "transformer_engine")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, epsilon: float, *, zero_centered: bool = False, backend: str
) -> torch.Tensor:
    """y [..., H] of x's dtype. Raises ValueError for tensors the backend cannot take; nothing is copied to make
    them fit."""
    require_backend("rms_norm", backend, *PEERS)
    _check_epsilon("rms_norm", epsilon)
    require_tensors("rms_norm", x=x, weight=weight)
    if backend == "torch":
        _check_values("rms_norm", x, weight, None, REFERENCE_FLOATS)
        return rms_norm_reference(x, weight, epsilon, zero_centered)
    if backend in PEERS:
        _check_forward("rms_norm", x, weight)
        return peers.rms_norm(backend, x, weight, epsilon, zero_centered)
    require_backend_device("rms_norm", backend, x)
    if torch.compiler.is_compiling():
        return FORWARD(x, weight, epsilon, zero_centered)[0]
    return _RMSNorm.apply(x, weight, epsilon, zero_centered)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    epsilon: float,
    *,
    zero_centered: bool = False,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h) with h = x + residual, both [..., H] of x's dtype; the gradient arriving at h is added in the same
    pass."""
    require_backend("add_rms_norm", backend, *PEERS)
    _check_epsilon("add_rms_norm", epsilon)
    require_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    if backend == "torch":
        _check_values("add_rms_norm", x, weight, residual, REFERENCE_FLOATS)
        return add_rms_norm_reference(x, residual, weight, epsilon, zero_centered)
    if backend in PEERS:
        _check_forward("add_rms_norm", x, weight, residual)
        h = x + residual
        return peers.rms_norm(backend, h, weight, epsilon, zero_centered), h
    require_backend_device("add_rms_norm", backend, x)
    if torch.compiler.is_compiling():
        return ADD_FORWARD(x, residual, weight, epsilon, zero_centered)[:2]
    return _AddRMSNorm.apply(x, residual, weight, epsilon, zero_centered)


def _check_epsilon(op, epsilon):
    require_number(op, "epsilon", epsilon)
    require(0 <= epsilon < math.inf, op, "epsilon is {}; it must be finite and not negative", epsilon)


def rms_norm_reference(x, weight, epsilon, zero_centered=False):
    """The equation in torch: fp32 arithmetic (fp64 for fp64 input), one rounding."""
    wide = torch.promote_types(x.dtype, torch.float32)
    wide_x = x.to(wide)
    rstd = torch.rsqrt(wide_x.square().mean(-1, keepdim=True) + epsilon)
    gamma = weight.to(wide) + 1 if zero_centered else weight.to(wide)
    return (wide_x * rstd * gamma).to(x.dtype)


def add_rms_norm_reference(x, residual, weight, epsilon, zero_centered=False):
    h = x + residual
    return rms_norm_reference(h, weight, epsilon, zero_centered), h


def _check_values(op, x, weight, residual, floats):
    """What every backend needs, the torch reference too."""
    require(x.dim() >= 1, op, "x is a scalar; it needs shape [..., H]")
    hidden = x.shape[-1]
    require_dtype(op, "x", x, floats)
    require(1 <= hidden <= MAXIMUM_HIDDEN_SIZE, op, "hidden size {}; allowed: 1 to {}", hidden, MAXIMUM_HIDDEN_SIZE)
    require_dtype(op, "weight", weight, (x.dtype, torch.float32))
    require_shape(op, "weight", weight, (hidden,), "[H] of x [..., H]")
    tensors = {"x": x, "weight": weight}
    if residual is not None:
        require_dtype(op, "residual", residual, (x.dtype,))
        require_shape(op, "residual", residual, x.shape, "x's shape")
        tensors["residual"] = residual
    require_one_device(op, **tensors)


def _check_forward(op, x, weight, residual=None):
    """What a kernel needs that is given pointers."""
    _check_values(op, x, weight, residual, FLOATS)
    require_contiguous(op, "x", x)
    require_contiguous(op, "weight", weight)
    if residual is not None:
        require_contiguous(op, "residual", residual)


def _check_backward(op, grad_y, h, weight, rstd, grad_h=None):
    _check_forward(op, h, weight)
    gradients = {"grad_y": grad_y} if grad_h is None else {"grad_y": grad_y, "grad_h": grad_h}
    for name, gradient in gradients.items():
        require_dtype(op, name, gradient, (h.dtype,))
        require_shape(op, name, gradient, h.shape, "the normalized tensor's shape")
        require_contiguous(op, name, gradient)
    require_dtype(op, "rstd", rstd, (torch.float32,))
    require_shape(op, "rstd", rstd, h.shape[:-1], "one value a row")
    require_contiguous(op, "rstd", rstd)
    require_one_device(op, h=h, weight=weight, rstd=rstd, **gradients)


def _rows(x):
    return x.numel() // x.shape[-1]


def _forward(op, x, residual, weight, epsilon, zero_centered):
    _check_forward(op, x, weight, residual)
    y = torch.empty_like(x)
    h = None if residual is None else torch.empty_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    run(op, "rms_norm_forward", x.device, pointer(x), pointer(residual), pointer(weight), pointer(h), pointer(y),
        pointer(rstd), _rows(x), x.shape[-1], epsilon, zero_centered, DTYPE_CODES[x.dtype],
        DTYPE_CODES[weight.dtype])  # fmt: skip
    return y, h, rstd


def _forward_op(x, weight, epsilon, zero_centered):
    y, _, rstd = _forward("rms_norm", x, None, weight, epsilon, zero_centered)
    return y, rstd


def _add_forward_op(x, residual, weight, epsilon, zero_centered):
    return _forward("add_rms_norm", x, residual, weight, epsilon, zero_centered)


def _backward(op, grad_y, grad_h, h, weight, rstd, zero_centered):
    _check_backward(op, grad_y, h, weight, rstd, grad_h)
    rows, hidden = _rows(h), h.shape[-1]
    partial_rows = module_for(op, h.device).rms_norm_partial_rows(rows, hidden)
    workspace = torch.empty(partial_rows, hidden, dtype=torch.float32, device=h.device)
    grad_x, grad_weight = torch.empty_like(h), torch.empty_like(weight)
    run(op, "rms_norm_backward", h.device, pointer(grad_y), pointer(grad_h), pointer(h), pointer(weight), pointer(rstd),
        pointer(grad_x), pointer(grad_weight), pointer(workspace), partial_rows, rows, hidden, zero_centered,
        DTYPE_CODES[h.dtype], DTYPE_CODES[weight.dtype])  # fmt: skip
    return grad_x, grad_weight


def _backward_op(grad_y, x, weight, rstd, zero_centered):
    return _backward("rms_norm", grad_y, None, x, weight, rstd, zero_centered)


def _add_backward_op(grad_y, grad_h, h, weight, rstd, zero_centered):
    return _backward("add_rms_norm", grad_y, grad_h, h, weight, rstd, zero_centered)


def _forward_fake(x, weight, epsilon, zero_centered):
    _check_forward("rms_norm", x, weight)
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _add_forward_fake(x, residual, weight, epsilon, zero_centered):
    _check_forward("add_rms_norm", x, weight, residual)
    return torch.empty_like(x), torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _backward_fake(grad_y, x, weight, rstd, zero_centered):
    return torch.empty_like(x), torch.empty_like(weight)


def _add_backward_fake(grad_y, grad_h, h, weight, rstd, zero_centered):
    return torch.empty_like(h), torch.empty_like(weight)


FORWARD = register(
    "rms_norm_forward(Tensor x, Tensor weight, float epsilon, bool zero_centered) -> (Tensor, Tensor)",
    _forward_op,
    _forward_fake,
)
ADD_FORWARD = register(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float epsilon, bool zero_centered)"
    " -> (Tensor, Tensor, Tensor)",
    _add_forward_op,
    _add_forward_fake,
)
BACKWARD = register(
    "rms_norm_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor rstd, bool zero_centered) -> (Tensor, Tensor)",
    _backward_op,
    _backward_fake,
)
ADD_BACKWARD = register(
    "add_rms_norm_backward(Tensor grad_y, Tensor grad_h, Tensor h, Tensor weight, Tensor rstd, bool zero_centered)"
    " -> (Tensor, Tensor)",
    _add_backward_op,
    _add_backward_fake,
)


def _grad(ctx, grad_y):
    """Gradients from autograd come in any layout (an expanded one from sum()): made dense, the only copy here."""
    refuse_second_derivative("rms_norm")
    x, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        return None, None
    return BACKWARD(grad_y.contiguous(), x, weight, rstd, ctx.zero_centered)


def _add_grad(ctx, grad_y, grad_h):
    refuse_second_derivative("add_rms_norm")
    h, weight, rstd = ctx.saved_tensors
    if grad_y is None:
        return grad_h, None
    if grad_h is None:
        return BACKWARD(grad_y.contiguous(), h, weight, rstd, ctx.zero_centered)
    return ADD_BACKWARD(grad_y.contiguous(), grad_h.contiguous(), h, weight, rstd, ctx.zero_centered)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, epsilon, zero_centered):
        y, rstd = call_in_function(FORWARD, x, weight, epsilon, zero_centered)
        ctx.save_for_backward(x, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.zero_centered = zero_centered
        return y

    @staticmethod
    def backward(ctx, grad_y):
        return *_grad(ctx, grad_y), None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, epsilon, zero_centered):
        y, h, rstd = call_in_function(ADD_FORWARD, x, residual, weight, epsilon, zero_centered)
        ctx.save_for_backward(h, weight, rstd)
        ctx.set_materialize_grads(False)
        ctx.zero_centered = zero_centered
        return y, h

    @staticmethod
    def backward(ctx, grad_y, grad_h):
        grad_x, grad_weight = _add_grad(ctx, grad_y, grad_h)
        return grad_x, grad_x, grad_weight, None, None


def _setup(ctx, inputs, output):
    x, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _add_setup(ctx, inputs, output):
    _, _, weight, _, ctx.zero_centered = inputs
    ctx.save_for_backward(output[1], weight, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _op_grad(ctx, grad_y, _grad_rstd):
    return *_grad(ctx, grad_y), None, None


def _add_op_grad(ctx, grad_y, grad_h, _grad_rstd):
    grad_x, grad_weight = _add_grad(ctx, grad_y, grad_h)
    return grad_x, grad_x, grad_weight, None, None


torch.library.register_autograd(FORWARD, _op_grad, setup_context=_setup)
torch.library.register_autograd(ADD_FORWARD, _add_op_grad, setup_context=_add_setup)
