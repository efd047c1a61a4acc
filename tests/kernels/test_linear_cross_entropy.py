"""The output projection with the loss holds one chunk's logits at a time, and forms the last chunk's only once."""

from __future__ import annotations

import weakref

import pytest
import torch
from kernel_backends import on_cpu
from torch.utils._python_dispatch import TorchDispatchMode

from k2_megatron.kernels.linear_cross_entropy import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY, CHUNK = 22, 6, 37, 8  # chunks of 8, 8 and 6 tokens


class LogitsWatch(TorchDispatchMode):
    """Counts the products of V columns, and the most rows of them that were alive at once."""

    def __init__(self):
        super().__init__()
        self.made, self.most_rows, self._alive = 0, 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and result.shape[1] == VOCABULARY:
            self.made += 1
            self._alive.append(weakref.ref(result))
            rows = sum(len(tensor) for alive in self._alive if (tensor := alive()) is not None)
            self.most_rows = max(self.most_rows, rows)
        return result


def loss_of(tokens=TOKENS, chunk=CHUNK, backend="cpu"):
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, HIDDEN, generator=generator).requires_grad_()
    weight = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,), generator=generator)
    return linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk, backend=backend), (hidden, weight)


@on_cpu
@pytest.mark.parametrize(("tokens", "chunks"), [(TOKENS, 3), (CHUNK, 1), (5, 1), (CHUNK + 1, 2)])
def test_no_more_than_a_chunk_of_logits_is_alive(tokens, chunks):
    with LogitsWatch() as watch:
        loss, leaves = loss_of(tokens)
        assert watch.made == chunks
        torch.autograd.grad(loss.sum(), leaves)
    assert watch.made == 2 * chunks - 1, "each chunk but the last is formed twice"
    assert watch.most_rows == min(tokens, CHUNK)


@on_cpu
def test_without_gradients_no_logits_wait():
    with LogitsWatch() as watch, torch.no_grad():
        loss_of()
        assert not any(alive() is not None for alive in watch._alive)


@on_cpu
def test_a_second_backward_forms_the_overwritten_logits_again():
    loss, leaves = loss_of()
    weights = torch.arange(1.0, 1 + len(loss))
    first = torch.autograd.grad(loss, leaves, weights, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, weights)
    whole, its_leaves = loss_of(chunk=TOKENS, backend="torch")
    expected = torch.autograd.grad(whole, its_leaves, weights)
    for one, other, wanted in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5)
