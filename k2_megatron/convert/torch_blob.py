"""One tensor as torch.save stores it (a zip of a small pickle and the raw bytes), written and read without torch.

torch.save into memory is what limits torch's own checkpoint writer (0.25 GB/s a core: it copies and checks the bytes
several times). Here the bytes go from the buffer to the file once, and come back by their position in the file. The
pickle is written by pickle and read by an unpickler that knows five names.

Format: torch/serialization.py; zip: PKWARE APPNOTE 6.3, sections 4.3.7 (local header), 4.3.12 and 4.3.16.
"""

import collections
import io
import os
import pickle
import struct
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

from k2_megatron.convert import pickle_opcodes as ops
from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.numbers import BITS

_STORAGES = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "float16": "HalfStorage"}
_DTYPES = {name: dtype for dtype, name in _STORAGES.items()}
_ALIGNMENT = 64
_PERSISTENT = b"Q"  # the opcode of an object outside of the pickle, named by what is on the stack
_MAX_BYTES = 1 << 31  # beyond 4 GB a zip needs other headers; chunks are far smaller


class Payload(NamedTuple):
    """Where a stored tensor's raw bytes lie in its file."""

    dtype: str
    shape: tuple[int, ...]
    position: int


def tensor_blob(bits: np.ndarray, dtype: str, shape: tuple[int, ...]) -> tuple[bytes, memoryview, bytes]:
    """(bytes before, the tensor's own bytes, bytes after) of a tensor of `shape`; torch.load reads their sum."""
    assert bits.flags.c_contiguous and bits.dtype == BITS[dtype], f"{bits.dtype} {bits.flags} is no {dtype} buffer"
    assert bits.nbytes < _MAX_BYTES, f"a chunk of {bits.nbytes} bytes is too large for one zip entry"
    before, entries = _small_records([("data.pkl", _tensor_pickle(dtype, shape)), ("byteorder", b"little")])
    payload = bits.data.cast("B")
    header, entry = _record("data/0", payload, len(before), _ALIGNMENT)
    after_start = len(before) + len(header) + len(payload)
    after, more = _small_records([("version", b"3\n")], after_start)
    entries = [*entries, entry, *more]
    return before + header, payload, after + _directory(entries, after_start + len(after))


def object_blob(pickled: bytes) -> bytes:
    """torch.save of an object without tensors, from its pickle."""
    records, entries = _small_records([("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")])
    return records + _directory(entries, len(records))


def find_payload(descriptor: int, offset: int, length: int, what: str) -> Payload:
    """Where the tensor stored at `offset` of an open file has its bytes. ConversionError when it is no such tensor."""
    try:
        with zipfile.ZipFile(_Window(descriptor, offset, length)) as archive:
            names = {entry.filename.split("/", 1)[1]: entry for entry in archive.infolist()}
            if "byteorder" in names and archive.read(names["byteorder"]) != b"little":
                raise ConversionError(f"{what} is stored big-endian, which this tool does not read")
            key, dtype, shape = _read_tensor_pickle(archive.read(names["data.pkl"]), what)
            entry = names[f"data/{key}"]
    except (zipfile.BadZipFile, KeyError, IndexError, pickle.UnpicklingError, EOFError, struct.error) as error:
        raise ConversionError(f"{what} is damaged: {type(error).__name__}: {error}; use another checkpoint") from None
    wanted = int(np.prod(shape, dtype=np.int64)) * BITS[dtype].itemsize
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < wanted:
        raise ConversionError(f"{what} holds {entry.file_size} bytes, its shape {shape} of {dtype} needs {wanted}")
    local = os.pread(descriptor, 30, offset + entry.header_offset)
    name_bytes, extra_bytes = struct.unpack("<HH", local[26:30])
    return Payload(dtype, shape, offset + entry.header_offset + 30 + name_bytes + extra_bytes)


# Writing


def _tensor_pickle(dtype: str, shape: tuple[int, ...]) -> bytes:
    """_rebuild_tensor_v2(storage, 0, shape, stride, False, OrderedDict()), as torch pickles it."""
    strides = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    elements = int(np.prod(shape, dtype=np.int64))
    storage = ops.group(
        ops.text("storage"), ops.name("torch", _STORAGES[dtype]), ops.text("0"), ops.text("cpu"), ops.integer(elements)
    )
    hooks = ops.name("collections", "OrderedDict") + ops.group() + ops.CALL
    arguments = (storage + _PERSISTENT, ops.integer(0), ops.integers(shape), ops.integers(strides), ops.FALSE, hooks)
    rebuild = ops.name("torch._utils", "_rebuild_tensor_v2")
    return ops.BEGIN + rebuild + ops.group(*arguments) + ops.CALL + ops.END


class _Entry(NamedTuple):
    name: bytes
    crc32: int
    size: int
    offset: int


def _record(name: str, data, offset: int, alignment: int = 1) -> tuple[bytes, _Entry]:
    """The local header of one stored record whose header begins at `offset`; padding aligns the data."""
    encoded = f"archive/{name}".encode()
    padding = -(offset + 30 + len(encoded) + 4) % alignment
    extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
    entry = _Entry(encoded, zlib.crc32(data), len(data), offset)
    header = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 0x21, entry.crc32, entry.size, entry.size,
                         len(encoded), len(extra))  # fmt: skip
    return header + encoded + extra, entry


def _small_records(records: list[tuple[str, bytes]], start: int = 0) -> tuple[bytes, list[_Entry]]:
    output, entries = b"", []
    for name, data in records:
        header, entry = _record(name, data, start + len(output))
        output += header + data
        entries.append(entry)
    return output, entries


def _directory(entries: list[_Entry], offset: int) -> bytes:
    rows = b"".join(
        struct.pack("<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 0x21, entry.crc32, entry.size, entry.size,
                    len(entry.name), 0, 0, 0, 0, 0, entry.offset) + entry.name
        for entry in entries
    )  # fmt: skip
    return rows + struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, len(entries), len(entries), len(rows), offset, 0)


# Reading


class _Window(io.RawIOBase):
    """A part of an open file as a file of its own, for zipfile."""

    def __init__(self, descriptor: int, offset: int, length: int) -> None:
        self.descriptor, self.offset, self.length, self.at = descriptor, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = max(0, offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence])
        return self.at

    def readinto(self, buffer) -> int:
        data = os.pread(self.descriptor, max(0, min(len(buffer), self.length - self.at)), self.offset + self.at)
        buffer[: len(data)] = data
        self.at += len(data)
        return len(data)


class _TensorUnpickler(pickle.Unpickler):
    """Reads a stored tensor's pickle as (storage key, dtype, shape); any other name in it is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, start, shape, stride, *_rest: (storage, start, tuple(shape), tuple(stride))
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise pickle.UnpicklingError(f"{module}.{name} is not what a stored tensor holds")

    def persistent_load(self, identity):
        _storage, dtype, key, _location, elements = identity
        return dtype, key, elements


def _read_tensor_pickle(pickled: bytes, what: str) -> tuple[str, str, tuple[int, ...]]:
    found = _TensorUnpickler(io.BytesIO(pickled)).load()
    if not (isinstance(found, tuple) and len(found) == 4):
        raise ConversionError(f"{what} is not a tensor")
    (dtype, key, elements), start, shape, stride = found
    dense = tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))
    if start != 0 or stride != dense or elements < int(np.prod(shape, dtype=np.int64)):
        raise ConversionError(f"{what} is stored with strides {stride} from {start}; a dense tensor was expected")
    return key, dtype, shape
