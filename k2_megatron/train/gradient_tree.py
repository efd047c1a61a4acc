"""Gradients added up as a fixed tree (config/leaves.py), so that no data-parallel size gives them other bits.

In:  the gradients that megatron-core's DistributedDataParallel accumulates micro-batch by micro-batch.
Out: their sum over the global batch: in a rank's shard with the distributed optimizer, everywhere without.

A rank adds up its own leaves while the schedule runs: when the last gradient of a leaf is there, the buffer joins the
sums that wait for it, or is kept to wait itself, as a counter carries. One buffer is kept for each level. Then the
ranks go on: where a reduce-scatter would add up in an order of the library's choice, each rank gets all parts of its
share, which are as many bytes, and adds them up in the tree's. Context-parallel ranks come last, in their own order:
what each has by then is the tree over its part of the sequences.

Nothing is scaled: the loss of a micro-batch is divided by the number of all of them (step.py).
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as distributed
from megatron.core.distributed import DistributedDataParallel

from k2_megatron.config.leaves import levels_of_a_rank, radices

PIECE_BYTES = 64 << 20  # sent at once; as much is received


class TreeSummedGradients(DistributedDataParallel):
    """megatron-core's DistributedDataParallel, whose gradients are added up as a tree of `leaves`."""

    def __init__(self, *arguments, leaves: int, context_size: int, **keywords) -> None:
        super().__init__(*arguments, **keywords)
        assert not self.ddp_config.overlap_grad_reduce, "gradients are added up over the ranks when all are there"
        self._levels = levels_of_a_rank(leaves, self.dp_cp_group.size() // context_size)
        self._levels_over_ranks = radices(leaves)[len(self._levels) :]
        self._micro_batches_a_leaf = self._added = 0
        self._waiting = [[torch.empty_like(buffer.grad_data) for _ in self._levels] for buffer in self.buffers]
        if self._levels:
            # After megatron-core's own hook on the same node, which adds the gradient to the buffer
            for accumulated in self.grad_accs:
                accumulated.register_hook(self._count)

    @property
    def waiting_bytes(self) -> int:
        """What is kept beside the gradient buffers."""
        return sum(one.numel() * one.element_size() for buffer in self._waiting for one in buffer)

    def begin(self, micro_batches_a_leaf: int) -> None:
        """A step begins, whose leaves have so many micro-batches each; the gradient buffers are zero."""
        self._micro_batches_a_leaf, self._added = micro_batches_a_leaf, 0

    def _count(self, *_gradients) -> None:
        self._added += 1
        leaf, more = divmod(self._added, len(self.grad_accs) * self._micro_batches_a_leaf)
        if not more:
            for buffer, waiting in zip(self.buffers, self._waiting, strict=True):
                carry(leaf - 1, self._levels, buffer.grad_data, waiting)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Add up over the data- and context-parallel ranks; called when the schedule has run."""
        assert not force_all_reduce, "a sharded optimizer's gradients are added up in its shards alone"
        if self._levels:
            expected = len(self.grad_accs) * self._micro_batches_a_leaf * math.prod(self._levels)
            assert self._added == expected, f"{self._added} gradients came, of {expected}: a leaf is not complete"
        if self.dp_cp_group.size() == 1:
            return
        add_up = sum_in_shares if self.ddp_config.use_distributed_optimizer else sum_everywhere
        for bucket in (bucket for buffer in self.buffers for bucket in buffer.buckets):
            add_up(bucket.grad_data, self.dp_cp_group, self._levels_over_ranks)


def carry(leaf: int, levels: Sequence[int], total: torch.Tensor, waiting: Sequence[torch.Tensor]) -> None:
    """Let a rank's leaf number `leaf`, just added up in `total`, join what waits for it, level by level; then `total`
    is zero, for the next leaf, or after the last one the sum of all."""
    for radix, earlier in zip(levels, waiting, strict=True):
        leaf, digit = divmod(leaf, radix)
        if digit:
            total.add_(earlier)
        if digit < radix - 1:
            earlier.copy_(total)
            total.zero_()
            return


def sum_in_shares(
    gradient: torch.Tensor, group: distributed.ProcessGroup, levels: Sequence[int], piece_bytes: int = PIECE_BYTES
) -> None:
    """Add up a flat gradient over the ranks of `group`, data-parallel ones of which context-parallel ones are adjacent,
    into this rank's equal part of it; the other parts stay what they were."""
    ranks = group.size()
    assert gradient.numel() % ranks == 0, f"a bucket of {gradient.numel()} elements is not padded for {ranks} ranks"
    shares = gradient.view(ranks, -1)
    sent, received = _room(shares.shape[1], ranks, gradient, piece_bytes)
    for part in shares.split(sent.shape[1], dim=1):
        sent[:, : part.shape[1]] = part
        distributed.all_to_all_single(received, sent, group=group)
        part[group.rank()] = fold(received, levels)[: part.shape[1]]


def sum_everywhere(
    gradient: torch.Tensor, group: distributed.ProcessGroup, levels: Sequence[int], piece_bytes: int = PIECE_BYTES
) -> None:
    """The same, for every rank to have the whole sum."""
    ranks = group.size()
    sent, received = _room(-(-gradient.numel() // ranks), ranks, gradient, piece_bytes)
    flat = sent.view(-1)
    for part in gradient.split(len(flat)):
        held = flat[: len(part)]
        held.copy_(part)
        distributed.all_to_all_single(received, sent, group=group)
        distributed.all_gather_into_tensor(flat, fold(received, levels), group=group)
        part.copy_(held)


def _room(share: int, ranks: int, gradient: torch.Tensor, piece_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[ranks, n] for what is sent, and for what is received, of n elements of each rank's share at once."""
    width = min(share, max(1, piece_bytes // (ranks * gradient.element_size())))
    return gradient.new_zeros(ranks, width), gradient.new_empty(ranks, width)


def fold(parts: torch.Tensor, levels: Sequence[int]) -> torch.Tensor:
    """[D * C, n] -> [n]: the sum over D data ranks by `levels`, whose product is D, then over C context ranks in order.
    Overwrites `parts`."""
    for radix in levels:
        sets = parts.view(radix, len(parts) // radix, -1)
        for later in sets[1:]:
            sets[0].add_(later)
        parts = sets[0]
    for later in parts[1:]:
        parts[0].add_(later)
    return parts[0]
