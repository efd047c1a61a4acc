"""The shards of a job become its outputs: one `.bin/.idx` a key, or the shards as they are, and a manifest.

In: the records in `PREFIX.shards/`. Out: `PREFIX_KEY_document*.{bin,idx,xxh3}`, `PREFIX_KEY_document.manifest.json`,
`PREFIX.rejects.jsonl`. Every document that went in is in the output or in the rejects; this is counted here.
Nothing here depends on how many workers or parts made the shards.
"""

from __future__ import annotations

import glob
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2_megatron.data.indexed import TokenFile
from k2_megatron.data.manifest import FORMAT, manifest_path
from k2_megatron.data.preprocess_job import Job, read_record, unbroken_rejected
from k2_megatron.data.store import HashedWriter, publish, write_sealed

COPY_BYTES = 8 << 20


def merge(job: Job, tokenizer: Any, max_bad_fraction: float) -> dict[str, Any]:
    """Check that every shard is there, join them or leave them, write the manifests, and count.

    ValueError: a shard is missing, or more than `max_bad_fraction` of the documents were rejected.
    """
    fingerprint = job.fingerprint(tokenizer.fingerprint)
    records = [_records_of_source(job, number, fingerprint) for number in range(len(job.sources))]
    rejects = write_rejects(job, records)
    documents = sum(record["documents"] for source in records for record in source)
    check_rejected(job, rejects, documents + len(rejects), max_bad_fraction)
    if documents == 0:
        raise ValueError(f"no document in {len(job.sources)} files, first {job.sources[0].path}; is --json-keys right?")
    totals: dict[str, Any] = {"documents": documents, "rejected": len(rejects), "tokens": 0}
    for key in job.keys:
        parts = [
            (number, record) for number, source in enumerate(records) for record in source if key in record["files"]
        ]
        first_lines = _first_lines(records)
        shards = [{**record["files"][key], "parts": [_part(number, record, first_lines)]} for number, record in parts]
        files = [_join(job, key, shards)] if job.one_file else shards
        manifest = {
            "format": FORMAT,
            "job": fingerprint,
            "key": key,
            "keys": list(job.keys),
            "tokenizer": {
                "fingerprint": tokenizer.fingerprint,
                "vocab_size": tokenizer.vocab_size,
                "end_of_document": tokenizer.end_of_document,
                "appended": job.append_end_of_document,
            },
            "documents": documents,
            "tokens": sum(entry["tokens"] for entry in files),
            "rejected": len(rejects),
            "unbroken_bytes": job.unbroken_bytes,
            "unbroken_rejected": sum(map(unbroken_rejected, itertools.chain(*records))),
            "sources": [_source_entry(job, number, source) for number, source in enumerate(records)],
            "files": files,
        }
        write_sealed(manifest_path(job.output(key)), manifest)
        totals["tokens"] += manifest["tokens"]
    remove_leftovers(job)
    return totals


def _records_of_source(job: Job, number: int, fingerprint: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    while not records or not records[-1]["last"]:
        record = read_record(job, number, len(records), fingerprint)
        if record is None:
            raise ValueError(
                f"{job.sources[number].path}: shard {len(records)} is not done; run the same command (all parts) again"
            )
        records.append(record)
    return records


def _first_lines(records: list[list[dict[str, Any]]]) -> dict[tuple[int, int], int]:
    """Number of the first line (from 1) of each (source, shard)."""
    return {
        (number, record["shard"]): 1 + sum(earlier["lines"] for earlier in source[: record["shard"]])
        for number, source in enumerate(records)
        for record in source
    }


def _part(number: int, record: dict[str, Any], first_lines: dict[tuple[int, int], int]) -> dict[str, Any]:
    """Where the documents of a shard came from: document d is the d-th line from first_line on that is not skipped."""
    return {
        "source": number,
        "documents": record["documents"],
        "first_line": first_lines[number, record["shard"]],
        "skipped": sorted(record["blank"] + [line for line, _ in record["rejected"]]),
    }


def _source_entry(job: Job, number: int, records: list[dict[str, Any]]) -> dict[str, Any]:
    source = job.sources[number]
    return {
        "name": source.name,
        "bytes": source.size,
        "lines": sum(record["lines"] for record in records),
        "documents": sum(record["documents"] for record in records),
        "rejected": sum(len(record["rejected"]) for record in records),
        "content": [[record["content_bytes"], record["content_xxh3"]] for record in records],
    }


def write_rejects(job: Job, records: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """`PREFIX.rejects.jsonl`: file, line and reason of every rejected document; no file where there is none."""
    first_lines = _first_lines(records)
    rejects = [
        {"file": record["source"], "line": first_lines[number, record["shard"]] + line, "reason": reason}
        for number, source in enumerate(records)
        for record in source
        for line, reason in record["rejected"]
    ]
    write_list(job, rejects)
    return rejects


def write_list(job: Job, rejects: list[dict[str, Any]]) -> None:
    path = Path(job.prefix + ".rejects.jsonl")
    if rejects:
        file = HashedWriter(path)
        file.write("".join(json.dumps(reject) + "\n" for reject in rejects).encode())
        file.commit(durable=True)
    else:
        path.unlink(missing_ok=True)


def check_rejected(job: Job, rejects: list[dict[str, Any]], documents: int, max_bad_fraction: float) -> None:
    """ValueError with the first rejects where they are too many."""
    if len(rejects) > max_bad_fraction * documents:
        shown = "; ".join(f"{reject['file']} line {reject['line']}: {reject['reason']}" for reject in rejects[:5])
        raise ValueError(
            f"{len(rejects)} of {documents} documents rejected, --max-bad-fraction {max_bad_fraction} allows "
            f"{int(max_bad_fraction * documents)}; all are in {job.prefix}.rejects.jsonl, first: {shown}"
        )


def _join(job: Job, key: str, shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Shards end to end in one `.bin/.idx`; a single one is renamed (linked, until the manifest is written)."""
    output, folder = job.output(key), Path(job.prefix).parent
    prefixes = [str(folder / shard["name"]) for shard in shards]
    parts = [part for shard in shards for part in shard["parts"]]
    if len(shards) == 1:
        for suffix in (".bin", ".idx", ".xxh3"):
            Path(output + suffix).unlink(missing_ok=True)
            os.link(prefixes[0] + suffix, output + suffix)
        return {**shards[0], "name": os.path.basename(output), "parts": parts}
    tokens = HashedWriter(Path(output + ".bin"))
    lengths, bounds = [], [np.zeros(1, np.int64)]
    for prefix, shard in zip(prefixes, shards, strict=True):
        file = TokenFile(prefix)
        lengths.append(np.array(file.lengths))
        bounds.append(bounds[-1][-1] + np.array(file.document_bounds)[1:])
        digest = xxhash.xxh3_64()
        with open(file.bin_path, "rb") as stream:
            while content := stream.read(COPY_BYTES):
                digest.update(content)
                tokens.write(content)
        if digest.hexdigest() != shard["bin_xxh3"]:
            raise ValueError(f"{file.bin_path}: changed since it was written; remove it and run the same command again")
    entry = publish(output, tokens, file.dtype, np.concatenate(lengths), np.concatenate(bounds))
    return {**entry, "parts": parts}


def remove_leftovers(job: Job) -> None:
    """Remove what a job whose manifests are written needs no more: shards that were joined, files that killed runs left
    open, the records. Other jobs' files stay, also those of a prefix that begins with this one's."""
    for key in job.keys:
        output = job.output(key)
        for path in glob.glob(glob.escape(output) + ".*"):
            is_shard = re.fullmatch(r"\.\d{5,}\.\d{4,}\.(bin|idx|xxh3)", path[len(output) :])
            if path.endswith(".partial") or (job.one_file and is_shard):
                Path(path).unlink(missing_ok=True)
    if job.record_folder.is_dir():
        shutil.rmtree(job.record_folder)
