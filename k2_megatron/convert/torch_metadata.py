"""The `.metadata` of a torch_dist checkpoint: which chunk of which tensor lies where. Read without torch, safely.

The file is a pickle. It is read by an unpickler that knows the dozen names such a file holds and turns each into a
plain record; any other name is refused, so a file from anywhere can be opened.
"""

import pickle
from pathlib import Path
from typing import NamedTuple

from k2_megatron.convert import pickle_opcodes as ops
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
    """Write the tables as torch's reader expects them, in the opcodes that pickle emits for torch's records.

    With torch itself, whose import takes seconds of a core, it would be the dearest part of a small conversion.
    """
    with collector_paused():
        (folder / METADATA).write_bytes(_pickled(stored))


# {name that each tensor or chunk needs again: the opcode that fetches it}
_KEPT = {name: ops.kept(number) for number, name in enumerate((*sorted(_RECORDS), ("torch", "Size")))}


def _pickled(stored: Stored) -> bytes:
    entries, places = [], []
    for key, tensor in stored.tensors.items():
        entries.append((ops.text(key), _tensor(tensor)))
        places += [_place(key, chunk, number) for number, chunk in enumerate(tensor.chunks)]
    for key, chunk in stored.objects.items():
        entries.append((ops.text(key), _record("metadata", "BytesStorageMetadata")))
        places.append(_place(key, chunk, None))
    whole = _record(
        "metadata",
        "Metadata",
        state_dict_metadata=ops.pairs(*entries),
        planner_data=ops.NONE,
        storage_data=ops.pairs(*places),
        storage_meta=ops.NONE,
    )
    names = b"".join(ops.keep(ops.name(*name), number) for number, name in enumerate(_KEPT))
    return ops.BEGIN + names + whole + ops.END


def _tensor(tensor: Tensor) -> bytes:
    layout = ops.name("torch.serialization", "_get_layout") + ops.group(ops.text("torch.strided")) + ops.CALL
    contiguous = ops.name(_DISTRIBUTED + "metadata", "_MEM_FORMAT_ENCODING") + ops.integers((0,)) + ops.CALL
    properties = ops.group(ops.name("torch", tensor.dtype), layout, ops.FALSE, contiguous, ops.FALSE)
    chunks = (
        _record("metadata", "ChunkStorageMetadata", offsets=_size(chunk.offsets), sizes=_size(chunk.sizes))
        for chunk in tensor.chunks
    )
    return _record(
        "metadata",
        "TensorStorageMetadata",
        properties=ops.instance(_KEPT[_DISTRIBUTED + "metadata", "TensorProperties"], properties),
        size=_size(tensor.shape),
        chunks=ops.items(*chunks),
    )


def _place(key: str, chunk: Chunk, number: int | None) -> tuple[bytes, bytes]:
    """Where a chunk (of a byte object: number None) lies, under its place in the tensor."""
    index = {} if number is None else {"index": ops.integer(number)}
    offset = ops.NONE if number is None else _size(chunk.offsets)
    return (
        _record("metadata", "MetadataIndex", fqn=ops.text(key), **index, offset=offset),
        _record(
            "filesystem",
            "_StorageInfo",
            relative_path=ops.text(chunk.file),
            offset=ops.integer(chunk.position),
            length=ops.integer(chunk.length),
        ),
    )


def _record(module: str, name: str, **fields: bytes) -> bytes:
    state = ops.pairs(*((ops.text(field), value) for field, value in fields.items()))
    return ops.instance(_KEPT[_DISTRIBUTED + module, name], state if fields else b"")


def _size(sizes: tuple[int, ...]) -> bytes:
    return _KEPT["torch", "Size"] + ops.group(ops.integers(sizes)) + ops.CALL
