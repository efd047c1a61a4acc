"""The processes of a conversion: started once a command, kept for all of its phases, gone when the command is."""

import ctypes
import multiprocessing
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from k2_megatron.convert.errors import ConversionError
from k2_megatron.runtime.memory import keep_freed_blocks

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Task = TypeVar("Task")


class Workers:
    """`count` processes, started with the first work for more than one of them. With a count of 1, this process."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_unused) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def each(self, run: Callable[[Task], Any], tasks: Sequence[Task]) -> Iterator[tuple[Task, Any]]:
        """(task, run(task)) of every task, as they are done. ConversionError when a process dies."""
        if self.count == 1 or len(tasks) < 2:
            for task in tasks:
                yield task, run(task)
            return
        self._pool = self._pool or process_pool(self.count)
        pickled = pickle.dumps(run)  # once: the tables of a large checkpoint, which it holds, are megabytes
        try:  # a process may also have died since the phase before
            pending = {self._pool.submit(_run_pickled, pickled, task): task for task in tasks}
            for done in as_completed(pending):
                yield pending[done], done.result()
        except BrokenProcessPool:
            raise ConversionError(
                "a worker process died (out of memory, or killed); start the same command again to go on, with fewer "
                "--workers if memory was short"
            ) from None


def _run_pickled(run: bytes, task: Any) -> Any:
    return _unpickled(run)(task)


@lru_cache(maxsize=1)
def _unpickled(run: bytes) -> Callable[[Any], Any]:
    """What a process does in this phase, the same for all tasks: unpickled once."""
    return pickle.loads(run)


def process_pool(workers: int, *, keep_memory: bool = True) -> ProcessPoolExecutor:
    """Processes that import what they need anew, and that die with the one that started them, however it dies."""
    context = multiprocessing.get_context("spawn")
    how = (os.getpid(), keep_memory)
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker, initargs=how)


def _begin_worker(parent: int, keep_memory: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the command speaks, and ends the others
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if keep_memory:
        keep_freed_blocks()
    if os.getppid() != parent:  # it died before the kernel was asked
        os._exit(1)


def resident_bytes() -> int:
    """The largest resident set of this process; getrusage would count that of its parent, whose copy it began as."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
