"""Rotary position embedding of q and k (Su et al. 2021, arXiv 2104.09864, equation 34), in one call.

    angle[s, i] = s * base^(-2i/R);  first' = first * cos - second * sin,  second' = second * cos + first * sin
    pair i is (x[i], x[i + R/2]) (GPT-NeoX, Llama), or (x[2i], x[2i+1]) when interleaved (GPT-J)

In:   q [S, B, N, D], k [S, B, Nk, D] fp32, bf16 or fp16, any strides but the last (megatron-core's are views into the
      output of the QKV projection, head stride 3D); cos, sin [rows, R/2] fp32, R <= D.
Out:  q and k rotated in their first R elements, fp32 arithmetic, one rounding.

In eager mode the compiled backends rotate q and k in place and return them: right for freshly computed tensors, whose
values nothing needs before the rotation (a linear layer saves its input, not its output). That is the caller's promise
where q and k are views: marking the write as an in-place change would make autograd refuse the split's third view, v.
A checkpoint that is given such views as arguments would find them rotated when it recomputes, and rotate them again:
q and k are to be computed inside of it. On tensors that are not views the write is marked, and autograd reports whoever
saved them. The Function returns its inputs, which autograd turns into views of them with the Function's gradient.
The results lie in new memory in compiled graphs; in the backward, whose incoming gradients may have other readers; and
where saved-tensor hooks are on (checkpoint with use_reentrant=False, offloading), which would hide from autograd who
saved q and k. A reader under hooks of its own, off again by now, stays hidden: the hooks must span both ops.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch

from k2_megatron.kernels import peers
from k2_megatron.kernels.checks import (
    FLOATS,
    REFERENCE_FLOATS,
    is_leafs_memory,
    may_overwrite,
    require,
    require_backend,
    require_backend_device,
    require_columns,
    require_contiguous,
    require_dtype,
    require_one_device,
    require_own_elements,
    require_plain_memory,
    require_shape,
    require_tensors,
)
from k2_megatron.kernels.library import DTYPE_CODES, pointer, register, run

OP = "rotary"


def rotary_tables(
    sequence_length: int, rotary_dim: int, base: float, device: torch.device | str | int
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [sequence_length, rotary_dim / 2] fp32. Angles are formed in fp64: at position 8192 fp32 is off
    by 5e-4."""
    require(rotary_dim > 0 and rotary_dim % 2 == 0, OP, "rotary_dim is {}; it must be even and positive", rotary_dim)
    require(sequence_length >= 0, OP, "sequence_length is {}; it cannot be negative", sequence_length)
    frequencies = base ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64, device=device) / rotary_dim)
    angles = torch.outer(torch.arange(sequence_length, dtype=torch.float64, device=device), frequencies)
    return angles.cos().float(), angles.sin().float()


def rotary(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    interleaved: bool = False,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q, k) rotated, of their shapes and dtype; see above for when this is in place. Token s has position s, or
    positions [S, B] int32; a position outside the table is a ValueError on a CPU and gives NaN on a GPU."""
    require_backend(OP, backend, "transformer_engine")
    require_tensors(OP, q=q, k=k, cos=cos, sin=sin, **({} if positions is None else {"positions": positions}))
    if backend == "torch":
        _check_values(q, k, cos, sin, positions, REFERENCE_FLOATS)
        _check_positions(positions, cos.shape[0])
        return rotary_reference(q, k, cos, sin, positions, interleaved)
    _check(q, k, cos, sin, positions)
    if backend == "transformer_engine":
        return peers.rotary(q, k, cos, sin, positions, interleaved)
    require_backend_device(OP, backend, q)
    if not may_overwrite():
        return ROTATED(q, k, cos, sin, positions, interleaved, False)
    check_computed(q=q, k=k)
    return _Rotary.apply(q, k, cos, sin, positions, interleaved)


def rotary_reference(q, k, cos, sin, positions=None, interleaved=False):
    """The equation in torch, out of place: fp32 arithmetic (fp64 for fp64 input), one rounding."""
    if positions is None:
        cos, sin = cos[: q.shape[0], None, None], sin[: q.shape[0], None, None]
    else:
        cos, sin = cos[positions.long()].unsqueeze(2), sin[positions.long()].unsqueeze(2)
    return _rotate_reference(q, cos, sin, interleaved), _rotate_reference(k, cos, sin, interleaved)


def _rotate_reference(x, cos, sin, interleaved):
    rotary_dim = 2 * cos.shape[-1]
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    rotated = rotated.to(torch.promote_types(x.dtype, torch.float32))
    if interleaved:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
        pair = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
    else:
        first, second = rotated.chunk(2, dim=-1)
        pair = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([pair.to(x.dtype), rest], dim=-1) if rest.shape[-1] else pair.to(x.dtype)


def _check_values(q, k, cos, sin, positions, floats):
    """What every backend needs, the torch reference too."""
    for name, x in (("q", q), ("k", k)):
        require(x.dim() == 4, OP, "{} has shape {}; it needs [S, B, N, D]", name, tuple(x.shape))
        require_dtype(OP, name, x, floats if name == "q" else (q.dtype,))
    sequence, batch, _, dim = q.shape
    require_shape(OP, "k", k, (sequence, batch, k.shape[2], dim), "[S, B, Nk, D] with q's S, B and D")
    tables = (torch.float32, torch.float64) if torch.float64 in floats else (torch.float32,)
    require_dtype(OP, "cos", cos, tables)
    require_dtype(OP, "sin", sin, tables)
    require(cos.dim() == 2, OP, "cos has shape {}; it needs [rows, R/2]", tuple(cos.shape))
    require_shape(OP, "sin", sin, cos.shape, "cos' shape")
    rows, half = cos.shape
    fits = 0 < 2 * half <= dim
    require(fits, OP, "cos has {} columns: R = {} of D = {} elements rotated; 0 < R <= D", half, 2 * half, dim)
    tensors = {"q": q, "k": k, "cos": cos, "sin": sin}
    if positions is None:
        require(rows >= sequence, OP, "cos has {} rows for a sequence of {}; build longer tables", rows, sequence)
    else:
        require_dtype(OP, "positions", positions, (torch.int32,))
        require_shape(OP, "positions", positions, (sequence, batch), "[S, B]")
        tensors["positions"] = positions
    require_one_device(OP, **tensors)


def _check(q, k, cos, sin, positions):
    """What a kernel needs that is given pointers."""
    _check_values(q, k, cos, sin, positions, FLOATS)
    for name, x in (("q", q), ("k", k)):
        require_columns(OP, name, x.shape[2] * x.shape[3])
        require_dense_heads(name, x)
    for name, table in (("cos", cos), ("sin", sin), ("positions", positions)):
        if table is not None:
            require_contiguous(OP, name, table)


def require_dense_heads(name, x):
    dense = x.shape[3] <= 1 or x.stride(3) == 1 or x.numel() == 0
    require(dense, OP, "{} has strides {}; the last must be 1", name, tuple(x.stride()))


def _check_positions(positions, rows):
    """On a CPU only: on a GPU reading them would wait for the device."""
    if positions is None or positions.device.type != "cpu" or positions.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(value) for value in positions.aminmax())
    within = low >= 0 and high < rows
    require(within, OP, "positions run from {} to {}; the tables hold 0 to {}", low, high, rows - 1)


def check_computed(**tensors):
    for name, tensor in tensors.items():
        require_plain_memory(OP, name, tensor)
        if torch.is_grad_enabled() and is_leafs_memory(tensor):
            raise ValueError(
                f"{OP}: {name} is a leaf that requires a gradient, or a view of one, and would be rotated in place; "
                "pass a computed tensor, or use backend 'torch'"
            )


@lru_cache(maxsize=256)
def _may_interleave(shape: tuple[int, ...], q_strides, k_heads: int, k_strides, offset: int) -> bool:
    """Whether q [S, B, N, D] and k, whose first elements lie `offset` apart, are slices of one buffer side by side."""
    dim, tokens = shape[3], [axis for axis in (0, 1) if shape[axis] > 1]
    starts = [head * q_strides[2] for head in range(shape[2])] + [
        offset + head * k_strides[2] for head in range(k_heads)
    ]
    starts.sort()
    span = starts[-1] - starts[0] + dim
    apart = all(second - first >= dim for first, second in pairwise(starts))
    return apart and all(q_strides[axis] == k_strides[axis] >= span for axis in tokens)


def _reach(x):
    """Elements from the first to one past the last."""
    return sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1


def _may_share(one, other):
    """Whether the spans of two tensors of one dtype meet."""
    if one.numel() == 0 or other.numel() == 0:
        return False
    offset = (other.data_ptr() - one.data_ptr()) // one.element_size()
    return offset < _reach(one) and offset + _reach(other) > 0


def _check_memory(q, k):
    """q and k may interleave in one buffer, but no element of one may be an element of the other."""
    require_own_elements(OP, "q", q)
    require_own_elements(OP, "k", k)
    if _may_share(q, k):
        offset = (k.data_ptr() - q.data_ptr()) // q.element_size()
        if not _may_interleave(tuple(q.shape), q.stride(), k.shape[2], k.stride(), offset):
            raise ValueError(
                f"{OP}: q (strides {q.stride()}) and k (strides {k.stride()}) share memory; they may be slices of one "
                "projection's output side by side, but must not overlap"
            )


def _check_targets(q, k, to_q, to_k):
    """Where q and k are rotated into other memory: of their shapes, and no part of them."""
    for name, target, source in (("to_q", to_q, q), ("to_k", to_k, k)):
        require_dtype(OP, name, target, (source.dtype,))
        require_shape(OP, name, target, source.shape, f"{name[3:]}'s shape")
        require_dense_heads(name, target)
    require_one_device(OP, q=q, to_q=to_q, to_k=to_k)


def _start(q, k, to_q, to_k, cos, sin, positions, interleaved, conjugate):
    run(OP, "rotary", q.device, pointer(q), *q.stride()[:3], pointer(to_q), *to_q.stride()[:3],
        pointer(k), *k.stride()[:3], pointer(to_k), *to_k.stride()[:3], pointer(cos), pointer(sin), pointer(positions),
        cos.shape[0], *q.shape[:3], k.shape[2], q.shape[3], 2 * cos.shape[1], interleaved, conjugate,
        DTYPE_CODES[q.dtype])  # fmt: skip


def _in_place_op(q, k, cos, sin, positions, interleaved, conjugate):
    _check(q, k, cos, sin, positions)
    _check_positions(positions, cos.shape[0])
    _check_memory(q, k)
    _start(q, k, q, k, cos, sin, positions, interleaved, conjugate)
    torch.autograd.graph.increment_version([x for x in (q, k) if not x._is_view()])


def _in_place_fake(q, k, cos, sin, positions, interleaved, conjugate):
    _check(q, k, cos, sin, positions)


def _into_op(q, k, to_q, to_k, cos, sin, positions, interleaved, conjugate):
    _into_fake(q, k, to_q, to_k, cos, sin, positions, interleaved, conjugate)
    _check_positions(positions, cos.shape[0])
    _check_memory(to_q, to_k)
    for name, target in (("to_q", to_q), ("to_k", to_k)):
        for other, source in (("q", q), ("k", k)):
            apart = not _may_share(source, target)
            require(apart, OP, "{} and {} share memory; they must not overlap", other, name)
    _start(q, k, to_q, to_k, cos, sin, positions, interleaved, conjugate)


def _into_fake(q, k, to_q, to_k, cos, sin, positions, interleaved, conjugate):
    _check(q, k, cos, sin, positions)
    _check_targets(q, k, to_q, to_k)


def _rotated_op(q, k, cos, sin, positions, interleaved, conjugate):
    to_q, to_k = _rotated_fake(q, k, cos, sin, positions, interleaved, conjugate)
    _check_positions(positions, cos.shape[0])
    _start(q, k, to_q, to_k, cos, sin, positions, interleaved, conjugate)
    return to_q, to_k


def _rotated_fake(q, k, cos, sin, positions, interleaved, conjugate):
    _check(q, k, cos, sin, positions)
    return q.new_empty(q.shape), k.new_empty(k.shape)


ARGUMENTS = "Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool conjugate"
IN_PLACE = register(f"rotary_(Tensor(a!) q, Tensor(b!) k, {ARGUMENTS}) -> ()", _in_place_op, _in_place_fake)
INTO = register(
    f"rotary_into(Tensor q, Tensor k, Tensor(a!) to_q, Tensor(b!) to_k, {ARGUMENTS}) -> ()", _into_op, _into_fake
)
ROTATED = register(f"rotary(Tensor q, Tensor k, {ARGUMENTS}) -> (Tensor, Tensor)", _rotated_op, _rotated_fake)


def with_dense_heads(gradient):
    """Autograd hands over any layout, an expanded or a transposed one too; copied where a head's elements lie apart."""
    return gradient if gradient.stride(3) == 1 else gradient.contiguous()


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved):
        IN_PLACE(q, k, cos, sin, positions, interleaved, False)
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.conjugate = interleaved, False
        return q, k

    @staticmethod
    def backward(ctx, grad_q, grad_k):
        return *_rotate_back(ctx, grad_q, grad_k), None, None, None, None


def _rotate_back(ctx, grad_q, grad_k):
    """The transpose of a rotation is the rotation by the opposite angle."""
    cos, sin, positions = ctx.saved_tensors
    grad_q, grad_k = (with_dense_heads(gradient) for gradient in (grad_q, grad_k))
    return ROTATED(grad_q, grad_k, cos, sin, positions, ctx.interleaved, not ctx.conjugate)


def _setup(ctx, inputs, output):
    _, _, cos, sin, positions, ctx.interleaved, ctx.conjugate = inputs
    ctx.save_for_backward(cos, sin, positions)


torch.library.register_autograd(
    ROTATED, lambda ctx, grad_q, grad_k: (*_rotate_back(ctx, grad_q, grad_k), *[None] * 5), setup_context=_setup
)
