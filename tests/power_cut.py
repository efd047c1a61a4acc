"""What a disk may hold after the power goes: every state between what was synced and what was written.

In:  a folder, and code that writes into it while a `Recorder` is active. Out: at each system call that orders writes
(fsync, rename, unlink, mkdir, rmdir) the states that a cut just before it may leave, each as a folder to be made.

Files and folders are told apart by inode; each is held open, so that no number is given out twice. A file's content is
safe as it was at its last fsync, a folder's names as they were at its own; of what came later anything may be missing.
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

ORDERING_CALLS = ("fsync", "rename", "replace", "unlink", "remove", "mkdir", "rmdir")
Names = dict[str, tuple[bool, int]]  # {name: (is a folder, inode)}


@dataclass
class Moment:
    """The tree just before a call: names of each folder and content of each file by inode, as written and as synced."""

    call: str
    names: dict[int, Names]
    contents: dict[int, bytes]
    synced_names: dict[int, Names]
    synced_contents: dict[int, bytes]


def as_written(content: bytes, _synced: bytes) -> bytes:
    return content


def as_synced(_content: bytes, synced: bytes) -> bytes:
    return synced


def torn(content: bytes, synced: bytes) -> bytes:
    """The length is there and what was not synced is zeros: metadata reached the disk before data."""
    same = len(synced) if content.startswith(synced) else 0
    return content[:same] + bytes(len(content) - same)


# name: (whether a folder's unsynced names are there, what of a file is)
WAYS = {
    "killed, no power lost": (True, as_written),
    "nothing that was not synced": (False, as_synced),
    "names without data": (True, torn),
    "data without names": (False, as_written),
}


@dataclass
class Recorder:
    """Active within `with recorder.active():`; keeps a `Moment` for every ordering call below `folder`."""

    folder: Path
    moments: list[Moment] = field(default_factory=list)
    _held: dict[int, int] = field(default_factory=dict)
    _synced_names: dict[int, Names] = field(default_factory=dict)
    _synced_contents: dict[int, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        originals = {name: getattr(os, name) for name in ORDERING_CALLS}
        self._folder_inode = os.stat(self.folder).st_ino
        for name, original in originals.items():
            setattr(os, name, self._recording(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(os, name, original)
            self._note("the end")
            for descriptor in self._held.values():
                os.close(descriptor)

    def _recording(self, name: str, original: Callable) -> Callable:
        def call(*arguments, **keywords):
            self._note(f"{name} {_told(arguments[0])}")
            result = original(*arguments, **keywords)
            if name == "fsync":
                self._sync(arguments[0])
            return result

        return call

    def _note(self, call: str) -> None:
        names, contents = {}, {}
        for path in [self.folder, *self.folder.rglob("*")]:
            inode = self._hold(path)
            if path.is_dir():
                names[inode] = _names_of(path)
            else:
                contents[inode] = path.read_bytes()
        self.moments.append(Moment(call, names, contents, dict(self._synced_names), dict(self._synced_contents)))

    def _hold(self, path: Path) -> int:
        descriptor = os.open(path, os.O_RDONLY)
        inode = os.fstat(descriptor).st_ino
        if self._held.setdefault(inode, descriptor) != descriptor:
            os.close(descriptor)
        return inode

    def _sync(self, descriptor: int) -> None:
        path, inode = Path(os.readlink(f"/proc/self/fd/{descriptor}")), os.fstat(descriptor).st_ino
        if path.is_dir():
            self._synced_names[inode] = _names_of(path)
        else:
            self._synced_contents[inode] = path.read_bytes()

    def states(self, moment: Moment, drawn: int) -> Iterator[tuple[str, Callable[[Path], None]]]:
        """(what is assumed, a function that makes the state as a new folder): each of `WAYS`, and `drawn` in which
        every file and folder takes a way of its own."""
        for way, (later_names, part) in WAYS.items():
            yield way, partial(self._make, moment, self._folder_inode, lambda n=later_names: n, lambda p=part: p)
        for number in range(drawn):
            draw = random.Random(f"{moment.call} {number}")
            choose = partial(draw.choice, [as_written, as_synced, torn])
            yield (
                f"drawn {number}",
                partial(self._make, moment, self._folder_inode, partial(draw.choice, [0, 1]), choose),
            )

    def _make(self, moment: Moment, inode: int, later_names: Callable, part: Callable, target: Path) -> None:
        target.mkdir()
        for name, (is_folder, child) in (moment.names if later_names() else moment.synced_names).get(inode, {}).items():
            if is_folder:
                self._make(moment, child, later_names, part, target / name)
            else:
                synced = moment.synced_contents.get(child, b"")
                (target / name).write_bytes(part()(moment.contents.get(child, synced), synced))


def _names_of(folder: Path) -> Names:
    return {entry.name: (entry.is_dir(), entry.inode()) for entry in os.scandir(folder)}


def _told(argument: int | str | Path) -> str:
    return os.readlink(f"/proc/self/fd/{argument}") if isinstance(argument, int) else str(argument)
