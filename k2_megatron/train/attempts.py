"""A step that is in doubt is computed again before anything of it is applied, from the same weights and rows.

In:  an attempt at a step, and above which loss and gradient norm it is in doubt: far above the detector's medians
(spikes/ceiling.py), or not finite. Out: the last result, applied or not, the same on every rank.

An attempt that is not applied leaves weights, moments, rows and generators as they were. Sound machines come to the
same result again: a doubtful one that comes again is the data's, or the weights', and is applied for the spike
detector to judge. One that does not come again was a machine's: it is told of, and the run is to the bit what it would
have been. So is, however often it comes, a step that is in doubt for the gradient of one layer on one rank alone, far
larger than its replicas': rows of data enlarge the layers below as well. After MOST computations that are all in doubt,
and no two alike, or a machine's, nothing is applied.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from k2_megatron.runtime.seeds import random_states, restore_random_states
from k2_megatron.train.replica_gradients import Apart, gradient_sizes
from k2_megatron.train.spikes.ceiling import Ceiling
from k2_megatron.train.step import StepResult

MOST = 3  # computations of one step
SAME = 0.01  # share by which two results of one step may differ: kernels that add in any order come far closer


@dataclass
class Attempts:
    """The computations of one step: `earlier` ones, which were not applied, `sizes` of this rank's gradients in each;
    `not_finite_reruns`: how often a result that is not finite is computed again."""

    ceiling: Ceiling
    not_finite_reruns: int
    earlier: list[StepResult] = field(default_factory=list)
    sizes: list[dict[str, float]] = field(default_factory=list)

    def accept(self, loss: float, grad_norm: float, apart: Apart | None) -> bool:
        """Whether a finite result is to be applied."""
        if not self.ceiling.is_passed(loss, grad_norm):
            return True
        return not self.is_a_ranks(loss, apart) and any(alike(one, loss, grad_norm) for one in self.earlier)

    def is_a_ranks(self, loss: float, apart: Apart | None) -> bool:
        """Whether a result is in doubt for one layer's gradient on one rank alone: without it, it would not be."""
        return apart is not None and apart.layer is not None and not self.ceiling.is_passed(loss, apart.others_norm)

    def are_over(self, result: StepResult) -> bool:
        """Whether `result` is the last."""
        if result.updated or result.difference is not None or len(self.earlier) + 1 >= MOST:
            return True
        return not result.finite and self.earlier_not_finite >= self.not_finite_reruns

    @property
    def earlier_not_finite(self) -> int:
        """How many of the computations before the last were not finite."""
        return sum(not one.finite for one in self.earlier)


def alike(one: StepResult, loss: float, grad_norm: float) -> bool:
    """Whether a computation came to the same loss and gradient norm, but for the order of sums."""
    return math.isclose(one.loss, loss, rel_tol=SAME) and math.isclose(one.grad_norm, grad_norm, rel_tol=SAME)


def reruns_left(allowed: int, step: int, in_vain: tuple[int, int]) -> int:
    """How often a result of `step` that is not finite is computed again: `allowed`, but with what an earlier start did
    `in_vain` (the step, how often) no more than MOST in all."""
    step_in_vain, times = in_vain
    return min(allowed, MOST - 1 - (times if step == step_in_vain else 0))


def settle(
    attempts: Attempts,
    attempt: Callable[..., StepResult],
    chunks: Sequence,
    tell: Callable[[StepResult], None],
    begin_again: Callable[[], None],
) -> tuple[StepResult, float]:
    """(the last result of `attempt`, the seconds it took). Each one before it is told of while its gradients are still
    there, then `begin_again` is called. `attempt` is given what accepts a result (`accept`), and whether to `compare`
    replicas: a step in doubt is computed again with weights that are equal everywhere."""
    generators = random_states()
    while True:
        began, result = time.monotonic(), attempt(accept=attempts.accept, compare=bool(attempts.earlier))
        seconds = time.monotonic() - began
        if attempts.are_over(result):
            return result, seconds
        tell(result)
        attempts.earlier.append(result)
        attempts.sizes.append(gradient_sizes(chunks))
        restore_random_states(generators)
        begin_again()
