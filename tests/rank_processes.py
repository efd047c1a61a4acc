"""Ranks for tests: processes forked from a server that has imported torch and megatron-core once.

In:  a function, the number of ranks, its arguments. Out: an `Outcome` a rank: exit code, what it printed, what the
function returned. A rank is told its place by the environment, as by any launcher, and meets the others over gloo;
each run has processes of its own, so that nothing of one can reach the next.
"""

import contextlib
import gc
import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

REPOSITORY = Path(__file__).resolve().parents[1]
DEADLINE_SECONDS = 240.0  # ends a test that hangs; none takes a tenth of it
_SERVER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # as many threads as cores in each of several ranks fight over the cores
    "CUDA_VISIBLE_DEVICES": "",  # these tests are about layouts, and need more ranks than a machine may have GPUs
    "PYTHONPATH": str(REPOSITORY),
}


@dataclass(frozen=True)
class Outcome:
    """`exit_code` is negative for the signal that killed the rank, as in `subprocess`; `result` None without one."""

    exit_code: int
    stdout: str
    stderr: str
    result: Any


class Rank:
    """A forked process that runs `function(*arguments)`; its output and result go to files in `folder`."""

    def __init__(self, function: Callable, arguments: tuple, environment: Mapping[str, str], folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.process = _forkserver().Process(
            target=_run, args=(function, arguments, dict(environment), folder), daemon=True
        )
        self.process.start()

    def finish(self, seconds: float = DEADLINE_SECONDS) -> Outcome:
        """Wait for the end. AssertionError, and the process killed, when it does not come within `seconds`."""
        self.process.join(seconds)
        in_time = self.process.exitcode is not None
        if not in_time:
            self.kill()
        outcome = Outcome(
            self.process.exitcode,
            (self.folder / "stdout").read_text(),
            (self.folder / "stderr").read_text(),
            torch.load(self.folder / "result", weights_only=False) if (self.folder / "result").exists() else None,
        )
        assert in_time, f"no end within {seconds} s:\n{outcome.stdout}\n{outcome.stderr}"
        return outcome

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def run_ranks(function: Callable, world_size: int, arguments: tuple, folder: Path) -> list[Outcome]:
    """Run `function(*arguments)` on `world_size` ranks; when one fails, the others are killed."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = [
        Rank(function, arguments, rank_environment(rank, world_size, store.port), folder / f"rank_{rank}")
        for rank in range(world_size)
    ]
    waiting, deadline = {rank.process.sentinel: rank for rank in ranks}, time.monotonic() + DEADLINE_SECONDS
    while waiting and time.monotonic() < deadline:
        for sentinel in multiprocessing.connection.wait(list(waiting), timeout=1.0):
            waiting.pop(sentinel).process.join()
        if any(rank.process.exitcode not in (None, 0) for rank in ranks):
            time.sleep(1.0)  # the others may be about to say the same
            break
    for rank in waiting.values():
        rank.kill()
    return [rank.finish() for rank in ranks]


def results_of(outcomes: list[Outcome]) -> list[Any]:
    """What each rank returned. AssertionError with the first failure's stderr when a rank failed."""
    failed = [outcome for outcome in outcomes if outcome.exit_code > 0] or [
        outcome for outcome in outcomes if outcome.exit_code
    ]
    assert not failed, f"exit code {failed[0].exit_code}:\n{failed[0].stderr}"
    return [outcome.result for outcome in outcomes]


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a plain start tells the ranks that it begins."""
    return {
        "K2_LAUNCHER": "local",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def pretrain(
    ranks: int, config: Path, settings: Sequence[str], folder: Path, fault: Callable[[], None] | None = None
) -> list[Outcome]:
    """`pretrain_k2.py config --set ...`: the ranks that a plain start would begin, or the plain start of one rank."""
    arguments = ([str(config), *(part for setting in settings for part in ("--set", setting))], fault)
    if ranks == 1:
        return [Rank(run_pretrain, arguments, {}, folder).finish()]
    return run_ranks(run_pretrain, ranks, arguments, folder)


def run_pretrain(arguments: list[str], fault: Callable[[], None] | None = None) -> None:
    """pretrain_k2.py with these arguments, in this process, which has its imports behind it; then the exit."""
    import pretrain_k2
    from k2_megatron.runtime.mistakes import leave, run_program

    if fault is not None:
        fault()
    leave(lambda: run_program(pretrain_k2.main, arguments))


def _forkserver() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain_k2", "transformers.models.llama.modeling_llama"])
    with _environment(_SERVER_ENVIRONMENT):
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _run(function: Callable, arguments: tuple, environment: dict[str, str], folder: Path) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        with open(folder / name, "wb") as file:
            os.dup2(file.fileno(), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    os.environ.update(environment)
    gc.freeze()  # megatron-core collects garbage now and then, and would look through all that the server imported
    result = function(*arguments)
    torch.save(result, folder / "result")
    sys.stdout.flush()
    sys.stderr.flush()
