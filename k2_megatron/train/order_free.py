"""Sums that no order and no cut changes: for what is added up over shards whose bounds depend on the layout.

In:  numbers that are not negative, in fp64, piece by piece, and the largest of them on this rank.
Out: their sum over ranks, rounded to fp64 once, the same to the bit however they were cut, ordered and dealt to ranks.

Every number is taken as an integer: in units of 2^-52 of the power of two above the largest of all ranks, what is below
a unit cut off. Integers add up without rounding, so that their order does not matter: in int64 on the device, a row at
once, then as Python's integers (Demmel & Nguyen 2013, "Fast reproducible floating-point summation", add up on such a
grid in floating point). A sum is too small by less than a unit a number: of a billion squares whose largest is 10^6
times the mean, by some 1e-10 of itself.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as distributed

UNITS_BITS = 52  # of the largest number
ROW = 1 << 10  # numbers below 2^UNITS_BITS that int64 adds up
PIECE = 1 << 20  # numbers at once, of which there are copies of 8 bytes; fewer would keep a GPU waiting
_DIGIT_BITS, _DIGITS = 32, 3  # of a sum that is on its way to other ranks: 2^(96 - 52) numbers


def order_free_sums(
    largest: torch.Tensor,
    pieces: Iterable[tuple[int, torch.Tensor]],
    group: distributed.ProcessGroup | None = None,
) -> list[float]:
    """The sum of each place over the ranks of `group` of the numbers in `pieces`: (place, flat fp64 tensor).

    `largest` [places] fp64: no number of that place on this rank is above; it and the pieces are overwritten. The sum
    is inf where `largest` of a rank is not finite.
    """
    largest.nan_to_num_(nan=math.inf, posinf=math.inf)  # gloo's and NCCL's maximum pass a NaN over
    distributed.all_reduce(largest, op=distributed.ReduceOp.MAX, group=group)
    exponents = [math.frexp(one)[1] if math.isfinite(one) else None for one in largest.tolist()]
    mask = (1 << _DIGIT_BITS) - 1
    digits = [[one >> _DIGIT_BITS * digit & mask for digit in range(_DIGITS)] for one in _in_units(exponents, pieces)]
    added = torch.tensor(digits, dtype=torch.int64, device=largest.device)
    distributed.all_reduce(added, group=group)
    totals = [sum(value << _DIGIT_BITS * digit for digit, value in enumerate(row)) for row in added.tolist()]
    return [
        math.inf if exponent is None else math.ldexp(total, exponent - UNITS_BITS)
        for total, exponent in zip(totals, exponents, strict=True)
    ]


def largest_square(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[] fp64: the largest square of an element; NaN or inf when one is not finite."""
    ends = [torch.stack(torch.aminmax(one)) for one in tensors]  # a sixth of the time that vector_norm takes
    return torch.stack(ends).double().square().max()


def squares_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The squares of the elements of a contiguous fp32 tensor, exact in fp64, piece by piece."""
    for piece in tensor.view(-1).split(PIECE):
        yield piece.double().square_()


def _in_units(exponents: Sequence[int | None], pieces: Iterable[tuple[int, torch.Tensor]]) -> list[int]:
    """This rank's sum of each place in units of 2^(exponent - 52)."""
    halves, places = [], []
    for place, numbers in pieces:
        exponent = exponents[place]
        if exponent is None:
            continue
        units = numbers.mul_(math.ldexp(1.0, UNITS_BITS - exponent)).long()
        whole = len(units) // ROW * ROW
        rows = torch.cat([units[:whole].view(-1, ROW).sum(dim=1), units[whole:].sum().view(1)])
        halves.append(torch.stack([(rows >> _DIGIT_BITS).sum(), (rows & (1 << _DIGIT_BITS) - 1).sum()]))
        places.append(place)
    sums = [0] * len(exponents)
    if halves:
        for place, (high, low) in zip(places, torch.stack(halves).tolist(), strict=True):
            sums[place] += (high << _DIGIT_BITS) + low
    return sums
