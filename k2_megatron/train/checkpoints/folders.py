"""Checkpoints as folders and files: written aside, hashed while written, published by a rename, `latest` last.

    checkpoints/step_00000941/    complete: every file of it stands in its manifest k2.json with size and hash
    checkpoints/.step_00000941.writing/   a save in progress, or what a kill left of one; removed at the next start
    checkpoints/latest            a text file naming one complete folder

A reader believes a folder only if its manifest is there and every file agrees with it. The manifest is written last
and the folder gets its name last, so a half-written checkpoint cannot be taken for a whole one.
"""

import contextlib
import os
import shutil
from pathlib import Path

from k2_megatron.runtime.durable import ASIDE, make_folder, sync, write_file
from k2_megatron.train.checkpoints.file_hash import hash_file
from k2_megatron.train.checkpoints.manifest import (
    FOLDER,
    MANIFEST,
    CheckpointError,
    folder_name,
    manifest_text,
    step_of,
)


def first_cause(error: BaseException) -> str:
    """An error of saving or loading in one line; torch's CheckpointException carries the first cause of each rank.

    Raises KeyboardInterrupt when that is what a rank was told: torch.distributed.checkpoint catches it as it catches
    errors, and whoever does not want to wait would be told that the checkpoint is bad.
    """
    from torch.distributed.checkpoint.api import CheckpointException  # conversions publish, and do without torch

    if isinstance(error, CheckpointException):
        if any(isinstance(cause, KeyboardInterrupt) for cause, _trace in error.failures.values()):
            raise KeyboardInterrupt
        rank, (cause, _trace) = next(iter(error.failures.items()))
        if isinstance(cause, CheckpointError):
            return str(cause)
        return f"rank {rank}: {_in_words(cause)}"
    return _in_words(error).split("\n")[0]


def _in_words(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    # torch's zip writer closes the file as well after a write that the disk refused, and tells of that error alone.
    of_the_disk = ("inline_container" in text and "unexpected pos" in text) or "iostream error" in text
    return f"{text} (the disk may be full)" if of_the_disk else text


_REPLACED = "replaced"

# Writing


def aside_folder(checkpoints: Path, step: int) -> Path:
    """The folder a save of `step` writes into, until it gets its name."""
    return checkpoints / f".{folder_name(step)}{ASIDE}"


def start_writing(checkpoints: Path, step: int) -> Path:
    """Make that folder, empty."""
    make_folder(checkpoints)
    aside = aside_folder(checkpoints, step)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(aside)
    aside.mkdir()
    return aside


def publish(aside: Path, manifest: dict) -> Path:
    """Seal `aside` with its manifest, give it its name, and point `latest` at it. Returns the final folder."""
    checkpoints, step = aside.parent, manifest["step"]
    for name in sorted(path.name for path in aside.iterdir() if path.name not in manifest["files"]):
        manifest["files"][name] = hash_file(aside / name)  # the few small files that megatron-core writes by itself
        sync(aside / name)
    write_file(aside / MANIFEST, manifest_text(manifest))
    final = checkpoints / folder_name(step)
    replaced = _hide(final, _REPLACED) if os.path.lexists(final) else None  # a step saved again
    try:
        os.rename(aside, final)
    except OSError:
        if replaced:
            os.rename(replaced, final)
        raise
    sync(checkpoints)
    write_file(checkpoints / "latest", final.name + "\n")
    if replaced:  # not before the new one is there for good: a kill between the renames must not cost both
        _remove(replaced)
    return final


def _hide(folder: Path, why: str) -> Path:
    """Rename a folder so that no reader sees it; what it is called now."""
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
    aside = free_name(folder.with_name(f"damaged_{folder.name}"))  # one of the same step may be there, as evidence
    try:
        os.rename(folder, aside)
    except OSError as error:
        raise CheckpointError(
            f"{folder} is damaged and cannot be set aside ({error.strerror}); restore access, or remove it"
        ) from None
    return aside


def set_incomplete_aside(checkpoints: Path) -> list[str]:
    """Rename folders that have a checkpoint's name and no manifest: they lost it, since a save gives the name last.
    Returns their new names; the step may be saved again, and nothing of them is removed."""
    names = []
    for path in sorted(checkpoints.iterdir() if checkpoints.is_dir() else []):
        if FOLDER.fullmatch(path.name) and path.is_dir() and not (path / MANIFEST).exists():
            names.append(set_damaged_aside(path).name)
    return names


def remove_unfinished(checkpoints: Path) -> list[str]:
    """Remove what kills left behind; returns the names. A checkpoint that was to be replaced, and whose successor did
    not get its name, gets it back."""
    for path in checkpoints.glob(f".step_*.{_REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(f".{_REPLACED}"))
        if not os.path.lexists(final):
            try:
                os.rename(path, final)
                sync(checkpoints)
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be given back its name {final.name} ({error.strerror}); restore access to it"
                ) from None
    left = [path for path in checkpoints.glob(".step_*") if path.is_dir()]
    for path in left:
        _remove(path)
    with contextlib.suppress(OSError):  # harmless, as the folders are
        (checkpoints / f".latest{ASIDE}").unlink(missing_ok=True)
    return sorted(path.name for path in left)


def set_later_aside(checkpoints: Path, chosen: Path) -> list[str]:
    """Rename the checkpoints after `chosen`, from which the run goes on: they are of a branch that it leaves, and must
    not be taken for what it is about to train. Nothing of them is removed; returns their new names."""
    names = []
    for folder in complete_checkpoints(checkpoints):
        if step_of(folder) > step_of(chosen):
            aside = free_name(folder.with_name(f"abandoned_{folder.name}"))
            try:
                os.rename(folder, aside)
            except OSError as error:
                raise CheckpointError(
                    f"{folder} is later than {chosen.name}, from which the run goes on, and cannot be set aside "
                    f"({error.strerror}); restore access, or move it"
                ) from None
            names.append(aside.name)
    if names:
        sync(checkpoints)
    return names


def free_name(path: Path) -> Path:
    """`path`, or that with a number behind it: what bears the name already stays."""
    names = (path, *(path.with_name(f"{path.name}.{number}") for number in range(2, 1000)))
    return next(name for name in names if not os.path.lexists(name))


def apply_retention(
    checkpoints: Path, keep_last: int | None, keep_every_steps: int | None, pinned: set[int]
) -> list[int]:
    """Remove checkpoints that no rule keeps; returns their steps. The newest two, `pinned` steps and
    what `latest` names always stay."""
    if keep_last is None:
        return []
    folders = complete_checkpoints(checkpoints)
    named, _ = _named_by_latest(checkpoints)
    newest = {step_of(folder) for folder in folders[: max(2, keep_last)]}
    removed = []
    for folder in folders:
        step = step_of(folder)
        if folder == named or step in newest or step in pinned or (keep_every_steps and step % keep_every_steps == 0):
            continue
        _remove(_hide(folder, "removed"))
        removed.append(step)
    return removed


# Reading


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Folders with a manifest, newest first. Content is not read: see `verify_files`. CheckpointError when the folder
    may not be read: what cannot be seen is not absent."""
    try:
        if not checkpoints.is_dir():
            return []
        named = [path for path in checkpoints.iterdir() if FOLDER.fullmatch(path.name)]
        folders = [path for path in named if (path / MANIFEST).is_file()]
    except OSError as error:
        raise CheckpointError(f"{error.filename} cannot be read ({error.strerror}); restore access to it") from None
    return sorted(folders, key=step_of, reverse=True)


def latest_checkpoint(checkpoints: Path) -> tuple[Path | None, str | None]:
    """(the checkpoint to resume from, why it is not the one `latest` names).

    (None, None) for a folder that holds no checkpoint at all. An empty, cut or stale `latest` falls back to the
    newest complete folder, with the reason.
    """
    candidates, doubt = candidate_checkpoints(checkpoints)
    return (candidates[0] if candidates else None), doubt


def candidate_checkpoints(checkpoints: Path) -> tuple[list[Path], str | None]:
    """(the checkpoints to try one after the other, why the first is not the one that `latest` names).

    After the one that `latest` names come those before it, newest first; then later ones, of a branch that was left.
    CheckpointError when `latest` names none and there is no other.
    """
    complete = complete_checkpoints(checkpoints)
    named, doubt = _named_by_latest(checkpoints)
    if named is not None:
        later = [folder for folder in complete if step_of(folder) > step_of(named)]
        return [named, *(folder for folder in complete if step_of(folder) < step_of(named)), *later], None
    if complete:
        return complete, doubt
    if (checkpoints / "latest").exists():
        raise CheckpointError(
            f"{doubt}, and {checkpoints} holds no other; put a checkpoint back, or remove the folder to start over"
        )
    return [], None


def _named_by_latest(checkpoints: Path) -> tuple[Path | None, str | None]:
    """(the complete checkpoint that `latest` names or None, why there is none)."""
    pointer = checkpoints / "latest"
    if not pointer.exists():
        return None, f"{pointer} is missing"
    try:
        name = pointer.read_text(errors="replace").strip()
    except OSError as error:  # a folder, or a link to one
        name = f"nothing ({error.strerror})"
    named = checkpoints / name
    if FOLDER.fullmatch(name) and (named / MANIFEST).is_file():
        return named, None
    return None, f"{pointer} says {name!r}, which is no complete checkpoint"
