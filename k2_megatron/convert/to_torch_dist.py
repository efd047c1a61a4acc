"""Any source into one of our checkpoints: torch_dist chunks for a wanted layout, by unit, and their tables.

One file holds one kind of state (weights, fp32 parameters, a moment) of one layer, so that a pipeline stage reads
only files of its layers, and a tensor rank whole chunks of them. What a source does not hold is made: fp32 parameters
from the weights, moments of zeros (one chunk of zeros on disk serves all chunks of its size).
"""

import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2_megatron.convert.fingerprint import fingerprint_rows
from k2_megatron.convert.names import Entry, Place, Shape, places
from k2_megatron.convert.numbers import BITS, Rounding, change_dtype, require_finite
from k2_megatron.convert.source import KEY_PREFIX, Kind, Source
from k2_megatron.convert.torch_blob import object_blob, tensor_blob
from k2_megatron.convert.torch_metadata import Chunk, Stored, Tensor
from k2_megatron.convert.work import HashedFile, Unit
from k2_megatron.convert.workers import resident_bytes
from k2_megatron.train.checkpoints.file_hash import AES_LANES

KINDS: tuple[Kind, ...] = ("weights", "main", "exp_avg", "exp_avg_sq")
SHARED = "__0_0.distcp"
BLOCK_BYTES = 32 << 20  # of rows in memory at once
_LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")


class Block(NamedTuple):
    """Rows of one tensor that are read together, and the column ranges they are stored in, each one chunk."""

    first_row: int
    last_row: int
    columns: tuple[tuple[int, int], ...]


def blocks(entry: Entry, shape: Shape, tensor_parallel: int, itemsize: int) -> Iterator[Block]:
    """How a tensor is cut: at the borders of tensor ranks, and into blocks of bounded size."""
    rows, columns = entry.size(shape)
    row_parts = [(0, rows)]
    column_parts: tuple[tuple[int, int], ...] = ((0, columns),)
    if entry.cut == "rows":
        halves = 2 if entry.rows == "gate_up" else 1  # each rank has its part of gate and its part of up
        row_parts = _equal_parts(rows, halves * tensor_parallel)
    elif entry.cut == "columns":
        column_parts = tuple(_equal_parts(columns, tensor_parallel))
    block_rows = max(1, BLOCK_BYTES // (columns * itemsize))
    for first, last in row_parts:
        for start in range(first, last, block_rows):
            yield Block(start, min(start + block_rows, last), column_parts)


def _equal_parts(size: int, parts: int) -> list[tuple[int, int]]:
    assert size % parts == 0, f"{size} cannot be cut into {parts} equal parts"
    return [(part * size // parts, (part + 1) * size // parts) for part in range(parts)]


@dataclass(frozen=True)
class TorchDistJob:
    """Writes the units of one checkpoint. `objects` are byte objects to store as they are, by key."""

    source: Source
    folder: Path
    precision: str
    tensor_parallel: int
    pipeline_parallel: int
    implementation: str = "k2"
    objects: dict[str, bytes] = field(default_factory=dict)

    def dtype(self, kind: Kind) -> str:
        return self.precision if kind == "weights" else "float32"

    @property
    def written_kinds(self) -> tuple[Kind, ...]:
        """Kinds with bytes of their own. A float32 run's main parameters are its weights: the same bytes."""
        kinds: list[Kind] = ["weights"]
        if "main" in self.source.dtypes or self.precision != "float32":
            kinds.append("main")
        return (*kinds, *(kind for kind in KINDS[2:] if kind in self.source.dtypes))

    def source_kind(self, kind: Kind) -> Kind:
        """Where values of `kind` are read: what is missing, or less exact than asked, has another origin."""
        if kind == "weights" and self.dtype(kind) == "float32" and "main" in self.source.dtypes:
            return "main"
        return kind if kind in self.source.dtypes else "weights"

    def units(self) -> list[Unit]:
        shape = self.source.shape
        groups: dict[tuple[int, str], int] = {}
        for place in places(shape):
            rows, columns = place.entry.size(shape)
            where = self.part(place)
            groups[where] = groups.get(where, 0) + rows * columns
        found = [Unit(SHARED, ("shared",), 0)]
        for kind in self.written_kinds:
            for (stage, part), elements in groups.items():
                bytes_ = elements * BITS[self.dtype(kind)].itemsize
                found.append(Unit(f"__{stage}_{kind}_{part}.distcp", (kind, stage, part), bytes_))
        return found

    def run(self, unit: Unit) -> dict[str, Any]:
        file = HashedFile(self.folder / unit.file, AES_LANES)
        facts: dict[str, Any] = {"chunks": [], "fingerprint": 0}
        if unit.content == ("shared",):
            facts["chunks"], facts["objects"] = self._write_shared(file)
        else:
            kind, stage, part = unit.content
            rounding = Rounding()
            for place in places(self.source.shape):
                if self.part(place) == (stage, part):
                    self._write_tensor(file, kind, place, facts, rounding)
            facts["rounded"], facts["largest_rounding"] = rounding.values, rounding.largest
        return {**facts, **file.close(), "resident_bytes": resident_bytes()}

    def part(self, place: Place) -> tuple[int, str]:
        """(pipeline stage, part) that a tensor is filed under."""
        if place.layer is not None:
            return place.layer * self.pipeline_parallel // self.source.shape.layers, f"layer{place.layer}"
        return (0, "first") if place.entry.ours.startswith("embedding.") else (self.pipeline_parallel - 1, "last")

    def _write_tensor(self, file: HashedFile, kind: Kind, place: Place, facts: dict, rounding: Rounding) -> None:
        dtype, origin = self.dtype(kind), self.source_kind(kind)
        name = place.entry.key(self.implementation)
        layer = "" if place.layer is None else f" of layer {place.layer}"
        what = f"{self.source.folder}: {KEY_PREFIX[kind]}{name}{layer}"
        for block in blocks(place.entry, self.source.shape, self.tensor_parallel, BITS[dtype].itemsize):
            rows = self.source.read(origin, place, block.first_row, block.last_row)
            require_finite(rows, self.source.dtypes[origin], what)
            rows = change_dtype(rows, self.source.dtypes[origin], dtype, rounding)
            if kind == "weights":
                facts["fingerprint"] += fingerprint_rows(name, place.layer, block.first_row, rows)
            for first, last in block.columns:
                offsets, sizes = _chunk_place(place, block, first, last)
                position = file.bytes
                for piece in tensor_blob(np.ascontiguousarray(rows[:, first:last]), dtype, sizes):
                    file.write(piece)
                facts["chunks"].append([KEY_PREFIX[kind] + name, offsets, sizes, position, file.bytes - position])

    def _write_shared(self, file: HashedFile) -> tuple[list, list]:
        """Zeros for moments that the source has not, one chunk of each size; and the byte objects."""
        zeros: list = []
        sizes_needed: set[tuple[int, ...]] = set()
        if "exp_avg" not in self.source.dtypes:
            for place in places(self.source.shape):
                for block in blocks(place.entry, self.source.shape, self.tensor_parallel, 4):
                    sizes_needed.update(_chunk_place(place, block, *columns)[1] for columns in block.columns)
        for sizes in sorted(sizes_needed):
            position = file.bytes
            for piece in tensor_blob(np.zeros(sizes, BITS["float32"]), "float32", sizes):
                file.write(piece)
            zeros.append(["zeros", None, sizes, position, file.bytes - position])
        stored = []
        same: dict[bytes, int] = {}
        for key, blob in self.objects.items():
            if blob not in same:
                same[blob] = file.bytes
                file.write(blob)
            stored.append([key, same[blob], len(blob)])
        return zeros, stored

    def tables(self, results: Sequence[dict]) -> Stored:
        """The checkpoint's metadata, from the facts of all units."""
        shape = self.source.shape
        chunks: dict[str, list[Chunk]] = {}
        zeros: dict[tuple[int, ...], tuple[int, int]] = {}
        objects: dict[str, Chunk] = {}
        for facts in results:
            for key, offsets, sizes, position, length in facts["chunks"]:
                if key == "zeros":
                    zeros[tuple(sizes)] = (position, length)
                else:
                    chunk = Chunk(tuple(offsets), tuple(sizes), facts["file"], position, length)
                    chunks.setdefault(key, []).append(chunk)
            for key, position, length in facts.get("objects", []):
                objects[key] = Chunk((), (), facts["file"], position, length)
        tensors: dict[str, Tensor] = {}
        for place in places(shape):
            for kind in KINDS:
                key = KEY_PREFIX[kind] + place.entry.key(self.implementation)
                if key not in tensors:
                    found = chunks.get(key) or self._borrowed(kind, place.entry, chunks, zeros)
                    tensors[key] = Tensor(self.dtype(kind), _global_shape(place, shape), tuple(found))
        return Stored(tensors, objects)

    def _borrowed(self, kind: Kind, entry: Entry, chunks: dict, zeros: dict) -> list[Chunk]:
        """Chunks of a kind without bytes of its own: the weights' (main parameters), or zeros (moments)."""
        if kind == "main":
            return chunks[entry.key(self.implementation)]
        found = []
        for place in places(self.source.shape):
            if place.entry is entry:
                for block in blocks(entry, self.source.shape, self.tensor_parallel, 4):
                    for columns in block.columns:
                        offsets, sizes = _chunk_place(place, block, *columns)
                        found.append(Chunk(offsets, sizes, SHARED, *zeros[sizes]))
        return found


def _chunk_place(place: Place, block: Block, first: int, last: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(offsets, sizes) in the global tensor, whose first axis is the layer where layers are stacked."""
    rows = block.last_row - block.first_row
    offsets: tuple[int, ...] = (block.first_row, first)
    sizes: tuple[int, ...] = (rows, last - first)
    if place.entry.cut == "whole":
        offsets, sizes = offsets[:1], sizes[:1]
    return (offsets, sizes) if place.layer is None else ((place.layer, *offsets), (1, *sizes))


def _global_shape(place: Place, shape: Shape) -> tuple[int, ...]:
    rows, columns = place.entry.size(shape)
    one = (rows,) if place.entry.cut == "whole" else (rows, columns)
    return (shape.layers, *one) if place.entry.stacked else one


def empty_extra_state(shape: Shape) -> dict[str, bytes]:
    """The (empty) extra state that megatron-core's linear layers store and ask for, one object a layer."""
    blob = object_blob(pickle.dumps([None], 2))
    return {
        f"decoder.layers.{linear}._extra_state/shard_{layer}_{shape.layers}": blob
        for linear in _LINEARS
        for layer in range(shape.layers)
    }
