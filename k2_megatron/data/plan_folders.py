"""Folders that come whole or not at all: written aside, and given their names together at the end.

In: the names that folders are to have. Out: folders to write in. Two builds of one plan each have their own.
"""

from __future__ import annotations

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
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}.partial")
    try:
        make_folder(aside)
    except OSError as error:
        raise _cannot_be_made(folder, error) from None
    lock = os.open(aside, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks; there nothing is removed either
            fcntl.flock(lock, fcntl.LOCK_EX)
        _remove_abandoned(folder)
        yield aside
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); make room, or name another folder") from None
    finally:
        os.close(lock)
        shutil.rmtree(aside, ignore_errors=True)


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
    named: list[Path] = []
    for folder, aside in asides.items():
        try:
            sync(aside)
            os.replace(aside, folder)
        except OSError as error:
            for done in named:
                os.replace(done, asides[done])
            raise _cannot_be_made(folder, error) from None
        named.append(folder)
    for folder in asides:
        sync(folder.parent)


def write_durably(path: Path, content: bytes | memoryview) -> None:
    """A file that is on the disk when this returns."""
    path.write_bytes(content)
    sync(path)


def _cannot_be_made(folder: Path, error: OSError) -> ValueError:
    return ValueError(f"{folder}: cannot be made ({error.strerror}); name a folder that you may write to")
