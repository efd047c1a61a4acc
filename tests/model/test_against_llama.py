"""K2's forward pass against an independent one: transformers' LlamaForCausalLM with the same weights, in float32."""

from pathlib import Path

import pytest
import torch
from one_rank_model import llama_with_weights_of, one_rank
from rank_processes import Rank
from small_run import overrides

import k2_megatron.model.attention as attention

WIDE_WEIGHTS = {"model.init_std": 0.15}  # so that attention and norms matter: at 0.02 every block is nearly nothing
SHAPES = {
    "multi-head": {},
    "grouped-query": {"model.kv_heads": 2},
    "one key-value head": {"model.kv_heads": 1},
    "other rotary base and epsilon": {"model.rope_base": 500.0, "model.norm_epsilon": 1e-2},
}


def both_logits(config_path: Path, settings: list[str], fault) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, Llama's), both [B, S, V], for the same random tokens."""
    if fault is not None:
        fault()
    with one_rank(config_path, settings) as (config, _groups, _kernels, model), torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm left out of its place
                parameter.copy_(torch.linspace(0.5, 1.5, len(parameter)))
        shape = (3, config.model.sequence_length)
        tokens = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(5))
        ours = model(tokens, None, None)
        theirs = llama_with_weights_of(model, config)(tokens).logits
        return ours.clone(), theirs.clone()


def relative_error(small_config, tmp_path, settings, fault=None) -> float:
    arguments = (small_config, overrides({**WIDE_WEIGHTS, **settings}), fault)
    outcome = Rank(both_logits, arguments, {}, tmp_path).finish()
    assert outcome.exit_code == 0, outcome.stderr
    ours, theirs = outcome.result
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.5, "logits that say nothing would agree with anything"
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kernels", ["torch", "auto"])
@pytest.mark.parametrize("settings", SHAPES.values(), ids=SHAPES)
def test_logits_are_those_of_llama(small_config, tmp_path, settings, kernels):
    assert relative_error(small_config, tmp_path, {**settings, "model.kernels": kernels}) < 1e-5


def rotated_by_neighbouring_pairs() -> None:
    right = attention.rotary_packed
    attention.rotary_packed = lambda *tensors, **options: right(*tensors, **{**options, "interleaved": True})


def attends_to_the_future() -> None:
    right = torch.nn.functional.scaled_dot_product_attention

    def everywhere(*tensors, is_causal, **options):
        return right(*tensors, is_causal=False, **options)

    torch.nn.functional.scaled_dot_product_attention = everywhere


@pytest.mark.parametrize("fault", [rotated_by_neighbouring_pairs, attends_to_the_future], ids=lambda f: f.__name__)
def test_comparison_sees_a_fault(small_config, tmp_path, fault):
    assert relative_error(small_config, tmp_path, {"model.kernels": "torch"}, fault) > 1e-3
