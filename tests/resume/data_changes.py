"""What a rank does to tell which rows it was fed, or to die at the wrong moment, while its batch or length changes."""

import os
import signal
from pathlib import Path

import numpy


def fed_rows_are_kept(folder: Path) -> None:
    """Every call of the training feed leaves its rows in `folder`, in a file named by length and first sample."""
    from k2_megatron.data.blended import BlendedFeed
    from k2_megatron.data.feed import Feed

    def kept(tokens):
        def and_keep(self, first_sample, count):
            rows = tokens(self, first_sample, count)
            numpy.save(folder / f"{self.fingerprint}_{self.sequence_length}_{first_sample}.npy", rows)
            return rows

        return and_keep

    for feed in (Feed, BlendedFeed):
        feed.tokens = kept(feed.tokens)


def killed_in_step_5() -> None:
    import pretrain_k2

    train_step = pretrain_k2.train_step

    def dies(config, parts, feed, step, **more):
        if step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(config, parts, feed, step, **more)

    pretrain_k2.train_step = dies


def killed_when_the_ledger_is_told() -> None:
    """The position is in the ledger, and no checkpoint follows."""
    from k2_megatron.train.checkpoints.save import CheckpointWriter

    CheckpointWriter.save = lambda *_unused: os.kill(os.getpid(), signal.SIGKILL)


def spike_at_step_5(then_killed: bool) -> None:
    """The run goes back by itself, once, to before step 2."""
    import pretrain_k2
    from k2_megatron.train.spikes.detector import Finding

    observe, found = pretrain_k2.SpikeWatch.observe, []

    def malignant(self, event, losses):
        observe(self, event, losses)
        if event["step"] == 5 and not found:
            found.append(Finding("malignant", 5, 2, 4, 30.0, 9.0, 1.5, 0.3))
            return found[0]
        if found and then_killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return None

    pretrain_k2.SpikeWatch.observe = malignant
