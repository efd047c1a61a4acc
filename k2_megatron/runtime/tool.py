"""The end of a tool: a mistake that its user can mend is one line on stderr and exit code 2; ours is a traceback.

What means something else has a code of its own, which the error carries. mistakes.py does this for programs of several
ranks, and needs torch.
"""

import errno
import os
import sys
from collections.abc import Callable

MISTAKE = 2  # exit codes; 1 is Python's own for an uncaught exception
NOT_SOUND = 1
INTERRUPTED = 130  # as a shell has it for SIGINT
NOBODY_READS = 141  # as it has it for SIGPIPE
_REMEDIES = {
    errno.EACCES: "restore access to it, or give another path",
    errno.EPERM: "restore access to it, or give another path",
    errno.EROFS: "give a place that can be written",
    errno.ENOSPC: "make room, and give the same command again",
    errno.EDQUOT: "make room, and give the same command again",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.EIO: "the disk fails: use another copy",
}


class CheckFailed(ValueError):
    """What was to be checked is not as it was written: the tool did its work, and the answer is no."""

    exit_code = NOT_SOUND


def run_tool(name: str, work: Callable[[], int], *, interrupted: str = "interrupted") -> int:
    """Do the work of the tool `name`; its exit code, or that of the error it raised: `exit_code` where it has one."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read has enough: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is flushed at the exit
        return NOBODY_READS
    except (ValueError, OSError) as error:
        print(f"{name}: {_text(error)}", file=sys.stderr)
        return getattr(error, "exit_code", MISTAKE)
    except KeyboardInterrupt:
        print(f"{name}: {interrupted}", file=sys.stderr)
        return INTERRUPTED


def _text(error: ValueError | OSError) -> str:
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    where = f"{error.filename}: " if error.filename else ""
    if error.strerror != os.strerror(error.errno):  # words of ours, which say what to do
        return f"{where}{error.strerror}"
    return f"{where}{error.strerror}; {_REMEDIES.get(error.errno, 'look at that path, or give another')}"
