"""One of our checkpoints into Hugging Face's form: safetensors shards of LlamaForCausalLM's tensors, by unit."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2_megatron.convert.fingerprint import fingerprint_rows
from k2_megatron.convert.names import EMBEDDING, OUTPUT, TABLE, Place, Shape, places, segments
from k2_megatron.convert.numbers import BITS, Rounding, change_dtype, require_finite
from k2_megatron.convert.safetensors_file import SINGLE, header_bytes
from k2_megatron.convert.source import Kind
from k2_megatron.convert.torch_dist import TorchDistSource
from k2_megatron.convert.work import HashedFile, Unit
from k2_megatron.convert.workers import resident_bytes
from k2_megatron.train.checkpoints.file_hash import XXH3

BLOCK_BYTES = 32 << 20


@dataclass(frozen=True)
class HuggingFaceJob:
    """Writes the shards. `shape` knows how many vocabulary rows are in use; `tied` leaves the output matrix out."""

    source: TorchDistSource
    shape: Shape
    folder: Path
    kind: Kind  # "weights", or "main" for the fp32 parameters
    dtype: str
    precision: str
    tied: bool
    shard_bytes: int

    def units(self) -> list[Unit]:
        shards: list[list[tuple[int, int | None, int]]] = [[]]
        sizes = [0]
        for place in places(self.shape):
            if self.tied and place.entry is OUTPUT:
                continue
            for index in range(len(place.hugging_face)):
                rows, columns = place.entry.hugging_face_size(index, self.shape)
                size = rows * columns * BITS[self.dtype].itemsize
                if sizes[-1] and sizes[-1] + size > self.shard_bytes:
                    shards.append([])
                    sizes.append(0)
                shards[-1].append((TABLE.index(place.entry), place.layer, index))
                sizes[-1] += size
        count = len(shards)
        names = [SINGLE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        return [Unit(name, tuple(shard), size) for name, shard, size in zip(names, shards, sizes, strict=True)]

    def run(self, unit: Unit) -> dict[str, Any]:
        tensors = [(Place(TABLE[entry], layer), index) for entry, layer, index in unit.content]
        file = HashedFile(self.folder / unit.file, XXH3)
        file.write(header_bytes({place.hugging_face[index]: self._stored(place, index) for place, index in tensors}))
        facts: dict[str, Any] = {"fingerprint": 0, "tensors": {}}
        rounding = Rounding()
        for place, index in tensors:
            digest = xxhash.xxh3_128()
            for first_row, rows in self._rows(place, index):
                require_finite(rows, self.source.dtypes[self.kind], place.hugging_face[index])
                facts["fingerprint"] += self._fingerprint(place, first_row, rows)
                rows = change_dtype(rows, self.source.dtypes[self.kind], self.dtype, rounding)
                digest.update(rows.data.cast("B"))
                file.write(rows)
            facts["tensors"][place.hugging_face[index]] = digest.hexdigest()
            if index == 0:
                facts["fingerprint"] += self._fingerprint_unwritten(place)
        facts["rounded"], facts["largest_rounding"] = rounding.values, rounding.largest
        return {**facts, **file.close(), "resident_bytes": resident_bytes()}

    def index_text(self, results: list[dict]) -> str:
        """model.safetensors.index.json."""
        where = {name: facts["file"] for facts in results for name in facts["tensors"]}
        total = sum(unit.bytes for unit in self.units())
        return (
            json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}, indent=2) + "\n"
        )

    def _stored(self, place: Place, index: int) -> tuple[str, tuple[int, ...]]:
        rows, columns = place.entry.hugging_face_size(index, self.shape)
        return self.dtype, (rows,) if place.entry.cut == "whole" else (rows, columns)

    def _rows(self, place: Place, index: int) -> Iterator[tuple[int, np.ndarray]]:
        """(our first row, rows) in the order of Hugging Face's `index`-th tensor."""
        ours = [segment for segment in segments(place.entry, self.shape) if segment.tensor == index]
        for segment in sorted(ours, key=lambda segment: segment.row):
            yield from self._blocks(place, segment.our_row, segment.our_row + segment.rows)

    def _blocks(self, place: Place, first_row: int, last_row: int) -> Iterator[tuple[int, np.ndarray]]:
        row_bytes = place.entry.size(self.shape)[1] * BITS[self.source.dtypes[self.kind]].itemsize
        step = max(1, BLOCK_BYTES // row_bytes)
        for first in range(first_row, last_row, step):
            yield first, self.source.read(self.kind, place, first, min(first + step, last_row))

    def _fingerprint(self, place: Place, first_row: int, rows: np.ndarray) -> int:
        """Of the weights as training has them: fp32 parameters round to exactly those."""
        weights = change_dtype(rows, self.source.dtypes[self.kind], self.precision)
        return fingerprint_rows(place.entry.key(self.source.implementation), place.layer, first_row, weights)

    def _fingerprint_unwritten(self, place: Place) -> int:
        """Of rows that this unit reads for the fingerprint alone: vocabulary padding, and a tied output matrix."""
        total = 0
        if place.entry.rows == "vocabulary":
            for first_row, rows in self._blocks(place, self.shape.used_vocabulary, self.shape.vocab_size):
                total += self._fingerprint(place, first_row, rows)
        if self.tied and place.entry is EMBEDDING:
            output = Place(OUTPUT, None)
            for first_row, rows in self._blocks(output, 0, self.shape.vocab_size):
                total += self._fingerprint(output, first_row, rows)
        return total


def tied_rows_equal(source: TorchDistSource, kind: Kind) -> bool:
    """Whether embedding and output matrix hold the same bits, read in blocks."""
    rows = EMBEDDING.size(source.shape)[0]
    step = max(1, BLOCK_BYTES // (source.shape.hidden_size * 4))
    return all(
        np.array_equal(
            source.read(kind, Place(EMBEDDING, None), first, min(first + step, rows)),
            source.read(kind, Place(OUTPUT, None), first, min(first + step, rows)),
        )
        for first in range(0, rows, step)
    )
