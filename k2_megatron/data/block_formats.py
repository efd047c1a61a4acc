"""Snappy's and LZ4's block formats, forward and with bounded memory; parquet's pages are such blocks of any size.

In: a block (raw, without a frame, seekable). Out: its content. Both formats refer back to what came before: LZ4 by
64 KiB at most, and so does Snappy's own encoder; others (klauspost's) may go further back, as the format allows. Such a
block arrow decompresses whole: it is in memory at once then, packed and unpacked, and a large one is refused.
"""

from __future__ import annotations

import io
from typing import IO, Any

import numpy as np

from k2_megatron.data.compiled import compiled

FORMATS = {"SNAPPY": 0, "LZ4": 1}  # as csrc/ops.h counts them
WINDOW_BYTES = 64 << 10
UNPACKED_BYTES = 1 << 20  # at once
READ_BYTES = 256 << 10
LARGEST_GROWTH = 22  # of a Snappy block: 3 bytes of it copy 64 at most
LARGEST_WHOLE_BYTES = 32 << 20  # packed and unpacked together
LENGTH_BYTES = 5  # of the length before a Snappy block, at most


class BlockFile(io.RawIOBase):
    """The content of one block; needs the compiled module. ValueError where it is damaged, EOFError where it is cut."""

    def __init__(self, raw: IO[bytes], name: str):
        self._raw, self._format = raw, FORMATS[name]
        self._length = _length_before(raw) if name == "SNAPPY" else None
        self._packed = b""
        self._buffer = np.empty(WINDOW_BYTES + UNPACKED_BYTES, dtype=np.uint8)
        self._state = np.zeros(7, dtype=np.int64)  # csrc/ops.h: unpack_block
        self._given, self._total = 0, 0  # of the buffer to the caller; of the block so far
        self._whole = False  # whether the buffer is all of the content

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._given == self._state[1] and not self._whole:
            self._unpack()
        count = min(len(buffer), int(self._state[1]) - self._given)
        buffer[:count] = self._buffer[self._given : self._given + count].data
        self._given += count
        return count

    def _unpack(self) -> None:
        """Fill the buffer behind the last 64 KiB, unless the block ends first."""
        module, state = compiled(), self._state
        assert module is not None, "blocks are unpacked by the compiled module; ask compiled() first"
        kept = min(WINDOW_BYTES, self._given)
        self._buffer[:kept] = self._buffer[self._given - kept : self._given]
        state[1] = self._given = kept
        while state[1] < len(self._buffer):
            packed = np.frombuffer(self._packed, dtype=np.uint8)
            addresses = (self._buffer.ctypes.data, len(self._buffer), state.ctypes.data)
            module.unpack_block(self._format, packed.ctypes.data, len(packed), *addresses, 1)
            if state[6]:
                if not 0 < state[4] <= self._total + state[1] - kept:
                    raise ValueError("a copy from before its beginning")
                self._unpack_whole()
                return
            self._packed, state[0] = self._packed[int(state[0]) :], 0
            if state[1] == len(self._buffer):
                break
            more = self._raw.read(READ_BYTES)
            if not more:
                self._check_end(int(state[1]) - kept)
                break
            self._packed += more
        self._total += int(state[1]) - kept

    def _unpack_whole(self) -> None:
        """Let the buffer be the whole content, of which `_total` bytes were given."""
        import pyarrow

        self._raw.seek(0)
        packed = self._raw.read()
        length = _length_before(io.BytesIO(packed))
        if length > LARGEST_GROWTH * len(packed):
            raise ValueError(f"a Snappy block of {len(packed)} bytes that says it becomes {length}")
        if length + len(packed) > LARGEST_WHOLE_BYTES:
            raise ValueError(
                f"a Snappy page of {length >> 20} MiB that refers back beyond 64 KiB: it would be in memory whole; "
                "write the file anew: pyarrow.parquet.write_table(pyarrow.parquet.read_table(FILE), NEW)"
            )
        try:
            content = pyarrow.Codec("snappy").decompress(packed, decompressed_size=length)
        except OSError as error:
            raise ValueError(f"a copy from further back than 64 KiB in a block that arrow refuses: {error}") from error
        self._buffer, self._whole = np.frombuffer(content, dtype=np.uint8), True
        self._given, self._state[1] = self._total, len(self._buffer)

    def _check_end(self, unpacked: int) -> None:
        under_way = self._packed or self._state[2] or (self._format == FORMATS["SNAPPY"] and self._state[3])
        if under_way or (self._length is not None and self._total + unpacked != self._length):
            raise EOFError("the block ends too early")


def _length_before(raw: IO[bytes]) -> int:
    length = 0
    for place in range(LENGTH_BYTES):
        byte = raw.read(1)
        if not byte:
            break
        length |= (byte[0] & 0x7F) << 7 * place
        if byte[0] < 0x80:
            return length
    raise ValueError("no length before a Snappy block")
