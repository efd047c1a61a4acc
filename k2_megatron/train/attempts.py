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

import torch.distributed as distributed

from k2_megatron.runtime.groups import Groups
from k2_megatron.runtime.mistakes import StopRun
from k2_megatron.runtime.seeds import random_states, restore_random_states
from k2_megatron.train.journal import Journal
from k2_megatron.train.not_finite import in_words
from k2_megatron.train.replica_gradients import NAMED, Apart, gradient_sizes
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
        return not self.is_a_ranks(loss, apart) and any(_alike(one, loss, grad_norm) for one in self.earlier)

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


def _alike(one: StepResult, loss: float, grad_norm: float) -> bool:
    return math.isclose(one.loss, loss, rel_tol=SAME) and math.isclose(one.grad_norm, grad_norm, rel_tol=SAME)


def settle(
    attempts: Attempts,
    attempt: Callable[[Callable[[float, float, Apart | None], bool], bool], StepResult],
    chunks: Sequence,
    tell: Callable[[StepResult], None],
) -> tuple[StepResult, float]:
    """(the last result of `attempt`, the seconds it took). Each one before it is told of while its gradients are still
    there. `attempt` is given what accepts a result, and whether to compare replicas: a step in doubt is computed again
    with weights that are equal everywhere."""
    generators = random_states()
    while True:
        began, result = time.monotonic(), attempt(attempts.accept, bool(attempts.earlier))
        seconds = time.monotonic() - began
        if attempts.are_over(result):
            return result, seconds
        tell(result)
        attempts.earlier.append(result)
        attempts.sizes.append(gradient_sizes(chunks))
        restore_random_states(generators)


def tell_of_doubts(
    attempts: Attempts, result: StepResult, step: int, first_sample: int, chunks: Sequence, groups: Groups,
    journal: Journal, say: Callable[[str], None],
) -> None:  # fmt: skip
    """Write what came of attempts at `step` that were finite and in doubt. StopRun when the last one is as well; one
    that is not finite is told of elsewhere."""
    if not result.finite:
        return
    wrong = []
    for number, one in enumerate(attempts.earlier):
        if not one.finite:
            continue
        values = {"step": step, "loss": one.loss, "grad_norm": one.grad_norm}
        if _alike(one, result.loss, result.grad_norm):
            if result.updated:
                equal = (one.sample_losses, one.grad_norm) == (result.sample_losses, result.grad_norm)
                ranks = result.apart.ranks if result.apart else {}
                journal.write("incident", kind="came again", equal_to_the_bit=equal, ranks=ranks, **values)
                whose = f" (far larger than in other replicas: {in_words(ranks)})" if ranks else ""
                say(f"step {step}: came to the same again, so the data or the weights do it; applied{whose}")
            continue
        pairs = enumerate(zip(one.sample_losses, result.sample_losses, strict=True), start=first_sample)
        samples: list[int] = [sample for sample, (before, now) in pairs if before != now][:NAMED]
        ranks = one.apart.ranks if one.apart else _ranks_wrong(attempts.sizes[number], chunks, groups)
        journal.write("incident", kind="computed wrongly", ranks=ranks, samples=samples, **values)
        wrong.append(in_words(ranks, samples))
    if wrong and result.updated:
        say(f"step {step} was computed wrongly, made again and taken: {wrong[0]}")
    elif not result.updated:
        _stop(attempts, result, step, wrong, journal)


def _stop(attempts: Attempts, result: StepResult, step: int, wrong: list[str], journal: Journal) -> None:
    """StopRun: nothing of the step was applied, and why."""
    why, remedy = "no two alike", ""
    if result.apart and attempts.is_a_ranks(result.loss, result.apart):
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "ranks": result.apart.ranks}
        journal.write("incident", kind="one replica alone", step=step, **values)
        wrong = [in_words(result.apart.ranks), *wrong]
        why = "for one layer on one rank alone, unlike its replicas"
        remedy = f"; if it ends so on other hosts too, take it by spikes.suspect_factor=1e30 until step {step} is saved"
    norms = ", ".join(f"{one.grad_norm:.6g}" for one in (*attempts.earlier, result))
    place = "; ".join(wrong) or "the journal names the ranks"
    raise StopRun(
        f"step {step}: {len(attempts.earlier) + 1} computations from the same weights and rows are all far from "
        f"the usual, {why} (gradient norms {norms}): {place}. Nothing "
        f"of it was applied. Exclude the host of the rank that is named, and start again{remedy}"
    )


def _ranks_wrong(before: dict[str, float], chunks: Sequence, groups: Groups) -> dict[str, list[str]]:
    """{rank in words: its parameters whose gradients are not of the size that they were, the one that changed most
    first}, the same on every rank.

    Gradients are summed over data-parallel ranks before, so ranks that hold the same parameters are named together.
    """
    changes = {
        name: abs(math.log(max(before[name], 1e-30)) - math.log(max(size, 1e-30)))
        for name, size in gradient_sizes(chunks).items()
        if not math.isclose(before[name], size, rel_tol=SAME)
    }
    mine = sorted(changes, key=lambda name: -changes[name])[:NAMED]
    everywhere: list = [None] * groups.world_size
    distributed.all_gather_object(everywhere, (groups.name, mine))
    return {name: parameters for name, parameters in everywhere if parameters}
