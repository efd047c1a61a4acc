"""A training in which every module's result is moved by a rounding: what the order of summation may do, and no more.

In:  the chunks of a model. Out: the same chunks, whose modules hand on results, and gradients on the way back, that are
multiplied, element by element, by 1 + d, d uniform within one unit in the last place of their precision (Parker 1997,
Monte Carlo Arithmetic).

A layout adds up in another order, and so moves each result by some units in its last place. How far such a move comes,
through the layers, the steps and Adam's division by a small root, no formula tells well; a repeat with it shows.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from k2_megatron.runtime.groups import Groups


def perturb(chunks: Sequence[torch.nn.Module], groups: Groups, number: int) -> None:
    """Have every module of `chunks` move its results; `number` is that of the repeat, each with numbers of its own.

    Tensor ranks, which hold some tensors alike, move them alike.
    """
    for index, chunk in enumerate(chunks):
        device = next(chunk.parameters()).device
        place = (index, groups.pipeline_rank, groups.context_rank, groups.data_rank)
        generator = torch.Generator(device).manual_seed(hash((number, *place)) % 2**63)  # of integers alone: fixed
        for module in chunk.modules():
            module.register_forward_hook(partial(_moved_result, generator))


def _moved_result(generator: torch.Generator, _module: torch.nn.Module, _arguments: tuple, result: Any) -> Any:
    if isinstance(result, tuple):
        return tuple(_moved_result(generator, _module, _arguments, part) for part in result)
    if torch.is_tensor(result) and result.is_floating_point():
        return _Moved.apply(result, generator)
    return result


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        ctx.generator = generator
        return moved(values, generator)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return moved(gradients[0], ctx.generator), None


def moved(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """`values` * (1 + d), |d| at most one unit in the last place."""
    size = torch.finfo(values.dtype).eps
    shifts = torch.empty_like(values, dtype=torch.float32).uniform_(-size, size, generator=generator)
    return torch.addcmul(values, values, shifts.to(values.dtype))
