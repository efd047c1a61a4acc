"""csrc/adamw.cu and gradient_norm.cu on the CPU: lists longer than one table, chunks, alignments, missing copies."""

from __future__ import annotations

from array import array

import pytest
import torch
from guarded import DTYPES, Guarded
from kernel_cases import assert_as_good_as_reference

CHUNK = 8192  # elements of one block
SIZES = [0, 1, 7, 8, 9, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 5]
NUMBERS = {"learning_rate": 1e-2, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-3, "weight_decay": 0.1}


class TensorLists:
    """Lists of guarded tensors, and the host arrays that the kernels take."""

    def __init__(self, *lists, offset=0):
        self.lists = [
            [None if value is None else Guarded(value, offset * (i % 3)) for i, value in enumerate(values)]
            for values in lists
        ]
        self.arrays = [array("q", [held.address if held else 0 for held in values]) for values in self.lists]
        self.sizes = array("q", [value.numel() for value in lists[0]])

    def addresses(self):
        return [values.buffer_info()[0] for values in [*self.arrays, self.sizes]]

    def results(self):
        for number, values in enumerate(self.lists):
            for index, held in enumerate(values):
                if held:
                    held.check(f"list {number}, tensor {index}")
        return [[held and held.tensor for held in values] for values in self.lists]


def random(sizes, dtype=torch.float32, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(size, generator=generator)).to(dtype) for size in sizes]


def adamw_equation(p, g, m, v, step, learning_rate, beta1, beta2, epsilon, weight_decay):
    p = p * (1 - learning_rate * weight_decay)
    m, v = m + (g - m) * (1 - beta1), beta2 * v + (1 - beta2) * g * g
    corrected = v.sqrt() / (1 - beta2**step) ** 0.5 + epsilon
    return p - learning_rate / (1 - beta1**step) * m / corrected, m, v


@pytest.mark.parametrize("gradient_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_adamw_is_as_exact_as_torch(kernels, gradient_dtype, offset):
    gradients = random(SIZES, gradient_dtype, 1)
    p, m, v = random(SIZES, seed=2), random(SIZES, seed=3, scale=0.1), [x.abs() for x in random(SIZES, seed=4)]
    copies = [torch.full((size,), torch.nan, dtype=torch.bfloat16) if i % 2 else None for i, size in enumerate(SIZES)]
    lists, factor = TensorLists(p, gradients, m, v, copies, offset=offset), torch.tensor([0.5])
    kernels.adamw(*lists.addresses(), len(SIZES), *NUMBERS.values(), 3, factor.data_ptr(), DTYPES[gradient_dtype], 1, 0)
    new_p, kept, new_m, new_v, new_copies = lists.results()
    assert all(map(torch.equal, kept, gradients)), "the gradients are only read"
    for index, size in enumerate(SIZES):
        arguments = (p[index], 0.5 * gradients[index].float(), m[index], v[index])
        exact = adamw_equation(*(x.double() for x in arguments), 3, **NUMBERS)
        reference = adamw_equation(*arguments, 3, **NUMBERS)
        found = (new_p[index], new_m[index], new_v[index])
        names = ("p", "m", "v")
        assert_as_good_as_reference(
            dict(zip(names, found, strict=True)),
            dict(zip(names, reference, strict=True)),
            dict(zip(names, exact, strict=True)),
            f"size {size}",
        )
        if new_copies[index] is not None:
            assert torch.equal(new_copies[index], new_p[index].bfloat16())


def test_adamw_without_copies_or_scale(kernels):
    p, g = random([100], seed=1), random([100], seed=2)
    lists = TensorLists(p, g, [torch.zeros(100)], [torch.zeros(100)])
    *four, sizes = lists.addresses()
    kernels.adamw(*four, 0, sizes, 1, *NUMBERS.values(), 1, 0, 0, 0, 0)
    expected, _, _ = adamw_equation(p[0], g[0], torch.zeros(100), torch.zeros(100), 1, **NUMBERS)
    torch.testing.assert_close(lists.results()[0][0], expected, rtol=1e-6, atol=1e-7)


def test_lists_longer_than_a_kernels_parameters(kernels):
    """500 tensors are several launches; each must meet its own addresses and sizes."""
    sizes = [(7 * index) % 50 for index in range(500)]
    p, g = random(sizes, seed=1), random(sizes, seed=2)
    zeros = [torch.zeros(size) for size in sizes]
    lists = TensorLists(p, g, zeros, zeros)
    *four, sizes_address = lists.addresses()
    kernels.adamw(*four, 0, sizes_address, 500, *NUMBERS.values(), 1, 0, 0, 0, 0)
    for found, before, gradient, zero in zip(lists.results()[0], p, g, zeros, strict=True):
        torch.testing.assert_close(
            found, adamw_equation(before, gradient, zero, zero, 1, **NUMBERS)[0], rtol=1e-5, atol=1e-6
        )


def squared_norm(kernels, tensors, offset=0):
    lists = TensorLists(tensors, offset=offset)
    addresses, sizes = lists.addresses()
    workspace = Guarded(
        torch.full((kernels.squared_norm_workspace(sizes, len(tensors)),), torch.nan, dtype=torch.float64)
    )
    result = torch.full((2,), torch.nan, dtype=torch.float64)
    dtype = DTYPES[tensors[0].dtype] if tensors else 0
    kernels.squared_norm(addresses, sizes, len(tensors), workspace.address, result.data_ptr(), dtype, 0)
    workspace.check("workspace")
    lists.results()
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_norm_is_exact_to_fp64_and_ignores_alignment(kernels, dtype):
    tensors = random(SIZES + [30] * 400, dtype)
    expected = sum(float(tensor.double().square().sum()) for tensor in tensors)
    result = squared_norm(kernels, tensors)
    assert result[0].item() == pytest.approx(expected, rel=1e-12)
    assert result[1] == 0
    assert torch.equal(result, squared_norm(kernels, tensors, offset=1))


def test_squared_norm_of_nothing_is_zero(kernels):
    assert squared_norm(kernels, []).tolist() == [0.0, 0.0]
    assert squared_norm(kernels, [torch.zeros(0)]).tolist() == [0.0, 0.0]


def test_squared_norm_counts_what_is_not_finite(kernels):
    tensors = random([20, CHUNK + 3])
    tensors[0][3], tensors[1][CHUNK + 1], tensors[1][5] = torch.nan, torch.inf, -torch.inf
    result = squared_norm(kernels, tensors)
    assert result[0].isnan()
    assert result[1] == 3


def test_large_elements_do_not_overflow_the_norm(kernels):
    assert squared_norm(kernels, [torch.full((4,), 3e38)])[0].item() == pytest.approx(
        4 * float(torch.tensor(3e38)) ** 2
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("factor", [0.3, 1.0, 0.0])
@pytest.mark.parametrize("offset", [0, 1])
def test_scale(kernels, dtype, factor, offset):
    tensors, by = random(SIZES, dtype), torch.tensor([factor])
    lists = TensorLists(tensors, offset=offset)
    kernels.scale(*lists.addresses(), len(tensors), by.data_ptr(), DTYPES[dtype], 0)
    for found, before in zip(lists.results()[0], tensors, strict=True):
        assert torch.equal(found, (before.float() * by).to(dtype))
