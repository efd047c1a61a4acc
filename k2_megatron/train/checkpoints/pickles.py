"""The pickles inside a checkpoint, read without letting them call anything: its tables, and its byte objects.

torch's own reader unpickles both without restriction: whoever can write the folder could run code where it is loaded.
Here tables are read by an unpickler that turns each name it knows into a record and refuses every other; training
builds torch's tables from these records (restricted_loading.py) and loads byte objects with weights_only. The extra
state of layers, which Transformer Engine would unpickle, has to be empty. This file needs no torch:
tools/convert_checkpoint.py asks it too. common.pt megatron-core itself loads with weights_only.
"""

import io
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from k2_megatron.runtime.collector import collector_paused

TABLES = ".metadata"
DTYPES = ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8", "uint8", "bool")
_DISTRIBUTED = "torch.distributed.checkpoint"
_TABLE_NAMES = {
    *(
        (f"{_DISTRIBUTED}.metadata", name)
        for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                     "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    (f"{_DISTRIBUTED}.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in DTYPES),
}  # fmt: skip
_OBJECT_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "ByteStorage"),
    ("torch", "LongStorage"),
    ("collections", "OrderedDict"),
}
# Transformer Engine keeps what a layer has for fp8, which K2 has not, as bytes of a pickle that it loads unrestricted.
EXTRA_STATE = "_extra_state"
EXTRA_STATE_REFUSED = "Transformer Engine would unpickle it unrestricted, and K2's layers have none"
_ZIP_BEGINS = b"PK\x03\x04"


class Record:
    """Stands for an object of a known name: what it was made with, and its state. It does nothing."""

    arguments: tuple
    fields: dict[str, Any]
    state: Any

    def __new__(cls, *arguments: Any) -> "Record":
        record = super().__new__(cls)
        record.arguments = arguments
        record.fields = {}
        record.state = None
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.fields = state


class Place(NamedTuple):
    """Where a stored part lies: a file of the checkpoint's folder, and the bytes in it."""

    file: str
    offset: int
    length: int


class Chunk(NamedTuple):
    """A stored part of a tensor: its place in the global tensor."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


class Tensor(NamedTuple):
    """A global tensor; `dtype` is torch's name of it."""

    dtype: str
    shape: tuple[int, ...]
    chunks: list[Chunk]


class Tables(NamedTuple):
    """What a checkpoint stores: tensors, or None for a byte object, by key; and the place of every part, which stands
    under (key, offsets in the tensor or None, number of the chunk or None)."""

    entries: dict[str, Tensor | None]
    places: dict[tuple[str, tuple[int, ...] | None, int | None], Place]


def read_tables(folder: Path) -> Tables:
    """The tables of a torch_dist folder. pickle.UnpicklingError when they hold anything but tables; any other error of
    a damaged pickle may come too."""
    with (folder / TABLES).open("rb") as stream, collector_paused():
        whole = _Inspector(stream, _TABLE_NAMES).load()
        stored = _fields(whole, "Metadata")
        entries = {_text(key): _entry(entry) for key, entry in _items(stored["state_dict_metadata"])}
        return Tables(entries, dict(_place(*item) for item in _items(stored["storage_data"])))


def pickle_problems(folder: Path) -> list[str]:
    """What in the pickles of a torch_dist folder is no data, naming the file; nothing when all is well."""
    path = folder / TABLES
    try:
        tables = read_tables(folder)
        for (key, _offsets, _number), place in tables.places.items():
            if tables.entries[key] is None:
                path = folder / place.file
                _inspect_object(path, place, key)
    except Exception as error:  # a pickle from anywhere can fail in any way
        return [f"{path} cannot be trusted: {error or type(error).__name__}"]
    return []


def _inspect_object(path: Path, place: Place, key: str) -> None:
    with path.open("rb") as stream:
        stream.seek(place.offset)
        content = stream.read(place.length)
    if not content.startswith(_ZIP_BEGINS):  # torch looks at the beginning, and takes anything else for a bare pickle
        raise pickle.UnpicklingError("an object in it does not begin as a zip does")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        found = _Inspector(io.BytesIO(archive.read(name)), _OBJECT_NAMES).load()
    if EXTRA_STATE in key and not all(map(_is_empty, found if isinstance(found, list) else [found])):
        raise pickle.UnpicklingError(f"{key} holds data: {EXTRA_STATE_REFUSED}")


def _is_empty(found: Any) -> bool:
    """None, or a tensor without elements, whose third argument is its size."""
    if isinstance(found, Record) and type(found).__name__ == "_rebuild_tensor_v2":
        return 0 in found.arguments[2]
    return found is None


class _Inspector(pickle.Unpickler):
    def __init__(self, stream, known: set[tuple[str, str]]) -> None:
        super().__init__(stream)
        self._known = known
        self._records: dict[str, type[Record]] = {}  # of this one pickle: what it does to a class stays with it

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours holds")
        if name == "OrderedDict":
            return OrderedDict  # its entries come as arguments or one by one: only itself takes both rightly
        if module == "torch" and name in DTYPES:
            return name
        if name not in self._records:
            self._records[name] = type(name, (Record,), {})
        return self._records[name]

    def persistent_load(self, _identity: Any) -> Any:
        return Record()


def _fields(found: Any, name: str) -> dict[str, Any]:
    if not isinstance(found, Record) or type(found).__name__ != name:
        raise pickle.UnpicklingError(f"it holds {type(found).__name__} where a {name} belongs")
    return found.fields


def _items(found: Any) -> Iterator[tuple[Any, Any]]:
    if type(found) not in (dict, OrderedDict):
        raise pickle.UnpicklingError(f"it holds {type(found).__name__} where a table belongs")
    return iter(found.items())


def _text(found: Any) -> str:
    if type(found) is not str:
        raise pickle.UnpicklingError(f"it holds {type(found).__name__} where a name belongs")
    return found


def _number(found: Any) -> int:
    if type(found) is not int or found < 0:
        raise pickle.UnpicklingError(f"it holds {found!r} where a count belongs")
    return found


def _size(found: Any) -> tuple[int, ...]:
    _fields(found, "Size")
    (sizes,) = found.arguments
    return tuple(map(_number, sizes))


def _entry(found: Any) -> Tensor | None:
    if isinstance(found, Record) and type(found).__name__ == "BytesStorageMetadata":
        return None
    tensor = _fields(found, "TensorStorageMetadata")
    _fields(tensor["properties"], "TensorProperties")
    dtype = _text(tensor["properties"].state[0])
    if dtype not in DTYPES:
        raise pickle.UnpicklingError(f"it names the dtype {dtype!r}")
    chunks = (_fields(chunk, "ChunkStorageMetadata") for chunk in tensor["chunks"])
    return Tensor(
        dtype, _size(tensor["size"]), [Chunk(_size(chunk["offsets"]), _size(chunk["sizes"])) for chunk in chunks]
    )


def _place(index: Any, info: Any) -> tuple[tuple[str, tuple[int, ...] | None, int | None], Place]:
    part, where = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    offsets, number = part.get("offset"), part.get("index")
    key = (
        _text(part["fqn"]),
        None if offsets is None else _size(offsets),
        None if number is None else _number(number),
    )
    file = _text(where["relative_path"])
    if Path(file).name != file:
        raise pickle.UnpicklingError(f"it points outside its folder: {file!r}")
    if where.get("transform_descriptors"):
        raise pickle.UnpicklingError(f"{file} was written through {where['transform_descriptors']}, which we never do")
    return key, Place(file, _number(where["offset"]), _number(where["length"]))
