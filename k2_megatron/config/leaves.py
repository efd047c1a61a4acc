"""The fixed tree by which the gradients of a step are added up: the same sums whatever the data-parallel size.

With train.gradient_leaves = L, micro-batch i of the global batch belongs to leaf i mod L, and the leaves are added up
level by level. The radices of the levels are the prime factors of L, the smallest first: a level of radix p turns n
sums into n / p, and sum j of these is that of the sums j, j + n / p, j + 2 n / p, ..., in this order.

A data rank r of D holds the leaves r, r + D, r + 2 D, ... These are a whole subtree when D is what some of the first
levels leave: L = 12 = 2 * 2 * 3 goes with 12, 6, 3 and 1 ranks. A rank then adds up its leaves by these first levels,
and the ranks go on with the rest.
"""

from math import prod


def radices(leaves: int) -> tuple[int, ...]:
    """The radix of each level: the prime factors of `leaves`, the smallest first."""
    found, divisor = [], 2
    while divisor * divisor <= leaves:
        if leaves % divisor:
            divisor += 1
        else:
            found.append(divisor)
            leaves //= divisor
    return (*found, leaves) if leaves > 1 else tuple(found)


def data_sizes(leaves: int) -> tuple[int, ...]:
    """The data-parallel sizes that `leaves` go with, the largest first."""
    levels = radices(leaves)
    return tuple(prod(levels[level:]) for level in range(len(levels) + 1))


def levels_of_a_rank(leaves: int, data_size: int) -> tuple[int, ...]:
    """The radices of the levels that a data rank adds up by itself; the others are added up over the ranks."""
    return radices(leaves)[: data_sizes(leaves).index(data_size)]


def leaves_of_a_rank(leaves: int, data_rank: int, data_size: int) -> list[int]:
    """A data rank's leaves in the order in which each subtree is complete before the next one begins."""
    steps, own = [], leaves // data_size
    for radix in levels_of_a_rank(leaves, data_size):
        own //= radix
        steps.append((radix, own * data_size))
    order = [data_rank]
    for radix, step in steps:
        order = [leaf + digit * step for digit in range(radix) for leaf in order]
    return order


def micro_batches_of_a_rank(micro_batches: int, data_rank: int, data_size: int, leaves: int | None) -> list[int]:
    """Which of a global batch's micro-batches a data rank computes, in its order: one leaf after another."""
    dealt = [data_rank] if leaves is None else leaves_of_a_rank(leaves, data_rank, data_size)
    return [number for leaf in dealt for number in range(leaf, micro_batches, leaves or data_size)]
