"""safetensors files read and written by position, so that no more than a block of a tensor is ever in memory.

Format: 8 bytes little-endian length of a JSON header {name: {dtype, shape, data_offsets}}, the header, the data; see
https://huggingface.co/docs/safetensors. The library maps whole files, which counts as resident memory.
"""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from k2_megatron.convert.errors import ConversionError
from k2_megatron.convert.numbers import BITS, SAFETENSORS

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {short: dtype for dtype, short in SAFETENSORS.items()}
_MAX_HEADER_BYTES = 100_000_000  # the library's own limit


class StoredTensor(NamedTuple):
    """Where a tensor lies: file name, position of its first byte, dtype and shape."""

    file: str
    position: int
    dtype: str
    shape: tuple[int, ...]


def read_index(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder, from its index or its only file. ConversionError when files disagree."""
    if (folder / INDEX).is_file():
        try:
            where = json.loads((folder / INDEX).read_text())["weight_map"]
            files = sorted(set(where.values()))
            outside = [file for file in files if Path(file).name != file]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConversionError(f"{folder / INDEX} is damaged ({error}); fetch it again") from None
        if outside:
            raise ConversionError(f"{folder / INDEX} points outside its folder: {outside[0]!r}")
    elif (folder / SINGLE).is_file():
        where, files = None, [SINGLE]
    else:
        raise ConversionError(
            f"{folder} holds neither {INDEX} nor {SINGLE}; other formats (.bin, .gguf) are first saved as safetensors "
            "with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder)"
        )
    found: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in read_header(folder / file).items():
            if where is not None and where.get(name) != file:
                raise ConversionError(f"{folder / file} holds {name}, which the index puts in {where.get(name)}")
            found[name] = tensor
    missing = sorted(set(where or ()) - set(found))
    if missing:
        raise ConversionError(f"{folder}: {missing[0]} is in the index and in no file ({len(missing)} such names)")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, checked to fill it exactly. ConversionError when it is cut, missing or no such file."""
    if not path.is_file():
        raise ConversionError(f"{path} is missing; fetch it again")
    size = path.stat().st_size
    with path.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
            raise ConversionError(f"{path} is not a safetensors file, or is cut ({size} bytes); fetch it again")
        try:
            header = json.loads(stream.read(header_bytes))
            header.pop("__metadata__", None)
            entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ConversionError(f"{path}: its header is damaged ({error}); fetch it again") from None
    found, end = {}, 0
    for name, entry in entries:
        if not _is_entry(entry):
            raise ConversionError(f"{path}: its header is damaged (it says {entry!r} of {name}); fetch it again")
        if entry["dtype"] not in _DTYPES:
            raise ConversionError(
                f"{path}: {name} is {entry['dtype']}; weights in {', '.join(_DTYPES)} are read. "
                "Dequantize the model first"
            )
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        first, last = entry["data_offsets"]
        if first != end or last - first != int(np.prod(shape, dtype=np.int64)) * BITS[dtype].itemsize:
            raise ConversionError(f"{path}: {name} at bytes {first} to {last} does not fit shape {shape} of {dtype}")
        found[name], end = StoredTensor(path.name, 8 + header_bytes + first, dtype, shape), last
    if size != 8 + header_bytes + end:
        raise ConversionError(f"{path} has {size} bytes, its header announces {8 + header_bytes + end}; fetch it again")
    return found


def _is_entry(entry: dict[str, Any]) -> bool:
    """Whether a tensor's entry has the form that the format gives it."""
    shape, offsets = entry.get("shape"), entry["data_offsets"]
    return (
        isinstance(entry.get("dtype"), str)
        and isinstance(shape, list)
        and isinstance(offsets, list)
        and len(offsets) == 2
        and all(type(size) is int and size >= 0 for size in (*shape, *offsets))
    )


def header_bytes(tensors: dict[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file that will hold `tensors` (name: dtype, shape), in this order, padded to 8 bytes."""
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + int(np.prod(shape, dtype=np.int64)) * BITS[dtype].itemsize
        header[name] = {"dtype": SAFETENSORS[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_exactly(descriptor: int, buffer: np.ndarray, position: int, path: Path) -> None:
    """Fill a contiguous `buffer` from `position` of an open file. ConversionError when the file ends before."""
    view, done = buffer.data.cast("B"), 0
    while done < len(view):
        count = os.preadv(descriptor, [view[done:]], position + done)
        if count == 0:
            raise ConversionError(f"{path} ends at byte {position + done}, {len(view) - done} bytes early")
        done += count
