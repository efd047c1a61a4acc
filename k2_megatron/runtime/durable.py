"""Files that survive a power cut: a name is safe when its folder was synced, a content when the file was."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
ASIDE = ".writing"  # ends the name of what is being written and has no name of its own yet
SYNC_FILE_RANGE_WRITE = 2  # fcntl.h


def write_file(path: Path, text: str) -> None:
    """Write a small text file so that a reader sees the old one or the new one, never a part. OSError names `path`."""
    aside = path.with_name(f".{path.name}{ASIDE}")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from None
    sync(path.parent)


def sync(path: Path) -> None:
    """Make the content of a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writing_back(descriptor: int, first: int, size: int) -> None:
    """Have the system begin to write these bytes of a file to the disk and go on at once, so that a later fsync finds
    little left to do. Where the system has no such call nothing happens."""
    call = _sync_file_range()
    if call is not None:
        call(descriptor, first, size, SYNC_FILE_RANGE_WRITE)  # an error shows in the fsync


@cache
def _sync_file_range() -> Any:
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux; Python's os has none
    if call is not None:
        call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, unless they are there, so that they survive a power cut."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync(made.parent)


class Refusal(ValueError):
    """What a disk did not take, and may take when it is tried again; `brief` is what to say when it is not given up."""

    def __init__(self, message: str, brief: str) -> None:
        super().__init__(message)
        self.brief = brief


def persist(
    action: Callable[[], T],
    seconds: float,
    refusal: type[ValueError],
    *,
    say: bool = True,
    again: Callable[[], None] = lambda: None,
) -> T:
    """What `action` returns; while it raises `refusal` it is tried again, after pauses of `seconds` in all: ranks that
    do so together try as often, whatever their clocks say. Each try is told of, unless another rank does (`say`
    False); `again` is called before it."""
    for pause in pauses(seconds):
        try:
            return action()
        except refusal as error:
            if say:
                brief = error.brief if isinstance(error, Refusal) else error
                print(f"{brief}; trying again in {pause:.0f} s", file=sys.stderr, flush=True)
            time.sleep(pause)
            again()
    return action()


def pauses(seconds: float) -> Iterator[float]:
    """How long to wait after each try of what a disk refuses, for `seconds` in all: 1, 2, 4 ... 30, 30."""
    pause = 1.0
    while seconds > 0:
        yield min(pause, seconds)
        seconds -= pause
        pause = min(2 * pause, 30.0)
