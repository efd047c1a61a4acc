"""K2's transformer layer and its specification: which class megatron-core builds at each place."""

import contextlib

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from k2_megatron.kernels.swiglu import swiglu
from k2_megatron.model.attention import K2CoreAttention, K2SelfAttention
from k2_megatron.model.norm import K2RMSNorm
from k2_megatron.model.transformer_config import K2TransformerConfig


class K2SwiGLU(MegatronModule):
    """silu(gate) * up on the packed [gate | up] of the first MLP projection (Shazeer 2020, "GLU Variants")."""

    def __init__(self, config: K2TransformerConfig) -> None:
        super().__init__(config=config)
        self.backend = config.kernels["swiglu"]

    def forward(self, packed_SBF: torch.Tensor) -> torch.Tensor:
        return swiglu(packed_SBF, backend=self.backend)


class K2TransformerLayer(TransformerLayer):
    """TransformerLayer in which the residual add after attention and the norm after it are one kernel.

    megatron-core calls `self_attn_bda` (add) and then `pre_mlp_layernorm` (norm). The add here computes both and
    keeps the normalized half for the call that follows. K2 has neither bias nor dropout, which the fusion needs.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        assert not self.config.add_bias_linear and self.config.hidden_dropout == 0.0, "the fused add knows no bias"
        self.self_attn_bda = self._fused_add
        # megatron-core turns gradients on around its adds, for the sake of torch.jit. The norm in ours has a weight, so
        # that would record a graph, and keep its input alive, where none is wanted: under full recompute (whose
        # memory it doubled) and in evaluation.
        self.bias_dropout_add_exec_handler = contextlib.nullcontext
        self._normalized_SBH: torch.Tensor | None = None

    def _fused_add(self, _training: bool, _fused: bool):
        def add(output_with_bias, residual_SBH, _dropout):
            self._normalized_SBH, hidden_SBH = self.pre_mlp_layernorm.add_and_normalize(
                output_with_bias[0], residual_SBH
            )
            return hidden_SBH

        return add

    def _forward_pre_mlp_layernorm(self, _hidden_states):
        normalized_SBH, self._normalized_SBH = self._normalized_SBH, None
        return normalized_SBH


def k2_block_spec(config: K2TransformerConfig, vp_stage: int | None, pp_rank: int) -> TransformerBlockSubmodules:
    """The specification of a stage's block: its layers, and the final norm (built on the last stage alone)."""
    layer = ModuleSpec(
        module=K2TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=K2RMSNorm,
            self_attention=ModuleSpec(
                module=K2SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=K2CoreAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=K2RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=K2SwiGLU
                ),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=pp_rank)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=K2RMSNorm)
