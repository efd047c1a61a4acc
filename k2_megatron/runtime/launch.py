"""Where this process stands: under torchrun, under srun, or started plainly, when it starts its own local ranks.

In:  the environment that a launcher made and, for a plain start, the number of ranks the layout asks for.
Out: a `RankEnvironment`; or, for a plain start of several ranks, the exit code of the ranks this process supervised.
"""

import ctypes
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from k2_megatron.runtime.mistakes import HUNG, LOST_PEER, MISTAKE, NOT_FINITE, STOPPED

TERMINATE_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
EXPLAINED = (MISTAKE, STOPPED, HUNG, NOT_FINITE)  # the rank itself has told of each of them
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Remedies:
    """What to do, told after a rank was killed, and after some have not ended when others had."""

    killed: str
    late: str


RESUME = Remedies(
    "Start again to resume.",
    "All was saved before the first one left; start again to resume, or to see that the run is finished.",
)


@dataclass(frozen=True)
class RankEnvironment:
    """`launcher` is "torchrun", "srun", "local" (a rank that a plain start began) or "single" (no other ranks)."""

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int


def read_environment(environ: Mapping[str, str] = os.environ) -> RankEnvironment | None:
    """The rank that a launcher gave this process, or None for a plain start."""
    if "RANK" in environ and "WORLD_SIZE" in environ:  # torchrun, or this file's own local ranks
        return RankEnvironment(
            launcher=environ.get("K2_LAUNCHER", "torchrun"),
            rank=int(environ["RANK"]),
            world_size=int(environ["WORLD_SIZE"]),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            address=environ.get("MASTER_ADDR", "127.0.0.1"),
            port=int(environ.get("MASTER_PORT", "29500")),
        )
    # A batch script itself has SLURM_PROCID too; only a step that srun started has a step id and its task count.
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" in environ and "SLURM_STEP_NUM_TASKS" in environ:
        return RankEnvironment(
            launcher="srun",
            rank=int(environ["SLURM_PROCID"]),
            world_size=int(environ["SLURM_STEP_NUM_TASKS"]),
            local_rank=int(environ["SLURM_LOCALID"]),
            address=environ.get("MASTER_ADDR") or _first_host(environ["SLURM_STEP_NODELIST"]),
            # Two jobs on one node must not meet: the port follows the job's number unless MASTER_PORT is set. From
            # 32768 on Linux gives ports to whoever connects to somewhere, and one may be taken by chance.
            port=int(environ.get("MASTER_PORT") or 20000 + int(environ["SLURM_JOB_ID"]) % 12000),
        )
    return None


def _first_host(node_list: str) -> str:
    """The first host of a Slurm node list such as "node[03-10],other1"."""
    if "[" not in node_list:
        return node_list.split(",")[0]
    shown = subprocess.run(["scontrol", "show", "hostnames", node_list], capture_output=True, text=True, check=True)
    return shown.stdout.split()[0]


def single_rank() -> RankEnvironment:
    """A run of one rank, in this process."""
    return RankEnvironment("single", 0, 1, 0, "127.0.0.1", 0)


def run_local_ranks(
    arguments: Sequence[str], world_size: int, leaving_seconds: float, remedies: Remedies = RESUME
) -> int:
    """Start `world_size` ranks of `python arguments...` on this machine, wait for them, return an exit code.

    When a rank dies, the others have `TERMINATE_GRACE_SECONDS` to end by themselves, then they are killed. When one has
    ended well, they have `leaving_seconds`, which must be longer than a rank that hangs takes to end itself. SIGINT and
    SIGTERM are passed on, so that the ranks finish their step and save; so is the death of this process.
    """
    from torch.distributed import TCPStore

    end_with_launcher = _end_with(os.getpid())
    # The store is opened here, on a port the system chooses, so that no rank can find its port taken.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, (os.cpu_count() or 1) // world_size)
    ranks = []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "K2_LAUNCHER": "local",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            # Ranks that each start a thread a core fight over the cores: measured 5x slower with 4 ranks on 2 cores.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
        }
        # A session of their own: Ctrl-C reaches this process alone, which passes it on once.
        program = [sys.executable, *arguments]
        ranks.append(subprocess.Popen(program, env=environment, start_new_session=True, preexec_fn=end_with_launcher))
    return _supervise(ranks, leaving_seconds, remedies)


def _supervise(ranks: Sequence[subprocess.Popen], leaving_seconds: float, remedies: Remedies = RESUME) -> int:
    def pass_on(number: int, _frame) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    # A closed terminal: the ranks are to save and leave, not to train on unseen.
    previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda _number, frame: pass_on(signal.SIGTERM, frame))
    first_left = math.inf
    try:
        while True:
            codes = [process.poll() for process in ranks]
            failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0)]
            if failed:
                return _end_all(ranks, failed, remedies.killed)
            if all(code == 0 for code in codes):
                return 0
            if 0 in codes:
                first_left = min(first_left, time.monotonic())
            if time.monotonic() - first_left > leaving_seconds:
                return _tell_of_late(codes, leaving_seconds, remedies.late)
            time.sleep(_POLL_SECONDS)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _tell_of_late(codes: Sequence[int | None], leaving_seconds: float, remedy: str) -> int:
    """Some ranks have ended well, and the others, which are to be killed, have not: stopped by the system, or in a call
    that does not return. Returns the exit code."""
    late = ", ".join(str(rank) for rank, code in enumerate(codes) if code is None)
    print(
        f"not ended {leaving_seconds:.0f} s after the first that did, and killed: rank {late}. {remedy}",
        file=sys.stderr,
    )
    return HUNG


def _end_all(ranks: Sequence[subprocess.Popen], failed: list[tuple[int, int]], remedy: str) -> int:
    """After a death: give the others a moment to report the same mistake, then end them. Returns the exit code."""
    deadline = time.monotonic() + TERMINATE_GRACE_SECONDS
    while time.monotonic() < deadline and any(process.poll() is None for process in ranks):
        time.sleep(_POLL_SECONDS)
    ended = [(rank, process.poll()) for rank, process in enumerate(ranks)]
    rank, code = _most_telling(failed) if any(code != LOST_PEER for _, code in failed) else _most_telling(ended)
    for process in ranks:
        if process.poll() is None:
            process.kill()
    for process in ranks:
        process.wait()
    if code < 0:
        name = signal.Signals(-code).name
        memory = " Unless somebody did that, dmesg tells whether it was for want of memory." if code == -9 else ""
        print(
            f"rank {rank} was killed by {name}; the other ranks were ended. {remedy}{memory}",
            file=sys.stderr,
        )
        return 128 - code
    if code not in EXPLAINED:
        print(
            f"rank {rank} failed with exit code {code}; the other ranks were ended. Its error stands above.",
            file=sys.stderr,
        )
    return code


def _most_telling(codes: Sequence[tuple[int, int | None]]) -> tuple[int, int]:
    """(rank, exit code) of the rank that knows why: ranks that lost it fail too, and may be seen to end before it."""
    failed = [(rank, code) for rank, code in codes if code not in (None, 0)]
    return min(failed, key=lambda one: (one[1] not in EXPLAINED, one[1] > 0))


def _end_with(launcher: int) -> Callable[[], None] | None:
    """What a rank calls before it is a program of its own: it receives SIGTERM (save and leave; while it imports, end)
    when the process that started it dies, however that dies. None where the system has no such thing."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def call() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != launcher:  # it died meanwhile
            os._exit(LOST_PEER)

    return call


def port_is_free(port: int) -> bool:
    """Whether a server can listen on `port` of this host."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
