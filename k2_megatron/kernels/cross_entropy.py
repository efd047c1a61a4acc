"""Cross-entropy over logits whose vocabulary is sharded across a tensor-parallel group.

    lse = log sum_v exp(z_v),   p = exp(z - lse),   e = label_smoothing,   sums over the V columns of all ranks
    loss = lse - (1 - e) * z_label - e / V * sum_v z_v + z_loss * lse^2
    grad_z = grad_loss * (p * (1 + 2 * z_loss * lse) - e / V - (1 - e) * [v == label])

Sources: vocabulary parallelism, Shoeybi et al. 2019 (arXiv 1909.08053) section 3; label smoothing, Szegedy et al. 2016
(arXiv 1512.00567) section 7; z-loss, Chowdhery et al. 2022 (arXiv 2204.02311) section 5; one-pass statistics, Milakov &
Gimelshein 2018 (arXiv 1805.02867).

In:   logits [S, B, V/tp] fp32, bf16 or fp16, this rank's columns; labels [S, B] int64 global ids.   Out: loss [S, B]
fp32. One pass over the shard gives 3 numbers a token (4 with smoothing); ONE all-gather of them; every rank merges
them in rank order, so all ranks hold the same bits. In eager mode the backward of the compiled backends writes the
gradient into the logits' own storage: a bf16 logit costs 2 bytes forward and 4 backward, and no buffer besides; who
else reads the logits in the backward is told by autograd. It goes to new memory in compiled graphs, and where
saved-tensor hooks (checkpoint with use_reentrant=False, offloading) are on in the forward: they hide such a reader. One
under hooks of its own, around another op on the same logits, stays hidden: those hooks must span both ops. A world of
one communicates nothing.
"""

from __future__ import annotations

from itertools import pairwise
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from k2_megatron.kernels import peers
from k2_megatron.kernels.checks import (
    FLOATS,
    REFERENCE_FLOATS,
    is_leafs_memory,
    may_overwrite,
    require,
    require_backend,
    require_backend_device,
    require_contiguous,
    require_dtype,
    require_integer,
    require_number,
    require_one_device,
    require_plain_memory,
    require_shape,
    require_tensors,
)
from k2_megatron.kernels.cross_entropy_steps import (
    OP,
    TO_DIFFERENTIATE_TWICE,
    CompiledSteps,
    ReferenceSteps,
    Settings,
    check_labels,
    check_rows,
    require_equal_widths,
)
from k2_megatron.kernels.library import refuse_second_derivative

# By group: the numbers of columns that the other ranks have confirmed.
WIDTHS_LOOKED_AT: WeakKeyDictionary[dist.ProcessGroup, set[int]] = WeakKeyDictionary()
STEPS = {"torch": ReferenceSteps, "cpu": CompiledSteps, "cuda": CompiledSteps}


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    backend: str,
) -> torch.Tensor:
    """loss [S, B] fp32 (any leading shape serves). With backend "cpu" or "cuda" a backward that overwrites the logits
    (see above) spends them, and a second one is refused. A label that is neither ignore_index nor in [0, V): ValueError
    on a CPU; on a GPU, where looking would wait for the device, a NaN loss and gradient (so does "torch" in compiled
    graphs). Every rank's shard has the same number of columns (pad the last): the widths travel with the statistics,
    and unequal ones are a ValueError on every rank, on a GPU in the first loss of each group and width and NaN after
    it and in compiled graphs."""
    require_backend(OP, backend, "transformer_engine")
    require_tensors(OP, logits=logits, labels=labels)
    require(logits.dim() >= 2, OP, "logits have shape {}; needed: [S, B, V/tp]", tuple(logits.shape))
    require_dtype(OP, "logits", logits, REFERENCE_FLOATS if backend == "torch" else FLOATS)
    require_shape(OP, "labels", labels, logits.shape[:-1], "logits' shape without the vocabulary")
    require_dtype(OP, "labels", labels, (torch.int64,))
    require_contiguous(OP, "labels", labels)
    require_one_device(OP, logits=logits, labels=labels)
    settings = settings_for(logits.shape[-1], group, label_smoothing, z_loss, ignore_index)
    if not torch.compiler.is_compiling():
        check_labels(labels, settings.vocabulary_size, ignore_index)
    if backend == "transformer_engine":
        return peers.cross_entropy(logits, labels, group, settings)
    require_backend_device(OP, backend, logits)
    has_backward = torch.is_grad_enabled() and logits.requires_grad
    overwrite = backend != "torch" and has_backward and may_overwrite()
    if backend != "torch":
        check_rows(_flat(logits), labels.view(-1))
    if overwrite:
        require_plain_memory(OP, "logits", logits)
        if is_leafs_memory(logits):
            raise ValueError(
                f"{OP}: logits are a leaf that requires a gradient, which would overwrite them, or a view of one; pass "
                "a projection's output, or use backend 'torch'"
            )
    return _VocabParallelCrossEntropy.apply(logits, labels, group, settings, STEPS[backend], overwrite)


def cross_entropy_reference(logits, labels, label_smoothing=0.0, z_loss=0.0, ignore_index=-100):
    """The equation on whole rows [..., V] by torch's autograd: what every other path is compared with."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    lse = wide.logsumexp(-1)
    ignored = labels == ignore_index
    target = wide.gather(-1, torch.where(ignored, 0, labels).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * target - label_smoothing * wide.mean(-1) + z_loss * lse.square()
    return loss.masked_fill(ignored, 0)


def settings_for(columns, group, label_smoothing, z_loss, ignore_index) -> Settings:
    require(columns > 0, OP, "logits have 0 columns; a shard needs at least one")
    for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss)):
        require_number(OP, name, value)
    require_integer(OP, "ignore_index", ignore_index)
    if group is not None and not torch.compiler.is_compiling():
        known = isinstance(group, dist.ProcessGroup)
        require(known, OP, "group is a {}; it must be a ProcessGroup of this rank, or None", type(group).__name__)
    require(0 <= label_smoothing < 1, OP, "label_smoothing is {}; it lies in [0, 1)", label_smoothing)
    require(z_loss >= 0, OP, "z_loss is {}; it cannot be negative", z_loss)
    ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
    return Settings(rank * columns, ranks * columns, float(label_smoothing), float(z_loss), ignore_index)


def gather_statistics(statistics, group, columns):
    """[planes * T + 1] of each rank -> [ranks, planes * T + 1] on every rank: the one collective."""
    if group is None or group.size() == 1:
        return statistics.unsqueeze(0)
    # Gloo wants the gathered tensor as a concatenation along the first axis, not as a stack.
    everyone = statistics.new_empty((group.size() * statistics.shape[0],))
    dist.all_gather_into_tensor(everyone, statistics, group=group)
    everyone = everyone.view(group.size(), -1)
    if not torch.compiler.is_compiling() and everyone.shape[1] > 1:
        _check_widths_once(everyone, group, columns)
    return everyone


def _check_widths_once(everyone, group, columns):
    """On a GPU, where looking at the widths waits for the device: a rank whose width changes looks again."""
    looked_at = WIDTHS_LOOKED_AT.setdefault(group, set())
    if everyone.is_cuda and columns not in looked_at and not torch.cuda.is_current_stream_capturing():
        require_equal_widths(everyone)
        looked_at.add(columns)


def spend(ctx):
    """Marks the logits as overwritten."""
    if getattr(ctx, "spent", False):
        raise RuntimeError(
            f"{OP}: the logits were overwritten by the gradient in an earlier backward of this loss; run one backward "
            "(no retain_graph), or use backend 'torch', which keeps them"
        )
    ctx.spent = True


def _flat(logits):
    """[T, V]: a view, where the rows of all leading dimensions lie at one stride."""
    leading = [(size, stride) for size, stride in zip(logits.shape[:-1], logits.stride(), strict=False) if size != 1]
    one_stride = all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading))
    require(one_stride or logits.numel() == 0, OP, "logits of shape {} have strides {}; rows must lie at one stride "
            "(call logits.contiguous() where they are made: no copy is made here)",
            tuple(logits.shape), tuple(logits.stride()))  # fmt: skip
    return logits.view(-1, logits.shape[-1])


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, group, settings, steps, overwrite):
        rows, flat_labels = _flat(logits) if steps is CompiledSteps else logits.flatten(0, -2), labels.view(-1)
        statistics = gather_statistics(steps.statistics(rows, flat_labels, settings), group, rows.shape[1])
        loss, lse = steps.loss(statistics, flat_labels, settings)
        ctx.save_for_backward(logits, flat_labels, lse)
        ctx.settings, ctx.steps, ctx.overwrite = settings, steps, overwrite
        return loss.view(labels.shape)

    @staticmethod
    def backward(ctx, grad_loss):
        refuse_second_derivative(OP, TO_DIFFERENTIATE_TWICE)
        overwrite = ctx.overwrite and not torch.compiler.is_compiling()
        if overwrite:
            spend(ctx)
        logits, labels, lse = ctx.saved_tensors
        logits = logits.detach()
        # reshape keeps the zero strides of an expanded gradient (that of a sum or a mean); else it copies T values.
        rows = _flat(logits) if ctx.steps is CompiledSteps else logits.flatten(0, -2)
        gradient = ctx.steps.gradient(rows, labels, lse, grad_loss.reshape(-1), ctx.settings, overwrite)
        return gradient.view(logits.shape), None, None, None, None, None
