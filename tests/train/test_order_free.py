"""Sums that do not depend on order, cut or rank: the same bits for all, right within what is cut off."""

import math
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as distributed
from rank_processes import results_of, run_ranks

from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import connect, disconnect
from k2_megatron.runtime.launch import read_environment
from k2_megatron.train.optimizer import gradient_squares
from k2_megatron.train.order_free import PIECE, ROW, largest_square, order_free_sums, squares_of

RANKS, DEALS = 3, 12
SIZES = (1, 2, 37, ROW, ROW + 1, 5000)


def values(size: int) -> numpy.ndarray:
    """fp32, over fourteen orders of magnitude, some of them zero."""
    generator = numpy.random.default_rng(size)
    found = generator.standard_normal(size) * 10.0 ** generator.uniform(-10, 4, size)
    return numpy.where(generator.random(size) < 0.1, 0, found).astype(numpy.float32)


def dealt(size: int, deal: int) -> list[list[torch.Tensor]]:
    """The values shuffled, and cut anywhere into tensors for each rank; a rank may get nothing."""
    generator = numpy.random.default_rng((size, deal))
    shuffled = generator.permutation(values(size)) if deal else values(size)
    cuts = sorted(generator.integers(0, size + 1, 2 * RANKS - 1).tolist()) if deal else [size] * (2 * RANKS - 1)
    pieces = [torch.from_numpy(piece.copy()) for piece in numpy.split(shuffled, cuts)]
    return [[piece for piece in pieces[rank::RANKS] if len(piece)] for rank in range(RANKS)]


def sums_of(by_place: list[list[torch.Tensor]]) -> list[float]:
    largest = torch.zeros(len(by_place), dtype=torch.float64)
    for place, tensors in enumerate(by_place):
        if tensors:
            largest[place] = largest_square(tensors)
    return order_free_sums(
        largest,
        ((place, piece) for place, tensors in enumerate(by_place) for one in tensors for piece in squares_of(one)),
    )


class Gradients:
    """What `gradient_squares` asks an optimizer for, whose gradients are given. Of the two places the first counts."""

    backend = "torch"

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.chained_optimizers, self.optimizer = [self], self
        self.mains = [torch.nn.Parameter(torch.zeros_like(one)) for one in (*tensors, torch.ones(1))]
        for place, (main, gradient) in enumerate(zip(self.mains, (*tensors, torch.ones(1)), strict=True)):
            main.grad, main.place = gradient, int(place == len(tensors))

    def prepare_grads(self) -> None:
        pass

    def get_grad_stats_parallel_group(self) -> distributed.ProcessGroup:
        return distributed.group.WORLD

    def get_main_grads_for_grad_norm(self) -> list[torch.Tensor]:
        return [main.grad for main in self.mains[:-1]]

    def get_parameters(self) -> list[torch.nn.Parameter]:
        return self.mains


BAD = [math.nan, math.inf, -math.inf]


def add_up() -> dict[str, list]:
    environment = read_environment()
    device, found = find_device(environment.local_rank), {"dealt": [], "bad": [], "large": [], "norms": []}
    with cpu_stands_in_for_cuda(device.type):
        connect(environment, device, 120.0)
        for deal in range(DEALS):
            found["dealt"].append(sums_of([dealt(size, deal)[environment.rank] for size in SIZES]))
            mine = Gradients(dealt(5000, deal)[environment.rank])
            how = [gradient_squares(mine, 0, device.torch, order_free).tolist() for order_free in (True, False)]
            found["norms"].append(how)
        for number, bad in enumerate(BAD):  # on one rank alone, beside a place that is sound
            tensor = torch.ones(50)
            if environment.rank == number % RANKS:
                tensor[17 * number] = bad
            found["bad"].append(sums_of([[tensor], [torch.ones(50)]]))
        for size in (torch.finfo(torch.float32).max, 1e-45):
            found["large"].append(sums_of([[torch.full((7,), size)]]))
        disconnect()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    results = results_of(run_ranks(add_up, RANKS, (), folder))
    assert all(result == results[0] for result in results), "every rank has the same"
    return results[0]


def test_no_order_and_no_cut_changes_a_bit(found):
    for place, size in enumerate(SIZES):
        exact = [float(one) ** 2 for one in values(size)]
        (total,) = {sums[place] for sums in found["dealt"]}
        expected = math.fsum(exact)
        assert 0 <= expected - total <= size * max(exact) * 2.0**-51, size


def test_no_cut_of_the_gradients_changes_their_squares(found):
    """And what tensor ranks hold alike, the second place here, does not count."""
    squares = [order_free for order_free, _ in found["norms"]]
    assert squares == [[found["dealt"][0][SIZES.index(5000)], 0.0]] * DEALS
    assert len({plain[0] for _, plain in found["norms"]}) > 1, "the same cuts change sums in fp64"


def test_what_is_not_finite_is_inf_in_its_place_alone(found):
    assert found["bad"] == [[math.inf, 50.0 * RANKS]] * len(BAD)


def test_ends_of_the_range(found):
    for size, sums in zip((torch.finfo(torch.float32).max, 1e-45), found["large"], strict=True):
        square = float(torch.tensor(size)) ** 2
        assert sums == [7 * RANKS * square]


def test_pieces_are_of_rows():
    assert PIECE % ROW == 0
    assert ROW * ((1 << 52) - 1) < 1 << 63, "int64 holds the sum of a row"
    assert [len(piece) for piece in squares_of(torch.zeros(2, PIECE // 2 + 3))] == [PIECE, 6]
