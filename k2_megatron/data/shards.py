"""One unit of preprocessing: the shards of one source (or one shard of a source that can be entered in the middle).

In: a `Job` and a `Unit`. Out: for each shard its token files and, last, a record in `PREFIX.shards/`. A shard whose
record is there is whole; a killed run loses at most the shard each worker was in, and is simply started again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import xxhash

from k2_megatron.data.encoder import Encoder, first_difference, make_encoder
from k2_megatron.data.indexed import token_dtype
from k2_megatron.data.json_lines import Piece
from k2_megatron.data.long_texts import Slice, Slicer, apart
from k2_megatron.data.preprocess_job import Job, Progress, Unit, read_record, source_facts
from k2_megatron.data.readers import pieces
from k2_megatron.data.sources import Source
from k2_megatron.data.store import TokenWriter, write_sealed
from k2_megatron.data.texts import Texts, beginnings
from k2_megatron.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer

Run = tuple[Sequence[str] | np.ndarray, list[Slice] | None]  # texts, or a long one and its slices, if it has any
COMPARED_CHARACTERS = 1 << 16  # what each worker encodes twice, to trust the fast encoder


class ShardMaker:
    """A worker's state: the tokenizer, its encoder, and what is known of them; each is made when it is first needed."""

    def __init__(self, job: Job):
        self.job = job
        self.settings: str | None = None  # gigatoken's for the tokenizer, where another process has made them
        self._compared = False

    @cached_property
    def tokenizer(self) -> HuggingFaceTokenizer | SentencePieceTokenizer:
        return load_tokenizer(
            self.job.tokenizer_path,
            end_of_document=self.job.end_of_document_piece,
            special_pieces=self.job.special_pieces,
        )

    @property
    def fingerprint(self) -> str:
        return self.job.fingerprint(self.tokenizer.fingerprint)

    @cached_property
    def encoder(self) -> Encoder:
        return make_encoder(self.tokenizer, self.job.encoder, self.settings)

    def run(self, unit: Unit, report: Callable[[Progress], None]) -> None:
        """Make what is missing of a unit's shards; `report` is called for every piece."""
        source = self.job.sources[unit.source]
        shard = unit.first_shard
        consumed = shard * self.job.shard_bytes if source.splittable else 0
        while record := read_record(self.job, unit.source, shard, self.fingerprint):
            rejected = len(record["rejected"])
            report(Progress(record["disk_bytes"], record["documents"] + rejected, rejected, 0, earlier=True))
            consumed += record["disk_bytes"]
            if record["last"] or shard == unit.last_shard:
                return
            shard += 1
        open_shard = _OpenShard(self, unit.source, shard)
        end = 0 if unit.last_shard is None else (unit.last_shard + 1) * self.job.shard_bytes
        wanted = (source, self.job.keys, self.job.shard_bytes, shard, unit.last_shard)
        for piece in pieces(*wanted, self.encoder.make_room, self.encoder.bytes_at_once):
            while open_shard.number < piece.shard:
                open_shard.close(last=False)
                open_shard = _OpenShard(self, unit.source, open_shard.number + 1)
            # What a line takes beyond its shard is counted with the next, of which it is the beginning
            reached = piece.consumed if unit.last_shard is None else min(piece.consumed, end)
            tokens = open_shard.add(piece, reached - consumed)
            report(Progress(reached - consumed, piece.lines - len(piece.blank), len(piece.rejected), tokens))
            consumed = reached
        open_shard.close(last=unit.last_shard is None or unit.last_shard == self._last_shard(source))

    def _last_shard(self, source: Source) -> int:
        return max(1, -(-source.size // self.job.shard_bytes)) - 1

    def encode(self, texts: Sequence[str], where: str) -> tuple[np.ndarray, np.ndarray]:
        self._compare(texts, where)
        return self.encoder.encode(texts)

    def encode_long(self, text: np.ndarray, slices: Sequence[Slice], where: str) -> Iterator[np.ndarray]:
        """The ids of one long text, given as UTF-8, slice after slice."""
        self._compare(Texts(text, np.array([0, len(text)], dtype=np.int64)), where)
        return self.slicer.encode(text, slices)

    def runs(self, texts: Sequence[str]) -> list[Run]:
        """The texts as they are encoded."""
        return [(run, self.slicer.slices(run) if isinstance(run, np.ndarray) else []) for run in apart(texts)]

    @property
    def why_unbroken(self) -> str:
        return (
            f"more than {self.job.unbroken_bytes >> 20} MiB of it can only be encoded at once, which would take up to "
            "45 times as much memory; break it, or raise --max-unbroken-size"
        )

    @cached_property
    def slicer(self) -> Slicer:
        """Made when the first long text comes: it looks through the whole vocabulary."""
        return Slicer(self.encoder.encode, self.tokenizer, self.job.unbroken_bytes)

    def _compare(self, texts: Sequence[str], where: str) -> None:
        """ValueError where the fast encoder gives the first texts that this worker sees other ids than the tokenizer's
        own library."""
        if self._compared or self.encoder.encode is self.encoder.reference:
            return
        sample = beginnings(texts, COMPARED_CHARACTERS)
        problem = first_difference(self.encoder.encode, self.encoder.reference, sample)
        if problem:
            raise ValueError(
                f"{where}: gigatoken gives other ids than the tokenizer's own library: {problem}; "
                "run again with --encoder tokenizers (or sentencepiece for a .model)"
            )
        self._compared = True


class _OpenShard:
    """A shard being written."""

    def __init__(self, maker: ShardMaker, source: int, number: int):
        self.maker, self.source, self.number = maker, source, number
        self.lines, self.documents, self.text_bytes, self.disk_bytes = 0, 0, 0, 0
        self.blank: list[int] = []
        self.rejected: list[tuple[int, str]] = []
        self.unbroken_rejected = 0  # of them
        self.hash = xxhash.xxh3_64()
        self.writers: dict[str, TokenWriter] = {}

    def add(self, piece: Piece, disk_bytes: int) -> int:
        maker = self.maker
        self._hash(piece)
        texts_of_keys, piece.texts, piece.raw = dict(piece.texts), {}, ()  # a long document is in memory often enough
        runs = {key: maker.runs(texts) for key, texts in texts_of_keys.items()}
        count = len(texts_of_keys.pop(maker.job.keys[0]))
        texts_of_keys.clear()
        if any(slices is None for found in runs.values() for _, slices in found):
            assert (count, piece.lines) == (1, 1), "a document of so many bytes is a piece of its own"
            piece.rejected.append((0, maker.why_unbroken))
            self.unbroken_rejected += 1
            count = 0
        tokens = sum(self._write(key, runs.pop(key)) for key in maker.job.keys) if count else 0
        self.blank += [self.lines + line for line in piece.blank]
        self.rejected += [(self.lines + line, reason) for line, reason in piece.rejected]
        self.lines += piece.lines
        self.documents += count
        self.disk_bytes += disk_bytes
        return tokens

    def _write(self, key: str, runs: Sequence[Run]) -> int:
        """Append the texts of a key; how many tokens they are."""
        job, maker = self.maker.job, self.maker
        if key not in self.writers:
            prefix = job.shard_output(key, self.source, self.number)
            self.writers[key] = TokenWriter(prefix, token_dtype(maker.tokenizer.vocab_size))
        writer, where = self.writers[key], job.sources[self.source].path
        end = maker.tokenizer.end_of_document if job.append_end_of_document else None
        tokens = 0
        for texts, slices in runs:
            if isinstance(texts, np.ndarray):
                assert slices is not None, "a document that is too long unbroken was to be rejected"
                tokens += writer.add_long(maker.encode_long(texts, slices, where), end)
            else:
                tokens += writer.add(*maker.encode(texts, where), end)
        return tokens

    def _hash(self, piece: Piece) -> None:
        for content in piece.raw:
            self.hash.update(content)
            self.text_bytes += len(content)

    def close(self, last: bool) -> None:
        """Publish the shard's files, then its record."""
        job, source = self.maker.job, self.maker.job.sources[self.source]
        found = os.stat(source.path)
        if (found.st_size, found.st_mtime_ns) != (source.size, source.modified_ns):
            raise ValueError(f"{source.path}: changed while it was read; run again when nothing writes to it any more")
        files = {key: writer.finish() for key, writer in self.writers.items()}
        asked = self.lines - len(self.blank) - len(self.rejected)
        for count in [self.documents, *(entry["documents"] for entry in files.values())]:
            if count != asked:
                raise RuntimeError(
                    f"{source.path}: {asked} documents read in shard {self.number} and {count} "
                    "written: a fault of this program; please report it with the file"
                )
        record = {
            "job": self.maker.fingerprint,
            **source_facts(source),
            "shard": self.number,
            "last": last,
            "lines": self.lines,
            "documents": self.documents,
            "blank": self.blank,
            "rejected": self.rejected,
            "unbroken_bytes": job.unbroken_bytes,
            "unbroken_rejected": self.unbroken_rejected,
            "content_bytes": self.text_bytes,
            "content_xxh3": self.hash.hexdigest(),
            "disk_bytes": self.disk_bytes,
            "files": files,
        }
        os.makedirs(job.record_folder, exist_ok=True)
        write_sealed(job.record_path(self.source, self.number), record)
