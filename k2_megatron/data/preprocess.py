"""Text to token files: what is there already is known again, what is missing is made here or by workers, and merged.

In: a `Job`. Out: token files and their manifest (see merge.py). The result is the same bytes for any number of workers
or parts, killed and started again or not.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from k2_megatron.data.compiled import compiled
from k2_megatron.data.indexed import strip_suffix
from k2_megatron.data.manifest import manifest_path, open_token_files, read_manifest
from k2_megatron.data.merge import merge, remove_leftovers
from k2_megatron.data.preprocess_job import Job, units_of
from k2_megatron.data.preprocess_workers import encoder_line, run_workers
from k2_megatron.data.rejects import Counter, Report, TooManyRejected, stop_with_list
from k2_megatron.data.shards import ShardMaker

NOT_COMPILED = (
    "k2_megatron._cpu is not built: lines are read slower, a long one may take more memory than docs/data.md says, and "
    "large parquet pages in snappy or lz4 are refused; pip install -e . builds it"
)


def preprocess(
    job: Job,
    *,
    workers: int,
    max_bad_fraction: float,
    part: tuple[int, int] = (0, 1),
    merge_only: bool = False,
    report: Report = lambda progress: None,
    announce: Callable[[str], None] = lambda text: None,
) -> dict[str, Any] | None:
    """Run a job, or part (i, n) of it: every n-th unit from the i-th. Merges where this is all there is to do.

    Returns the totals, or None where other parts are still needed. ValueError for the user's mistakes, RuntimeError
    where a worker died.
    """
    if not os.path.basename(job.prefix):
        raise ValueError(
            f"--output-prefix {job.prefix!r}: ends without a name, and outputs are PREFIX_KEY_document.bin; give one "
            f"such as {job.prefix + 'web'}"
        )
    for key in job.keys:
        if os.sep in key:
            raise ValueError(
                f"--json-keys {key}: a key of the record itself, without {os.sep}, since outputs are "
                f"PREFIX_KEY_document.bin; keys within a value are not read: put the text under one such as "
                f"{key.rpartition(os.sep)[2] or 'text'}"
            )
    try:
        os.makedirs(os.path.dirname(job.prefix) or ".", exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"--output-prefix {job.prefix}: its folder cannot be made ({error.strerror}); choose a prefix in a folder "
            "that you may write to"
        ) from None
    with _alone(job) if part[1] == 1 else contextlib.nullcontext():  # parts have their files for themselves
        return _preprocess(job, workers, max_bad_fraction, part, merge_only, report, announce)


@contextlib.contextmanager
def _alone(job: Job) -> Iterator[None]:
    """Lock the job's records. ValueError where another process holds them: whoever ends first removes what is left."""
    folder = job.record_folder
    with contextlib.ExitStack() as afterwards:
        try:
            folder.mkdir(exist_ok=True)
            lock = os.open(folder, os.O_RDONLY)
            afterwards.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{job.prefix}: another process is making it; wait for that one, or choose another --output-prefix"
            ) from None
        except OSError:  # a file system without locks, or one that is only read: all may be there already
            pass
        afterwards.callback(_remove_empty, folder)
        yield


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):  # records are in it, or another process has removed it
        folder.rmdir()


def _preprocess(
    job: Job,
    workers: int,
    max_bad_fraction: float,
    part: tuple[int, int],
    merge_only: bool,
    report: Report,
    announce: Callable[[str], None],
) -> dict[str, Any] | None:
    if compiled() is None:
        announce(NOT_COMPILED)
    maker = ShardMaker(job)
    finished = _finished(job, maker)
    if finished:
        announce(f"{job.prefix}: complete already, nothing to do")
        return finished
    if not os.access(os.path.dirname(job.prefix) or ".", os.W_OK | os.X_OK):
        raise ValueError(
            f"--output-prefix {job.prefix}: its folder is not yours to write to; choose a prefix in one that is"
        )
    if not merge_only:
        units = units_of(job)[part[0] :: part[1]]
        counter = Counter(job, max_bad_fraction, report, announce)
        try:
            if workers <= 1 or len(units) <= 1:
                announce(encoder_line(maker))
                for unit in units:
                    maker.run(unit, counter)
            else:
                run_workers(maker, units, min(workers, len(units)), counter, announce)
        except TooManyRejected as found:
            raise stop_with_list(job, max_bad_fraction, found) from None
    if part[1] > 1 and not merge_only:
        return None
    return merge(job, maker.tokenizer, max_bad_fraction)


def _finished(job: Job, maker: ShardMaker) -> dict[str, Any] | None:
    """The totals of outputs that this very job has already made, and what a kill at its very end left is removed.
    ValueError where another job made them, or they are no longer what was made."""
    _refuse_foreign_files(job)
    paths = [path for path in (manifest_path(job.output(key)) for key in job.keys) if path.is_file()]
    manifests = [read_manifest(path) for path in paths]
    sources = [[source.name, source.size] for source in job.sources]
    for path, manifest in zip(paths, manifests, strict=True):
        made_from = [[source["name"], source["bytes"]] for source in manifest["sources"]]
        same_job = manifest.get("job") == maker.fingerprint and job.unbroken_fits(manifest)
        if not same_job or made_from != sources:
            raise ValueError(
                f"{path}: made by another run (other options, tokenizer or sources); remove the outputs of "
                f"{job.prefix} to make them afresh, or choose another --output-prefix"
            )
        try:
            open_token_files(path)
        except ValueError as error:
            problem = str(error).rpartition("; ")[0]  # its remedy is for whoever reads the tokens
            raise ValueError(
                f"{problem}; restore it from a backup, or remove {path} and give the same command to make all again"
            ) from None
    if len(paths) < len(job.keys):
        return None
    remove_leftovers(job)
    return {
        "documents": manifests[0]["documents"],
        "rejected": manifests[0]["rejected"],
        "tokens": sum(manifest["tokens"] for manifest in manifests),
    }


def _refuse_foreign_files(job: Job) -> None:
    """ValueError where token files of a name are there that nothing of ours stands beside: no manifest, no hashes (they
    stay where a manifest was removed to make all again), no record of a run that was killed."""
    if any(job.record_folder.glob("*.json")):
        return
    for path in (job.output(key) + suffix for key in job.keys for suffix in (".bin", ".idx")):
        ours = [manifest_path(path), Path(strip_suffix(path) + ".xxh3")]
        if os.path.lexists(path) and not any(map(os.path.lexists, ours)):
            raise ValueError(
                f"{path}: exists, and nothing tells that this tool made it; move it away or choose another "
                "--output-prefix, or remove it and the .bin or .idx beside it if it may be overwritten"
            )
