"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning before the time limit) ask the run to finish its step, save, leave.

Before the ranks have met there is nothing to save, and each of them ends the process at once.
"""

import signal
from types import FrameType

import torch
import torch.distributed as distributed

SAVE_FAILED = "a save that failed"
_ASKS_TO_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def end_at_once() -> None:
    """Have SIGINT end the process as the others do. Python's own handler would wait until the ranks have met: a library
    waits there, for minutes when one is missing, and no handler runs before it returns."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopSignals:
    """Remembers the first signal; a second SIGINT raises KeyboardInterrupt, for a person who will not wait."""

    def __init__(self) -> None:
        self.received: int | None = None
        for number in _ASKS_TO_STOP:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or number

    def agreed(self, device: torch.device, *, save_failed: bool = False) -> str | None:
        """Why to stop, the same on every rank: SAVE_FAILED if `save_failed` on any, else the name of the signal if any
        has received one; None otherwise."""
        told = torch.tensor([self.received or 0, save_failed], dtype=torch.int32, device=device)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX)
        number, failed = told.tolist()
        if failed:
            return SAVE_FAILED
        return signal.Signals(number).name if number else None
