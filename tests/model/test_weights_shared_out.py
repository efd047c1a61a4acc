"""What a built model says of its weights, whoever's layers it is built from."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from one_rank_model import one_rank
from rank_processes import Rank
from small_run import overrides

from k2_megatron.config import load_config
from k2_megatron.kernels.dispatch import OPS
from k2_megatron.model import build
from k2_megatron.model.layer import k2_block_spec
from k2_megatron.model.transformer_config import transformer_config


def shared_out(config_path: Path, implementation: str) -> set[str]:
    """The weights that are marked as parts of a matrix over tensor ranks, with our layers in Transformer Engine's
    place where that is asked for: it cannot run here, and what is around its layers is the same."""
    settings = overrides({"model.implementation": implementation})
    layers = k2_block_spec(transformer_config(load_config(config_path), dict.fromkeys(OPS, "torch")), None, 0)
    sys.modules["transformer_engine"] = ModuleType("transformer_engine")
    build.get_gpt_layer_with_transformer_engine_spec = lambda: layers
    with one_rank(config_path, settings) as (_config, _groups, _kernels, model):
        named = dict(model.named_parameters())
        return {name for name, weight in named.items() if getattr(weight, "tensor_model_parallel", False)}


@pytest.mark.parametrize("implementation", ["k2", "transformer_engine"])
def test_every_matrix_is_marked_as_shared_out_over_tensor_ranks(
    small_config: Path, tmp_path: Path, implementation: str
) -> None:
    """Unmarked, all but one tensor rank's part would be left out of the gradient norm."""
    outcome = Rank(shared_out, (small_config, implementation), {}, tmp_path).finish()
    assert outcome.exit_code == 0, outcome.stderr
    matrices = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")
    layers = {f"decoder.layers.{layer}.{matrix}.weight" for layer in range(4) for matrix in matrices}
    assert outcome.result == layers | {"embedding.word_embeddings.weight", "output_layer.weight"}
