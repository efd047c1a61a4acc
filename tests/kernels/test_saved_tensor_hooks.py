"""In-place ops under saved-tensor hooks, which hand back what autograd saved without asking for its version: a second
reader of an overwritten tensor would get other values without a word. Gradients are compared with backend "torch"."""

from __future__ import annotations

import pytest
import torch
from kernel_backends import on_cpu
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from k2_megatron.kernels import checks
from k2_megatron.kernels.cross_entropy import vocab_parallel_cross_entropy
from k2_megatron.kernels.cross_entropy_steps import CompiledSteps
from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy
from k2_megatron.kernels.rotary import rotary, rotary_tables
from k2_megatron.kernels.rotary_packed import rotary_packed

pytestmark = on_cpu
DIM = 8
TABLES = rotary_tables(6, DIM, 100.0, "cpu")
LABELS = torch.tensor([[1], [0], [6], [3], [2], [5]])
LOGITS, HEADS, PACKED = (6, 1, 7), (6, 1, 2, DIM), (6, 1, 2, 4 * DIM)


def cross_entropy(logits, backend):
    return vocab_parallel_cross_entropy(logits, LABELS, backend=backend).mean()


def z_loss_beside(z, backend):
    z = z * 2
    return 0.1 * z.logsumexp(-1).square().mean() + cross_entropy(z, backend)


def two_losses(z, backend):
    z = z * 2
    return cross_entropy(z, backend) + 3 * cross_entropy(z, backend)


def loss_of_tanh(z, backend):
    return cross_entropy(z.tanh(), backend)


def rotation_of_tanh(q, k, backend):
    q, k = rotary(q.tanh(), k.tanh(), *TABLES, backend=backend)
    return (q * k.sigmoid()).sum()


def rotation_beside_a_square(q, k, backend):
    q, k = q * 2, k * 2
    square = q.square().sum()
    q, k = rotary(q, k, *TABLES, backend=backend)
    return square + (q * k.sigmoid()).sum()


def packed_rotation_of_tanh(qkv, backend):
    q, k, v = rotary_packed(qkv.tanh(), *TABLES, DIM, backend=backend)
    return (q.unflatten(2, (2, 2)) * (k.sigmoid() + v)[:, :, :, None]).sum()


CASES = [
    (z_loss_beside, [LOGITS]),
    (two_losses, [LOGITS]),
    (loss_of_tanh, [LOGITS]),
    (rotation_of_tanh, [HEADS, HEADS]),
    (rotation_beside_a_square, [HEADS, HEADS]),
    (packed_rotation_of_tanh, [PACKED]),
]


def recomputed(function, *arguments):
    return checkpoint(function, *arguments, use_reentrant=False)


def under(hooks):
    def run(function, *arguments):
        with hooks():
            return function(*arguments)

    return run


RUNS = {
    "checkpoint": recomputed,
    "identity": under(lambda: saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)),
    "save_on_cpu": under(save_on_cpu),
}


def plainly(function, *arguments):
    return function(*arguments)


def gradients(function, shapes, backend, run=plainly):
    generator = torch.Generator().manual_seed(6)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return torch.autograd.grad(run(function, *leaves, backend), leaves)


@pytest.mark.parametrize("top_hooks", [checks._TOP_HOOKS, None], ids=["asked", "torch_before_2_8"])
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("function", "shapes"), CASES)
def test_other_readers_keep_their_values_under_hooks(function, shapes, run, top_hooks, monkeypatch):
    monkeypatch.setattr(checks, "_TOP_HOOKS", top_hooks)
    expected = gradients(function, shapes, "torch")
    for found, wanted in zip(gradients(function, shapes, "cpu", RUNS[run]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_hooks", [checks._TOP_HOOKS, None], ids=["asked", "torch_before_2_8"])
@pytest.mark.parametrize(("function", "shapes"), CASES)
def test_without_hooks_autograd_names_the_overwritten_tensor(function, shapes, top_hooks, monkeypatch):
    """In place, then: K2's own memory rests on it."""
    monkeypatch.setattr(checks, "_TOP_HOOKS", top_hooks)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(function, shapes, "cpu")


@pytest.mark.parametrize(
    ("rotate", "shapes"),
    [
        (lambda q, k, backend: rotary(q, k, *TABLES, backend=backend), [HEADS, HEADS]),
        (lambda qkv, backend: rotary_packed(qkv, *TABLES, DIM, backend=backend), [PACKED]),
    ],
)
def test_what_a_checkpoint_is_given_is_rotated_once(rotate, shapes):
    """The recomputation would find it rotated."""

    def loss(*leaves_and_backend):
        *leaves, backend = leaves_and_backend
        given = [leaf * 2 for leaf in leaves]
        return recomputed(lambda: sum(output.sigmoid().sum() for output in rotate(*given, backend)))

    expected = gradients(loss, shapes, "torch")
    for found, wanted in zip(gradients(loss, shapes, "cpu"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_loss_under_hooks_is_not_spent():
    leaf = torch.randn(LOGITS, requires_grad=True)
    loss = recomputed(loss_of_tanh, leaf, "cpu")
    first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_recomputed_pass_without_hooks_stays_in_place():
    """megatron-core's recompute, and torch's reentrant one, set no hooks: no buffer of the logits' size there."""
    seen = []

    def loss(z):
        logits = z * 2
        logits.register_hook(lambda gradient: seen.append(gradient.data_ptr() == logits.data_ptr()))
        q, _ = rotary(q_leaf * 2, k_leaf * 2, *TABLES, backend="cpu")
        seen.append(q._is_view())  # of its input, rotated
        return cross_entropy(logits, "cpu") + q.sum()

    q_leaf, k_leaf = torch.randn(HEADS), torch.randn(HEADS)
    leaf = torch.randn(LOGITS, requires_grad=True)
    checkpoint(lambda z: loss(z) if torch.is_grad_enabled() else z.sum(), leaf, use_reentrant=True).backward()
    assert seen == [True, True]


def test_the_linear_loss_under_hooks_overwrites_its_own_logits(monkeypatch):
    """They are never anyone else's, and there would be twice the memory of a chunk."""
    hidden, weight = torch.randn(6, 5, requires_grad=True), torch.randn(7, 5, requires_grad=True)
    calls = []
    original = CompiledSteps.gradient

    def gradient(logits, *arguments):
        result = original(logits, *arguments)
        calls.append(result.data_ptr() == logits.data_ptr())
        return result

    monkeypatch.setattr(CompiledSteps, "gradient", staticmethod(gradient))
    RUNS["identity"](
        lambda: linear_cross_entropy(hidden, weight, LABELS.flatten(), chunk_tokens=4, backend="cpu").sum()
    ).backward()
    assert calls == [True, True]
