"""A job of preprocessing: what determines its output, the units that workers do, and the records of what is done.

`PREFIX.shards/` has a record for each shard that is whole: what it was made from and under, what was rejected, and
which files it is. It outlives a kill, so that the same command goes on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k2_megatron.data.long_texts import UNBROKEN_BYTES
from k2_megatron.data.sources import Source
from k2_megatron.data.store import read_sealed


@dataclass(frozen=True)
class Job:
    """What determines the output of preprocessing, and where it goes."""

    sources: tuple[Source, ...]
    keys: tuple[str, ...]
    tokenizer_path: str
    end_of_document_piece: str | None
    special_pieces: bool
    append_end_of_document: bool
    prefix: str
    shard_bytes: int  # uncompressed input bytes a shard
    one_file: bool  # join the shards in one file a key, or leave them
    encoder: str
    unbroken_bytes: int = UNBROKEN_BYTES  # the longest part of a document that is encoded at once

    def fingerprint(self, tokenizer_fingerprint: str) -> str:
        """Changes with anything that changes the tokens or how they are cut into shards, but for `unbroken_bytes`: see
        `unbroken_fits`."""
        parts = (tokenizer_fingerprint, self.keys, self.append_end_of_document, self.shard_bytes, self.one_file)
        return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    def unbroken_fits(self, made: dict[str, Any]) -> bool:
        """Whether what a record or manifest tells of is the same under this job's limit: a larger one changes nothing
        where no document was rejected for the smaller."""
        limit = made.get("unbroken_bytes", UNBROKEN_BYTES)
        return limit == self.unbroken_bytes or (limit < self.unbroken_bytes and not unbroken_rejected(made))

    def output(self, key: str) -> str:
        """The prefix of one key's token files: the name that Megatron's tool gives."""
        return f"{self.prefix}_{key}_document"

    @property
    def record_folder(self) -> Path:
        return Path(self.prefix + ".shards")

    def record_path(self, source: int, shard: int) -> Path:
        return self.record_folder / f"{source:05d}.{shard:04d}.json"

    def shard_output(self, key: str, source: int, shard: int) -> str:
        return f"{self.output(key)}.{source:05d}.{shard:04d}"


@dataclass(frozen=True)
class Unit:
    """Shards first_shard..last_shard (None: to the end) of one source, done by one worker."""

    source: int
    first_shard: int
    last_shard: int | None


@dataclass
class Progress:
    """What one piece added, or a shard that is there already."""

    bytes: int  # of the file on disk
    documents: int  # that were read, rejected ones included
    rejected: int
    tokens: int
    earlier: bool = False  # made by an earlier run


def units_of(job: Job) -> list[Unit]:
    """The units of a job in their fixed order: one a shard where a source is splittable, else one a source."""
    units = []
    for number, source in enumerate(job.sources):
        if source.splittable:
            shards = max(1, -(-source.size // job.shard_bytes))
            units += [Unit(number, shard, shard) for shard in range(shards)]
        else:
            units.append(Unit(number, 0, None))
    return units


def read_record(job: Job, source: int, shard: int, fingerprint: str) -> dict[str, Any] | None:
    """The record of a finished shard, or None where it is to be made (again). ValueError where it belongs to another
    job, or was made under a larger limit: without that documents may be lost."""
    path = job.record_path(source, shard)
    if not path.is_file():
        return None
    record = read_sealed(path, f"remove {path}: its shard is then made again")
    for name, value in {"job": fingerprint, **source_facts(job.sources[source])}.items():
        if record.get(name) != value:
            raise ValueError(
                f"{path}: its {name} is {record.get(name)!r}, this run's is {value!r}; remove {job.record_folder} and "
                f"the outputs of {job.prefix} to start afresh, or choose another --output-prefix"
            )
    limit = record.get("unbroken_bytes", UNBROKEN_BYTES)
    if limit > job.unbroken_bytes:
        raise ValueError(
            f"{path}: its shard was made with --max-unbroken-size {limit}, this run's is {job.unbroken_bytes}; give at "
            f"least the former, or remove {path}: its shard is then made again"
        )
    if not job.unbroken_fits(record):
        return None
    for entry in record["files"].values():
        for suffix, key in ((".bin", "bin_bytes"), (".idx", "idx_bytes")):
            found = Path(job.prefix).parent / (entry["name"] + suffix)
            if not found.is_file() or found.stat().st_size != entry[key]:
                return None  # removed by hand, or torn by a power cut: made again
    return record


def unbroken_rejected(made: dict[str, Any]) -> int:
    """How many documents a record or manifest counts as rejected for the limit; before it told, any might have been."""
    rejected = made["rejected"]
    return made.get("unbroken_rejected", rejected if isinstance(rejected, int) else len(rejected))


def source_facts(source: Source) -> dict[str, Any]:
    """What a record keeps of its source, to know it again."""
    return {"source": source.name, "source_bytes": source.size, "source_modified_ns": source.modified_ns}
