"""The torch references, by which the rest is measured: gradcheck in fp64, torch's own functions where it has them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from k2_megatron.kernels.cross_entropy import cross_entropy_reference, vocab_parallel_cross_entropy
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rms_norm import add_rms_norm, rms_norm
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.swiglu import swiglu

SMOOTHINGS = [(0.0, 0.0), (0.1, 0.0), (0.1, 1e-2)]


def wide(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rms_norm_differentiates(zero_centered):
    def both(x, residual, weight):
        return add_rms_norm(x, residual, weight, 1e-5, zero_centered=zero_centered, backend="torch")

    assert gradcheck(both, (wide(3, 8), wide(3, 8), wide(8)))


def test_rms_norm_is_torchs():
    x, weight = wide(3, 8), wide(8)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, backend="torch"), F.rms_norm(x, (8,), weight, 1e-5))


def test_swiglu_differentiates_and_takes_the_gate_first():
    packed = wide(3, 8)
    assert gradcheck(lambda packed: swiglu(packed, backend="torch"), (packed,))
    torch.testing.assert_close(swiglu(packed, backend="torch"), F.silu(packed[:, :4]) * packed[:, 4:])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_differentiates_and_is_a_complex_product(interleaved):
    cos, sin = (table.double() for table in rotary_tables(5, 6, 100.0, "cpu"))
    positions = torch.tensor([[4, 0], [1, 1], [3, 2]], dtype=torch.int32)
    q, k = wide(3, 2, 2, 8), wide(3, 2, 1, 8)

    def rotated(q, k):
        return rotary(q, k, cos, sin, positions=positions, interleaved=interleaved, backend="torch")

    assert gradcheck(rotated, (q, k))
    pairs = q[..., :6].unflatten(-1, (3, 2)) if interleaved else q[..., :6].unflatten(-1, (2, 3)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)[positions.long()].unsqueeze(2)
    turned = torch.view_as_real(turned)
    expected = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    torch.testing.assert_close(rotated(q, k)[0][..., :6], expected)
    assert torch.equal(rotated(q, k)[0][..., 6:], q[..., 6:])


def test_rotary_tables_hold_the_angles_to_fp32_rounding():
    cos, sin = rotary_tables(8193, 128, 10_000.0, "cpu")
    angles = 8192 * 10_000.0 ** (-torch.arange(0, 128, 2).double() / 128)
    assert (cos[8192] - angles.cos()).abs().max() <= 2**-24
    assert (sin[8192] - angles.sin()).abs().max() <= 2**-24


@pytest.mark.parametrize(("label_smoothing", "z_loss"), SMOOTHINGS)
def test_cross_entropy_steps_differentiate_and_equal_the_equation(label_smoothing, z_loss):
    logits, labels = wide(2, 3, 7), torch.tensor([[0, 6, -100], [3, 3, 1]])
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}

    def loss(logits):
        return vocab_parallel_cross_entropy(logits, labels, backend="torch", **options)

    assert gradcheck(loss, (logits,))
    torch.testing.assert_close(loss(logits), cross_entropy_reference(logits, labels, **options))
    if not z_loss:
        expected = F.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), reduction="none", label_smoothing=label_smoothing
        )
        torch.testing.assert_close(loss(logits).flatten(), expected)


@pytest.mark.parametrize(("label_smoothing", "z_loss"), SMOOTHINGS)
def test_linear_cross_entropy_is_the_two_ops_in_turn(label_smoothing, z_loss):
    hidden, weight, labels = wide(7, 4), wide(9, 4), torch.tensor([0, 8, -100, 3, 3, 1, 2])
    options = {"label_smoothing": label_smoothing, "z_loss": z_loss}

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, labels, chunk_tokens=3, backend="torch", **options)

    assert gradcheck(loss, (hidden, weight))
    torch.testing.assert_close(loss(hidden, weight), cross_entropy_reference(hidden @ weight.t(), labels, **options))
