"""Checkpoints as folders and files: written aside, hashed while written, published by a rename, `latest` last.

    checkpoints/step_00000941/    complete: every file of it stands in its manifest k2.json with size and xxh3 hash
    checkpoints/.step_00000941.writing/   a save in progress, or what a kill left of one; removed at the next start
    checkpoints/latest            a text file naming one complete folder

A reader believes a folder only if its manifest is there and every file agrees with it. The manifest is written last
and the folder gets its name last, so a half-written checkpoint cannot be taken for a whole one.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter

from k2_megatron.runtime.durable import make_folder, sync, write_file

MANIFEST = "k2.json"
MANIFEST_FORMAT = 1
_FOLDER = re.compile(r"step_(\d{8,})")
_READ_BYTES = 1 << 22


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file and the remedy."""


class CheckpointVersionError(CheckpointError):
    """A checkpoint that another version of this project wrote: it is not damaged, and must not be passed over."""


def first_cause(error: BaseException) -> str:
    """An error of saving or loading in one line; torch's CheckpointException carries the first cause of each rank."""
    if isinstance(error, CheckpointException):
        rank, (cause, _trace) = next(iter(error.failures.items()))
        if isinstance(cause, CheckpointError):
            return str(cause)
        return f"rank {rank}: {type(cause).__name__}: {cause}"
    return f"{type(error).__name__}: {error}".split("\n")[0]


def folder_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The step a checkpoint folder's name gives. CheckpointError when the name is not a checkpoint's."""
    match = _FOLDER.fullmatch(folder.name)
    if match is None:
        raise CheckpointError(f"{folder} is not a checkpoint folder (its name should look like step_00000941)")
    return int(match.group(1))


# Writing


class _HashingStream:
    """A binary file that hashes what passes through it, in the order written (torch.save never seeks)."""

    def __init__(self, stream) -> None:
        self._stream = stream
        self.digest = xxhash.xxh3_128()
        self.bytes_written = 0

    def write(self, data) -> int:
        self.digest.update(data)
        written = self._stream.write(data)
        self.bytes_written += written
        return written

    def tell(self) -> int:
        return self.bytes_written

    def flush(self) -> None:
        self._stream.flush()

    def fileno(self) -> int:
        self._stream.flush()  # torch asks for it to fsync, and does not flush: the last buffer would not be on the disk
        return self._stream.fileno()

    def close(self) -> None:
        self._stream.close()


class _HashingFileSystem(FileSystem):
    """torch's file system, keeping {file name: {"bytes", "xxh3"}} of all that is written through it."""

    def __init__(self) -> None:
        self.files: dict[str, dict] = {}

    @contextlib.contextmanager
    def create_stream(self, path, mode: str) -> Iterator:
        with super().create_stream(path, mode) as stream:
            if "w" not in mode:
                yield stream
                return
            hashing = _HashingStream(stream)
            yield hashing
        self.files[Path(path).name] = {"bytes": hashing.bytes_written, "xxh3": hashing.digest.hexdigest()}

    def rename(self, path, new_path) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class HashingWriter(FileSystemWriter):
    """torch's checkpoint writer, whose files are hashed as they are written: no second pass over the data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.fs = self._hashing = _HashingFileSystem()

    @property
    def files(self) -> dict[str, dict]:
        """{file name: {"bytes", "xxh3"}} of what was written."""
        return self._hashing.files


def hash_file(path: Path) -> dict:
    """{"bytes", "xxh3"} of a file on disk."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3": digest.hexdigest()}


def start_writing(checkpoints: Path, step: int) -> Path:
    """The empty folder a save of `step` writes into."""
    make_folder(checkpoints)
    aside = checkpoints / f".{folder_name(step)}.writing"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    return aside


def publish(aside: Path, manifest: dict) -> Path:
    """Seal `aside` with its manifest, give it its name, and point `latest` at it. Returns the final folder."""
    checkpoints, step = aside.parent, manifest["step"]
    for name in sorted(path.name for path in aside.iterdir() if path.name not in manifest["files"]):
        manifest["files"][name] = hash_file(aside / name)  # the few small files that megatron-core writes by itself
        sync(aside / name)
    write_file(aside / MANIFEST, json.dumps({"format": MANIFEST_FORMAT, **manifest}, indent=1))
    final = checkpoints / folder_name(step)
    if final.exists():  # a step saved again after a rollback: the old one leaves before the new one comes
        _remove(_set_aside(final, "replaced"))
    os.rename(aside, final)
    sync(checkpoints)
    write_file(checkpoints / "latest", final.name + "\n")
    return final


def _set_aside(folder: Path, why: str) -> Path:
    hidden = folder.with_name(f".{folder.name}.{why}")
    _remove(hidden)
    os.rename(folder, hidden)
    sync(folder.parent)  # before its files go: under its old name it must not come back without them
    return hidden


def _remove(folder: Path) -> None:
    """Remove a folder as far as it goes; of one that is a link, the link alone."""
    if folder.is_symlink():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)


def set_damaged_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that no reader takes it, and nothing of it is lost. CheckpointError when that is
    not allowed."""
    aside = folder.with_name(f"damaged_{folder.name}")
    _remove(aside)
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is damaged and cannot be set aside ({error.strerror}); restore access, or remove it"
        ) from None
    return aside


def remove_unfinished(checkpoints: Path) -> list[str]:
    """Remove what kills left behind; returns the names."""
    left = [path for path in checkpoints.glob(".step_*") if path.is_dir()]
    for path in left:
        _remove(path)
    return sorted(path.name for path in left)


def apply_retention(
    checkpoints: Path, keep_last: int | None, keep_every_steps: int | None, pinned: set[int]
) -> list[int]:
    """Remove checkpoints that no rule keeps; returns their steps. The newest two and `pinned` steps always stay."""
    if keep_last is None:
        return []
    folders = complete_checkpoints(checkpoints)
    newest = {step_of(folder) for folder in folders[: max(2, keep_last)]}
    removed = []
    for folder in folders:
        step = step_of(folder)
        if step in newest or step in pinned or (keep_every_steps and step % keep_every_steps == 0):
            continue
        _remove(_set_aside(folder, "removed"))
        removed.append(step)
    return removed


# Reading


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders with a manifest, newest first. Content is not read: see `verify_files`. CheckpointError when the folder
    may not be read: what cannot be seen is not absent."""
    try:
        if not checkpoints.is_dir():
            return []
        named = [path for path in checkpoints.iterdir() if _FOLDER.fullmatch(path.name)]
        folders = [path for path in named if (path / MANIFEST).is_file()]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); restore access to it") from None
    return sorted(folders, key=step_of, reverse=True)


def latest_checkpoint(checkpoints: Path) -> tuple[Path | None, str | None]:
    """(the checkpoint to resume from, why it is not the one `latest` names).

    (None, None) for a folder that holds no checkpoint at all. An empty, cut or stale `latest` falls back to the
    newest complete folder, with the reason.
    """
    complete = complete_checkpoints(checkpoints)
    pointer = checkpoints / "latest"
    if not pointer.exists():
        if complete:
            return complete[0], f"{pointer} is missing"
        return None, None
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError as error:  # a folder, or a link to one
        name = f"nothing ({error.strerror})"
    named = checkpoints / name
    if _FOLDER.fullmatch(name) and (named / MANIFEST).is_file():
        return named, None
    found = f"{pointer} says {name!r}, which is no complete checkpoint"
    if complete:
        return complete[0], found
    raise CheckpointError(
        f"{found}, and {checkpoints} holds no other; put a checkpoint back, or remove the folder to start over"
    )


def read_manifest(folder: Path) -> dict:
    """The manifest of a complete checkpoint. CheckpointError when it is missing, broken or of another format."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {MANIFEST}: it is not a complete checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); restore access to it") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}); use another checkpoint") from None
    if manifest.get("format") != MANIFEST_FORMAT:
        raise CheckpointVersionError(
            f"{path} has format {manifest.get('format')!r}, this version reads {MANIFEST_FORMAT}; "
            "use the version of k2_megatron that wrote it"
        )
    if manifest["step"] != step_of(folder):
        raise CheckpointError(f"{path} belongs to step {manifest['step']}, not to {folder.name}: files were mixed up")
    return manifest


def verify_files(folder: Path, manifest: dict, part: int = 0, parts: int = 1) -> list[str]:
    """Problems of the `part`-th of `parts` shares of the checkpoint's files: missing, truncated, altered."""
    problems = []
    for name in sorted(manifest["files"])[part::parts]:
        try:
            problem = _problem_of_file(folder / name, manifest["files"][name])
        except OSError as error:
            problem = f"{folder / name} cannot be read ({error.strerror})"
        if problem:
            problems.append(problem)
    return problems


def _problem_of_file(path: Path, expected: dict) -> str | None:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected["bytes"]:
        return f"{path} has {size} bytes, {expected['bytes']} were written"
    if hash_file(path) != expected:
        return f"{path} was altered after it was written (its xxh3 hash differs)"
    return None
