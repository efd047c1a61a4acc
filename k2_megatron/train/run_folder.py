"""The run folder: one configuration for its whole life, and what is known about the code that fills it."""

import fcntl
import platform
import subprocess
import time
from collections.abc import Collection
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO

import k2_megatron
from k2_megatron.config import Config, load_config
from k2_megatron.config.changes import changes
from k2_megatron.runtime.durable import make_folder, write_file
from k2_megatron.train.watchdog import HEARTBEATS, read_heartbeats

CONFIG = "config.toml"


def check_run_folder(config: Config, given: Collection[str] = ()) -> None:
    """ValueError when the folder belongs to a training that this configuration does not describe.

    `given` are the keys that --set names: what may be changed on purpose is, when it is among them.
    """
    folder = Path(config.run.folder)
    stored = folder / CONFIG
    if not stored.exists():
        return
    earlier = load_config(stored)
    if earlier.fingerprint == config.fingerprint:
        return
    found = changes(config.model_dump(exclude_none=True), earlier.model_dump(exclude_none=True), given)
    refused = [str(change) for change in found if change.outcome == "refused"]
    if refused:
        raise ValueError(
            f"{folder} holds a run of another configuration: {'; '.join(refused)}. "
            "Give run.folder another name, or undo these changes to resume"
        )


def hold_run_folder(config: Config) -> IO[str]:
    """Lock the run folder for as long as the returned file is open. ValueError when another process holds it.

    The kernel lets go of the lock when its holder dies, so nothing is left to clean up.
    """
    folder = Path(config.run.folder)
    make_folder(folder)
    lock = (folder / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another process is training in {folder}; wait for it or stop it (SIGTERM saves and leaves), "
            "or give run.folder another name"
        ) from None
    except OSError:  # a file system without locks, such as Lustre mounted without "flock"
        _refuse_living_run(folder / HEARTBEATS, config.watchdog.heartbeat_seconds)
    return lock


def _refuse_living_run(heartbeats: Path, heartbeat_seconds: float) -> None:
    """ValueError when a heartbeat that a run left here changes while we look, whatever the clocks say."""

    def beats() -> dict[int, float]:
        return {beat["rank"]: beat["time"] for beat in read_heartbeats(heartbeats)}

    before, deadline = beats(), time.monotonic() + 2 * heartbeat_seconds
    while before and time.monotonic() < deadline:
        time.sleep(min(1.0, heartbeat_seconds / 4))
        now = beats()
        changed = [rank for rank, told in now.items() if before.get(rank) != told]
        if changed:
            raise ValueError(
                f"another process is training in {heartbeats.parent}: rank {changed[0]} has just given a sign of life; "
                "wait for it or stop it (SIGTERM saves and leaves), or give run.folder another name"
            )


def write_config(config: Config) -> None:
    """Store the resolved configuration, with the code's revision and versions as comments above it."""
    folder = Path(config.run.folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = "\n".join(f"# {name}: {value}" for name, value in provenance().items())
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
