"""Rotary position embedding on the packed output of the QKV projection, and its split into q, k and v.

The equation is rotary.py's. What is gained is the backward: separate gradients of q, k and v would be rotated into new
memory and then concatenated by the split; here they are rotated straight into their places in the packed gradient.

In:   qkv [S, B, G, (n + 2) * D]: in each of G groups n query heads, a key head and a value head (megatron-core's
      get_query_key_value_tensors with split_qkv=False returns it); tables and positions as in rotary.py.
Out:  q [S, B, G * n, D], k [S, B, G, D], v [S, B, G, D]: views of qkv; where n > 1 q is a copy, as in megatron-core.
The promise is rotary.py's: qkv is freshly computed, and nothing needs its values before the rotation. Where
saved-tensor hooks are on, which would hide that something does, a copy of it is rotated, and the views are the copy's.
"""

from __future__ import annotations

import torch

from k2_megatron.kernels.checks import (
    may_overwrite,
    require,
    require_backend,
    require_backend_device,
    require_contiguous,
    require_tensors,
)
from k2_megatron.kernels.library import refuse_second_derivative
from k2_megatron.kernels.rotary import IN_PLACE, INTO, OP, check_computed, rotary, with_dense_heads

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def rotary_packed(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_dim: int,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    backend: str,
) -> Triple:
    """(q, k, v), q and k rotated. ValueError where qkv is no whole number of heads, and for all that rotary refuses."""
    require_backend(OP, backend, "transformer_engine")
    require_tensors(OP, qkv=qkv)
    require(qkv.dim() == 4, OP, "qkv has shape {}; it needs [S, B, G, (n + 2) * D]", tuple(qkv.shape))
    require(head_dim > 0, OP, "head_dim is {}; it must be positive", head_dim)
    columns = qkv.shape[3]
    whole = columns % head_dim == 0 and columns >= 3 * head_dim
    require(whole, OP, "qkv has {} columns a group; needed: (n + 2) * {}, n >= 1", columns, head_dim)
    if backend not in ("cpu", "cuda") or torch.compiler.is_compiling():
        q, k, v = _split(qkv, head_dim)
        return *rotary(q, k, cos, sin, positions=positions, interleaved=interleaved, backend=backend), v
    require_backend_device(OP, backend, qkv)
    require_contiguous(OP, "qkv", qkv)
    if not may_overwrite():
        qkv = qkv.clone()  # a copy, not rotary()'s new q and k: beside those the view v would keep all of qkv
    check_computed(qkv=qkv)
    return _RotaryPacked.apply(qkv, cos, sin, head_dim, positions, interleaved)


def _split(qkv: torch.Tensor, head_dim: int) -> Triple:
    q, k, v = qkv.split([qkv.shape[3] - 2 * head_dim, head_dim, head_dim], dim=3)
    return q.reshape(*q.shape[:2], q.shape[2] * (q.shape[3] // head_dim), head_dim), k, v


def _in_pairs(slices: list[tuple[torch.Tensor, ...]]):
    """The slices two at a time, as one call takes them; the last alone beside an empty one."""
    if len(slices) % 2:
        slices.append(tuple(tensor[:, :, :0] for tensor in slices[-1]))
    return zip(slices[::2], slices[1::2], strict=True)


def in_wide_elements(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors' memory as elements of 16 bytes, where all of it is whole, aligned ones; else as they are. On a GPU
    torch copies strided tensors an element a thread and step, and of 2 bytes each that is bound by instructions."""
    for tensor in tensors:
        width = 16 // tensor.element_size()
        steps = (tensor.shape[-1], *tensor.stride()[:-1], tensor.storage_offset())
        if tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(step % width for step in steps):
            return tensors
    return tuple(tensor.view(torch.complex128) for tensor in tensors)


class _RotaryPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, head_dim, positions, interleaved):
        # All heads but the last of each group, a slice at a time: heads and groups lie at different strides.
        for (first,), (second,) in _in_pairs([(heads,) for heads in qkv.split(head_dim, dim=3)[:-1]]):
            IN_PLACE(first, second, cos, sin, positions, interleaved, False)
        if not qkv._is_view():  # of the slices, all views, nothing was marked
            torch.autograd.graph.increment_version(qkv)
        ctx.save_for_backward(cos, sin, positions)
        ctx.shape, ctx.interleaved = qkv.shape, interleaved
        return _split(qkv, head_dim)

    @staticmethod
    def backward(ctx, grad_q, grad_k, grad_v):
        refuse_second_derivative(OP)
        cos, sin, positions = ctx.saved_tensors
        head_dim = grad_k.shape[3]
        grad_q, grad_k = with_dense_heads(grad_q), with_dense_heads(grad_k)
        packed = grad_q.new_empty(ctx.shape)
        *to_heads, to_v = packed.split(head_dim, dim=3)
        if grad_v.is_cuda:
            to_v, grad_v = in_wide_elements(to_v, grad_v)
        to_v.copy_(grad_v)
        queries = len(to_heads) - 1
        heads = [*(grad_q[:, :, query::queries] for query in range(queries)), grad_k]
        for (q, to_q), (k, to_k) in _in_pairs(list(zip(heads, to_heads, strict=True))):
            INTO(q, k, to_q, to_k, cos, sin, positions, ctx.interleaved, True)
        return packed, None, None, None, None, None
