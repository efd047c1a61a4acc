"""The faults that a resume must not survive unseen."""

import k2_megatron.train.checkpoints.load as checkpoint_load
import k2_megatron.train.optimizer as optimizer
import k2_megatron.train.step as step


def optimizer_not_restored() -> None:
    """The run goes on with moments of zero."""
    checkpoint_load.restore_optimizer = lambda *_unused: None


def second_moment_not_restored() -> None:
    """One of the two moments is lost."""
    right = checkpoint_load.restore_optimizer

    def without(restored, *rest) -> None:
        right(restored, *rest)
        for part in restored.chained_optimizers:
            for state in part.optimizer.state.values():
                state["exp_avg_sq"].zero_()

    checkpoint_load.restore_optimizer = without


def optimizer_step_not_restored() -> None:
    """Adam's bias correction begins anew."""
    right = checkpoint_load.restore_optimizer
    checkpoint_load.restore_optimizer = lambda restored, loaded, local, _step: right(restored, loaded, local, 0)


def next_sample_is_the_first() -> None:
    """The data begins anew."""
    right = step.micro_batches

    def from_start(config, parts, feed, first_sample, *rest):
        return right(config, parts, feed, first_sample - config.consumed_samples_at(3), *rest)

    step.micro_batches = from_start


def sums_in_the_order_of_ranks_refused() -> None:
    """No fault, but a guard: on few ranks such a sum in float64 seldom comes out otherwise."""

    def refused(*_arguments, **_keywords) -> None:
        raise AssertionError("a sum whose order depends on the ranks was taken, in spite of gradient leaves")

    optimizer.gradient_norm_squared = step._gathered_losses = refused
