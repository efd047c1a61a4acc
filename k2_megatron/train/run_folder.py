"""The run folder: one configuration for its whole life, and what is known about the code that fills it."""

import contextlib
import errno
import fcntl
import platform
import subprocess
import time
from collections.abc import Collection, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import k2_megatron
from k2_megatron.config import Config, load_run_config
from k2_megatron.config.changes import changes
from k2_megatron.data.ledger import Ledger
from k2_megatron.runtime.durable import make_folder, write_file
from k2_megatron.runtime.journal import JOURNAL, read_events
from k2_megatron.train.checkpoints.folders import candidate_checkpoints
from k2_megatron.train.checkpoints.manifest import CheckpointError, is_imported, read_manifest
from k2_megatron.train.heartbeats import HEARTBEATS, read_heartbeats
from k2_megatron.train.position import going_on_from

CONFIG = "config.toml"
# A node that died holds its lock until the file server's lease ends (NFS: about 90 s), and Slurm requeues at once.
TAKEOVER_SECONDS = 300.0
# What a start by itself would meet again; of a file system that refuses for the moment the batch script starts again.
LASTING = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
LASTING |= {errno.ENOSPC, errno.EDQUOT}


def check_run_folder(config: Config, given: Collection[str] = ()) -> list[str]:
    """ValueError when the folder belongs to a training that this configuration does not describe; else what the last
    start changed that no checkpoint has, and this one does not.

    `given` are the keys that --set names: what may be changed on purpose is, when it is among them.
    """
    folder = Path(config.run.folder)
    stored = folder / CONFIG
    if not stored.exists():
        return []
    earlier = load_run_config(stored)
    if earlier.fingerprint == config.fingerprint:
        return []
    now = config.model_dump(exclude_none=True)
    refused = [
        change for change in changes(now, earlier.model_dump(exclude_none=True), given) if change.outcome == "refused"
    ]
    manifest = newest_manifest(folder) if refused else None
    saved = changes(now, manifest["config"], given) if manifest and not is_imported(manifest) else refused
    differing = {change.key for change in saved}
    wrong = [str(change) for change in refused if change.key in differing]
    if wrong:
        raise ValueError(
            f"{folder} holds a run of another configuration: {'; '.join(wrong)}. "
            "Give run.folder another name, or undo these changes to resume"
        )
    return [
        f"{change.key} = {change.was!r} of the last start is not in the newest checkpoint; the run goes on with "
        f"{change.now!r}"
        for change in refused
    ]


def with_past(config: Config) -> Config:
    """`config` as the run in its folder, if there is one, would go on with it after its newest checkpoint."""
    manifest = newest_manifest(Path(config.run.folder))
    return going_on_from(config, manifest) if manifest else config


def newest_manifest(folder: Path) -> dict | None:
    """Of the newest checkpoint that tells of itself; whether its files are sound is another question."""
    try:
        candidates, _ = candidate_checkpoints(folder / "checkpoints")
    except CheckpointError:  # the start says so
        return None
    for candidate in candidates:
        with contextlib.suppress(CheckpointError):
            return read_manifest(candidate)
    return None


def refuse_lost_checkpoints(folder: Path) -> None:
    """ValueError when the run in `folder`, which has no checkpoint, had saved one: it must not begin again by itself.

    The journal tells of saves, so does a checkpoint that was set aside; and a ledger with positions, where the journal
    was lost (each is recorded just before a save, so alone it may be one that a kill ended).
    """
    journal, checkpoints = folder / JOURNAL, folder / "checkpoints"
    found = []
    events = [event for event in read_events(journal) if event["event"] in ("step", "checkpoint")]
    saved = [event["step"] for event in events if event["event"] == "checkpoint"]
    if saved:
        found.append(f"{JOURNAL} tells of one of step {saved[-1]}")
    aside = sorted(path.name for path in checkpoints.glob("damaged_*"))
    if aside:
        found.append(f"{', '.join(aside)} was set aside as damaged")
    positions = Ledger(folder).positions
    if positions and not events:
        found.append(
            f"the ledger tells of one before sample {positions[-1]['consumed_samples']}, and {JOURNAL} of no step"
        )
    if found:
        raise ValueError(
            f"{checkpoints} holds no checkpoint, but this run had been saved: {'; '.join(found)}. It is not started "
            "over by itself: put a checkpoint back, or give run.folder another name"
        )


def hold_run_folder(config: Config) -> IO[str]:
    """Lock the run folder for as long as the returned file is open. ValueError when another process holds it.

    The kernel lets go of the lock when its holder dies; when the holder's machine dies, its file server does later.
    So a lock whose holder gives no sign of life is waited for, up to `TAKEOVER_SECONDS`.
    """
    folder = Path(config.run.folder)
    with _told_of(folder):
        make_folder(folder)
        lock = (folder / ".lock").open("a+")
    before, deadline = _beats(folder), time.monotonic() + TAKEOVER_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            _refuse_living_run(folder, before)
            if time.monotonic() >= deadline:
                last = next(iter(before.values()), None)
                who = f"the last sign of life is {_whose(last)}, an old one" if last else "it gave no sign of life"
                raise ValueError(
                    f"another process is training in {folder}: it has held the lock for {TAKEOVER_SECONDS:.0f} s and "
                    f"{who}; stop it, or give run.folder another name"
                ) from None
        except OSError:  # a file system without locks, such as Lustre mounted without "flock"
            deadline = time.monotonic() + 2 * config.watchdog.heartbeat_seconds
            while before and time.monotonic() < deadline:
                time.sleep(min(1.0, config.watchdog.heartbeat_seconds / 4))
                _refuse_living_run(folder, before)
            return lock
        time.sleep(min(1.0, config.watchdog.heartbeat_seconds / 4))


@contextlib.contextmanager
def _told_of(folder: Path) -> Iterator[None]:
    """ValueError where the run folder cannot be written and will not be by itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in LASTING:
            raise
        raise ValueError(
            f"run.folder {folder} cannot be written ({error.strerror}: {error.filename}); make room or restore access, "
            "or give another run.folder"
        ) from None


def _beats(folder: Path) -> dict[int, dict]:
    return {beat["rank"]: beat for beat in read_heartbeats(folder / HEARTBEATS)}


def _refuse_living_run(folder: Path, before: dict[int, dict]) -> None:
    """ValueError when a heartbeat that a run left in `folder` is not as it was `before`, whatever the clocks say."""
    for rank, beat in _beats(folder).items():
        if before.get(rank, {}).get("time") != beat["time"]:
            raise ValueError(
                f"another process is training in {folder}: rank {rank} has just given a sign of life "
                f"({_whose(beat)}); wait for it or stop it (SIGTERM saves and leaves), or give run.folder another name"
            )


def _whose(beat: dict) -> str:
    return f"of process {beat.get('pid')} on {beat.get('host')}"


def write_config(config: Config) -> None:
    """Store the resolved configuration, with the code's revision and versions as comments above it."""
    folder = Path(config.run.folder)
    about = "\n".join(f"# {name}: {value}" for name, value in provenance().items())
    with _told_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_file(folder / CONFIG, f"{about}\n\n{config.to_toml()}")


def provenance() -> dict[str, str | None]:
    """Versions of what computes, and the revision of this code."""
    facts: dict[str, str | None] = {"k2_megatron": k2_megatron.__version__, "revision": _revision()}
    facts["python"] = platform.python_version()
    for package in ("torch", "megatron-core", "numpy"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    facts["host"] = platform.node()
    return facts


def _revision() -> str | None:
    """The git commit of the code, with "+changes" when files differ from it; None outside a checkout."""
    source = Path(k2_megatron.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=source, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
