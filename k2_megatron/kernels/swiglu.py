"""SwiGLU on the packed output of the first MLP projection (Shazeer 2020, arXiv 2002.05202, equation 6 without biases).

    y = gate * sigmoid(gate) * up,   packed = [gate | up]
    grad_gate = grad_y * up * s * (1 + gate * (1 - s)),   grad_up = grad_y * gate * s,   s = sigmoid(gate)

In:   packed [..., 2F] fp32, bf16 or fp16, contiguous.   Out: y [..., F] of its dtype. fp32 arithmetic, one rounding.
Saved for the backward: packed. Bytes: 3 elements an output forward, 5 backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from k2_megatron.kernels.checks import (
    FLOATS,
    REFERENCE_FLOATS,
    require,
    require_backend,
    require_backend_device,
    require_columns,
    require_contiguous,
    require_dtype,
    require_one_device,
    require_shape,
    require_tensors,
)
from k2_megatron.kernels.library import DTYPE_CODES, call_in_function, pointer, refuse_second_derivative, register, run


def swiglu(packed: torch.Tensor, *, backend: str) -> torch.Tensor:
    """y [..., F] of packed [..., 2F] = [gate | up]. Raises ValueError for a tensor the backend cannot take."""
    require_backend("swiglu", backend)
    require_tensors("swiglu", packed=packed)
    if backend == "torch":
        _check_values(packed, REFERENCE_FLOATS)
        return swiglu_reference(packed)
    require_backend_device("swiglu", backend, packed)
    if torch.compiler.is_compiling():
        return FORWARD(packed)
    return _SwiGLU.apply(packed)


def swiglu_reference(packed):
    gate, up = packed.to(torch.promote_types(packed.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(packed.dtype)


def _check_values(packed, floats):
    require(packed.dim() >= 1, "swiglu", "packed is a scalar; it needs shape [..., 2F]")
    require_dtype("swiglu", "packed", packed, floats)
    columns = packed.shape[-1]
    even = columns % 2 == 0 and columns > 0
    require(even, "swiglu", "packed has {} columns; [gate | up] needs an even number", columns)


def _check(packed):
    _check_values(packed, FLOATS)
    require_columns("swiglu", "packed", packed.shape[-1])
    require_contiguous("swiglu", "packed", packed)


def _check_backward(grad_y, packed):
    _check(packed)
    require_dtype("swiglu", "grad_y", grad_y, (packed.dtype,))
    require_shape(
        "swiglu", "grad_y", grad_y, (*packed.shape[:-1], packed.shape[-1] // 2), "[..., F] of packed [..., 2F]"
    )
    require_contiguous("swiglu", "grad_y", grad_y)
    require_one_device("swiglu", packed=packed, grad_y=grad_y)


def _forward_fake(packed):
    _check(packed)
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2))


def _forward_op(packed):
    y = _forward_fake(packed)
    columns = y.shape[-1]
    run("swiglu", "swiglu_forward", packed.device, pointer(packed), pointer(y), y.numel() // columns, columns,
        DTYPE_CODES[packed.dtype])  # fmt: skip
    return y


def _backward_fake(grad_y, packed):
    _check_backward(grad_y, packed)
    return torch.empty_like(packed)


def _backward_op(grad_y, packed):
    grad_packed = _backward_fake(grad_y, packed)
    columns = grad_y.shape[-1]
    run("swiglu", "swiglu_backward", packed.device, pointer(grad_y), pointer(packed), pointer(grad_packed),
        grad_y.numel() // columns, columns, DTYPE_CODES[packed.dtype])  # fmt: skip
    return grad_packed


FORWARD = register("swiglu_forward(Tensor packed) -> Tensor", _forward_op, _forward_fake)
BACKWARD = register("swiglu_backward(Tensor grad_y, Tensor packed) -> Tensor", _backward_op, _backward_fake)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed):
        ctx.save_for_backward(packed)
        return call_in_function(FORWARD, packed)

    @staticmethod
    def backward(ctx, grad_y):
        """A gradient that autograd hands over expanded or strided is made dense first, the only copy here."""
        refuse_second_derivative("swiglu")
        return BACKWARD(grad_y.contiguous(), *ctx.saved_tensors)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


torch.library.register_autograd(FORWARD, _SwiGLU.backward, setup_context=_setup)
