"""Megatron's token files: a `.bin` of raw token ids and an `.idx` that says where each document lies.

In: arrays of token ids. Out: files that mcore's `IndexedDataset` reads and writes byte for byte alike.
Layout of the `.idx`, little-endian throughout (worked example: two documents of 3 and 2 uint16 tokens):

    bytes   content                        example
    9       magic                          b"MMIDIDX\\0\\0"
    8       uint64 version                 1
    1       uint8 dtype code               8 (uint16)
    8       uint64 S, sequences            2
    8       uint64 D, document bounds      3
    4 S     int32 length of each sequence  3, 2
    8 S     int64 byte offset of each      0, 6
    8 D     int64 first sequence of each   0, 1, 2
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from pathlib import Path

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER_BYTES = 34
DTYPE_OF_CODE: dict[int, np.dtype] = {
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
CODE_OF_DTYPE = {dtype: code for code, dtype in DTYPE_OF_CODE.items()}
CHECK_ELEMENTS = 1 << 20  # the .idx is checked in slices of this many sequences, to bound memory


def token_dtype(vocab_size: int) -> np.dtype:
    """uint16 where every id fits in it, else int32: Megatron's two choices."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<i4")


def index_bytes(dtype: np.dtype, lengths: np.ndarray, document_bounds: np.ndarray):
    """The `.idx` of sequences of `lengths` int32 [S], documents bounded by `document_bounds` int64 [D], in pieces."""
    yield MAGIC + struct.pack("<QBQQ", 1, CODE_OF_DTYPE[np.dtype(dtype)], len(lengths), len(document_bounds))
    yield lengths.astype("<i4").tobytes()
    offsets = np.zeros(len(lengths), dtype="<i8")
    np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    offsets *= np.dtype(dtype).itemsize
    yield offsets.tobytes()
    yield document_bounds.astype("<i8").tobytes()


def strip_suffix(prefix: str | os.PathLike) -> str:
    """A prefix may be given as either of its two files."""
    text = os.fspath(prefix)
    return text[:-4] if text.endswith((".bin", ".idx")) else text


class TokenFile:
    """One `.bin/.idx` pair, memory mapped.

    `tokens` is the flat array [T] of ids; sequences and documents index it. Opening checks the header and that the
    sizes of the two files agree; `check_index` reads the whole `.idx`. ValueError names the file and what to do.
    """

    def __init__(self, prefix: str | os.PathLike):
        self.prefix = strip_suffix(prefix)
        self.bin_path, self.idx_path = Path(self.prefix + ".bin"), Path(self.prefix + ".idx")
        for path in (self.bin_path, self.idx_path):
            if not path.is_file():
                raise ValueError(f"{path}: no such file; make it with tools/preprocess_data.py or correct the prefix")
        self._read_header()
        index = np.memmap(self.idx_path, mode="r", dtype=np.uint8)
        self._index = index.data
        position = HEADER_BYTES
        arrays = []
        for dtype, count in (("<i4", self.sequences), ("<i8", self.sequences), ("<i8", self.documents + 1)):
            size = np.dtype(dtype).itemsize * count
            arrays.append(index[position : position + size].view(dtype))
            position += size
        self.lengths, self.offsets, self.document_bounds = arrays
        self._check_size()
        self.token_count = self.bin_path.stat().st_size // self.dtype.itemsize
        self.tokens = (
            np.memmap(self.bin_path, mode="r", dtype=self.dtype) if self.token_count else np.zeros(0, self.dtype)
        )

    def _read_header(self) -> None:
        size = self.idx_path.stat().st_size
        with open(self.idx_path, "rb") as file:
            header = file.read(HEADER_BYTES)
        if len(header) < HEADER_BYTES or header[:9] != MAGIC:
            raise ValueError(f"{self.idx_path}: not a Megatron index (bad or short header); {self._remake()}")
        version, code, self.sequences, bounds = struct.unpack("<QBQQ", header[9:])
        if version != 1 or code not in DTYPE_OF_CODE:
            raise ValueError(
                f"{self.idx_path}: version {version}, dtype code {code}; this reads version 1 and integer tokens; "
                + self._remake()
            )
        self.dtype = DTYPE_OF_CODE[code]
        self.documents = bounds - 1
        needed = HEADER_BYTES + 12 * self.sequences + 8 * bounds
        with_modes = needed + self.sequences  # mcore's multimodal files end with one int8 a sequence
        if bounds < 1 or size not in (needed, with_modes):
            raise ValueError(f"{self.idx_path}: {size} bytes, its header asks for {needed}; {self._remake()}")

    def _check_size(self) -> None:
        found = self.bin_path.stat().st_size
        expected = int(self.offsets[-1]) + int(self.lengths[-1]) * self.dtype.itemsize if self.sequences else 0
        if found != expected:
            raise ValueError(f"{self.bin_path}: {found} bytes, its .idx describes {expected}; {self._remake()}")

    def _remake(self) -> str:
        return f"make {self.prefix}.bin and .idx again with tools/preprocess_data.py, or restore both from a backup"

    def check_index(self) -> None:
        """Read the whole `.idx`: offsets must be the running sum of lengths, documents must tile the sequences."""
        end = 0
        for start in range(0, self.sequences, CHECK_ELEMENTS):
            lengths = self.lengths[start : start + CHECK_ELEMENTS].astype(np.int64) * self.dtype.itemsize
            ends = end + np.cumsum(lengths)
            if lengths.min() < 0 or not np.array_equal(ends - lengths, self.offsets[start : start + CHECK_ELEMENTS]):
                raise ValueError(f"{self.idx_path}: offsets are not the sums of the lengths; {self._remake()}")
            end = int(ends[-1])
        bounds = self.document_bounds
        if bounds[0] != 0 or bounds[-1] != self.sequences or (self.documents and np.diff(bounds).min() < 0):
            raise ValueError(f"{self.idx_path}: documents do not tile the sequences; {self._remake()}")

    def check_index_bytes(self, first: np.ndarray | int, end: np.ndarray | int) -> None:
        """Called with the bytes first..end-1 of the `.idx` that are about to be used; here it has no hashes."""

    def document_start(self, documents: np.ndarray) -> np.ndarray:
        """Index of the first token of each document (int64); document number `documents` itself gives the end."""
        bounds = self._elements(self.document_bounds, HEADER_BYTES + 12 * self.sequences, documents)
        if not self.sequences:
            return np.zeros_like(bounds)
        sequences = np.minimum(bounds, self.sequences - 1)
        starts = self._elements(self.offsets, HEADER_BYTES + 4 * self.sequences, sequences) // self.dtype.itemsize
        return np.where(bounds == self.sequences, self.token_count, starts)

    def _elements(self, array: np.ndarray, position: int, places: np.ndarray) -> np.ndarray:
        """Elements of an int64 array that lies at byte `position` of the `.idx`."""
        self.check_index_bytes(position + 8 * places, position + 8 * places + 8)
        return np.asarray(array)[places]

    def first_token(self, document: int) -> int:
        """`document_start` of one, without numpy's cost."""
        sequence = self._int64_at(HEADER_BYTES + 12 * self.sequences + 8 * document)
        if sequence >= self.sequences:
            return self.token_count
        return self._int64_at(HEADER_BYTES + 4 * self.sequences + 8 * sequence) // self.dtype.itemsize

    def _int64_at(self, position: int) -> int:
        self.check_index_bytes(position, position + 8)
        return struct.unpack_from("<q", self._index, position)[0]

    def document_at(self, token: int) -> int:
        """The document that holds token number `token`. A search that reads some forty numbers: the arrays of an `.idx`
        lie unaligned, and numpy's would copy them whole."""
        return bisect_right(range(self.documents), token, key=self.first_token) - 1
