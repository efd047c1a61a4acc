"""Folders that come whole or not at all: written aside, and given their names together at the end.

In: the names that folders are to have. Out: folders to write in. Two builds of one plan each have their own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from k2_megatron.runtime.durable import make_folder, sync

MARK = "[0-9a-f]" * 8  # what `secrets` draws


@contextmanager
def folder_aside(folder: Path) -> Iterator[Path]:
    """A folder to write in beside `folder`; it goes at the end, unless it was given its name. It is locked meanwhile:
    what is found without a lock, a killed build has left behind. ValueError where it cannot be made or written."""
    try:
        aside, lock = _make_locked(folder)
    except OSError as error:
        raise _cannot_be_made(folder, error) from None
    try:
        _remove_abandoned(folder)
        yield aside
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        room = "make room, or " if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        raise ValueError(f"{folder}: cannot be written ({error.strerror}{where}); {room}name another folder") from None
    finally:
        os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


def _make_locked(folder: Path) -> tuple[Path, int]:
    """A folder beside `folder`, and its lock. One that another build finds before the lock is on, it removes."""
    while True:
        aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
        make_folder(aside)
        with suppress(FileNotFoundError):
            lock = os.open(aside, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks; there nothing is removed either
                fcntl.flock(lock, fcntl.LOCK_EX)
            if aside.exists():
                return aside, lock
            os.close(lock)


def _remove_abandoned(folder: Path) -> None:
    for path in folder.parent.iterdir():
        if not (path.name.startswith(f"{folder.name}.") and path.match(f"*.{MARK}.partial")):
            continue
        with suppress(OSError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(lock)


def give_names(asides: dict[Path, Path]) -> None:
    """Rename each folder aside to the name it was made for, all or none. ValueError where a name was taken."""
    for aside in asides.values():  # all of them first: a kill between two renames leaves a part of them
        sync(aside)
    tried: list[Path] = []
    try:
        for folder, aside in asides.items():
            tried.append(folder)
            os.replace(aside, folder)
        for folder in asides:
            sync(folder.parent)
    except BaseException as error:
        for folder in tried:
            if not asides[folder].exists():
                os.replace(folder, asides[folder])
        if isinstance(error, OSError):
            raise _cannot_be_made(tried[-1], error) from None
        raise


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """A file that is on the disk when this returns."""
    path.write_bytes(content)
    sync(path)


def _cannot_be_made(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"{folder}: cannot be made ({error.strerror}); name a folder that you may write to")
