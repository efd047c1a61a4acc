"""Context parallelism: each rank of a group of C holds a share of every sequence, and attends over all of it.

A sequence is cut into 2C pieces and rank c holds pieces c and 2C - 1 - c, one from either end, so that all ranks have
equally many earlier positions to attend to. Keys and values are gathered over the group and their gradients reduced
and scattered (one collective a layer each way); all else in a layer is local to its positions. Dubey et al. 2024 (Llama
3, arXiv 2407.21783, section 3.3.2) train this way: with grouped-query attention the gathered heads are few.
"""

import torch
import torch.distributed as distributed
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch.nn.attention.bias import causal_lower_right


def _pieces_of(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def context_positions(sequence_length: int, rank: int, size: int) -> torch.Tensor:
    """The positions that context rank `rank` of `size` holds, ascending: [S / C] int64 (all of them when C is 1)."""
    assert sequence_length % (2 * size) == 0 or size == 1, f"{sequence_length} positions do not make {2 * size} pieces"
    if size == 1:
        return torch.arange(sequence_length)
    length = sequence_length // (2 * size)
    return torch.cat([torch.arange(piece * length, (piece + 1) * length) for piece in _pieces_of(rank, size)])


def gather_sequence(local: torch.Tensor, group: distributed.ProcessGroup) -> torch.Tensor:
    """This rank's positions [S / C, ...] -> the whole sequence [S, ...] in order.

    Backward: each rank gets the sum over the group of the gradients of its positions.
    """
    size = group.size()
    by_rank = gather_from_sequence_parallel_region(local, group=group)
    length = local.shape[0] // 2
    pieces = by_rank.split(length)
    held = [piece for rank in range(size) for piece in _pieces_of(rank, size)]
    return torch.cat([pieces[held.index(piece)] for piece in range(2 * size)])


def causal_attention_of_two_pieces(
    query_SBND: torch.Tensor,
    key_SBKD: torch.Tensor,
    value_SBKD: torch.Tensor,
    scale: float | None,
    group: distributed.ProcessGroup,
) -> torch.Tensor:
    """Attention of this rank's positions to all that come before them: [B, N, S / C, D].

    Each piece attends to the beginning of the sequence up to its own end, causal from the lower right corner.
    """
    queries_a_key = query_SBND.shape[2] // key_SBKD.shape[2]
    whole = gather_sequence(torch.cat((key_SBKD, value_SBKD), dim=2), group)
    key_BKSD, value_BKSD = whole.permute(1, 2, 0, 3).chunk(2, dim=1)
    query_BNSD = query_SBND.permute(1, 2, 0, 3)
    length = query_BNSD.shape[2] // 2
    attended = []
    for half, piece in enumerate(_pieces_of(group.rank(), group.size())):
        end = (piece + 1) * length
        attended.append(
            torch.nn.functional.scaled_dot_product_attention(
                query_BNSD[:, :, half * length : (half + 1) * length],
                key_BKSD[:, :, :end],
                value_BKSD[:, :, :end],
                attn_mask=causal_lower_right(length, end),
                scale=scale,
                enable_gqa=queries_a_key > 1,
            )
        )
    return torch.cat(attended, dim=2)
