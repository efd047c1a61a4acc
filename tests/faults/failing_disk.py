"""A disk that fails under this process: each call that changes files below a folder is counted, and some give errors.

In:  a folder. Out: how many calls a piece of work makes there, and the same work with the n-th of them failing, alone
or with all that follow. The calls are Python's own (open, write, fsync, mkdir, rename, unlink) and torch.save of a
path, which writes by itself and counts as one.
"""

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path

import torch

CALLS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir")
# What a disk says, and whether it goes on saying so
ERRORS = {errno.ENOSPC: True, errno.EIO: False, errno.EROFS: True, errno.EDQUOT: True}


class FailingDisk:
    """`fail_at(n, error)`: the n-th call from now on (from 0) fails; `mend()`: none does. Patches this process for
    good."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        self.calls: list[str] = []
        self.fails: Callable[[int], int] = lambda _number: 0  # the error of a call, 0 for none
        for name in CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        os.fsync = self._counted("fsync", lambda _descriptor: None)  # the power stays, and waiting for a disk is dear
        builtins.open = io.open = self._open(io.open)
        torch.save = self._saved(torch.save)

    def fail_at(self, number: int, error: int) -> None:
        self.calls.clear()
        goes_on = ERRORS[error]
        self.fails = lambda call: error if call == number or (goes_on and call > number) else 0

    def mend(self) -> None:
        self.calls.clear()
        self.fails = lambda _number: 0

    def call(self, name: str, path: object) -> None:
        """Count a call; OSError when it is one that fails."""
        told = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
        if not told.startswith(self.folder):
            return
        error = self.fails(len(self.calls))
        self.calls.append(f"{name} {told}")
        if error:
            raise OSError(error, os.strerror(error), told)

    def _counted(self, name: str, original: Callable) -> Callable:
        def counted(path, *arguments, **keywords):
            self.call(name, path)
            return original(path, *arguments, **keywords)

        return counted

    def _open(self, original: Callable) -> Callable:
        disk = self

        class Raw(io.FileIO):
            def write(self, data) -> int:
                disk.call("write", self.name)
                return super().write(data)

        def opened(file, mode="r", *arguments, **keywords):
            path = os.fspath(file) if not isinstance(file, int) else ""
            if not str(path).startswith(self.folder) or not set(mode) & set("wax+"):
                return original(file, mode, *arguments, **keywords)
            self.call("open", path)
            raw = Raw(path, mode.replace("b", "").replace("t", ""))
            if 0 in (*arguments, keywords.get("buffering")):
                return raw
            if "b" not in mode:
                return io.TextIOWrapper(io.BufferedWriter(raw), write_through=True)
            return io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)

        return opened

    def _saved(self, original: Callable) -> Callable:
        def save(content, file, *arguments, **keywords):
            if isinstance(file, str | os.PathLike):
                self.call("torch.save", file)
            return original(content, file, *arguments, **keywords)

        return save
