"""Model FLOPs per token: the numerator of model FLOPs utilization.

Counted are the multiply-adds (2 FLOPs each) of the matrix products, forward once and backward twice; norms, rotary,
softmax and the embedding lookup are left out, as everywhere in the literature. Utilization is
flops_per_token * tokens / (seconds * peak of all devices), and depends on how attention is counted:

    "full"    every query against all S keys: 12 * S * H per layer. PaLM (arXiv 2204.02311, appendix B), Megatron
              (Narayanan et al., arXiv 2104.04473, section 5.1, without their recomputation), LLM-Foundry.
    "causal"  every query against S / 2 keys on average, what causal attention needs: half of that.

At K2's stage 1 the two differ by 2 %. A number without its convention can't be compared.
"""

from collections.abc import Mapping
from typing import Literal

from k2_megatron.config.schema import Model

Attention = Literal["full", "causal"]


def layer_matrix_parameters(model: Model) -> int:
    """Weights of one layer's matrix products: query, key, value, output, gate, up, down."""
    hidden, kv_size = model.hidden_size, model.kv_heads * model.head_dim
    return hidden * (2 * hidden + 2 * kv_size + 3 * model.ffn_hidden_size)


def attention_forward_flops(model: Model, attention: Attention) -> float:
    """FLOPs per token of one layer's two products with scores: Q K^T and P V, 2 * keys * H each."""
    keys = model.sequence_length if attention == "full" else model.sequence_length / 2
    return 4.0 * keys * model.hidden_size


def forward_flops_per_token(model: Model, attention: Attention) -> float:
    """FLOPs of one token's forward pass: layers and output matrix."""
    layer = 2.0 * layer_matrix_parameters(model) + attention_forward_flops(model, attention)
    return model.layers * layer + 2.0 * model.vocab_size * model.hidden_size


def output_share(model: Model, stages: int) -> float:
    """Work of the output matrix as a share of what a pipeline stage's layers do."""
    layer = 2.0 * layer_matrix_parameters(model) + attention_forward_flops(model, "causal")
    return 2.0 * model.vocab_size * model.hidden_size / (layer * model.layers / stages)


def flops_per_token(model: Model, attention: Attention) -> float:
    """Model FLOPs of one trained token: three forward passes' worth, recomputation not counted."""
    return 3.0 * forward_flops_per_token(model, attention)


def flops_of_tokens(model: Model, tokens: Mapping[int, int], attention: Attention) -> float:
    """Model FLOPs of {sequence length: tokens trained in it}."""
    return sum(
        flops_per_token(model.model_copy(update={"sequence_length": length}), attention) * count
        for length, count in tokens.items()
    )


def hardware_flops_per_token(model: Model, attention: Attention, recompute: str, micro_batch_tokens: int) -> float:
    """What the hardware computes for one token: as `flops_per_token`, plus the activations computed again.

    `recompute` is train.recompute: "full" repeats every layer's forward pass, "selective" its attention products.
    A loss in chunks repeats the output matrix's for those of the micro-batch's tokens that are not in the last chunk.
    """
    again = {
        "none": 0.0,
        "selective": attention_forward_flops(model, attention),
        "full": 2.0 * layer_matrix_parameters(model) + attention_forward_flops(model, attention),
    }[recompute]
    last_chunk = (micro_batch_tokens - 1) % (model.loss_chunk_tokens or micro_batch_tokens) + 1
    output_again = 2.0 * model.vocab_size * model.hidden_size * (1 - last_chunk / micro_batch_tokens)
    return flops_per_token(model, attention) + model.layers * again + output_again
