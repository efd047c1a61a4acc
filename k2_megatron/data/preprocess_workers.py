"""The workers of preprocessing: processes that make shards, unit after unit, and the parent that hands out the units.

In: the units of a job. Out: their shards, and the workers' `Progress` to a counter, in whatever order it comes. A
worker that dies ends the run, and is named with the file it read.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from k2_megatron.data.encoder import settings_for_workers
from k2_megatron.data.preprocess_job import Job, Progress, Unit
from k2_megatron.data.rejects import Counter
from k2_megatron.data.shards import ShardMaker
from k2_megatron.runtime.memory import keep_freed_buffers

WAIT_SECONDS = 1.0
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # for the workers' tables of words: 3 to 5 % of encoding


def run_workers(
    maker: ShardMaker, units: list[Unit], workers: int, counter: Counter, announce: Callable[[str], None]
) -> None:
    """Have so many processes make the units. RuntimeError where one of them died."""
    crew = _Crew(maker.job, workers)
    waiting = list(reversed(units))
    left = len(units)
    encoders: set[str] = set()  # that were announced; the parent needs none, and saves the time to load one
    try:
        settings = settings_for_workers(maker.tokenizer, maker.job.encoder)  # while they start
        for connection in crew.connections:
            crew.doing[connection] = waiting.pop()
            crew.send(connection, settings)
        for connection, unit in crew.doing.items():
            crew.send(connection, unit)
        while left:
            for ready in wait(list(crew.connections), timeout=WAIT_SECONDS):
                connection = cast(Connection, ready)
                message = crew.receive(connection)
                if isinstance(message, str):
                    if message not in encoders:
                        announce(message)
                    encoders.add(message)
                    continue
                if isinstance(message, Progress):
                    counter(message)
                    continue
                left -= 1
                crew.give(connection, waiting.pop() if waiting else None)
                if crew.doing[connection] is None:
                    crew.connections.pop(connection).join()
    finally:
        crew.end()


class _Crew:
    """The running workers: which connection belongs to whom, and what each is doing."""

    def __init__(self, job: Job, workers: int):
        context = multiprocessing.get_context("spawn")
        os.environ.setdefault("GLIBC_TUNABLES", HUGE_PAGES)
        self.job = job
        self.connections: dict[Connection, Any] = {}
        self.doing: dict[Connection, Unit | None] = {}
        for number in range(workers):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(job, there), name=f"worker {number}", daemon=True)
            process.start()
            there.close()
            self.connections[here] = process
            self.doing[here] = None

    def give(self, connection: Connection, unit: Unit | None) -> None:
        self.doing[connection] = unit
        self.send(connection, unit)

    def send(self, connection: Connection, message: Unit | str | None) -> None:
        try:
            connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise self.death(connection) from None

    def receive(self, connection: Connection) -> Progress | str | None:
        """The next message of a worker: what encodes, Progress, or None for a unit done. It died if its pipe ends."""
        try:
            message = connection.recv()
        except (EOFError, ConnectionResetError):
            raise self.death(connection) from None
        if isinstance(message, Exception):
            raise message
        return message

    def death(self, connection: Connection) -> RuntimeError:
        """What to say of a worker whose pipe has ended."""
        process, unit = self.connections[connection], self.doing[connection]
        process.join(1)
        code = process.exitcode
        how = f"signal {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        source = self.job.sources[unit.source].path if unit else "nothing"
        return RuntimeError(
            f"{process.name} (pid {process.pid}) died with {how} while it read {source}; run the same command again: "
            "finished shards are kept (a SIGKILL is often the system short of memory: fewer --workers)"
        )

    def end(self) -> None:
        for process in self.connections.values():
            process.terminate()
        for process in self.connections.values():
            process.join(2)
            if process.is_alive():
                process.kill()


def _worker(job: Job, connection: Connection) -> None:
    """A worker process: gigatoken's settings and then units in, until None comes; out what encodes, then progress."""
    os.environ["RAYON_NUM_THREADS"] = "1"  # the encoders' own threads would fight the other workers for the cores
    os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # its own allocators copy a long row where it grows
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    keep_freed_buffers()  # or the system clears a piece's pages anew: a tenth of a fast encoder's time
    gc.disable()
    try:
        maker = ShardMaker(job)
        maker.tokenizer  # noqa: B018  loaded while the parent makes the settings
        maker.settings = connection.recv()
        connection.send(encoder_line(maker))
        gc.freeze()  # what is loaded stays: no collection need look at it
        gc.enable()
        while (unit := connection.recv()) is not None:
            maker.run(unit, connection.send)
            connection.send(None)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    except (ValueError, OSError, RuntimeError) as error:
        connection.send(error)


def encoder_line(maker: ShardMaker) -> str:
    return f"encoder: {maker.encoder.name} ({maker.encoder.reason})"
