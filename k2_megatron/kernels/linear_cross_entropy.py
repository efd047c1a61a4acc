"""Output projection and cross-entropy together, over chunks of tokens, so that the logits never exist all at once.

    logits = hidden @ weight^T,   loss and grad_logits as in cross_entropy.py
    grad_hidden = grad_logits @ weight (summed over the group),   grad_weight = grad_logits^T @ hidden

In:   hidden [T, H], the same on every rank of the group; weight [V/tp, H], this rank's rows; labels [T] int64 global
      ids.
Out:  loss [T] fp32.
Forward: each chunk's logits are reduced to 3 or 4 numbers a token and dropped, but for the last chunk's, which wait for
the backward; one all-gather after the last chunk.
Backward: the last chunk first, then each other's logits are computed again, turned into their gradient in place, and
used up: one chunk's logits at a time, here and in the forward. The losses are per token and so is their gradient, which
only the backward knows: the gradient cannot be finished in the forward. The weight's gradient accumulates in fp32 and
is rounded once. The waiting logits do not pass through save_for_backward, so saved-tensor hooks (offloading, packing)
do not see them: the backward overwrites them in place, which a saved tensor forbids. The price is one more GEMM of the
head for every chunk but one; worth it where T * V/tp logits are too many to hold, not for K2's own 4004 columns a rank.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from k2_megatron.kernels.checks import (
    FLOATS,
    REFERENCE_FLOATS,
    require,
    require_backend,
    require_backend_device,
    require_contiguous,
    require_dtype,
    require_integer,
    require_one_device,
    require_shape,
    require_tensors,
)
from k2_megatron.kernels.cross_entropy import STEPS, gather_statistics, settings_for
from k2_megatron.kernels.cross_entropy_steps import TO_DIFFERENTIATE_TWICE, check_labels
from k2_megatron.kernels.library import refuse_second_derivative

OP = "linear_cross_entropy"


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int = 1024,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    reduce_hidden_gradient: bool = True,
    backend: str,
) -> torch.Tensor:
    """loss [T] fp32. reduce_hidden_gradient=False leaves the sum of grad_hidden over the group to the caller (sequence
    parallelism reduce-scatters it instead). A compiled graph holds the loop over chunks unrolled: one graph for each
    number of tokens. Equal shards as in cross_entropy.py. In fp32 on a CPU the bits follow torch's GEMMs, whose sums
    may be taken in another order with another number of threads. ValueError for shapes, dtypes, devices, autocast and
    labels out of range (on a CPU)."""
    require_backend(OP, backend)
    require_tensors(OP, hidden=hidden, weight=weight, labels=labels)
    require(hidden.dim() == 2, OP, "hidden has shape {}; needed: [T, H]", tuple(hidden.shape))
    require(weight.dim() == 2, OP, "weight has shape {}; needed: [V/tp, H]", tuple(weight.shape))
    require_dtype(OP, "hidden", hidden, REFERENCE_FLOATS if backend == "torch" else FLOATS)
    require_dtype(OP, "weight", weight, (hidden.dtype,))
    require_shape(OP, "weight", weight, (weight.shape[0], hidden.shape[1]), "[V/tp, H] with hidden's H")
    require_dtype(OP, "labels", labels, (torch.int64,))
    require_shape(OP, "labels", labels, hidden.shape[:1], "[T] of hidden")
    require_one_device(OP, hidden=hidden, weight=weight, labels=labels)
    require_contiguous(OP, "labels", labels)
    _refuse_autocast(hidden)
    require_integer(OP, "chunk_tokens", chunk_tokens)
    require(chunk_tokens > 0, OP, "chunk_tokens is {}; it must be positive", chunk_tokens)
    require_backend_device(OP, backend, hidden)
    settings = settings_for(weight.shape[0], group, label_smoothing, z_loss, ignore_index)
    if not torch.compiler.is_compiling():
        check_labels(labels, settings.vocabulary_size, ignore_index)
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, group, chunk_tokens, settings, reduce_hidden_gradient, STEPS[backend]
    )


def _refuse_autocast(hidden):
    """It would cast the products' factors, but not what they are added to."""
    enabled = torch.is_autocast_enabled(hidden.device.type)
    require(not enabled, OP, "autocast is on for {}; the products are taken in hidden's dtype ({}): cast hidden and "
            "weight, and call this under torch.autocast(..., enabled=False)",
            hidden.device.type, hidden.dtype)  # fmt: skip


def _add_product_(total, a, b):
    """total fp32 (fp64) += a^T @ b; the GEMM's fp32 sums are not rounded to the factors' dtype in between."""
    if a.dtype == total.dtype:
        total.addmm_(a.t(), b)
    elif a.is_cuda and torch.__version__ >= "2.8":  # the first with mm(out_dtype=), on CUDA
        total.add_(torch.mm(a.t(), b, out_dtype=total.dtype))
    else:
        total.addmm_(a.to(total.dtype).t(), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, group, chunk_tokens, settings, reduce_hidden_gradient, steps):
        wide = torch.promote_types(hidden.dtype, torch.float32)
        statistics = hidden.new_empty((settings.planes * len(hidden) + 1,), dtype=wide)
        statistics[-1] = len(weight)
        planes, logits = statistics[:-1].view(settings.planes, len(hidden)), None
        for start in range(0, len(hidden), chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            del logits  # before the next are made
            logits = hidden[chunk] @ weight.t()
            planes[:, chunk] = steps.statistics(logits, labels[chunk], settings)[:-1].view(settings.planes, -1)
        loss, lse = steps.loss(gather_statistics(statistics, group, len(weight)), labels, settings)
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.group, ctx.chunk_tokens, ctx.settings = group, chunk_tokens, settings
        ctx.reduce_hidden_gradient, ctx.steps, ctx.last_logits = reduce_hidden_gradient, steps, logits
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_second_derivative(OP, TO_DIFFERENTIATE_TWICE)
        hidden, weight, labels, lse = ctx.saved_tensors
        _refuse_autocast(hidden)
        grad_hidden = torch.empty_like(hidden)
        is_one_chunk = 0 < len(hidden) <= ctx.chunk_tokens
        if not is_one_chunk:
            grad_weight = torch.zeros_like(weight, dtype=lse.dtype)
        logits, ctx.last_logits = ctx.last_logits, None  # None again where the graph is retained
        for start in reversed(range(0, len(hidden), ctx.chunk_tokens)):
            chunk = slice(start, start + ctx.chunk_tokens)
            if logits is None:
                logits = hidden[chunk] @ weight.t()
            # No one else has these logits: whatever hooks are on, they may be overwritten.
            grad_logits = ctx.steps.gradient(logits, labels[chunk], lse[chunk], grad_loss[chunk], ctx.settings, True)
            torch.mm(grad_logits, weight, out=grad_hidden[chunk])
            if is_one_chunk:  # the GEMM's fp32 sums are all: it rounds them itself, and a CPU has no mixed GEMM
                grad_weight = grad_logits.t() @ hidden
            else:
                _add_product_(grad_weight, grad_logits, hidden[chunk])
            logits = grad_logits = None  # before the next are made
        if ctx.reduce_hidden_gradient and ctx.group is not None and ctx.group.size() > 1:
            dist.all_reduce(grad_hidden, group=ctx.group)
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None, None, None
