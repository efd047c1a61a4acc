"""Zstandard files, forward: bounded memory, and a file cut short is an error.

In: frames (RFC 8878). Out: their content, decompressed block by block, so that no call gives more than one block's
128 KiB: the library's object gives all that its input holds, which of 16 KiB may be half a GiB. The library's own
reader is bounded but takes a frame cut short for whole.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import IO, Any

import zstandard

MAGIC, SKIPPABLE_MAGIC = 0xFD2FB528, 0x184D2A50  # the last four bits of the second are free
ONE_BYTE_REPEATED = 1  # type of a block that holds a single byte, whatever its size
SKIP_BYTES = 1 << 20
LARGEST_WINDOW_BYTES = 128 << 20  # level 22's and --long's; --long=31 asks for 2 GiB


class ZstandardFile(io.RawIOBase):
    """The uncompressed bytes of zstandard frames. EOFError where the last frame is cut short, ValueError where it is
    damaged or none."""

    def __init__(self, raw: IO[bytes]):
        self._raw, self._context = raw, zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW_BYTES)
        self._content = self._blocks()
        self.window_bytes = 0  # of the frame that was read last
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            content = next(self._content, None)
            if content is None:
                return 0
            self._ready = memoryview(content)
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count

    def _blocks(self) -> Iterator[bytes]:
        """The content of each block of each frame."""
        while start := self._raw.read(4):
            magic = int.from_bytes(start, "little")
            if len(start) == 4 and magic & ~0xF == SKIPPABLE_MAGIC:
                left = int.from_bytes(self._exactly(4), "little")
                while left:
                    left -= len(self._exactly(min(left, SKIP_BYTES)))
                continue
            if len(start) == 4 and magic != MAGIC:
                raise ValueError("not a zstandard frame")
            yield from self._blocks_of_frame(start)

    def _blocks_of_frame(self, start: bytes) -> Iterator[bytes]:
        start += self._exactly(5 - len(start))
        descriptor = start[4]
        single_segment, has_checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
        content_size_bytes = (single_segment, 2, 4, 8)[descriptor >> 6]
        dictionary_id_bytes = (0, 1, 2, 4)[descriptor & 3]
        start += self._exactly(1 - single_segment + dictionary_id_bytes + content_size_bytes)
        frame = self._context.decompressobj()
        try:
            window = zstandard.get_frame_parameters(start).window_size
            if window > LARGEST_WINDOW_BYTES:
                raise ValueError(
                    f"zstandard's window is {window >> 20} MiB here, all of which would be held in memory; compress it "
                    f"with {LARGEST_WINDOW_BYTES >> 20} or less: zstd -d --long=31 -c FILE | zstd -19 -o NEW"
                )
            self.window_bytes = window
            frame.decompress(start)
            last = False
            while not last:
                header = self._exactly(3)
                fields = int.from_bytes(header, "little")
                last, kind, size = bool(fields & 1), fields >> 1 & 3, fields >> 3
                yield frame.decompress(header + self._exactly(1 if kind == ONE_BYTE_REPEATED else size))
            if has_checksum:
                yield frame.decompress(self._exactly(4))
        except zstandard.ZstdError as error:
            raise ValueError(error) from None
        if not frame.eof:
            raise ValueError("a zstandard frame that does not end with its last block")

    def _exactly(self, count: int) -> bytes:
        content = self._raw.read(count)
        if len(content) < count:
            raise EOFError("the file ends inside a zstandard frame")
        return content
