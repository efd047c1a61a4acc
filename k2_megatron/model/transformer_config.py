"""From our configuration to megatron-core's TransformerConfig, with the kernels chosen for each op along in it."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from k2_megatron.config import Config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class K2TransformerConfig(TransformerConfig):
    """`kernels` maps each op (rms_norm, rotary, cross_entropy, swiglu, adamw) to the backend chosen for it;
    `loss_chunk_tokens` asks for the chunked loss."""

    kernels: Mapping[str, str] = field(default_factory=dict)
    loss_chunk_tokens: int | None = None


def transformer_config(config: Config, kernels: Mapping[str, str]) -> K2TransformerConfig:
    """The TransformerConfig of K2: RMSNorm, RoPE, SwiGLU, no biases, no dropout, untied embeddings.

    `kernels` maps ops to backends, as `k2_megatron.kernels.dispatch.choose_backend` chooses them.
    """
    model, parallel, train = config.model, config.parallel, config.train
    dtype = DTYPES[train.precision]
    interleaved = parallel.virtual_pipeline > 1
    return K2TransformerConfig(
        kernels=dict(kernels),
        loss_chunk_tokens=model.loss_chunk_tokens,
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        # The hook through which MLP hands the packed [gate | up] to an activation module of ours (no TE involved).
        use_te_activation_func=model.implementation == "k2",
        bias_activation_fusion=False,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        init_method_std=model.init_std,
        perform_initialization=False,  # k2_megatron.model.initialize fills the weights, by global name
        use_cpu_initialization=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=train.precision == "bfloat16",
        deterministic_mode=train.deterministic,
        # megatron-core then scales neither the loss nor the gradients: by the ranks and their micro-batches
        calculate_per_token_loss=train.gradient_leaves is not None,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # Batched p2p pairs up wrongly when the next and the previous stage are the same rank (two stages,
        # interleaved): gradients came out six times too large, silently. Overlapped p2p is right with any number.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        batch_p2p_sync=False,
        **_recompute(train.recompute),
    )


def _recompute(choice: str) -> dict:
    if choice == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if choice == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
