"""The size of each layer's gradient and output, step by step: what the journal tells of the layers of a run.

In:  the hidden states that the layers hand on in the forward passes of a step, and the squares of its gradients.
Out: a `LayerNorms`, the same on every rank and, to rounding, in every layout.

The output of a layer is what it adds to and hands on, the residual stream; its root mean square is taken over all
tokens of the global batch. A layer that goes wrong shows here steps before it shows in the loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as distributed

from k2_megatron.kernels.gradient_norm import gradient_norm_squared
from k2_megatron.train.model_chunks import unwrapped
from k2_megatron.train.order_free import order_free_sums
from k2_megatron.train.parts import Parts

DIGITS = 5  # significant ones in the journal: far finer than the noise from step to step


@dataclass(frozen=True)
class LayerNorms:
    """By layer, from the first: the L2 norm of its gradient before clipping, and the root mean square of its output.
    Beside them the gradient norms of the embedding, and of the output projection with the final norm."""

    gradient_norm: tuple[float, ...]
    activation_rms: tuple[float, ...]
    embedding_gradient_norm: float
    output_gradient_norm: float

    def rounded(self) -> dict[str, list[float] | float]:
        """As the journal has it."""
        return {
            "gradient_norm": [_rounded(value) for value in self.gradient_norm],
            "activation_rms": [_rounded(value) for value in self.activation_rms],
            "embedding_gradient_norm": _rounded(self.embedding_gradient_norm),
            "output_gradient_norm": _rounded(self.output_gradient_norm),
        }


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def layer_norms(gradient_squares: Sequence[float], activation_squares: Sequence[float], elements: int) -> LayerNorms:
    """From sums of squares: of the gradients by layer, then embedding, then output (see `gradient_squares`); of the
    outputs by layer, each over `elements` numbers."""
    *layers, embedding, output = (math.sqrt(square) for square in gradient_squares)
    rms = tuple(math.sqrt(square / elements) for square in activation_squares)
    return LayerNorms(tuple(layers), rms, embedding, output)


class ActivationSquares:
    """Adds up the squares of what each layer of this rank hands on, between `begin` and `collect`."""

    def __init__(self, parts: Parts, layers: int, backend: str) -> None:
        self._layers, self._backend, self._device = layers, "torch" if backend == "apex" else backend, parts.device
        self._squares: list[list[torch.Tensor]] | None = None  # [] fp64 of each micro-batch, by layer
        for chunk in parts.chunks:
            model = unwrapped(chunk)
            # Without sequence parallelism every tensor rank holds the same hidden states, and one of them counts.
            if model.config.sequence_parallel or parts.groups.tensor_rank == 0:
                for layer in model.decoder.layers:
                    layer.register_forward_hook(partial(self._add, layer.layer_number - 1))

    def begin(self) -> None:
        self._squares = [[] for _ in range(self._layers)]

    def collect(self, order_free: bool = False) -> list[float]:
        """The sum of each layer over the global batch; with `order_free` the same to the bit whatever the data-parallel
        size."""
        assert self._squares is not None, "collect follows begin"
        squares, self._squares = self._squares, None
        found = torch.zeros(self._layers, dtype=torch.float64, device=self._device)
        if order_free:
            pieces = {index: torch.stack(of_layer) for index, of_layer in enumerate(squares) if of_layer}
            for index, piece in pieces.items():
                found[index] = piece.max()
            return order_free_sums(found, pieces.items())
        for index, of_layer in enumerate(squares):
            for square in of_layer:
                found[index] += square
        distributed.all_reduce(found)
        return found.tolist()

    def _add(self, index: int, _layer: torch.nn.Module, _arguments: tuple, output: tuple) -> None:
        # Full recompute runs a layer twice, the first time without gradients.
        if self._squares is not None and torch.is_grad_enabled():
            hidden_SBH = output[0].detach()
            self._squares[index].append(gradient_norm_squared([hidden_SBH], backend=self._backend))
