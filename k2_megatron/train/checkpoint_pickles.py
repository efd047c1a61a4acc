"""Whether the pickles inside a checkpoint hold nothing but data: asked before torch and megatron-core unpickle them.

torch's reader unpickles a checkpoint's tables, and its byte objects (generator states, extra state), without
restriction: whoever can write the folder could run code where it is loaded. Here both are read by an unpickler that
makes an inert object of each name it knows and refuses every other, so that what passes holds no other call. Tensors
and common.pt are loaded with weights_only by torch and megatron-core themselves.
"""

import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

from k2_megatron.runtime.collector import collector_paused

TABLES = ".metadata"
_TABLE_NAMES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in ("Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
                     "BytesStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("collections", "OrderedDict"),
    *(("torch", name) for name in ("float32", "float16", "bfloat16", "float64", "int64", "int32", "int16", "int8",
                                   "uint8", "bool")),
}  # fmt: skip
_OBJECT_NAMES = {
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "ByteStorage"),
    ("torch", "LongStorage"),
    ("collections", "OrderedDict"),
    ("_io", "BytesIO"),  # the extra state of Transformer Engine
}


def pickle_problems(folder: Path) -> list[str]:
    """What in the pickles of a torch_dist folder is no data, naming the file; nothing when all is well."""
    path = folder / TABLES
    try:
        with path.open("rb") as stream, collector_paused():
            tables = _Inspector(stream, _TABLE_NAMES).load()
        for index, info in tables.storage_data.items():
            if not hasattr(tables.state_dict_metadata[index.fqn], "chunks"):
                path = folder / info.relative_path
                _inspect_object(path, info.offset, info.length)
    except Exception as error:  # a pickle from anywhere can fail in any way
        return [f"{path} cannot be trusted: {error or type(error).__name__}"]
    return []


def _inspect_object(path: Path, offset: int, length: int) -> None:
    with path.open("rb") as stream:
        stream.seek(offset)
        content = stream.read(length)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        _Inspector(io.BytesIO(archive.read(name)), _OBJECT_NAMES).load()


class _Inert(dict):
    """Stands for any object of a known name: takes all that unpickling does to one, and does nothing."""

    def __init__(self, *_arguments: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _Inspector(pickle.Unpickler):
    def __init__(self, stream, known: set[tuple[str, str]]) -> None:
        super().__init__(stream)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of ours holds")
        return _Inert

    def persistent_load(self, _identity: Any) -> Any:
        return _Inert()
