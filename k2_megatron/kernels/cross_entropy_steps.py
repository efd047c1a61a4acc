"""The three steps of vocab-parallel cross-entropy (equations in cross_entropy.py), as torch references and as compiled
ops.

    statistics: logits [T, V] of a shard, labels [T]  -> [planes * T + 1]: max, sum of exp(z - max), the label's logit
                if it is this shard's (else 0), with label smoothing the sum of the logits; last the number V
    loss:       statistics of all shards [ranks, planes * T + 1] -> loss [T], lse [T], merged in rank order
    gradient:   logits, lse, grad_loss [T] -> gradient [T, V]; the compiled one overwrites the logits where it may

Rows may start at any multiple of the element size: K2's shard is 4004 columns wide. A label outside the vocabulary
that is not ignore_index reads nothing and gives NaN, in the loss and in the gradient. Shards of unequal widths give a
NaN loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from k2_megatron.kernels.checks import (
    FLOATS,
    require,
    require_columns,
    require_contiguous,
    require_dtype,
    require_one_device,
    require_shape,
)
from k2_megatron.kernels.library import DTYPE_CODES, pointer, register, run

OP = "cross_entropy"
# The references of this op and of linear_cross_entropy have a backward of their own too: it saves the logits alone.
TO_DIFFERENTIATE_TWICE = "no backend can; take torch.nn.functional.cross_entropy of the whole rows of logits"


@dataclass(frozen=True)
class Settings:
    vocabulary_start: int  # this shard's first column
    vocabulary_size: int  # columns of all shards
    label_smoothing: float
    z_loss: float
    ignore_index: int

    @property
    def planes(self) -> int:
        return planes_for(self.label_smoothing)


def planes_for(label_smoothing: float) -> int:
    return 4 if label_smoothing else 3


class ReferenceSteps:
    """The equations in torch; fp32 arithmetic (fp64 for fp64 logits). The gradient is a new tensor, always."""

    @staticmethod
    def statistics(logits, labels, settings):
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        maximum = wide.amax(-1) if wide.shape[1] else wide.new_full((len(wide),), -torch.inf)
        shift = torch.where(maximum == -torch.inf, 0, maximum)
        total = (wide - shift[:, None]).exp().sum(-1)
        local = labels - settings.vocabulary_start
        owned = (local >= 0) & (local < wide.shape[1])
        target = wide.gather(1, torch.where(owned, local, 0)[:, None])[:, 0]
        planes = [maximum, total, torch.where(owned, target, 0)]
        width = wide.new_full((1,), wide.shape[1])
        return torch.cat([*planes, wide.sum(-1), width] if settings.planes == 4 else [*planes, width])

    @staticmethod
    def loss(all_statistics, labels, settings):
        if not torch.compiler.is_compiling():
            check_widths(all_statistics)
        planes, widths = all_statistics[:, :-1].unflatten(1, (settings.planes, len(labels))), all_statistics[:, -1]
        maximum = planes[:, 0].amax(0)
        shift = torch.where(maximum == -torch.inf, 0, maximum)
        lse = shift + (planes[:, 1] * (planes[:, 0] - shift).exp()).sum(0).log()
        smoothing = settings.label_smoothing
        loss = lse - (1 - smoothing) * planes[:, 2].sum(0) + settings.z_loss * lse.square()
        if smoothing:
            loss = loss - smoothing / settings.vocabulary_size * planes[:, 3].sum(0)
        known = (labels >= 0) & (labels < settings.vocabulary_size) & (widths == widths[0]).all()
        return torch.where(labels == settings.ignore_index, 0, torch.where(known, loss, torch.nan)), lse

    @staticmethod
    def gradient(logits, labels, lse, grad_loss, settings, overwrite):
        smoothing = settings.label_smoothing
        gradient = (logits.to(lse.dtype) - lse[:, None]).exp() * (1 + 2 * settings.z_loss * lse[:, None])
        columns = torch.arange(logits.shape[1], device=logits.device) + settings.vocabulary_start
        gradient = gradient - smoothing / settings.vocabulary_size
        gradient = gradient - (1 - smoothing) * (columns == labels[:, None])
        known = (labels >= 0) & (labels < settings.vocabulary_size)
        scale = torch.where(known, grad_loss, torch.nan)
        zero = (labels == settings.ignore_index) | (grad_loss == 0)
        return torch.where(zero[:, None], 0, gradient * scale[:, None]).to(logits.dtype)


class CompiledSteps:
    """The same by csrc/; the gradient is the logits' storage with `overwrite`, else a new tensor. In compiled graphs
    always: there a view of a parameter cannot be told from a computed tensor, and inductor would copy what is
    overwritten first."""

    @staticmethod
    def statistics(logits, labels, settings):
        return STATISTICS(logits, labels, settings.vocabulary_start, settings.planes)

    @staticmethod
    def loss(all_statistics, labels, settings):
        return LOSS(
            all_statistics,
            labels,
            settings.vocabulary_size,
            settings.label_smoothing,
            settings.z_loss,
            settings.ignore_index,
        )

    @staticmethod
    def gradient(logits, labels, lse, grad_loss, settings, overwrite):
        arguments = (
            logits, labels, lse, grad_loss, settings.vocabulary_start, settings.vocabulary_size,
            settings.label_smoothing, settings.z_loss, settings.ignore_index,
        )  # fmt: skip
        if overwrite and not torch.compiler.is_compiling():
            GRADIENT(*arguments)
            return logits
        return NEW_GRADIENT(*arguments)


def check_labels(labels, vocabulary_size, ignore_index):
    """Reads the labels, so on a CPU only."""
    if labels.device.type != "cpu":
        return
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary_size))
    if wrong.any():
        place = tuple(int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"{OP}: labels[{', '.join(map(str, place))}] is {int(labels[place])}; allowed: 0 to {vocabulary_size - 1} "
            f"(ids are global), and ignore_index {ignore_index}"
        )


def check_widths(all_statistics):
    """Every rank finds the same and raises. Reads the widths, so on a CPU only; the kernels themselves give NaN."""
    if all_statistics.device.type == "cpu" and all_statistics.shape[1] > 1:
        require_equal_widths(all_statistics)


def require_equal_widths(all_statistics):
    widths = all_statistics[:, -1].tolist()
    if len(set(widths)) > 1:
        found = ", ".join(f"rank {rank} has {width:.0f}" for rank, width in enumerate(widths))
        raise ValueError(
            f"{OP}: the ranks' shards have unequal numbers of columns: {found}; a rank counts its columns from its "
            "number times its own width, so all need the same (pad the last shard)"
        )


def check_rows(logits, labels):
    """logits [T, V] with dense columns and any row stride of at least V; labels [T] int64."""
    require(logits.dim() == 2, OP, "logits have shape {}; needed here: [T, V]", tuple(logits.shape))
    require_dtype(OP, "logits", logits, FLOATS)
    rows, columns = logits.shape
    require(columns > 0, OP, "logits have 0 columns; a shard needs at least one")
    require_columns(OP, "logits", columns)
    dense = (columns == 1 or logits.stride(1) == 1) and (rows <= 1 or logits.stride(0) >= columns)
    require(dense, OP, "logits of shape {} have strides {}; columns must be dense", tuple(logits.shape),
            tuple(logits.stride()))  # fmt: skip
    require_dtype(OP, "labels", labels, (torch.int64,))
    require_shape(OP, "labels", labels, (rows,), "one label a row of logits")
    require_contiguous(OP, "labels", labels)
    require_one_device(OP, logits=logits, labels=labels)


def _statistics_fake(logits, labels, vocabulary_start, planes):
    check_rows(logits, labels)
    return logits.new_empty((planes * logits.shape[0] + 1,), dtype=torch.float32)


def _statistics_op(logits, labels, vocabulary_start, planes):
    statistics = _statistics_fake(logits, labels, vocabulary_start, planes)
    run(OP, "cross_entropy_statistics", logits.device, pointer(logits), logits.stride(0), pointer(labels),
        pointer(statistics), planes, *logits.shape, vocabulary_start, DTYPE_CODES[logits.dtype])  # fmt: skip
    return statistics


def _loss_fake(all_statistics, labels, vocabulary_size, label_smoothing, z_loss, ignore_index):
    require_dtype(OP, "all_statistics", all_statistics, (torch.float32,))
    require_dtype(OP, "labels", labels, (torch.int64,))
    require(labels.dim() == 1, OP, "labels have shape {}; needed: [T]", tuple(labels.shape))
    planes, two_dimensional = planes_for(label_smoothing), all_statistics.dim() == 2
    require(two_dimensional and all_statistics.shape[1] == planes * labels.shape[0] + 1, OP,
            "all_statistics has shape {}; needed: [ranks, {} * T + 1], T = {} labels", tuple(all_statistics.shape),
            planes, labels.shape[0])  # fmt: skip
    require_contiguous(OP, "all_statistics", all_statistics)
    require_contiguous(OP, "labels", labels)
    require_one_device(OP, all_statistics=all_statistics, labels=labels)
    return torch.empty_like(labels, dtype=torch.float32), torch.empty_like(labels, dtype=torch.float32)


def _loss_op(all_statistics, labels, vocabulary_size, label_smoothing, z_loss, ignore_index):
    loss, lse = _loss_fake(all_statistics, labels, vocabulary_size, label_smoothing, z_loss, ignore_index)
    check_widths(all_statistics)
    check_labels(labels, vocabulary_size, ignore_index)  # compiled graphs come here unchecked
    run(OP, "cross_entropy_loss", labels.device, pointer(all_statistics), len(all_statistics),
        planes_for(label_smoothing), pointer(labels), pointer(loss), pointer(lse), len(labels), vocabulary_size,
        label_smoothing, z_loss, ignore_index)  # fmt: skip
    return loss, lse


def _gradient_fake(
    logits, labels, lse, grad_loss, vocabulary_start, vocabulary_size, label_smoothing, z_loss, ignore_index
):
    check_rows(logits, labels)
    for name, values in (("lse", lse), ("grad_loss", grad_loss)):
        require_dtype(OP, name, values, (torch.float32,))
        require_shape(OP, name, values, labels.shape, "[T] like labels")
    require_contiguous(OP, "lse", lse)
    require_one_device(OP, logits=logits, lse=lse, grad_loss=grad_loss)


def _write_gradient(gradient, logits, labels, lse, grad_loss, *settings):
    _gradient_fake(logits, labels, lse, grad_loss, *settings)
    run(OP, "cross_entropy_gradient", logits.device, pointer(logits), logits.stride(0), pointer(labels), pointer(lse),
        pointer(grad_loss), grad_loss.stride(0), pointer(gradient), gradient.stride(0), *logits.shape, *settings,
        DTYPE_CODES[logits.dtype])  # fmt: skip


def _gradient_op(logits, labels, lse, grad_loss, *settings):
    _write_gradient(logits, logits, labels, lse, grad_loss, *settings)
    torch.autograd.graph.increment_version(logits)


def _new_gradient_op(logits, labels, lse, grad_loss, *settings):
    gradient = logits.new_empty(logits.shape)
    _write_gradient(gradient, logits, labels, lse, grad_loss, *settings)
    return gradient


def _new_gradient_fake(logits, labels, lse, grad_loss, *settings):
    _gradient_fake(logits, labels, lse, grad_loss, *settings)
    return logits.new_empty(logits.shape)


STATISTICS = register(
    "cross_entropy_statistics(Tensor logits, Tensor labels, int vocabulary_start, int planes) -> Tensor",
    _statistics_op,
    _statistics_fake,
)
LOSS = register(
    "cross_entropy_loss(Tensor all_statistics, Tensor labels, int vocabulary_size, float label_smoothing, "
    "float z_loss, int ignore_index) -> (Tensor, Tensor)",
    _loss_op,
    _loss_fake,
)
ARGUMENTS = (
    "Tensor labels, Tensor lse, Tensor grad_loss, int vocabulary_start, int vocabulary_size, float label_smoothing, "
    "float z_loss, int ignore_index"
)
GRADIENT = register(f"cross_entropy_gradient_(Tensor(a!) logits, {ARGUMENTS}) -> ()", _gradient_op, _gradient_fake)
NEW_GRADIENT = register(
    f"cross_entropy_gradient(Tensor logits, {ARGUMENTS}) -> Tensor", _new_gradient_op, _new_gradient_fake
)
