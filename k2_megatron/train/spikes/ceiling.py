"""Above what loss and gradient norm a step is in doubt, by the detector's own medians: which no step of a sound run
passes but at the onset of a spike, and a flipped bit of an exponent does."""

import math
from dataclasses import dataclass
from statistics import median

from k2_megatron.train.spikes.detector import State

FEWEST = 16  # values that a median is taken of: as many as the smallest window


@dataclass(frozen=True)
class Ceiling:
    """The loss, and the gradient norm, above which a step is in doubt."""

    loss: float = math.inf
    grad_norm: float = math.inf

    def is_passed(self, loss: float, grad_norm: float) -> bool:
        return loss > self.loss or grad_norm > self.grad_norm


def ceiling(state: State, factor: float) -> Ceiling:
    """`factor` times the medians; none before there are values enough, and none during a spike that was called: its
    steps are known to be far from the medians, which stand still."""
    if len(state.losses) < FEWEST or state.trip is not None:
        return Ceiling()
    return Ceiling(factor * median(state.losses), factor * math.exp(median(state.log_norms)))
