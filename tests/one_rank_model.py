"""A model of one rank, and transformers' Llama with the same weights, for the ranks of model tests."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from k2_megatron.config import Config, load_config
from k2_megatron.kernels.dispatch import choose_backends
from k2_megatron.model import build_model
from k2_megatron.runtime.cpu_stand_in import cpu_stands_in_for_cuda
from k2_megatron.runtime.devices import find_device
from k2_megatron.runtime.groups import Groups, build_groups, connect, disconnect
from k2_megatron.runtime.launch import single_rank
from k2_megatron.runtime.seeds import seed_everything


@contextmanager
def one_rank(
    config_path: Path, settings: list[str]
) -> Iterator[tuple[Config, Groups, dict[str, str], torch.nn.Module]]:
    """(configuration, groups, kernels, model) in a world of this process alone."""
    config = load_config(config_path, settings)
    with cpu_stands_in_for_cuda("cpu"):
        connect(single_rank(), find_device(0), 60.0)
        groups = build_groups(config.parallel)
        seed_everything(config.run.seed, groups)
        kernels = choose_backends(config.model.kernels, "cpu")
        (model,) = build_model(config, kernels, groups.collection)
        yield config, groups, kernels, model
        disconnect()


def llama_with_weights_of(model: torch.nn.Module, config: Config) -> torch.nn.Module:
    """transformers' LlamaForCausalLM of the same shape, its weights copied from ours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = config.model
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_hidden_size,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.sequence_length,
            rms_norm_eps=shape.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_base},
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            hidden_act="silu",
            attn_implementation="eager",
        )
    )
    llama.load_state_dict(_llama_names(dict(model.named_parameters()), config))
    return llama


def _llama_names(ours: dict[str, torch.Tensor], config: Config) -> dict[str, torch.Tensor]:
    shape = config.model
    theirs = {
        "model.embed_tokens.weight": ours["embedding.word_embeddings.weight"],
        "model.norm.weight": ours["decoder.final_layernorm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    for layer in range(shape.layers):
        from_, to = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        theirs[to + "input_layernorm.weight"] = ours[from_ + "input_layernorm.weight"]
        theirs[to + "post_attention_layernorm.weight"] = ours[from_ + "pre_mlp_layernorm.weight"]
        theirs[to + "self_attn.o_proj.weight"] = ours[from_ + "self_attention.linear_proj.weight"]
        theirs[to + "mlp.down_proj.weight"] = ours[from_ + "mlp.linear_fc2.weight"]
        gate, up = ours[from_ + "mlp.linear_fc1.weight"].chunk(2)
        theirs[to + "mlp.gate_proj.weight"], theirs[to + "mlp.up_proj.weight"] = gate, up
        # One block a group of heads: its queries, its key, its value.
        packed = ours[from_ + "self_attention.linear_qkv.weight"].reshape(shape.kv_heads, -1, shape.hidden_size)
        queries = shape.heads // shape.kv_heads * shape.head_dim
        for name, part in zip("qkv", packed.split([queries, shape.head_dim, shape.head_dim], dim=1), strict=True):
            theirs[f"{to}self_attn.{name}_proj.weight"] = part.reshape(-1, shape.hidden_size)
    return theirs
