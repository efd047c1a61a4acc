"""How the leaves of the gradient tree are dealt to ranks: each micro-batch once, subtrees whole."""

from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2_megatron.config.leaves import (
    data_sizes,
    leaves_of_a_rank,
    levels_of_a_rank,
    micro_batches_of_a_rank,
    radices,
)


def test_worked_examples():
    assert (radices(12), data_sizes(12), data_sizes(15)) == ((2, 2, 3), (12, 6, 3, 1), (15, 5, 1))
    assert [radices(leaves) for leaves in (1, 2, 9, 30, 2040)] == [(), (2,), (3, 3), (2, 3, 5), (2, 2, 2, 3, 5, 17)]
    assert [leaves_of_a_rank(8, 0, size) for size in (8, 4, 2, 1)] == [
        *([0], [0, 4], [0, 4, 2, 6]),
        [0, 4, 2, 6, 1, 5, 3, 7],
    ]
    assert leaves_of_a_rank(12, 1, 3) == [1, 7, 4, 10]
    assert micro_batches_of_a_rank(12, 1, 2, 4) == [1, 5, 9, 3, 7, 11]
    assert micro_batches_of_a_rank(12, 1, 2, None) == [1, 3, 5, 7, 9, 11]


@given(st.integers(2, 120), st.integers(1, 3), st.data())
def test_every_micro_batch_belongs_to_one_rank_and_leaf(leaves, a_leaf, data):
    size = data.draw(st.sampled_from(data_sizes(leaves)))
    count = leaves * a_leaf
    dealt = [micro_batches_of_a_rank(count, rank, size, leaves) for rank in range(size)]
    assert sorted(number for of_rank in dealt for number in of_rank) == list(range(count))
    for rank, of_rank in enumerate(dealt):
        order = leaves_of_a_rank(leaves, rank, size)
        assert [number % leaves for number in of_rank] == [leaf for leaf in order for _ in range(a_leaf)]
        assert {leaf % size for leaf in order} == {rank}
    assert prod(levels_of_a_rank(leaves, size)) == leaves // size


@given(st.integers(2, 120), st.data())
def test_a_rank_s_leaves_complete_one_subtree_after_another(leaves, data):
    """The first level adds up leaves that are equal modulo leaves / radix, the next those equal modulo less."""
    size = data.draw(st.sampled_from(data_sizes(leaves)))
    order, modulus, together = leaves_of_a_rank(leaves, 0, size), leaves, 1
    for radix in levels_of_a_rank(leaves, size):
        modulus, together = modulus // radix, together * radix
        for first in range(0, len(order), together):
            assert len({leaf % modulus for leaf in order[first : first + together]}) == 1


@pytest.mark.parametrize("leaves", [2, 4, 15])
def test_as_many_ranks_as_leaves_take_what_they_take_without(leaves):
    for rank in range(leaves):
        with_leaves = micro_batches_of_a_rank(4 * leaves, rank, leaves, leaves)
        assert with_leaves == micro_batches_of_a_rank(4 * leaves, rank, leaves, None)
