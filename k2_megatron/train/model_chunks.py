"""The chunks of the model that a rank holds, one or, with virtual pipeline stages, several: the GPTModel in each, and
every parameter by its global name."""

from collections.abc import Iterator, Sequence

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.module import MegatronModule


def unwrapped(chunk: MegatronModule) -> GPTModel:
    """The GPTModel inside DistributedDataParallel and Float16Module."""
    while not isinstance(chunk, GPTModel):
        chunk = chunk.module
    return chunk


def named_parameters(chunks: Sequence) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of all that a rank holds; layers are counted over the whole model, from 0."""
    for chunk in map(unwrapped, chunks):
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:  # whose third part is the number within the chunk
                parts[2] = str(chunk.decoder.layers[int(parts[2])].layer_number - 1)
            yield ".".join(parts), parameter
