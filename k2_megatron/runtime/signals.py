"""SIGINT, SIGTERM and SIGUSR1 (Slurm's warning before the time limit) ask the run to finish its step, save, leave.

Before the ranks have met there is nothing to save, and each of them ends the process at once.
"""

import signal
from types import FrameType

import torch
import torch.distributed as distributed

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
        self.received = number

    def agreed(self, device: torch.device) -> str | None:
        """The name of the signal if any rank has received one, the same answer on every rank; None otherwise."""
        number = torch.tensor([self.received or 0], dtype=torch.int32, device=device)
        distributed.all_reduce(number, op=distributed.ReduceOp.MAX)
        return signal.Signals(int(number)).name if int(number) else None
