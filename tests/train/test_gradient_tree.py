"""Gradients added up as a tree: the same bits however many ranks share the leaves, and with no other order."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as distributed
from rank_processes import results_of, run_ranks

from k2_megatron.config.leaves import data_sizes, leaves_of_a_rank, levels_of_a_rank, radices
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.train.gradient_tree import carry, fold, sum_everywhere, sum_in_shares

SIZE = 64
LEAVES = [2, 3, 4, 6, 8, 12, 15, 30, 32]


def gradients(leaves: int, context_size: int = 1) -> torch.Tensor:
    """[leaves, C, SIZE] of many magnitudes, so that nearly every order gives other bits."""
    generator = torch.Generator().manual_seed(leaves)
    shape = (leaves, context_size, SIZE)
    return torch.randn(shape, generator=generator) * 10 ** torch.empty(shape).uniform_(-3, 3, generator=generator)


def by_definition(values: torch.Tensor) -> torch.Tensor:
    """The tree as config/leaves.py says it, leaf by leaf."""
    sums = list(values)
    for radix in radices(len(sums)):
        count = len(sums) // radix
        sums = [sum(sums[index + count :: count], start=sums[index]) for index in range(count)]
    return sum(sums[0][1:], start=sums[0][0])


def on_ranks(values: torch.Tensor, data_size: int, order=leaves_of_a_rank) -> torch.Tensor:
    """What `data_size` ranks (times context ranks) make of it: their own leaves by `carry`, then `fold`."""
    leaves, context_size = values.shape[:2]
    own = levels_of_a_rank(leaves, data_size)
    parts = torch.zeros(data_size, context_size, SIZE)
    for rank in range(data_size):
        for context in range(context_size):
            waiting = [torch.full((SIZE,), float("nan")) for _ in own]
            for number, leaf in enumerate(order(leaves, rank, data_size)):
                assert not parts[rank, context].any(), "the buffer is zero when a leaf begins"
                parts[rank, context] += values[leaf, context]
                carry(number, own, parts[rank, context], waiting)
    return fold(parts.view(-1, SIZE), radices(leaves)[len(own) :])


@pytest.mark.parametrize("context_size", [1, 3])
@pytest.mark.parametrize("leaves", LEAVES)
def test_every_data_size_gives_the_bits_of_the_tree(leaves, context_size):
    values = gradients(leaves, context_size)
    for data_size in data_sizes(leaves):
        assert torch.equal(on_ranks(values, data_size), by_definition(values)), data_size


@pytest.mark.parametrize("leaves", [leaves for leaves in LEAVES if leaves > 3])
def test_other_orders_give_other_bits(leaves):
    values = gradients(leaves)
    expected = by_definition(values)
    assert not torch.equal(sum(values[1:, 0], start=values[0, 0]), expected), "one after another"
    assert not torch.equal(values[:, 0].sum(dim=0), expected)

    def in_turn(*place):
        return sorted(leaves_of_a_rank(*place))

    assert not torch.equal(on_ranks(values, 1, in_turn), expected), "leaves that do not complete subtrees"


ROOM = 3 * 6 * 4  # bytes: three elements of each of six ranks' shares at once
RANKS, CONTEXT, LEVELS = 6, 2, (3,)


def add_up_over_ranks(sizes: list[int]) -> dict[tuple[str, int], torch.Tensor]:
    """{(how, size): this rank's gradient after it} on one of six ranks."""
    environment = read_environment()
    device, found = find_device(environment.local_rank), {}
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        world = distributed.group.WORLD
        for size in sizes:
            mine = rank_gradient(environment.rank, size)
            sum_everywhere(mine, world, LEVELS, ROOM)
            found["everywhere", size] = mine
            if size % RANKS == 0:
                mine = rank_gradient(environment.rank, size)
                sum_in_shares(mine, world, LEVELS, ROOM)
                found["in shares", size] = mine
        disconnect()
    return found


def rank_gradient(rank: int, size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (rank - 2)


def test_ranks_add_up_in_pieces(tmp_path):
    """Six ranks, of which each two are context-parallel; sizes that fill no piece, end in one, or fill some."""
    sizes = [1, 5, 6, 18, 24, 42, 100]
    found = results_of(run_ranks(add_up_over_ranks, RANKS, (sizes,), tmp_path))
    for size in sizes:
        every_rank = torch.stack([rank_gradient(rank, size) for rank in range(RANKS)])
        expected = fold(every_rank.clone(), LEVELS)
        assert not torch.equal(expected, every_rank.sum(dim=0)) or size < 5
        for rank in range(RANKS):
            assert torch.equal(found[rank]["everywhere", size], expected), (size, rank)
            if size % RANKS == 0:
                bounds = list(range(0, size + 1, size // RANKS))
                shares = list(pairwise(bounds))
                others = rank_gradient(rank, size)
                others[slice(*shares[rank])] = expected[slice(*shares[rank])]
                assert torch.equal(found[rank]["in shares", size], others), (size, rank)
