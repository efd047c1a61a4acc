"""The faults that a resume must not survive unseen."""

import k2_megatron.train.checkpoint as checkpoint
import k2_megatron.train.step as step


def optimizer_not_restored() -> None:
    """The run goes on with moments of zero."""
    checkpoint.restore_optimizer = lambda *_unused: None


def second_moment_not_restored() -> None:
    """One of the two moments is lost."""
    right = checkpoint.restore_optimizer

    def without(optimizer, *rest) -> None:
        right(optimizer, *rest)
        for part in optimizer.chained_optimizers:
            for state in part.optimizer.state.values():
                state["exp_avg_sq"].zero_()

    checkpoint.restore_optimizer = without


def optimizer_step_not_restored() -> None:
    """Adam's bias correction begins anew."""
    right = checkpoint.restore_optimizer
    checkpoint.restore_optimizer = lambda optimizer, loaded, local, _step: right(optimizer, loaded, local, 0)


def next_sample_is_the_first() -> None:
    """The data begins anew."""
    right = step.micro_batches

    def from_start(config, groups, feed, first_sample, *rest):
        return right(config, groups, feed, first_sample - config.consumed_samples_at(3), *rest)

    step.micro_batches = from_start
