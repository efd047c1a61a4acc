"""The files tokens are kept in: a writer that leaves whole files or none, hashes of every block, and their checks.

In: ids and lengths of documents. Out: `NAME.bin`, `NAME.idx` (Megatron's), and `NAME.xxh3`: one uint64 xxh3 hash for
each 64 KiB block of the .bin, then of the .idx, so that a reader can check just what it touches.
Small JSON files (manifests, plans) carry the hash of themselves: `write_sealed` and `read_sealed`.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from k2_megatron.data.compiled import compiled
from k2_megatron.data.indexed import index_bytes
from k2_megatron.runtime.durable import start_writing_back, sync

BLOCK_BYTES = 64 << 10
WRITE_BACK_BYTES = 4 << 20  # the disk gets a file in such steps, so that the end does not wait for all of it


class HashedWriter:
    """A file written aside (`.partial`), hashed as a whole and block by block, published by a rename in `commit`."""

    def __init__(self, path: Path):
        self.path = path
        self.partial = Path(f"{path}.{secrets.token_hex(4)}.partial")  # two runs of one shard must not share a file
        self.file = open(self.partial, "wb")
        self.bytes, self._handed_over = 0, 0
        self._whole, self._block, self._filled = xxhash.xxh3_64(), xxhash.xxh3_64(), 0
        self._blocks: list[int] = []

    def write(self, content: bytes | np.ndarray) -> None:
        """Append bytes, or the memory of a contiguous array."""
        whole = content.data if isinstance(content, np.ndarray) else memoryview(content)
        view = whole.cast("B") if len(content) else memoryview(b"")
        with self._named():
            self.file.write(view)
        self._whole.update(view)
        self.bytes += len(view)
        while len(view):
            part, view = view[: BLOCK_BYTES - self._filled], view[BLOCK_BYTES - self._filled :]
            self._block.update(part)
            self._filled += len(part)
            if self._filled == BLOCK_BYTES:
                self._close_block()
        if self.bytes - self._handed_over >= WRITE_BACK_BYTES:
            self.hand_over()

    def hand_over(self) -> None:
        """Have the system begin to write to the disk what it was not yet told to."""
        with self._named():
            self.file.flush()
        start_writing_back(self.file.fileno(), self._handed_over, self.bytes - self._handed_over)
        self._handed_over = self.bytes

    def _close_block(self) -> None:
        self._blocks.append(self._block.intdigest())
        self._block.reset()
        self._filled = 0

    def commit(self, durable: bool = False) -> None:
        """Give the file its name; `durable` waits for the disk. What a power cut tears is found by its size or hash."""
        if self._filled:
            self._close_block()
        with self._named():
            self.file.flush()
            if durable:
                os.fsync(self.file.fileno())
            self.file.close()
        os.replace(self.partial, self.path)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """The system's own error of a full disk names no file."""
        try:
            yield
        except OSError as error:
            self.partial.unlink(missing_ok=True)
            remedy = "make room or choose another folder, then run the same command again"
            raise OSError(error.errno, f"{error.strerror}, {remedy}", str(self.path)) from error

    @property
    def block_hashes(self) -> np.ndarray:
        return np.array(self._blocks, dtype="<u8")

    @property
    def whole_hash(self) -> str:
        return self._whole.hexdigest()


class TokenWriter:
    """Writes one `.bin/.idx/.xxh3` triple; nothing under its final name before `finish`."""

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.bin = HashedWriter(Path(prefix + ".bin"))
        self._lengths: list[np.ndarray] = []

    def add(self, ids: np.ndarray, lengths: np.ndarray, end_of_document: int | None) -> int:
        """Append documents of `lengths` int64 [n] ids each, `end_of_document` after each that is not empty."""
        if end_of_document is not None:
            ids, lengths = with_ends(ids, lengths, end_of_document, self.dtype)
        self.bin.write(np.ascontiguousarray(ids, dtype=self.dtype))
        self._lengths.append(lengths.astype(np.int32))
        return int(lengths.sum())

    def add_long(self, parts: Iterable[np.ndarray], end_of_document: int | None) -> int:
        """Append one document whose ids come in parts."""
        length = 0
        for ids in parts:
            self.bin.write(ids.astype(self.dtype))
            length += len(ids)
        if end_of_document is not None and length:
            self.bin.write(np.array([end_of_document], dtype=self.dtype))
            length += 1
        self._lengths.append(np.array([length], dtype=np.int32))
        return length

    def finish(self) -> dict[str, Any]:
        """Publish the three files; their counts, sizes and hashes for the manifest."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.zeros(0, np.int32)
        written = lengths[lengths > 0]  # an empty document has no sequence, as in Megatron's own tool
        bounds = np.concatenate([[0], np.cumsum(lengths > 0)])
        return publish(self.prefix, self.bin, self.dtype, written, bounds)


def publish(prefix: str, tokens: HashedWriter, dtype: np.dtype, lengths: np.ndarray, bounds: np.ndarray) -> dict:
    """Write `.idx` and `.xxh3` beside the tokens and rename all three into place, so that they survive a power cut; the
    manifest's entry for them."""
    index = HashedWriter(Path(prefix + ".idx"))
    for part in index_bytes(dtype, lengths, bounds):
        index.write(part)
    tokens.commit(durable=True)
    index.commit(durable=True)
    hashes = HashedWriter(Path(prefix + ".xxh3"))
    hashes.write(tokens.block_hashes.tobytes() + index.block_hashes.tobytes())
    hashes.commit(durable=True)
    sync(Path(prefix).parent)  # the record that names them is written next
    return {
        "name": os.path.basename(prefix),
        "documents": len(bounds) - 1,
        "sequences": len(lengths),
        "tokens": tokens.bytes // np.dtype(dtype).itemsize,
        "dtype": np.dtype(dtype).name,
        "bin_bytes": tokens.bytes,
        "idx_bytes": index.bytes,
        "bin_xxh3": tokens.whole_hash,
        "idx_xxh3": index.whole_hash,
        "blocks_xxh3": hashes.whole_hash,
    }


def with_ends(ids: np.ndarray, lengths: np.ndarray, end: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """Documents of `lengths` int64 [n] uint32 `ids` each -> (the same as `dtype` with `end` after each that is not
    empty, their new lengths)."""
    longer = lengths + (lengths > 0)
    out = np.empty(int(longer.sum()), dtype=dtype)
    module = compiled()
    if module is None:
        is_text = np.ones(len(out), dtype=bool)
        is_text[np.cumsum(longer)[longer > 0] - 1] = False
        out[is_text] = ids
        out[~is_text] = end
    else:
        ids, counts = np.ascontiguousarray(ids, dtype=np.uint32), np.ascontiguousarray(lengths, dtype=np.int64)
        addresses = (ids.ctypes.data, counts.ctypes.data)
        module.narrow_ids(*addresses, len(counts), end, out.ctypes.data, out.dtype.itemsize, 1)
    return out, longer


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """JSON with the xxh3 of its own text as the last key, written aside and renamed; it survives a power cut."""
    text = _seal({key: value for key, value in content.items() if key != "xxh3"})
    partial = Path(f"{path}.{secrets.token_hex(4)}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(path.parent)


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_sealed` wrote. ValueError where a single byte of it has changed."""
    try:
        text = path.read_bytes().decode("utf-8")
        content = json.loads(text)
        whole = isinstance(content, dict) and text == _seal({k: v for k, v in content.items() if k != "xxh3"})
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {remedy}") from None
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(f"{path}: damaged (it no longer has the hash it was written with); {remedy}")
    return content


def _seal(content: dict[str, Any]) -> str:
    body = json.dumps(content, indent=1)
    return json.dumps({**content, "xxh3": xxhash.xxh3_64_hexdigest(body.encode())}, indent=1) + "\n"
