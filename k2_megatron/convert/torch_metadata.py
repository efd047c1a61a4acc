"""The `.metadata` of a torch_dist checkpoint: which chunk of which tensor lies where. Read without torch, safely.

The file is a pickle. It is read by an unpickler that knows the dozen names such a file holds and turns each into a
plain record; any other name is refused, so a file from anywhere can be opened.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

from k2_megatron.convert.errors import ConversionError
from k2_megatron.runtime.collector import collector_paused

METADATA = ".metadata"
_DISTRIBUTED = "torch.distributed.checkpoint."
_RECORDS = {
    (_DISTRIBUTED + "metadata", "Metadata"),
    (_DISTRIBUTED + "metadata", "TensorStorageMetadata"),
    (_DISTRIBUTED + "metadata", "TensorProperties"),
    (_DISTRIBUTED + "metadata", "ChunkStorageMetadata"),
    (_DISTRIBUTED + "metadata", "BytesStorageMetadata"),
    (_DISTRIBUTED + "metadata", "MetadataIndex"),
    (_DISTRIBUTED + "metadata", "StorageMeta"),
    (_DISTRIBUTED + "filesystem", "_StorageInfo"),
}
_VALUES = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
    (_DISTRIBUTED + "metadata", "_MEM_FORMAT_ENCODING"): int,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib", "Path"): lambda *parts: "/".join(parts),
    ("collections", "OrderedDict"): dict,
}
_DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")


class Chunk(NamedTuple):
    """A stored part of a tensor: its place in the global tensor, and its place on disk."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


class Tensor(NamedTuple):
    """A global tensor as the checkpoint stores it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


class Stored(NamedTuple):
    """All that a checkpoint holds: tensors by key, and byte objects by key."""

    tensors: dict[str, Tensor]
    objects: dict[str, Chunk]


def read_metadata(folder: Path) -> Stored:
    """The tables of a torch_dist folder. ConversionError when the file is missing, damaged or holds other things."""
    path = folder / METADATA
    try:
        with path.open("rb") as stream, collector_paused():
            return _stored(_MetadataUnpickler(stream).load())
    except FileNotFoundError:
        raise ConversionError(f"{folder} has no {METADATA}: it is not a torch_dist checkpoint") from None
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, IndexError, KeyError, ValueError) as error:
        raise ConversionError(f"{path} cannot be used: {error}; use another checkpoint") from None


class _Record:
    """Any of the metadata's dataclasses: its fields as attributes, or its state as it came."""

    state: tuple = ()
    offset: tuple | int | None = None  # of a whole object, which has none, torch stores nothing

    def __setstate__(self, state) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in _RECORDS:
            return type(name, (_Record,), {})
        if (module, name) in _VALUES:
            return _VALUES[module, name]
        if module == "torch" and name in _DTYPES:
            return name
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours holds")


def _stored(found) -> Stored:
    places: dict[tuple, tuple[str, int, int]] = {}
    for index, info in found.storage_data.items():
        offsets = None if index.offset is None else tuple(index.offset)
        places[index.fqn, offsets] = (info.relative_path, info.offset, info.length)
    tensors, objects = {}, {}
    for key, entry in found.state_dict_metadata.items():
        if not hasattr(entry, "chunks"):
            objects[key] = Chunk((), (), *places[key, None])
            continue
        chunks = [
            Chunk(tuple(chunk.offsets), tuple(chunk.sizes), *places[key, tuple(chunk.offsets)])
            for chunk in entry.chunks
        ]
        tensors[key] = Tensor(entry.properties.state[0], tuple(entry.size), tuple(chunks))
    outside = {chunk.file for chunk in _all_chunks(tensors, objects) if Path(chunk.file).name != chunk.file}
    if outside:
        raise ValueError(f"it points outside its folder: {sorted(outside)[0]!r}")
    return Stored(tensors, objects)


def _all_chunks(tensors: dict[str, Tensor], objects: dict[str, Chunk]):
    for tensor in tensors.values():
        yield from tensor.chunks
    yield from objects.values()


def write_metadata(folder: Path, stored: Stored) -> None:
    """Write the tables as torch's reader expects them."""
    with collector_paused():
        _write_metadata(folder, stored)


def _write_metadata(folder: Path, stored: Stored) -> None:
    import torch
    from torch.distributed.checkpoint import metadata as records
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    state: dict = {}
    places: dict = {}
    for key, tensor in stored.tensors.items():
        chunks = [records.ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in tensor.chunks]
        properties = records.TensorProperties(dtype=getattr(torch, tensor.dtype))
        state[key] = records.TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for number, chunk in enumerate(tensor.chunks):
            index = records.MetadataIndex(key, torch.Size(chunk.offsets), number)
            places[index] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    for key, chunk in stored.objects.items():
        state[key] = records.BytesStorageMetadata()
        places[records.MetadataIndex(key)] = _StorageInfo(chunk.file, chunk.position, chunk.length)
    whole = records.Metadata(state_dict_metadata=state, planner_data=None, storage_data=places)
    with (folder / METADATA).open("wb") as stream:
        pickle.dump(whole, stream)
