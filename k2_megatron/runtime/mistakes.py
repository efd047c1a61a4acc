"""The end of a program: a user's mistake is one line on stderr and exit code 2, said by one rank; ours is a traceback.

Our functions raise ValueError for what a user can mend. A ValueError that torch or megatron-core raises is not that:
it keeps its traceback.
"""

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch.distributed as distributed

from k2_megatron.runtime.tool import INTERRUPTED, MISTAKE

_PACKAGE = Path(__file__).resolve().parents[1]
_OURS = (f"{_PACKAGE}{os.sep}", f"{_PACKAGE.parent / 'tools'}{os.sep}", str(_PACKAGE.parent / "pretrain_k2.py"))
STOPPED = 3  # exit codes, beside those of tools
HUNG = 4  # the watchdog ended the rank (train/watchdog.py)
NOT_FINITE = 5
LOST_PEER = 1  # as an uncaught exception: start again to resume
_LISTENING_SECONDS = 0.5
_LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # gloo's words


class StopRun(RuntimeError):
    """The run ends for a reason that is no mistake of the user's: the message says it and what to do; exit code 3."""

    exit_code = STOPPED


class StopNotFinite(StopRun):
    """A loss or gradient was not finite, and its update was not applied: whoever starts runs may have the step made
    again, for the machine may have erred; exit code 5."""

    exit_code = NOT_FINITE


class RanksDidNotMeet(StopRun):
    """Not all ranks came to the meeting point, or something else answers there: each rank tells of it, exit code 1."""

    exit_code = LOST_PEER


class RankMistake(ValueError):
    """A mistake that only this rank can see, so that this rank must speak."""


def run_program(main: Callable[[list[str]], int], arguments: list[str]) -> int:
    """Run `main(arguments)`; its exit code, or that of the mistake it raised."""
    try:
        return main(arguments)
    except StopRun as stop:
        _say_once(str(stop), stop)
        return stop.exit_code
    except ValueError as error:
        if not _is_ours(error):
            raise
        _say_once(f"error: {error}", error)
        return MISTAKE
    except KeyboardInterrupt:
        print("interrupted; start again to resume from the last save", file=sys.stderr, flush=True)
        return INTERRUPTED
    except RuntimeError as error:
        if not any(words in str(error) for words in _LOST_PEER):
            raise
        # The rank that died has the story; a traceback of each one that noticed would bury it.
        print("this rank lost its connection to another rank, which died or was ended", file=sys.stderr, flush=True)
        return LOST_PEER


def leave(program: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `program`, or with 1 and a traceback. When it is not 0, at once: a save in
    the background is not waited for, since the ranks that it needs may be gone."""
    try:
        code = program()
    except SystemExit:
        raise
    except BaseException:  # torch's of checkpoints is one, too
        traceback.print_exc()
        code = 1
    if code:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # another Ctrl-C must not keep the process
        sys.stdout.flush()
        sys.stderr.flush()
        if distributed.is_initialized() and distributed.get_rank() == 0:
            time.sleep(_LISTENING_SECONDS)  # its store is asked by the others who of them speaks
        os._exit(code)
    sys.exit(0)


def _is_ours(error: BaseException) -> bool:
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return os.path.abspath(raised_in).startswith(_OURS)


def _say_once(text: str, error: BaseException) -> None:
    """Print on one rank: the first that asks the store, or rank 0 before there is a store."""
    if distributed.is_initialized():
        key = "said/" + hashlib.sha256(text.encode()).hexdigest()
        try:
            if distributed.distributed_c10d._get_default_store().add(key, 1) > 1:
                return
        except RuntimeError:  # the store left with its rank: better twice than not at all
            pass
    elif os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0" and not isinstance(
        error, RankMistake | RanksDidNotMeet
    ):
        return
    print(text, file=sys.stderr, flush=True)
