"""csrc/rotary.cu on the CPU, beyond the common cases: views of a QKV buffer, heads, tables, what must stay as it is."""

from __future__ import annotations

import pytest
import torch
from guarded import DTYPES, Guarded
from kernel_cases import assert_as_good_as_reference

from k2_megatron.kernels.rotary import rotary_tables


class Packed:
    """q and k as views of a [S, B, heads, width] buffer, as the QKV GEMM leaves them; the rest must not change."""

    def __init__(self, sequence, batch, q_heads, k_heads, dim, dtype, offset=0):
        generator = torch.Generator().manual_seed(sequence + dim)
        values = torch.randn(sequence, batch, q_heads + k_heads, dim + 8, generator=generator).to(dtype)
        self.guarded = Guarded(values, offset)
        self.before, self.split, self.dim = values, q_heads, dim

    def heads_of(self, buffer):
        return buffer[:, :, : self.split, : self.dim], buffer[:, :, self.split :, : self.dim]

    def rotate(self, kernels, cos, sin, *, to=None, positions=None, rotary_dim=None, interleaved=False,
               conjugate=False):  # fmt: skip
        buffer = self.guarded.tensor
        sequence, batch, heads, _ = buffer.shape
        q, k = self.heads_of(buffer)
        to_q, to_k = (q, k) if to is None else to.heads_of(to.guarded.tensor)
        kernels.rotary(
            q.data_ptr(), *q.stride()[:3], to_q.data_ptr(), *to_q.stride()[:3], k.data_ptr() if k.shape[2] else 0,
            *k.stride()[:3], to_k.data_ptr() if k.shape[2] else 0, *to_k.stride()[:3], cos.data_ptr(), sin.data_ptr(),
            0 if positions is None else positions.data_ptr(), cos.shape[0], sequence, batch, self.split,
            heads - self.split, self.dim, rotary_dim or self.dim, interleaved, conjugate, DTYPES[buffer.dtype], 0,
        )  # fmt: skip
        self.guarded.check("qkv")
        if to is not None:
            to.guarded.check("the rotated q and k")
            assert torch.equal(buffer, self.before), "q or k changed, which were to be rotated into other memory"
            return torch.cat(to.heads_of(to.guarded.tensor), 2)
        untouched = (rotary_dim or self.dim) // 2 * 2
        assert torch.equal(buffer[..., untouched:], self.before[..., untouched:]), (
            "elements that are not rotated changed"
        )
        return buffer[..., :untouched]


def equation(x, cos, sin, interleaved):
    """x [S, B, N, R]; cos, sin [S, B, 1, R/2]"""
    first, second = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    a, b = first * cos - second * sin, second * cos + first * sin
    return torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)


# sequence, batch, q heads, k heads, head dim, rotated: K2's rank; grouped queries; one head; no k; partial; pairs alone
SHAPES = [(5, 2, 8, 8, 128, 128), (3, 1, 8, 1, 64, 64), (7, 2, 1, 0, 32, 32), (4, 3, 3, 2, 96, 32), (3, 2, 2, 2, 6, 6),
          (2, 1, 40, 40, 16, 16), (2, 1, 2, 1, 520, 520)]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_is_as_exact_as_torch(kernels, shape, dtype, interleaved):
    *sizes, rotary_dim = shape
    cos, sin = rotary_tables(11, rotary_dim, 10_000.0, "cpu")
    positions = torch.arange(sizes[0] * sizes[1], dtype=torch.int32).view(sizes[0], sizes[1]) * 7 % 11
    for given, conjugate in ((None, False), (positions, True)):
        packed = Packed(*sizes, dtype)
        found = packed.rotate(
            kernels, cos, sin, positions=given, rotary_dim=rotary_dim, interleaved=interleaved, conjugate=conjugate
        )
        rows = torch.arange(sizes[0])[:, None].expand(sizes[0], sizes[1]) if given is None else given.long()

        def at(kind, packed=packed, rows=rows, conjugate=conjugate):
            sign = -1 if conjugate else 1
            tables = cos[rows].to(kind)[:, :, None], sign * sin[rows].to(kind)[:, :, None]
            return {"qk": equation(packed.before[..., :rotary_dim].to(kind), *tables, interleaved)}

        reference = {name: value.to(dtype) for name, value in at(torch.float32).items()}
        assert_as_good_as_reference({"qk": found}, reference, at(torch.float64), shape)


class Targets(Packed):
    """Memory of its own for q and k, with strides of its own (12 elements between heads), filled with NaN."""

    def __init__(self, packed, offset=0):
        sequence, batch, heads, _ = packed.before.shape
        self.before = torch.full((sequence, batch, heads, packed.dim + 12), torch.nan, dtype=packed.before.dtype)
        self.guarded, self.split, self.dim = Guarded(self.before, offset), packed.split, packed.dim


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (3, 2, 4, 2, 128, 96)], ids=str)
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_into_other_memory_is_as_in_place_to_the_bit(kernels, shape, dtype, interleaved):
    *sizes, rotary_dim = shape
    tables, options = rotary_tables(sizes[0], rotary_dim, 10_000.0, "cpu"), {"interleaved": interleaved}
    expected = Packed(*sizes, dtype)
    expected.rotate(kernels, *tables, rotary_dim=rotary_dim, **options)
    for offset in (0, 1):
        packed = Packed(*sizes, dtype)
        targets = Targets(packed, offset)
        found = packed.rotate(kernels, *tables, to=targets, rotary_dim=rotary_dim, **options)
        assert torch.equal(found, torch.cat(expected.heads_of(expected.guarded.tensor), 2))
        assert targets.guarded.tensor[..., targets.dim :].isnan().all(), "the gaps between heads were written"


@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "pairs"])
def test_alignment_does_not_change_a_bit(kernels, interleaved):
    cos, sin = rotary_tables(5, 64, 10_000.0, "cpu")
    results = [
        Packed(5, 2, 4, 2, 64, torch.bfloat16, offset).rotate(kernels, cos, sin, interleaved=interleaved)
        for offset in (0, 1)
    ]
    assert torch.equal(*results)


@pytest.mark.parametrize("dim", [128, 6])
def test_positions_outside_of_the_table_become_nan_and_read_nothing(kernels, dim):
    cos, sin = (Guarded(table) for table in rotary_tables(4, dim, 10_000.0, "cpu"))
    positions = torch.tensor([[0], [4], [-1], [3], [2**31 - 1]], dtype=torch.int32)
    found = Packed(5, 1, 2, 2, dim, torch.float32).rotate(kernels, cos.tensor, sin.tensor, positions=positions)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, True, False, True]
    assert found[[0, 3]].isfinite().all()
    beyond = Packed(6, 1, 2, 2, dim, torch.float32).rotate(kernels, cos.tensor, sin.tensor)
    assert beyond.isnan().flatten(1).all(1).tolist() == [False] * 4 + [True] * 2
