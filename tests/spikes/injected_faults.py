"""Faults put into a real run from a step on, as a machine, a file or a person would: what the spike detector must find.

Each is called in the rank before it starts, with the steps (numbered as in the journal) in which it acts. What acts
once, acts in the first.
"""

import numpy as np
import torch

BATCH = 8  # samples a step, in the runs of these tests
BAD_ROWS = (2, 3, 6)  # of each batch
STEADY = [  # no evaluation, one learning rate
    "train.evaluate_every_steps=",
    "train.evaluate_batches=",
    "data.held_out=",
    "optimizer.schedule=constant",
    "optimizer.min_learning_rate=",
    "optimizer.learning_rate=2e-3",
]
WATCHED = [
    *STEADY,
    f"train.micro_batch={BATCH}",
    "spikes.window_steps=32",
    "spikes.benign_steps=20",
]


def leave_after(step: int) -> None:
    """The run saves after `step`, and ends: pretrain_k2.py's --until."""
    import pretrain_k2

    train = pretrain_k2.train
    pretrain_k2.train = lambda config, environment, device, until, given, ending: train(
        config, environment, device, step, given, ending
    )


def _change_rows(change, steps: range) -> None:
    from k2_megatron.data.feed import Feed

    read = Feed._read

    def rows(self, first_sample, count):
        tokens = read(self, first_sample, count).copy()
        for number in range(count):
            sample = first_sample + number
            if sample // BATCH + 1 in steps:
                change(tokens[number], sample)
        return tokens

    Feed._read = rows


def garbage_rows(steps: range) -> None:
    """Three rows of each batch are random bytes."""

    def change(row, sample):
        if sample % BATCH in BAD_ROWS:
            row[:] = np.random.default_rng(sample).integers(1, 256, len(row))

    _change_rows(change, steps)


def one_garbage_row(steps: range) -> None:
    """One row of each batch is random bytes: it is an eighth of the loss here, a two-thousandth in K2."""

    def change(row, sample):
        if sample % BATCH == BAD_ROWS[0]:
            row[:] = np.random.default_rng(sample).integers(1, 256, len(row))

    _change_rows(change, steps)


def repeated_tokens(steps: range) -> None:
    """Two rows of each batch repeat one token that the text never has, each time another: a damaged document."""

    def change(row, sample):
        if sample % BATCH in BAD_ROWS[:2]:
            row[:] = 128 + sample % 127

    _change_rows(change, steps)


def label_noise(steps: range) -> None:
    """A tenth of all tokens are others."""

    def change(row, sample):
        random = np.random.default_rng(sample)
        wrong = random.random(len(row)) < 0.1
        row[wrong] = random.integers(1, 256, wrong.sum())

    _change_rows(change, steps)


def learning_rate_jump(steps: range) -> None:
    """The learning rate is twenty times what it should be."""
    import pretrain_k2

    right = pretrain_k2.learning_rate_at
    pretrain_k2.learning_rate_at = lambda config, step: right(config, step) * (20.0 if step + 1 in steps else 1.0)


def _before_step(act, steps: range) -> None:
    import pretrain_k2

    train_step = pretrain_k2.train_step

    def with_fault(config, parts, feed, step, **more):
        if step + 1 == steps[0]:
            act(parts)
        return train_step(config, parts, feed, step, **more)

    pretrain_k2.train_step = with_fault


def flipped_weight_bit(steps: range) -> None:
    """The highest bit of the exponent of one weight of the third layer."""

    def flip(parts):
        from k2_megatron.train.model_chunks import unwrapped

        weight = unwrapped(parts.chunks[0]).decoder.layers[2].mlp.linear_fc2.weight
        bits = weight.data.view(-1).view(torch.int32)
        bits[5] ^= 1 << 30

    _before_step(flip, steps)


def corrupted_moment(steps: range) -> None:
    """The first moments of one matrix of the second layer are far too large, and its updates with them."""

    def corrupt(parts):
        from k2_megatron.train.model_chunks import unwrapped

        weight = unwrapped(parts.chunks[0]).decoder.layers[1].mlp.linear_fc1.weight
        (part,) = parts.optimizer.chained_optimizers
        part.optimizer.state[weight]["exp_avg"].mul_(300.0)

    _before_step(corrupt, steps)


SPIKES = (
    garbage_rows,
    one_garbage_row,
    repeated_tokens,
    label_noise,
    learning_rate_jump,
    flipped_weight_bit,
    corrupted_moment,
)
