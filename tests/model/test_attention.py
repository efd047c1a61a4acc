"""Core attention against softmax(q k^T / sqrt(D) + causal mask) v written out, in float64 as the truth."""

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from k2_megatron.model.attention import K2CoreAttention

S, B, N, D = 17, 2, 4, 8


def written_out(query_SBND: torch.Tensor, key_SBKD: torch.Tensor, value_SBKD: torch.Tensor) -> torch.Tensor:
    queries_a_key = query_SBND.shape[2] // key_SBKD.shape[2]
    context = torch.empty_like(query_SBND)
    for batch in range(B):
        for head in range(N):
            query = query_SBND[:, batch, head]
            key, value = key_SBKD[:, batch, head // queries_a_key], value_SBKD[:, batch, head // queries_a_key]
            for position in range(S):
                scores = key[: position + 1] @ query[position] / math.sqrt(D)
                context[position, batch, head] = scores.softmax(0) @ value[: position + 1]
    return context.reshape(S, B, N * D)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_and_its_gradients(kv_heads):
    generator = torch.Generator().manual_seed(kv_heads)
    shapes = [(S, B, N, D), (S, B, kv_heads, D), (S, B, kv_heads, D)]
    truth = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ours = [tensor.detach().float().requires_grad_() for tensor in truth]
    upstream = torch.randn(S, B, N * D, generator=generator, dtype=torch.float64)
    core = K2CoreAttention(None, 1, AttnMaskType.causal, "self")

    expected, found = written_out(*truth), core(*ours, None)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    expected.backward(upstream)
    found.backward(upstream.float())
    for mine, right in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.grad, right.grad.float(), rtol=1e-4, atol=1e-5)


def test_other_masks_and_cross_attention_are_refused():
    with pytest.raises(AssertionError, match="attends causally"):
        K2CoreAttention(None, 1, AttnMaskType.padding, "self")
    with pytest.raises(AssertionError, match="self-attention alone"):
        K2CoreAttention(None, 1, AttnMaskType.causal, "cross")
