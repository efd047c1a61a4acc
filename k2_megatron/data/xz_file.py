"""Xz files, forward: every stream to its end, and what follows one is another or padding.

In: streams (the .xz file format, 1.0.4 and later). Out: their content, in bounded parts. Python's own reader takes
whatever follows the first stream and is none for the end of the file: of several streams (pixz, `cat a.xz b.xz`) all
behind a damaged one would be gone without a word.
"""

from __future__ import annotations

import io
import lzma
from typing import IO, Any

COMPRESSED_BYTES = 64 << 10  # that are read at once
CONTENT_BYTES = 256 << 10  # that are decompressed at once
PADDING_UNIT = 4  # zero bytes come in fours


class XzFile(io.RawIOBase):
    """The uncompressed bytes of xz streams. EOFError where the last one is cut short, lzma.LZMAError where one is
    damaged, ValueError where something else follows one."""

    def __init__(self, raw: IO[bytes]):
        self._raw = raw
        self._stream = lzma.LZMADecompressor(lzma.FORMAT_XZ)
        self._ahead = b""  # read, and not yet given to the stream
        self._ended = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ended:
            if self._stream.eof:
                self._next_stream()
                continue
            if self._stream.needs_input and not self._ahead:
                self._ahead = self._raw.read(COMPRESSED_BYTES)
                if not self._ahead:
                    raise EOFError("the file ends inside an xz stream")
            content = self._stream.decompress(self._ahead, min(len(buffer), CONTENT_BYTES))
            self._ahead = b""
            if content:
                buffer[: len(content)] = content
                return len(content)
        return 0

    def _next_stream(self) -> None:
        """Begin the stream that follows the one just ended, if any does."""
        following, padding = self._stream.unused_data or self._raw.read(COMPRESSED_BYTES), 0
        while following and not (begin := following.lstrip(b"\0")):
            padding += len(following)
            following = self._raw.read(COMPRESSED_BYTES)
        if following:
            padding += len(following) - len(begin)
        if padding % PADDING_UNIT:
            raise ValueError(f"{padding} zero bytes follow an xz stream, where padding comes in fours")
        self._ended = not following
        if following:
            self._stream, self._ahead = lzma.LZMADecompressor(lzma.FORMAT_XZ), begin
