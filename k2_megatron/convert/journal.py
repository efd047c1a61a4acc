"""A folder that is being put together: who writes it, and which of its files are finished.

Facts of finished files stand in `finished.jsonl` beside them, a line each; a kill leaves at worst a line cut short.
A second start with the same plan hashes what is there, removes what the journal does not vouch for and does the rest.
A lock beside the folder, held until the result has its own name, keeps a second process out.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from k2_megatron.convert.errors import ConversionError
from k2_megatron.runtime.durable import make_folder
from k2_megatron.train.checkpoints.file_hash import problem_of_file

JOURNAL = "finished.jsonl"


@contextlib.contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keep other conversions out of `folder` (which may not exist yet), from its first file to its last rename.

    ConversionError when another process is at work there. The lock is a file of its own: the folder leaves its name in
    between, and the journal is removed.
    """
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ConversionError(f"{existing} is no folder; give another --save")
    make_folder(folder.parent)
    path = folder.with_name(f"{folder.name}.lock")
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConversionError(f"another process is writing {folder}; wait for it, or give another --save") from None
        except OSError:
            pass  # a file system without locks
        if not (path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat())):
            raise ConversionError(f"another process has just written {folder}; look at its result, then start again")
        try:
            yield
        finally:
            path.unlink()


def begin_or_continue(journal: IO[str], folder: Path, plan: dict[str, Any]) -> dict[str, dict]:
    """What an earlier start of the same plan finished, by file. Begins a journal where there is none."""
    journal.seek(0)
    text = journal.read()
    whole, _newline, cut = text.rpartition("\n")  # the line that a kill cut has no end
    if not whole:
        journal.truncate(0)
        journal.write(json.dumps({"plan": plan}) + "\n")
        journal.flush()
        os.fsync(journal.fileno())
        return {}
    if cut:
        journal.truncate(len((whole + "\n").encode()))
    try:
        begun, *lines = [json.loads(line) for line in whole.splitlines()]
        finished = {line["file"]: line for line in lines}
    except (ValueError, KeyError, TypeError):
        raise ConversionError(f"{folder / JOURNAL} is damaged; remove {folder} and start again") from None
    if begun != {"plan": json.loads(json.dumps(plan))}:
        raise ConversionError(
            f"{folder} was begun by a conversion of other files or options; remove it, or repeat that command"
        )
    return finished


def is_there(folder: Path, facts: dict | None) -> bool:
    """Whether the file that `facts` of the journal tell of is in `folder`, whole."""
    return facts is not None and problem_of_file(folder / facts["file"], facts) is None
