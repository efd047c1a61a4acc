"""Tensors of more than 2^32 elements on the CPU: their memory is reserved, and only the first and last rows, which the
emulation then runs alone, are ever touched. An index that drops bits reads or writes another row."""

from __future__ import annotations

import mmap
from array import array

import pytest
import torch
from guarded import DTYPES

BF16 = torch.bfloat16
EXTENT = 2**32 + 2**20  # elements: beyond what an unsigned index of 32 bits holds
ENDS = 2  # rows, and blocks, at either end
NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python names from 3.13 on


@pytest.fixture
def kernels(emulated_module, monkeypatch):
    monkeypatch.setenv("K2_EMULATION_ENDS", str(ENDS))
    return emulated_module


def reserved(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Zeros, whose pages come into being where they are touched."""
    size = torch.Size(shape).numel()
    memory = mmap.mmap(-1, size * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE)
    return torch.frombuffer(memory, dtype=dtype, count=size).view(shape)


def at_the_ends(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The same tensor, its first and last rows random."""
    generator = torch.Generator().manual_seed(seed)
    for rows in (tensor[:ENDS], tensor[-ENDS:]):
        rows.copy_(torch.randn(rows.shape, generator=generator))
    return tensor


def ends(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [torch.cat([tensor[:ENDS], tensor[-ENDS:]]) for tensor in tensors]


def assert_same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Bit for bit, and not what had been there before."""
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
        assert one.any()


def test_rms_norm(kernels):
    rows, hidden = EXTENT // 4096, 4096
    x, grad_y = at_the_ends(reserved(rows, hidden), 1), at_the_ends(reserved(rows, hidden), 2)
    weight = torch.randn(hidden).to(BF16)

    def run(x, grad_y, y, rstd, grad_x):
        addresses = [tensor.data_ptr() for tensor in (x, weight, y, rstd)]
        kernels.rms_norm_forward(
            addresses[0], 0, addresses[1], 0, *addresses[2:], len(x), hidden, 1e-5, False, DTYPES[BF16], DTYPES[BF16], 0
        )
        # As many partial rows as rows: a block a row, so that the last block has the last row alone.
        kernels.rms_norm_backward(
            grad_y.data_ptr(), 0, x.data_ptr(), weight.data_ptr(), rstd.data_ptr(), grad_x.data_ptr(), 0, 0, len(x),
            len(x), hidden, False, DTYPES[BF16], DTYPES[BF16], 0,
        )  # fmt: skip
        return y, rstd, grad_x

    wide = run(x, grad_y, reserved(rows, hidden), reserved(rows, dtype=torch.float32), reserved(rows, hidden))
    few = ends(x, grad_y)
    expected = run(*few, torch.zeros_like(few[0]), torch.zeros(2 * ENDS), torch.zeros_like(few[0]))
    assert_same(ends(*wide), list(expected))


def test_swiglu(kernels):
    columns = 4096  # a tile is one row
    rows = EXTENT // columns
    packed, grad_out = at_the_ends(reserved(rows, 2 * columns), 1), at_the_ends(reserved(rows, columns), 2)

    def run(packed, grad_out, out, grad_packed):
        addresses = [tensor.data_ptr() for tensor in (packed, out, grad_out, packed, grad_packed)]
        kernels.swiglu_forward(*addresses[:2], len(packed), columns, DTYPES[BF16], 0)
        kernels.swiglu_backward(*addresses[2:], len(packed), columns, DTYPES[BF16], 0)
        return out, grad_packed

    wide = run(packed, grad_out, reserved(rows, columns), reserved(rows, 2 * columns))
    few = ends(packed, grad_out)
    assert_same(ends(*wide), list(run(*few, torch.zeros_like(few[1]), torch.zeros_like(few[0]))))


def test_rotary(kernels):
    heads, dim = 32, 128
    rows = EXTENT // (heads * dim)
    q = at_the_ends(reserved(rows, heads, dim), 1)
    cos, sin = torch.randn(1, dim // 2), torch.randn(1, dim // 2)

    def run(q):
        strides, positions = (heads * dim, 0, dim), torch.zeros(len(q), dtype=torch.int32)
        kernels.rotary(
            q.data_ptr(), *strides, q.data_ptr(), *strides, 0, 0, 0, 0, 0, 0, 0, 0, cos.data_ptr(), sin.data_ptr(),
            positions.data_ptr(), 1, len(q), 1, heads, 0, dim, dim, False, False,
            DTYPES[BF16], 0,
        )  # fmt: skip
        return q

    expected = run(ends(q)[0])
    assert_same(ends(run(q)), [expected])


def test_cross_entropy(kernels):
    columns = 4096
    rows = EXTENT // columns
    logits, labels = at_the_ends(reserved(rows, columns), 1), torch.arange(rows) % columns
    labels[-ENDS:] = torch.arange(ENDS, 2 * ENDS)

    def run(logits, labels, statistics):
        few = torch.ones(len(logits))
        kernels.cross_entropy_statistics(
            logits.data_ptr(), columns, labels.data_ptr(), statistics.data_ptr(), 3, len(logits), columns, 0,
            DTYPES[BF16], 0,
        )  # fmt: skip
        kernels.cross_entropy_gradient(
            logits.data_ptr(), columns, labels.data_ptr(), few.data_ptr(), few.data_ptr(), 1, logits.data_ptr(),
            columns, len(logits), columns, 0, columns, 0.0, 0.0, -100, DTYPES[BF16], 0,
        )  # fmt: skip
        return statistics[:-1].view(3, -1).t().contiguous(), logits

    few = torch.cat([logits[:ENDS], logits[-ENDS:]])
    expected = run(few, torch.arange(2 * ENDS), torch.zeros(3 * 2 * ENDS + 1))
    assert_same(ends(*run(logits, labels, torch.zeros(3 * rows + 1))), list(expected))


def test_multi_tensor(kernels):
    """The table of chunks is shared by AdamW, the norm and scale: scale is run, in place."""
    tensor, factor, chunk = at_the_ends(reserved(EXTENT // 8192, 8192), 1), torch.tensor([0.5]), 8192
    before = ends(tensor)[0]
    assert tensor.numel() % chunk == 0
    kernels.scale(
        (addresses := array("q", [tensor.data_ptr()])).buffer_info()[0],
        (sizes := array("q", [tensor.numel()])).buffer_info()[0],
        len(addresses), factor.data_ptr(), DTYPES[BF16], 0,
    )  # fmt: skip
    assert len(sizes) == 1
    assert_same(ends(tensor), [before / 2])
