"""A process that the kernel kills because its control group is out of memory, as under a batch system's limit."""

import os
import time
from pathlib import Path

# Of version 1 and of version 2: where groups are made, the file of the limit, the file that counts kills
_CONTROLLERS = (
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
)
_WITHIN_SECONDS = 30.0


def kill_for_want_of_memory(pid: int) -> bool:
    """Let a process have no more memory, and wait until the kernel has killed it for asking. False, and nothing done,
    where this machine lets us make no control group for memory (in a container, to a user)."""
    for parent, limit, kills in _CONTROLLERS:
        group = parent / f"k2_megatron_{pid}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            _set(group / limit, "0")
            _set(group / "cgroup.procs", str(pid))
        except OSError:
            pass
        else:
            _wait(lambda file=group / kills: "oom_kill 1" in file.read_text().splitlines(), f"{pid} was not killed")
            return True
        finally:
            _wait(lambda group=group: _removed(group), f"{group} cannot be removed")
    return False


def _set(file: Path, value: str) -> None:
    with file.open("r+") as stream:  # one that is not there is not made
        stream.write(value)


def _removed(group: Path) -> bool:
    try:
        os.rmdir(group)
    except OSError:  # not while the process is on its way out
        return False
    return True


def _wait(arrived, otherwise: str) -> None:
    deadline = time.monotonic() + _WITHIN_SECONDS
    while not arrived():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.05)
