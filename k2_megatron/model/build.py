"""Build this rank's part of K2: one model chunk, or several under the interleaved schedule."""

from collections.abc import Mapping

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)

from k2_megatron.config import Config
from k2_megatron.model.gpt import GPTModelWithK2Loss, K2Model
from k2_megatron.model.initialize import initialize_weights
from k2_megatron.model.layer import k2_block_spec
from k2_megatron.model.transformer_config import transformer_config


def build_model(
    config: Config, kernels: Mapping[str, str], collection: ProcessGroupCollection, *, initialize: bool = True
) -> list[torch.nn.Module]:
    """The model chunks of the rank that `collection` belongs to, in the configured precision, weights initialized.

    `initialize=False` leaves the weights undefined (fake tensors, or a checkpoint about to be loaded).
    """
    settings = transformer_config(config, kernels)
    stages = collection.pp.size()
    stage = collection.pp.rank()
    chunks_per_stage = config.parallel.virtual_pipeline
    chunks: list[torch.nn.Module] = []
    for chunk in range(chunks_per_stage):
        vp_stage = chunk if chunks_per_stage > 1 else None
        arguments = {
            "config": settings,
            "vocab_size": config.model.vocab_size,
            "max_sequence_length": config.model.sequence_length,
            "pre_process": stage == 0 and chunk == 0,
            "post_process": stage == stages - 1 and chunk == chunks_per_stage - 1,
            "share_embeddings_and_output_weights": False,
            "rotary_base": config.model.rope_base,
            "pg_collection": collection,
            "vp_stage": vp_stage,
        }
        if config.model.implementation == "transformer_engine":
            model = _transformer_engine_model(arguments)
        else:
            model = K2Model(transformer_layer_spec=k2_block_spec(settings, vp_stage, stage), **arguments)
        mark_tensor_parallel(model)
        if initialize:
            initialize_weights(
                model,
                config.run.seed,
                config.model.init_std,
                config.model.layers,
                settings.layernorm_zero_centered_gamma,
            )
        chunks.append(model)
    return chunks


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Mark the weights that tensor ranks share out, which megatron-core does while it initializes them.

    Unmarked, a weight counts as a copy that every tensor rank holds, and all but one rank's part of it is left out of
    the gradient norm. Transformer Engine marks its own; embedding and output matrix are megatron-core's there, too.
    """
    for module in model.modules():
        if isinstance(module, ColumnParallelLinear | VocabParallelEmbedding):
            set_tensor_model_parallel_attributes(module.weight, True, 0, getattr(module, "stride", 1))
        elif isinstance(module, RowParallelLinear):
            set_tensor_model_parallel_attributes(module.weight, True, 1, 1)


def _transformer_engine_model(arguments: dict) -> GPTModelWithK2Loss:
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        raise ValueError(
            'model.implementation = "transformer_engine" needs Transformer Engine, which is not installed: '
            'pip install "k2_megatron[te]" on a machine with CUDA, or set model.implementation = "k2"'
        ) from None
    layer = get_gpt_layer_with_transformer_engine_spec()
    return GPTModelWithK2Loss(transformer_layer_spec=layer, **arguments)
