"""What the journal and the console are told of a step that was computed again, or was not applied; and when a run ends
by it.

In:  how to attempt a step, and its batch. Out: what came of it; incidents, the same on every rank; StopRun or
StopNotFinite, which name step, ranks and samples, where no result may be applied.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch.distributed as distributed

from k2_megatron.config.schema import Spikes
from k2_megatron.data.open_feed import AnyFeed
from k2_megatron.runtime.journal import Journal
from k2_megatron.runtime.mistakes import StopNotFinite, StopRun
from k2_megatron.train.attempts import SAME, Attempts, alike, reruns_left, settle
from k2_megatron.train.not_finite import in_words, where_not_finite
from k2_megatron.train.parts import Parts
from k2_megatron.train.replica_gradients import NAMED, gradient_sizes
from k2_megatron.train.spikes.ceiling import Ceiling
from k2_megatron.train.step import StepResult


@dataclass(frozen=True)
class Batch:
    """Of the `step`th step, counted from one: samples first_sample ... end_sample - 1 of `feed`."""

    step: int
    first_sample: int
    end_sample: int
    feed: AnyFeed


@dataclass(frozen=True)
class Settled:
    """What came of a step: the last result, the seconds that it took, and the attempts."""

    batch: Batch
    attempts: Attempts
    result: StepResult
    seconds: float


@dataclass(frozen=True)
class Doubts:
    """Those of a run; `in_vain` is what `computed_in_vain` found."""

    settings: Spikes
    in_vain: tuple[int, int]
    parts: Parts
    journal: Journal
    say: Callable[[str], None]

    def settle(
        self, batch: Batch, attempt: Callable[..., StepResult], ceiling: Ceiling, begin_again: Callable[[], None]
    ) -> Settled:
        """Attempt a step (attempts.settle) as often as it takes."""
        attempts = Attempts(ceiling, reruns_left(self.settings.not_finite_reruns, batch.step, self.in_vain))
        tell = partial(self._made_again, batch)
        return Settled(batch, attempts, *settle(attempts, attempt, self.parts.chunks, tell, begin_again))

    def tell(self, settled: Settled) -> None:
        """Tell what came of computations that were finite and in doubt. StopRun when the last is as well; one that is
        not finite is for `passed_over`."""
        attempts, result = settled.attempts, settled.result
        if not result.finite:
            return
        wrong = []
        for one, sizes in zip(attempts.earlier, attempts.sizes, strict=True):
            if not one.finite:
                continue
            if not alike(one, result.loss, result.grad_norm):
                wrong.append(self._computed_wrongly(settled, one, sizes))
            elif result.updated:
                self._came_again(settled, one)
        if wrong and result.updated:
            self.say(f"step {settled.batch.step} was computed wrongly, made again and taken: {wrong[0]}")
        elif not result.updated:
            self._stop(settled, wrong)

    def passed_over(self, settled: Settled, event: dict, *, end: bool) -> None:
        """Tell of the last computation, which was not finite and not applied; `event` is what the step would have
        written. StopNotFinite where the run is to `end` by it."""
        batch, result = settled.batch, settled.result
        told = self._where_not_finite(batch, result)
        self.journal.write("incident", kind="not finite", made_again=False, **event, **told)
        if end:
            raise StopNotFinite(
                f"step {batch.step}: loss {result.loss}, gradient norm {result.grad_norm}: not finite, "
                f"{settled.attempts.earlier_not_finite + 1} times; "
                f"{in_words(told['ranks'], told['samples_not_finite'])}. The update was not applied; its batch is "
                f"samples {batch.first_sample} to {batch.end_sample - 1}"
            )

    def _made_again(self, batch: Batch, result: StepResult) -> None:
        """Tell of a computation that another one follows, while its gradients are still there."""
        values = {"step": batch.step, "loss": result.loss, "grad_norm": result.grad_norm}
        if result.finite:
            self.journal.write("incident", kind="in doubt", made_again=True, **values)
            why = f"in doubt: loss {result.loss:.6g}, gradient norm {result.grad_norm:.6g}"
        else:
            told = self._where_not_finite(batch, result)
            self.journal.write("incident", kind="not finite", made_again=True, **values, **told)
            why = f"not finite: {in_words(told['ranks'], told['samples_not_finite'])}"
        self.say(f"step {batch.step}: {why}; the step is made again")

    def _where_not_finite(self, batch: Batch, result: StepResult) -> dict[str, dict]:
        return where_not_finite(result, batch.first_sample, self.parts, batch.feed)

    def _came_again(self, settled: Settled, one: StepResult) -> None:
        step, result = settled.batch.step, settled.result
        equal = (one.sample_losses, one.grad_norm) == (result.sample_losses, result.grad_norm)
        ranks = result.apart.ranks if result.apart else {}
        values = {"step": step, "loss": one.loss, "grad_norm": one.grad_norm}
        self.journal.write("incident", kind="came again", equal_to_the_bit=equal, ranks=ranks, **values)
        whose = f" (far larger than in other replicas: {in_words(ranks)})" if ranks else ""
        self.say(f"step {step}: came to the same again, so the data or the weights do it; applied{whose}")

    def _computed_wrongly(self, settled: Settled, one: StepResult, sizes: dict[str, float]) -> str:
        """Write where a computation differs from the last; the place in words."""
        batch, losses = settled.batch, settled.result.sample_losses
        pairs = enumerate(zip(one.sample_losses, losses, strict=True), start=batch.first_sample)
        samples: list[int] = [sample for sample, (before, now) in pairs if before != now][:NAMED]
        ranks = one.apart.ranks if one.apart else _ranks_wrong(sizes, self.parts)
        values = {"step": batch.step, "loss": one.loss, "grad_norm": one.grad_norm}
        self.journal.write("incident", kind="computed wrongly", ranks=ranks, samples=samples, **values)
        return in_words(ranks, samples)

    def _stop(self, settled: Settled, wrong: list[str]) -> None:
        """StopRun: nothing of the step was applied, and why."""
        step, attempts, result = settled.batch.step, settled.attempts, settled.result
        why, remedy = "no two alike", ""
        if result.apart and attempts.is_a_ranks(result.loss, result.apart):
            values = {"loss": result.loss, "grad_norm": result.grad_norm, "ranks": result.apart.ranks}
            self.journal.write("incident", kind="one replica alone", step=step, **values)
            wrong = [in_words(result.apart.ranks), *wrong]
            why = "for one layer on one rank alone, unlike its replicas"
            until = f"until step {step} is saved"
            remedy = f"; if it ends so on other hosts too, take it by spikes.suspect_factor=1e30 {until}"
        norms = ", ".join(f"{one.grad_norm:.6g}" for one in (*attempts.earlier, result))
        where = "; ".join(wrong) or "the journal names the ranks"
        raise StopRun(
            f"step {step}: {len(attempts.earlier) + 1} computations from the same weights and rows are all far "
            f"from the usual, {why} (gradient norms {norms}): {where}. Nothing "
            f"of it was applied. Exclude the host of the rank that is named, and start again{remedy}"
        )


def _ranks_wrong(before: dict[str, float], parts: Parts) -> dict[str, list[str]]:
    """{rank in words: its parameters whose gradients are not of the size that they were, the one that changed most
    first}, the same on every rank.

    Gradients are summed over data-parallel ranks before, so ranks that hold the same parameters are named together.
    """
    changes = {
        name: abs(math.log(max(before[name], 1e-30)) - math.log(max(size, 1e-30)))
        for name, size in gradient_sizes(parts.chunks).items()
        if not math.isclose(before[name], size, rel_tol=SAME)
    }
    mine = sorted(changes, key=lambda name: -changes[name])[:NAMED]
    everywhere: list = [None] * parts.groups.world_size
    distributed.all_gather_object(everywhere, (parts.groups.name, mine))
    return {name: parameters for name, parameters in everywhere if parameters}
