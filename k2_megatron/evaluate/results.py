"""evaluations.jsonl: one JSON object for each checkpoint and text (docs/evaluate.md has the format), appended for good.

A line is written whole and is on the disk before the next evaluation begins; what a kill cut is passed over.
"""

import os
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from k2_megatron.runtime.durable import sync
from k2_megatron.runtime.journal import end_of_last_line, read_events, strict_json

RESULTS = "evaluations.jsonl"
_KINDS = {"step": int, "checkpoint": dict, "text": dict, "settings": dict, "figures": dict}


def read_results(path: Path) -> list[dict[str, Any]]:
    """The whole lines of the file, in order; [] where there is no such file. ValueError where it cannot be read."""
    try:
        events = list(read_events(path))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name another --output") from None
    return [event for event in events if all(isinstance(event.get(key), kind) for key, kind in _KINDS.items())]


def append_result(path: Path, result: dict[str, Any]) -> None:
    """Add one line, with the time (UTC). ValueError when the disk does not take it."""
    line = {
        "event": "evaluation",
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        **result,
    }
    try:
        is_new = not path.exists()
        with path.open("ab", buffering=0) as stream:
            waiting = end_of_last_line(path) + strict_json(line).encode() + b"\n"
            while waiting:
                waiting = waiting[stream.write(waiting) :]
            os.fsync(stream.fileno())
        if is_new:
            sync(path.parent)
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); make room, or name another --output. What stands in it is "
            "not computed again"
        ) from None


def identity(manifest_hash: str, text: dict[str, Any], settings: dict[str, Any]) -> tuple:
    """Two results with the same identity are of the same evaluation, up to rounding: the layout is not in it."""
    return manifest_hash, text["kind"], text["name"], text["hash"], tuple(sorted(settings.items()))


def identity_of(result: dict[str, Any]) -> tuple:
    """The identity of what `read_results` gave."""
    text = {key: result["text"].get(key) for key in ("kind", "name", "hash")}
    return identity(result["checkpoint"].get("manifest", ""), text, result["settings"])
