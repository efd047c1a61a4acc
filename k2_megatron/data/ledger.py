"""The ledger: `ledger.jsonl` of a run, to which amendments of the data order and the positions reached are appended.

In: amendments (skip, defer), changes of batch and sequence length, and, at checkpoints, the number of samples consumed
with the hash of their chain. Out: the amendments in order, for every rank's feed. Each line carries the hash of the
line before it, so a line that was edited, removed or put in between is found on reading. For the last line no other
vouches: each checkpoint, and each step in the journal, carries the number of lines and the hash of the last (`mark`). A
run that resumes from a checkpoint compares them (`check_mark`), and `inspect_data.py verify` compares all of them
(`check_lines`). Only rank 0 appends; a line cut short by a crash is dropped.
A checkpoint that was taken to a new folder begins a ledger there, whose first line says which ledger it continues.

    {"event": "amendment", "action": "defer", "chunk": 160, "from_sample": 307142400, "reason": "...", ...}
    {"event": "continues", "step": 150560, "ledger": {"lines": 161, "last": "0b7e..."}, ...}
    {"event": "position", "consumed_samples": 307142400, "chain": "9f0c...", "step": 150560, ...}
    {"event": "change", "from_step": 150560, "from_sample": 153571200, "global_batch": 1020, "sequence_length": 4096,
     ...}
    {"event": "position", "consumed_samples": 154531020, "chain": "47ad...", "step": 151501,
     "parts": [[2048, 0, 307142400], [4096, 153571200, 154531020]], ...}

The chain over consumed samples is chain(n + 1) = blake2b(chain(n), record of sample n): whoever knows the plan and the
amendments can compute it again, whatever batch sizes the run had (see feed.py for the record of a sample). Where the
sequence length changed, a position says what its chain goes over: [tokens a sample, first sample, the one after the
last] of each part; otherwise it is all samples from the first on, in the length that the run began with. A change
stands just before the first position under it, so that one of which nothing was saved leaves no line.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from k2_megatron.data.schedule import DEFER, SKIP
from k2_megatron.runtime.durable import Refusal, make_folder, sync

CHAIN_START = ""  # the chain of no samples
FILE_NAME = "ledger.jsonl"


class LedgerNotWritten(Refusal):
    """The disk did not take a line: it is not in the ledger, and may be appended again."""


class Samples(Protocol):
    """What the ledger needs of a feed."""

    fingerprint: str

    def sample_records(self, first_sample: int, count: int) -> Iterable[bytes]: ...

    def after(self, amendment: dict[str, Any]) -> Any: ...


class Ledger:
    """The ledger of a run folder. Reading needs no file; the first append makes it."""

    def __init__(self, folder: str | os.PathLike):
        self.path = Path(folder) / FILE_NAME
        self.entries: list[dict[str, Any]] = []
        self._whole_bytes = 0
        self._last_hash = ""
        self._exists = False
        self._unconfirmed: set[bytes] = set()  # lines that the disk refused; one may be in the file all the same
        self._feed: Samples | None = None
        self._read()

    def _read(self) -> None:
        self._exists = self.path.is_file()
        content = self.path.read_bytes() if self._exists else b""
        whole = content[: content.rfind(b"\n") + 1]  # what follows the last newline is a write cut short by a crash
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                linked = isinstance(entry, dict) and entry.get("previous") == self._last_hash
            except ValueError:
                linked = False
            if not linked:
                raise ValueError(
                    f"{self.path}, line {number}: does not follow from the line before it; the ledger is append-only: "
                    "restore it from a copy (checkpoints name the amendments they were made with)"
                )
            self.entries.append(entry)
            self._last_hash = _line_hash(line)
        self._whole_bytes = len(whole)

    @property
    def exists(self) -> bool:
        """Whether there was a file when it was read, or is since."""
        return self._exists

    @property
    def amendments(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["event"] == "amendment"]

    @property
    def positions(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["event"] == "position"]

    @property
    def last_change(self) -> dict[str, Any] | None:
        """The change that the run went through last, of those of which something was saved."""
        return next((entry for entry in reversed(self.entries) if entry["event"] == "change"), None)

    def append(self, event: str, **fields: Any) -> dict[str, Any]:
        """Write one line, durably. Call on rank 0 only. LedgerNotWritten where the disk does not take it."""
        entry = {"event": event, "time": now(), **fields, "previous": self._last_hash}
        line = json.dumps(entry).encode()
        try:
            self._write(line)
        except OSError as error:
            self._take_back(line)
            raise LedgerNotWritten(
                f"{self.path} could not be written ({error}); make room or restore access, and start again",
                f"{self.path} is not written yet ({error})",
            ) from None
        self._unconfirmed.clear()
        self._whole_bytes += len(line) + 1
        self._last_hash = _line_hash(line)
        self.entries.append(entry)
        self._exists = True
        return entry

    def _write(self, line: bytes) -> None:
        make_folder(self.path.parent)
        is_new = not self.path.is_file()
        size = 0 if is_new else self.path.stat().st_size
        if size < self._whole_bytes:
            raise ValueError(
                f"{self.path}: {size} bytes, and {self._whole_bytes} when it was last written or read: something cut "
                "or removed it; put it back, and start again"
            )
        with open(self.path, "wb" if is_new else "r+b") as file:
            self._refuse_strangers_lines(file)
            file.truncate(self._whole_bytes)
            file.seek(self._whole_bytes)
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if is_new or not self._exists:  # the second, where a try before this one made the file
            sync(self.path.parent)

    def _take_back(self, line: bytes) -> None:
        """Cut off what the disk took and did not make safe: the next try must not take it for another process's line,
        nor a reader for one that counts. Where the disk refuses that as well, the next try knows the line."""
        self._unconfirmed.add(line + b"\n")
        with contextlib.suppress(OSError):
            os.truncate(self.path, self._whole_bytes)

    def _refuse_strangers_lines(self, file: BinaryIO) -> None:
        """ValueError where another process has appended since this one read: its line is not to be cut off."""
        if not file.readable():
            return
        file.seek(self._whole_bytes)
        if b"\n" in (found := file.read()) and found not in self._unconfirmed:
            raise ValueError(
                f"{self.path}: another process has appended to it since it was opened here; amend a run only while it "
                "is stopped, and start it again to follow what the ledger now says"
            )

    def amend(
        self,
        action: str,
        *,
        from_sample: int,
        sequence_length: int,
        reason: str,
        chunk: int | None = None,
        samples: tuple[int, int] | None = None,
    ) -> dict[str, Any]:
        """Append an amendment: from sample `from_sample` on, skip or defer a chunk or samples samples[0]..samples[1]-1
        (as numbered before this amendment). Feeds opened afterwards follow it. ValueError where it says nothing, or
        does not fit the attached feed."""
        if action not in (SKIP, DEFER):
            raise ValueError(f"action {action!r}: {SKIP} or {DEFER}")
        if (chunk is None) == (samples is None):
            raise ValueError("an amendment names either a chunk or a range of samples")
        what: dict[str, Any] = {"chunk": chunk} if samples is None else {"samples": list(samples)}
        amendment = {"action": action, **what, "from_sample": from_sample, "sequence_length": sequence_length}
        if self._feed is not None:
            self._feed.after(amendment)
        return self.append("amendment", **amendment, reason=reason)

    def record_position(self, consumed_samples: int, chain: str, **fields: Any) -> dict[str, Any]:
        """Append the position reached, with its chain: at every checkpoint."""
        return self.append("position", consumed_samples=consumed_samples, chain=chain, **fields)

    def mark(self) -> dict[str, Any]:
        """What a checkpoint keeps of the ledger: how many lines there are, and the hash of the last."""
        return {"lines": len(self.entries), "last": self._last_hash}

    def check_mark(self, manifest: dict[str, Any]) -> None:
        """ValueError unless the ledger still has the lines that it had when the checkpoint of `manifest` was saved;
        more may follow. A checkpoint may be taken to a new folder without its ledger where nothing was amended."""
        if "ledger" not in manifest or self._continues(manifest):  # earlier versions did not write it
            return
        if not self._exists and not manifest["amendments"]:
            return
        self.check_lines(manifest["ledger"], f"the checkpoint of step {manifest['step']} was saved")

    def check_lines(self, mark: dict[str, Any], told: str) -> None:
        """ValueError unless the ledger still has the lines that it had when `mark` was written; `told`: by whom."""
        lines = mark["lines"]
        told = f"{self.path}: {told} after line {lines}, "
        restore = "the ledger is append-only: put back the ledger.jsonl of the run that wrote this"
        if len(self.entries) < lines:
            raise ValueError(f"{told}and there are {len(self.entries)} lines; {restore}")
        if (self.entries[lines]["previous"] if lines < len(self.entries) else self._last_hash) != mark["last"]:
            raise ValueError(f"{told}and that line is another now; {restore}")

    def _continues(self, manifest: dict[str, Any]) -> bool:
        """Whether this ledger began with that checkpoint, or with a later one of the run that was taken along with it:
        then the lines it tells of are in that run's folder."""
        first = self.entries[0] if self.entries else {}
        if first.get("event") != "continues":
            return False
        mark, begun = manifest["ledger"], first["ledger"]
        earlier = manifest["step"] < first["step"] and mark["lines"] < begun["lines"] and not manifest["amendments"]
        return earlier or mark == begun

    def continue_from(self, manifest: dict[str, Any]) -> None:
        """Begin this ledger where that of the run which saved the checkpoint of `manifest` ended: in a new folder."""
        if not self._exists and "ledger" in manifest:
            self.append("continues", step=manifest["step"], ledger=manifest["ledger"])

    def before(self, number: int) -> Ledger:
        """The ledger as it was before its entry `number` (from 0) was appended; for reading only."""
        earlier = Ledger.__new__(Ledger)
        earlier.path, earlier.entries, earlier._feed = self.path, self.entries[:number], None
        return earlier

    def attach(self, feed: Samples) -> None:
        """The feed whose samples `chain` hashes: `open_feed(..., ledger=...)` does this."""
        self._feed = feed

    def chain(self, previous: str, first_sample: int, end_sample: int) -> str:
        """The chain after samples first_sample..end_sample-1, given the chain before them (CHAIN_START for none)."""
        assert self._feed is not None, "the ledger has no feed yet: open_feed(..., ledger=ledger)"
        return chain_samples(self._feed, previous, first_sample, end_sample)


def chain_samples(feed: Samples, previous: str, first_sample: int, end_sample: int) -> str:
    """See `Ledger.chain`. About a microsecond a sample."""
    value = bytes.fromhex(previous) if previous else feed.fingerprint.encode()
    block = 1 << 16
    for first in range(first_sample, end_sample, block):
        for record in feed.sample_records(first, min(block, end_sample - first)):
            value = hashlib.blake2b(value + record, digest_size=16).digest()
    return value.hex() if end_sample > first_sample else previous


def now() -> str:
    """UTC, as the journal writes it: the two files are compared by time."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


def _line_hash(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=16).hexdigest()
